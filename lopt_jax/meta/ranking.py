"""Sets of weights of a campaign in order: how much lower their trainings end than others."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lopt_jax.meta.campaign import Kept
from lopt_jax.weights import Weights

REFERENCE = "lopt"  # the label of the weights that ship, trained beside those of the campaign


class Row(NamedTuple):
    """One set of weights in the ranking.

    Fields:
      label: the outer step as text, or `REFERENCE`.
      losses: mean final validation loss by task; a task that has none is missing.
      score: mean over tasks of the log of the loss over that of the base, of the seeds that both
        have; nan where a task has none.
    """

    label: str
    losses: dict[str, float]
    score: float


def rank(records: Sequence[Mapping[str, Any]]) -> tuple[list[Row], str]:
    """Ranks sets of weights by their trainings.

    Args:
      records: of `select`.

    Returns:
      Rows by outer step, the reference first; and the base: the first row whose losses on all tasks
      are finite and above zero, else the first of all.

    Raises:
      ValueError: for no records.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    labels = sorted({r["weights"] for r in records}, key=_order)
    if not labels:
        raise ValueError("records: expected trainings to rank, found none; give it more --seconds")
    ends = {label: _final_losses(records, label) for label in labels}

    def is_base(label: str) -> bool:
        found = ends[label]
        return len(found) == len(tasks) and all(
            0 < _mean(x.values()) < math.inf for x in found.values()
        )

    base = next(filter(is_base, labels), labels[0])

    def score(label: str) -> float:
        logs = [_log_ratio(ends[label].get(t, {}), ends[base].get(t, {})) for t in tasks]
        return sum(logs) / len(logs)

    losses = {
        label: {task: _mean(found.values()) for task, found in by_task.items()}
        for label, by_task in ends.items()
    }
    return [Row(label, losses[label], score(label)) for label in labels], base


def _final_losses(records: Sequence[Mapping[str, Any]], label: str) -> dict[str, dict[int, float]]:
    """Final validation losses of one set of weights, by task and seed; inf for what is none."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["weights"] == label:
            end = record["validation"][-1]
            found.setdefault(record["task"], {})[record["seed"]] = math.inf if end is None else end
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _log_ratio(losses: Mapping[int, float], base: Mapping[int, float]) -> float:
    """The log of the mean loss over that of the base, of the seeds that both have; nan: of none."""
    shared = losses.keys() & base.keys()
    if not shared:
        return math.nan
    own, other = (_mean(x[seed] for seed in sorted(shared)) for x in (losses, base))
    if not 0 < other < math.inf:
        return math.nan
    return math.log(own / other) if own > 0 else -math.inf


def _order(label: str) -> int:
    return -1 if label == REFERENCE else int(label)


def best_of(rows: Sequence[Row]) -> Row | None:
    """The best of the campaign's own sets; None where none has been trained on every task."""
    own = [row for row in rows if row.label != REFERENCE and row.score < math.inf]
    return min(own, key=lambda row: row.score, default=None)


def mean_loss(kept: Kept, step: int) -> float | None:
    """The mean meta-loss of the steps before one, back to the kept one before; None at the first.

    One report is noisy: trainings of other ages have other losses.
    """
    before = max((s for s in kept.steps if s < step), default=step)
    losses = [r["loss"] for r in kept.history if before < r["step"] <= step]
    finite = [loss for loss in losses if loss is not None]
    return sum(finite) / len(finite) if finite else None


def with_evidence(weights: Weights, records: Sequence[Mapping[str, Any]], best: Row) -> Weights:
    """The weights, whose metadata say what they were chosen by.

    Args:
      weights: of the best set.
      records: of `select`.
      best: its row.
    """
    tasks = {r["task"]: r["steps"] for r in records}
    chosen = {
        "tasks": {task: f"{steps} steps" for task, steps in tasks.items()},
        "losses": best.losses,
        "among": sorted({r["weights"] for r in records}, key=_order),
    }
    return dataclasses.replace(weights, metadata={**weights.metadata, "selection": chosen})


def table(kept: Kept, rows: Sequence[Row], base: str) -> str:
    """The ranking as a Markdown table, with the meta-loss up to each step."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.losses))
    best = best_of(rows)
    lines = [
        "| weights | meta-loss | " + " | ".join(tasks) + f" | against {base} |",
        "| --- | ---: |" + " ---: |" * (len(tasks) + 1),
    ]
    for row in rows:
        meta = mean_loss(kept, int(row.label)) if row.label != REFERENCE else None
        cells = [f"{row.losses[task]:.4f}" if task in row.losses else "" for task in tasks]
        score = f"{100 * math.expm1(row.score):+.2f}%" if math.isfinite(row.score) else ""
        name = f"**{row.label}**" if best is not None and row.label == best.label else row.label
        text = "" if meta is None else f"{meta:.4f}"
        lines.append("| " + " | ".join([name, text, *cells, score]) + " |")
    return "\n".join(lines)


def plot(kept: Kept, rows: Sequence[Row], base: str, path: Path) -> None:
    """The meta-loss by outer step, and each task's loss against the base's.

    Raises:
      ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    reports = [(r["step"], r["loss"]) for r in kept.history if r["loss"] is not None]
    axes[0].plot(*zip(*reports, strict=True) if reports else ([], []), alpha=0.3)
    means = [(step, mean_loss(kept, step)) for step in kept.steps]
    smooth = [(step, loss) for step, loss in means if loss is not None]
    axes[0].plot(*zip(*smooth, strict=True) if smooth else ([], []))
    axes[0].set_ylabel("meta-loss")
    own = [row for row in rows if row.label != REFERENCE]
    bases = next(row for row in rows if row.label == base).losses
    drawn = [task for task, loss in bases.items() if 0 < loss < math.inf]
    for task in drawn:
        points = [(int(r.label), r.losses[task]) for r in own if task in r.losses]
        change = [100 * (loss / bases[task] - 1) for _, loss in points]
        axes[1].plot([step for step, _ in points], change, "o-", label=task)
    axes[1].axhline(0.0, color="black", linewidth=0.8)
    axes[1].set_ylabel(f"final loss against {base}, %")
    if drawn:
        axes[1].legend(fontsize="small")
    for axis in axes:
        axis.set_xlabel("outer step")
        axis.grid(alpha=0.3)
    figure.suptitle(kept.config.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)
