"""Draws diagnostics over a run; needs matplotlib (`pip install "lopt_jax[plot]"`)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lopt_jax.diagnostics import Diagnostics

_LEGEND_ENTRIES = 12  # more leaves than that are drawn without a legend

# One colour for an optimizer in every picture of the documentation, as matplotlib names them.
COLOURS: Mapping[str, str] = {
    "lopt": "black",
    "adamw": "C0",
    "muon": "C1",
    "celo2_small": "C2",
    "velo_small": "C3",
    "celo_small": "C4",
    "small_fc_lopt": "C5",
    "small_fc_lopt_h4": "C6",
}


def plot_run(
    history: Sequence[Diagnostics],
    losses: Sequence[Any] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """Draws the measures of a run, a line a tensor.

    Args:
      history: the diagnostics of each step that was logged, in order.
      losses: the loss at each of them, if it should be drawn.
      path: a file to write (its ending says the format), or None.

    Returns:
      The `matplotlib.figure.Figure`.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: history is empty, or not as long as losses.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'lopt_jax.plot needs matplotlib: pip install "lopt_jax[plot]".'
        ) from error
    if not history:
        raise ValueError("history: expected the diagnostics of at least one step, found none.")
    if losses is not None and len(losses) != len(history):
        raise ValueError(
            f"losses: expected one a step of history, {len(history)}; found {len(losses)}."
        )
    panels: list[tuple[str, dict[str, np.ndarray], bool]] = []
    if losses is not None:
        panels.append(("loss", {"": np.asarray(losses, np.float64)}, True))
    total = np.asarray([d.total_step_norm for d in history])
    panels.append(("norm of the step", {**_series(history, "step_norm"), "all": total}, True))
    panels.append(("update to parameter", _series(history, "update_to_parameter"), True))
    if history[0].multiplier is not None:
        scheduler = {"scheduler": np.asarray([d.scheduler for d in history])}
        panels.append(("learned multiplier", _series(history, "multiplier") | scheduler, False))

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines, logarithmic) in zip(axes, panels, strict=True):
        for name, values in lines.items():
            axis.plot(values, label=name, linewidth=1)
        if logarithmic and any((values > 0).any() for values in lines.values()):
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("step")
        if 1 < len(lines) <= _LEGEND_ENTRIES:
            axis.legend(fontsize="small")
    if path is not None:
        figure.savefig(path)
    return figure


def _series(history: Sequence[Diagnostics], field: str) -> dict[str, np.ndarray]:
    """Name of a tensor to its values over the run."""
    lines: dict[str, list] = {}
    for diagnostics in history:
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(diagnostics, field)):
            name = jax.tree_util.keystr(path)
            values = np.asarray(leaf)
            for index in np.ndindex(values.shape):
                key = f"{name}{list(index)}" if index else name
                lines.setdefault(key, []).append(float(values[index]))
    return {name: np.asarray(values) for name, values in lines.items()}
