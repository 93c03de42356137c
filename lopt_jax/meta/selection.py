"""Which weights of a campaign are best: every kept set trains the same models as users would.

The meta-loss falls on networks of some thousand parameters, and what is best there need not be best
on models that people train. So the kept sets are ranked by trainings of a language model and of a
vision model: of the tuning tasks, never of those that are reported as evidence.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.meta.campaign import Kept
from lopt_jax.meta.files import read_rows, write_rows
from lopt_jax.meta.locks import lock
from lopt_jax.meta.ranking import REFERENCE
from lopt_jax.meta.rules import LOPT_TAKES, make_rule, make_schedule
from lopt_jax.meta.scale import run
from lopt_jax.meta.scale.contenders import LOPT
from lopt_jax.meta.scale.tasks import TUNING, Split, Task, stacked_axes
from lopt_jax.meta.tasks import data_hashes, training_tasks
from lopt_jax.optimizers.lopt import Recipe, lopt
from lopt_jax.weights import Weights

DEFAULT_TASKS = ("tuning_gpt5m", "tuning_vit_clipart")
_SMALL_LANES = 4
_RECORDS = "selection.json"
_KEY = ("task", "steps", "weights", "digest", "seed", "data")  # of a record: what says which it is
_DIGITS = 16  # of the digest of data


class Candidate(NamedTuple):
    """One set of weights in one training.

    Fields:
      label: the outer step as text, or `REFERENCE`.
      digest: of `digest_of`; of the reference, the version of `lopt`.
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
    """A short text that says what is trained with weights: them, and the recipe around them."""
    content = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights.params)]
    content.append(repr((weights.architecture, dict(weights.config))).encode())
    if weights.architecture in LOPT_TAKES:
        content.append(repr(Recipe()).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()[:12]


# -- records --------------------------------------------------------------------------------------


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of earlier selections in a campaign's folder.

    Raises:
      ValueError: for a damaged file.
    """
    return read_rows(folder / _RECORDS, (*_KEY, "validation"))


def current_records(kept: Kept, steps: int) -> list[dict[str, Any]]:
    """The records of trainings of so many steps with what the weights and the recipe are now."""
    digests = {str(step): digest_of(kept.weights(step)) for step in kept.steps}
    digests[REFERENCE] = LOPT.version()
    records = [r for r in read_records(kept.folder) if r["steps"] == steps]
    return [r for r in records if digests.get(r["weights"]) == r["digest"]]


def _key(task: str, steps: int, candidate: Candidate, data: Split) -> tuple[Any, ...]:
    return task, steps, *candidate, data.digest[:_DIGITS]


def _key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in _KEY)


def _record(
    task: str, steps: int, candidate: Candidate, curve: run.Curve, data: Split
) -> dict[str, Any]:
    """What is kept of a training: JSON values alone."""

    def rounded(values: Sequence[float]) -> list[float | None]:
        return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values]

    return {
        **dict(zip(_KEY, _key(task, steps, candidate, data), strict=True)),
        "validation": rounded(curve.validation),
        "training": rounded(curve.training[-1:])[0],
        "milliseconds": float(f"{curve.milliseconds:.4g}"),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "hardware": f"1 {jax.devices()[0].device_kind}",
    }


# -- what is to be trained ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Group:
    """Trainings side by side: candidates of one program."""

    task: str
    program: tuple[str, str]  # task, and "kept" or `REFERENCE`
    candidates: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All trainings of a selection.

    Attributes:
      kept: the campaign.
      weights: its chosen sets by label.
      candidates: those sets with every seed.
      reference: the weights that ship with every seed; or none.
      tasks: by name.
      data: of every task.
      steps: of every training.
    """

    kept: Kept
    weights: Mapping[str, Weights]
    candidates: tuple[Candidate, ...]
    reference: tuple[Candidate, ...]
    tasks: Mapping[str, Task]
    data: Mapping[str, Split]
    steps: int

    def key(self, task: str, candidate: Candidate) -> tuple[Any, ...]:
        """Of a training's record."""
        return _key(task, self.steps, candidate, self.data[task])

    def keys(self) -> list[tuple[Any, ...]]:
        """Of all records."""
        every = (*self.reference, *self.candidates)
        return [self.key(task, candidate) for task in self.tasks for candidate in every]

    def _lanes(self, task: str, candidates: Sequence[Candidate]) -> int:
        return max(1, min(self.tasks[task].lanes, len(candidates)))

    def groups(self, records: Container[tuple[Any, ...]]) -> list[_Group]:
        """What has no record: of every task the reference, then the first candidates, and so on."""
        by_task: list[list[_Group]] = []
        for task in self.tasks:
            rows = []
            for kind, some in ((REFERENCE, self.reference), ("kept", self.candidates)):
                lanes = self._lanes(task, some)
                left = [c for c in some if self.key(task, c) not in records]
                parts = [left[i : i + lanes] for i in range(0, len(left), lanes)]
                rows += [_Group(task, (task, kind), tuple(part)) for part in parts]
            by_task.append(rows)
        longest = max(map(len, by_task), default=0)
        return [rows[i] for i in range(longest) for rows in by_task if i < len(rows)]

    def compiled(self, task: str, kind: str) -> run.Program:
        """A program, compiled."""
        build: run.Build = _build_reference
        if kind != REFERENCE:
            build = build_of(self.kept, list(self.weights.values()))
        lanes = self._lanes(task, self.reference if kind == REFERENCE else self.candidates)
        return run.program(self.tasks[task], build, self.data[task], ("place",), lanes)

    def train(self, program: run.Program, group: _Group) -> list[dict[str, Any]]:
        """Trains a group: a record for each of its candidates."""
        data = self.data[group.task]
        place = {label: float(i) for i, label in enumerate(self.weights)}
        settings = [{"place": place.get(c.label, 0.0)} for c in group.candidates]
        seeds = [c.seed for c in group.candidates]
        curves = run.train(program, self.tasks[group.task], data, settings, seeds, self.steps)
        return [
            _record(group.task, self.steps, candidate, curve, data)
            for candidate, curve in zip(group.candidates, curves, strict=True)
        ]


def _candidates(
    kept: Kept, checkpoints: int | None, seeds: int, with_reference: bool
) -> tuple[dict[str, Weights], tuple[Candidate, ...], tuple[Candidate, ...]]:
    """Sets of weights by label, the candidates, and those of the reference."""
    if not kept.steps:
        raise ValueError(
            f"campaign: expected weights in {kept.folder / 'weights'}, found none; "
            "`lopt meta-train` writes them"
        )
    weights = {str(step): kept.weights(step) for step in spread(kept.steps, checkpoints)}
    digests = {label: digest_of(found) for label, found in weights.items()}
    every = range(seeds)
    own = [Candidate(label, digest, seed) for label, digest in digests.items() for seed in every]
    reference = [Candidate(REFERENCE, LOPT.version(), seed) for seed in every]
    return weights, tuple(own), tuple(reference if with_reference else ())


# -- the selection --------------------------------------------------------------------------------


class Selected(NamedTuple):
    """What a selection did.

    Fields:
      records: of the sets of weights that were asked for, of this run and of earlier ones.
      complete: whether all are there.
      compiling: whether programs still compile in the background.
    """

    records: list[dict[str, Any]]
    complete: bool
    compiling: bool


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
) -> Selected:
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

    Raises:
      ValueError: for a number of steps that is no such multiple, a campaign without weights, or one
        in whose folder another selection is at work.
    """
    began = time.monotonic()
    tell = lambda text: say(f"{time.monotonic() - began:5.0f} s  {text}")  # noqa: E731
    if steps <= 0 or steps % run.CHUNK:
        raise ValueError(f"--steps: expected a multiple of {run.CHUNK}, found {steps}")
    claim = lock(kept.folder / ".selection.lock")
    if claim is None:
        raise ValueError(f"campaign: another selection is at work in {kept.folder}; wait for it")
    with claim:
        weights, own, reference = _candidates(kept, checkpoints, seeds, with_reference)
        data = {}
        for task in tasks:
            data[task.name] = task.load(data_folder, cache)
            tell(f"data of {task.name}")
        by_name = {task.name: task for task in tasks}
        plan = _Plan(kept, weights, own, reference, by_name, data, steps)
        records = {_key_of(record): record for record in read_records(kept.folder)}
        compiling = _train_all(plan, records, began + seconds, tell)
    keys = plan.keys()
    found = [records[key] for key in keys if key in records]
    return Selected(found, len(found) == len(keys), compiling)


def _train_all(
    plan: _Plan,
    records: dict[tuple[Any, ...], dict[str, Any]],
    deadline: float,
    tell: Callable[[str], None],
) -> bool:
    """Makes the trainings that have no record, and adds and writes theirs.

    Args:
      plan: all trainings.
      records: by key; those that are made are added.
      deadline: of `time.monotonic()`.
      tell: prints a line.

    Returns:
      Whether programs still compile in the background.
    """
    left = plan.groups(records)
    wanted = dict.fromkeys(group.program for group in left)
    jobs = {item: functools.partial(plan.compiled, *item) for item in wanted}
    futures = run.compile_all(jobs, max((os.cpu_count() or 2) - 2, 2)) if jobs else {}
    tell(f"{len(left)} groups of trainings of {plan.steps:,} steps to run; compiling")
    took: dict[tuple[str, str], float] = {}
    while left:
        now = time.monotonic()
        left = [group for group in left if now + took.get(group.program, 0.0) < deadline]
        ready = next((group for group in left if futures[group.program].done()), None)
        if ready is None:
            waited = {futures[group.program] for group in left}
            if not waited or not _any_done(waited, deadline - now):
                break
            continue
        left.remove(ready)
        made = plan.train(futures[ready.program].result(), ready)
        took[ready.program] = time.monotonic() - now
        for record in made:
            records[_key_of(record)] = record
            end = record["validation"][-1]
            tell(f"{ready.task} {record['weights']}: {'diverged' if end is None else f'{end:.4f}'}")
        write_rows(plan.kept.folder / _RECORDS, records.values())
    return any(not future.done() for future in futures.values())


def _any_done(futures: Iterable[Any], seconds: float) -> bool:
    first = concurrent.futures.FIRST_COMPLETED
    timeout = None if seconds == math.inf else max(seconds, 0.0)
    return bool(concurrent.futures.wait(set(futures), timeout, first).done)
