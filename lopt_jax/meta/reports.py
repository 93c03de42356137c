"""What a meta-training says of itself every so many outer steps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lopt_jax.meta.estimators import Estimate


class Report(NamedTuple):
    """Averages over the outer steps since the last report."""

    step: int
    seconds: float  # training time, without compilation
    loss: float  # mean over tasks of the meta-loss
    final_score: float  # mean over tasks of the score near the horizon; nan if none was near
    diverged: float  # fraction of particles above their initial loss
    rejected: float  # fraction of pairs with a loss that is not finite
    gradient_norm: float
    task_scores: tuple[float, ...]  # final_score of each task, or of those that are joined


def report_of(
    step: int,
    seconds: float,
    pending: list[tuple[list[Estimate], jax.Array]],
    counts: Sequence[int],
) -> Report:
    """The report of the steps since the last one.

    Args:
      step: outer steps done.
      seconds: of training so far.
      pending: of each step the programs' estimates and the norm of the meta-gradient.
      counts: how many tasks each program stands for.

    Returns:
      Means over steps and tasks. It waits for the device.
    """
    values = jax.device_get(pending)
    scores = np.array([[e.final_score for e in estimates] for estimates, _ in values])

    def mean(name: str) -> float:
        found = np.array([[getattr(e, name) for e in row] for row, _ in values])
        return float(np.mean(np.average(found, 1, counts)))

    known = np.isfinite(scores)
    totals = np.where(known, scores, 0.0).sum(0)
    times = known.sum(0)
    tasks = np.where(times > 0, totals / np.maximum(times, 1), np.nan)
    final = math.nan
    if times.any():
        final = float(np.average(tasks[times > 0], weights=np.asarray(counts)[times > 0]))
    norm = float(np.mean([norm for _, norm in values]))
    return Report(
        step, seconds, mean("loss"), final, mean("diverged"), mean("rejected"), norm,
        tuple(float(x) for x in tasks),
    )  # fmt: skip
