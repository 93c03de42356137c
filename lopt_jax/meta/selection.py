"""Which weights of a campaign are best: every kept set trains the same models as users would.

The meta-loss falls on networks of some thousand parameters, and what is best there need not be best
on models that people train. So the kept sets are ranked by trainings of a language model and of a
vision model: of the tuning tasks, never of those that are reported as evidence.
"""

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.meta.campaign import Kept
from lopt_jax.meta.rules import LOPT_TAKES, make_rule, make_schedule
from lopt_jax.meta.scale import run
from lopt_jax.meta.scale.tasks import TUNING, Split, Task, stacked_axes
from lopt_jax.meta.tasks import data_hashes, training_tasks
from lopt_jax.optimizers.lopt import lopt
from lopt_jax.weights import Weights

DEFAULT_TASKS = ("tuning_gpt5m", "tuning_vit_clipart")
REFERENCE = "lopt"  # the weights that ship, trained beside the kept ones
_SMALL_LANES = 4
_RECORDS = "selection.json"


class Candidate(NamedTuple):
    """One set of weights in one training.

    Fields:
      label: the outer step as text, or `REFERENCE`.
      digest: of the weights.
      seed: of the training.
    """

    label: str
    digest: str
    seed: int


@dataclasses.dataclass(frozen=True)
class _SmallModel:
    """A meta-training task in the place of a Flax module: its "output" is the loss."""

    task: Any

    def init(self, key: jax.Array, batch: Any) -> Any:
        return {"params": self.task.init(key, batch[0])}

    def apply(self, variables: Any, batch: Any) -> jax.Array:
        content, examples = batch
        return self.task.loss(variables["params"], content, examples)


def small_task(name: str) -> Task:
    """A task of meta-training as one of the scale suite: always the same problem.

    Args:
      name: of `tasks.training_tasks`.

    Returns:
      The task; its batches are of the size that it has itself.
    """
    task = training_tasks()[name]

    def load(folder: Path, cache: Path) -> Split:
        del folder, cache
        content = task.sample(jax.random.key(0))
        text = json.dumps(data_hashes([task]), sort_keys=True)
        return Split(content, content, hashlib.sha256(text.encode()).hexdigest())

    def sample(key: jax.Array, content: Any, size: int, augment: bool) -> Any:
        del size
        return content, task.batch(key, content, "train" if augment else "valid")

    return Task(
        name=name,
        model=_SmallModel(task),
        example=lambda batch: (batch,),
        loss=lambda loss, batch: loss,
        load=load,
        sample=sample,
        batch=1,
        items=1,
        horizons=(),
        lanes=_SMALL_LANES,
    )


def selection_task(name: str) -> Task:
    """The task of a name.

    Raises:
      ValueError: for another one than those that constants may be chosen on, which it lists.
    """
    tuning = {task.name: task for task in TUNING}
    if name in tuning:
        return tuning[name]
    small = training_tasks()
    if name in small:
        return small_task(name)
    raise ValueError(
        f"--tasks: expected names of {', '.join(tuning)} or of tasks of meta-training, "
        f"{', '.join(small)}; found {name!r}"
    )


