"""The table and the plot of the scale suite, from its records alone."""

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lopt_jax.meta.scale.suite import final_loss
from lopt_jax.plot import COLOURS

_USUAL = ("muon", "adamw")


class Cell(NamedTuple):
    """One optimizer on one task for one number of steps.

    Fields:
      task: name of the task.
      steps: number of steps.
      optimizer: name of the optimizer.
      settings: the setting that was best, by the first seed.
      losses: final validation losses of that setting, a seed each.
      tried: settings that were tried.
      milliseconds: of a step of one run.
      record: of the first seed.
    """

    task: str
    steps: int
    optimizer: str
    settings: Mapping[str, float]
    losses: tuple[float, ...]
    tried: int
    milliseconds: float
    record: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """The mean final validation loss over seeds."""
        return float(np.mean(self.losses))


def cells(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells of records, in the order in which they come first.

    An optimizer that is tuned has the best of its settings; one that is not has the one that users
    get, whatever others were tried for the record.
    """
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["task"], record["steps"], record["optimizer"])
        groups.setdefault(key, []).append(record)
    out = []
    for (task, steps, optimizer), group in groups.items():
        first = [r for r in group if r["seed"] == 0]
        chosen = [r for r in first if optimizer in _USUAL or r["settings"].get("rate", 1.0) == 1.0]
        if not chosen:
            continue
        best = min(chosen, key=final_loss)
        same = sorted(
            (r for r in group if r["settings"] == best["settings"]), key=lambda r: r["seed"]
        )
        losses = tuple(final_loss(r) for r in same)
        out.append(
            Cell(
                task, steps, optimizer, best["settings"], losses, len(first),
                best["milliseconds"], best,
            )
        )  # fmt: skip
    return out


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: a row a task and horizon, a column an optimizer.

    Args:
      records: of the suite.

    Returns:
      The text. A loss is the mean over seeds, with their deviation; in brackets the best rate of as
      many as were tried. The last columns say how far learned optimizers are from the usual ones.
    """
    by_cell = {(c.task, c.steps, c.optimizer): c for c in cells(records)}
    rows = list(dict.fromkeys((task, steps) for task, steps, _ in by_cell))
    optimizers = list(dict.fromkeys(optimizer for _, _, optimizer in by_cell))
    optimizers.sort(key=lambda name: (name in _USUAL, name))
    learned = [name for name in optimizers if name not in _USUAL]
    versus = [(name, usual) for name in learned for usual in _USUAL if usual in optimizers]
    titles = ["task", "parameters", "steps", *optimizers, *(f"{a} / {b}" for a, b in versus)]
    lines = [
        "| " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * (len(titles) - 1),
    ]
    for task, steps in sorted(rows, key=lambda row: _order(row, by_cell)):
        here = {name: by_cell.get((task, steps, name)) for name in optimizers}
        size = next(c.record["parameters"] for c in here.values() if c)
        texts = [task, f"{size / 1e6:.1f}M", f"{steps:,}", *map(_loss, here.values())]
        for a, b in versus:
            one, other = here[a], here[b]
            texts.append(f"{100 * (one.mean / other.mean - 1):+.1f}%" if one and other else "")
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def multiples(records: Sequence[Mapping[str, Any]], optimizer: str = "lopt") -> str:
    """A Markdown table: what multiples of an untuned optimizer's rate give, a row a cell.

    Args:
      records: of the suite.
      optimizer: the untuned one.

    Returns:
      The text: final validation losses of the first seed, the best one in bold, and how far the
      rate that users get is from it.
    """
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for record in records:
        if record["optimizer"] == optimizer and record["seed"] == 0:
            here = losses.setdefault((record["task"], record["steps"]), {})
            here[record["settings"]["rate"]] = final_loss(record)
    tried = {cell: here for cell, here in losses.items() if len(here) > 1}
    rates = sorted({rate for here in tried.values() for rate in here})
    titles = ["task", "steps", *(f"{rate:g}" for rate in rates), "1 / best"]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for (task, steps), here in tried.items():
        best = min(here.values())
        texts = [f"{here[r]:.4g}" if r in here else "" for r in rates]
        texts = [
            f"**{t}**" if here.get(r) == best else t for r, t in zip(rates, texts, strict=True)
        ]
        over = f"{100 * (here[1.0] / best - 1):+.1f}%" if 1.0 in here else ""
        lines.append("| " + " | ".join([task, f"{steps:,}", *texts, over]) + " |")
    return "\n".join(lines)


def _order(row: tuple[str, int], by_cell: Mapping[Any, Cell]) -> tuple[bool, int, str, int]:
    size = next(c.record["parameters"] for k, c in by_cell.items() if k[:2] == row)
    return (not row[0].startswith("gpt"), size, *row)


def _loss(cell: Cell | None) -> str:
    if cell is None:
        return ""
    seeds = f" ±{np.std(cell.losses):.3f}" if len(cell.losses) > 1 else ""
    rate = f" ({cell.settings['rate']:.2g} of {cell.tried})" if cell.optimizer in _USUAL else ""
    return f"{cell.mean:.4g}{seeds}{rate}"


def digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Of records: a picture has it, so that pictures of other records are found."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Validation losses by step, a panel a task and horizon, the best setting of each optimizer.

    An optimizer has one colour in all panels. Cells with nothing to compare are left out.

    Args:
      records: of the suite.
      path: of the picture to write.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = cells(records)
    counts = collections.Counter((c.task, c.steps) for c in chosen)
    panels = [panel for panel, count in counts.items() if count > 1]
    columns = max(min(2, len(panels)), 1)
    rows = max(-(-len(panels) // columns), 1)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (task, steps) in zip(axes.flat, panels, strict=False):
        for cell in chosen:
            if (cell.task, cell.steps) == (task, steps):
                name, record = cell.optimizer, cell.record
                colour = COLOURS.get(name, "gray")
                axis.plot(record["at"], record["validation"], label=name, color=colour)
        axis.set(title=f"{task}, {steps:,} steps", xlabel="step", ylabel="validation loss (nats)")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Comment": digest(records)})
    pyplot.close(figure)