def spread(items: Sequence[int], count: int | None = None) -> list[int]:
    """Items in an order in which the first few always are spread over all.

    Args:
      items: in their order.
      count: at most so many; None: all.

    Returns:
      The last, the first, the one between, and so on by halves.
    """
    order: list[int] = []
    if items:
        order += dict.fromkeys((items[-1], items[0]))
    gaps = [(0, len(items) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low < 2:
            continue
        middle = (low + high) // 2
        order.append(items[middle])
        gaps += [(low, middle), (middle, high)]
    return order if count is None else order[:count]


def build_of(kept: Kept, weights: Sequence[Weights]) -> run.Build:
    """What trains with one of several sets of weights: the number "place" says with which.

    Directions that `lopt` takes are trained by `lopt`, as users would. Other rules have the
    arguments of their meta-training, under a warm-up and half a cosine.

    Args:
      kept: the campaign.
      weights: of one architecture and one config.
    """
    config = kept.config
    first = weights[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(w.params for w in weights))
    options = {**dict(config.rule_options), "stacked_axes": stacked_axes}
    is_test = first.architecture.startswith("learned_")  # it has no arguments

    def build(settings: Mapping[str, jax.Array], horizon: jax.Array) -> Any:
        place = settings["place"].astype(jnp.int32)
        theta = jax.tree.map(lambda x: x[place], stacked)
        if first.architecture in LOPT_TAKES:
            chosen = Weights(first.architecture, first.config, theta, {})
            return lopt(horizon, chosen, stacked_axes=stacked_axes, backend="xla")
        rule = make_rule(
            first.architecture,
            first.config,
            config.learning_rate_peak,
            config.weight_decay,
            options={} if is_test else options,
        )
        return rule(theta, horizon, make_schedule("warmup_cosine", horizon))

    return build


def _build_reference(settings: Mapping[str, jax.Array], horizon: jax.Array) -> Any:
    del settings
    return lopt(horizon, stacked_axes=stacked_axes, backend="xla")


def digest_of(weights: Weights) -> str:
    """A short text that says which weights they are."""
    content = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights.params)]
    content.append(repr((weights.architecture, dict(weights.config))).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()[:12]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of earlier selections in a campaign's folder.

    Raises:
      ValueError: for a damaged file.
    """
    path = folder / _RECORDS
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected records of a selection ({error})") from error


def write_records(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records, a line each."""
    lines = [json.dumps(record, separators=(",", ":")) for record in records]
    temporary = folder / f".{_RECORDS}.{os.getpid()}"
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    os.replace(temporary, folder / _RECORDS)


def _key(task: str, steps: int, candidate: Candidate, data: str) -> tuple[Any, ...]:
    return task, steps, *candidate, data[:16]


def _key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("task", "steps", "weights", "digest", "seed", "data")
    return tuple(record[name] for name in names)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Trainings side by side: candidates of one program."""

    task: str
    program: tuple[str, str]  # task, and "kept" or `REFERENCE`
    candidates: tuple[Candidate, ...]


def _groups(
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    reference: Sequence[Candidate],
    is_missing: Callable[[Task, Candidate], bool],
) -> list[_Group]:
    """What is to be run: of every task the reference, then the first candidates, and so on."""
    by_task: list[list[_Group]] = []
    for task in tasks:
        rows = []
        for kind, lanes, some in (
            (REFERENCE, _lanes(task, len(reference)), reference),
            ("kept", _lanes(task, len(candidates)), candidates),
        ):
            left = [c for c in some if is_missing(task, c)]
            parts = [left[i : i + lanes] for i in range(0, len(left), lanes)]
            rows += [_Group(task.name, (task.name, kind), tuple(part)) for part in parts]
        by_task.append(rows)
    longest = max(map(len, by_task), default=0)
    return [rows[i] for i in range(longest) for rows in by_task if i < len(rows)]


def _lanes(task: Task, candidates: int) -> int:
    return max(1, min(task.lanes, candidates))


def select(
    kept: Kept,
    tasks: Sequence[Task],
    steps: int,
    *,
    seeds: int = 1,
    checkpoints: int | None = None,
    with_reference: bool = True,
    seconds: float = math.inf,
    data_folder: Path,
    cache: Path,
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], bool, bool]:
    """Makes the trainings that are missing, until the time is over; writes each as a record.

    Args:
      kept: the campaign.
      tasks: of `selection_task`.
      steps: of every training, a multiple of `run.CHUNK`.
      seeds: trainings of each set of weights.
      checkpoints: at most so many sets, spread over the campaign; None: all.
      with_reference: whether the weights that ship are trained, too.
      seconds: of wall-clock time, compilation included.
      data_folder: of prepared data.
      cache: for tokens.
      say: prints a line.

    Returns:
      The records of these weights, whether all are there, and whether programs still compile in
      the background.

    Raises:
      ValueError: for a number of steps that is no such multiple.
    """
    began = time.monotonic()
    clock = lambda: time.monotonic() - began  # noqa: E731
    if steps <= 0 or steps % run.CHUNK:
        raise ValueError(f"--steps: expected a multiple of {run.CHUNK}, found {steps}")
    chosen = spread(kept.steps, checkpoints)
    weights = {str(step): kept.weights(step) for step in chosen}
    digests = {label: digest_of(found) for label, found in weights.items()}
    every = range(seeds)
    candidates = [Candidate(label, digests[label], seed) for label in weights for seed in every]
    reference = [Candidate(REFERENCE, _reference_digest(), seed) for seed in every]
    reference = reference if with_reference else []
    data = {}
    for task in tasks:
        data[task.name] = task.load(data_folder, cache)
        say(f"{clock():5.0f} s  data of {task.name}")
    records = {_key_of(record): record for record in read_records(kept.folder)}

    def key(task: Task, candidate: Candidate) -> tuple[Any, ...]:
        return _key(task.name, steps, candidate, data[task.name].digest)

    def is_missing(task: Task, candidate: Candidate) -> bool:
        return key(task, candidate) not in records

    groups = _groups(tasks, candidates, reference, is_missing)
    by_name = {task.name: task for task in tasks}
    place = {label: float(i) for i, label in enumerate(weights)}

    def compile_one(name: str, kind: str) -> run.Program:
        task = by_name[name]
        lanes = _lanes(task, len(reference if kind == REFERENCE else candidates))
        build = _build_reference if kind == REFERENCE else build_of(kept, list(weights.values()))
        return run.program(task, build, data[name], ("place",), lanes)

    wanted = dict.fromkeys(group.program for group in groups)
    jobs = {item: (lambda item=item: compile_one(*item)) for item in wanted}
    futures = run.compile_all(jobs, max((os.cpu_count() or 2) - 2, 2)) if jobs else {}
    say(f"{clock():5.0f} s  {len(groups)} groups of trainings of {steps:,} steps to run; compiling")
    left, took = list(groups), dict[tuple[str, str], float]()
    while left:
        left = [g for g in left if clock() + took.get(g.program, 0.0) < seconds]
        ready = next((g for g in left if futures[g.program].done()), None)
        if ready is None:
            waited = {futures[g.program] for g in left}
            rest = None if seconds == math.inf else max(seconds - clock(), 0.0)
            if not waited or not _any_done(waited, rest):
                break
            continue
        left.remove(ready)
        start = clock()
        task = by_name[ready.task]
        settings = [{"place": place.get(c.label, 0.0)} for c in ready.candidates]
        curves = run.train(
            futures[ready.program].result(), task, data[task.name], settings,
            [c.seed for c in ready.candidates], steps,
        )  # fmt: skip
        took[ready.program] = clock() - start
        for candidate, curve in zip(ready.candidates, curves, strict=True):
            record = _record(task, steps, candidate, curve, data[task.name])
            records[key(task, candidate)] = record
            say(f"{clock():5.0f} s  {task.name} {candidate.label}: {curve.validation[-1]:.4f}")
        write_records(kept.folder, list(records.values()))
    found = [
        records[key(task, c)]
        for task in tasks
        for c in (*reference, *candidates)
        if not is_missing(task, c)
    ]
    complete = len(found) == len(tasks) * len([*reference, *candidates])
    return found, complete, any(not future.done() for future in futures.values())


def _any_done(futures: Iterable[Any], seconds: float | None) -> bool:
    first = concurrent.futures.FIRST_COMPLETED
    return bool(concurrent.futures.wait(set(futures), seconds, first).done)


def _reference_digest() -> str:
    from lopt_jax.meta.scale.contenders import LOPT

    return LOPT.version()


def _record(
    task: Task, steps: int, candidate: Candidate, curve: run.Curve, data: Split
) -> dict[str, Any]:
    """What is kept of a training: JSON values alone."""

    def rounded(values: Sequence[float]) -> list[float | None]:
        return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values]

    return {
        "task": task.name,
        "steps": steps,
        "weights": candidate.label,
        "digest": candidate.digest,
        "seed": candidate.seed,
        "validation": rounded(curve.validation),
        "training": rounded(curve.training[-1:])[0],
        "milliseconds": float(f"{curve.milliseconds:.4g}"),
        "data": data.digest[:16],
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "hardware": f"1 {jax.devices()[0].device_kind}",
    }


class Row(NamedTuple):
    """One set of weights in the ranking.

    Fields:
      label: the outer step as text, or `REFERENCE`.
      losses: mean final validation loss by task; a task that has none is missing.
      score: mean over tasks of the log of the loss over that of the base; nan where one is missing.
    """

    label: str
    losses: dict[str, float]
    score: float


def rank(records: Sequence[Mapping[str, Any]]) -> tuple[list[Row], str]:
    """Ranks sets of weights by their trainings.

    Args:
      records: of `select`.

    Returns:
      Rows by outer step, the reference first; and the base: the reference where it has all tasks,
      else the first step that has.

    Raises:
      ValueError: for no records.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    labels = sorted({r["weights"] for r in records}, key=_order)
    if not labels:
        raise ValueError("records: expected trainings to rank, found none; give it more --seconds")

    def losses_of(label: str) -> dict[str, float]:
        found = {}
        for task in tasks:
            rows = [r for r in records if (r["task"], r["weights"]) == (task, label)]
            ends = [r["validation"][-1] for r in rows]
            if ends:
                finite = [math.inf if end is None else end for end in ends]
                found[task] = sum(finite) / len(finite)
        return found

    losses = {label: losses_of(label) for label in labels}
    base = next((label for label in labels if len(losses[label]) == len(tasks)), labels[0])

    def score(label: str) -> float:
        if len(losses[label]) < len(tasks) or len(losses[base]) < len(tasks):
            return math.nan
        logs = [math.log(losses[label][task] / losses[base][task]) for task in tasks]
        return sum(logs) / len(logs)

    return [Row(label, losses[label], score(label)) for label in labels], base


def _order(label: str) -> int:
    return -1 if label == REFERENCE else int(label)


def best_of(rows: Sequence[Row]) -> Row | None:
    """The best of the campaign's own sets; None where none has been trained on every task."""
    own = [row for row in rows if row.label != REFERENCE and math.isfinite(row.score)]
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
    for task in bases:
        points = [(int(r.label), r.losses[task]) for r in own if task in r.losses]
        change = [100 * (loss / bases[task] - 1) for _, loss in points]
        axes[1].plot([step for step, _ in points], change, "o-", label=task)
    axes[1].axhline(0.0, color="black", linewidth=0.8)
    axes[1].set_ylabel(f"final loss against {base}, %")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.set_xlabel("outer step")
        axis.grid(alpha=0.3)
    figure.suptitle(kept.config.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)
