"""Evaluation: learned optimizers, untuned, against the usual ones, each tuned, on held-out tasks.

The tuned optimizers get the best of twelve learning rates by the mean over seeds of the final
validation loss, the measure that all are compared by.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.checks import check_value
from lopt_jax.meta.locks import lock
from lopt_jax.meta.rules import cosine_schedule, make_rule, make_schedule
from lopt_jax.meta.shampoo import shampoo
from lopt_jax.meta.tasks import Task, data_hashes, held_out_tasks
from lopt_jax.weights import Weights

HORIZONS = (200, 1000, 5000)
POINTS = 40  # measurements a run; divides every horizon
# Inner steps a second over all held-out tasks and optimizers, compilation included. An H200 made 38
# million in 1,506 s for the records of the documentation; for CPUs it is a guess from three tasks.
# It is to tell minutes from hours before anything was measured.
_STEPS_A_SECOND = {"gpu": 25_000.0, "cpu": 500.0}
_EXAMPLES = 512  # of each split a measurement

# (learning_rate, num_steps) -> transformation; both may be traced.
Build = Callable[[jax.Array, jax.Array], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer with the learning rates it may choose from.

    Args:
      name: for tables.
      build: from a learning rate and a number of steps.
      learning_rates: candidates; one for an untuned optimizer.
      evaluation_params: maps state and params to the params to measure, where they differ.
      digest: of the weights: curves of other weights are not taken for these.
    """

    name: str
    build: Build
    learning_rates: tuple[float, ...]
    evaluation_params: Callable[[Any, Any], Any] | None = None
    digest: str = ""


def _grid(low: float, high: float) -> tuple[float, ...]:
    return tuple(float(x) for x in np.geomspace(low, high, 12))


def _schedule_free(rate: jax.Array, steps: jax.Array) -> optax.GradientTransformation:
    # A constant rate after a warm-up of 5%: the schedule it is made for.
    def schedule(step: jax.Array) -> jax.Array:
        return rate * jnp.minimum(1.0, (step + 1) / jnp.maximum(0.05 * steps, 1.0))

    base = optax.adamw(schedule, b1=0.0)
    return optax.contrib.schedule_free(base, schedule, b1=0.9)


def baselines() -> dict[str, Contender]:
    """The tuned optimizers by name, under a cosine schedule (but for schedule-free adamw)."""

    def cosine(make: Callable[[Any], optax.GradientTransformation]) -> Build:
        return lambda rate, steps: make(lambda step: rate * cosine_schedule(steps)(step))

    contenders = [
        Contender("adamw", cosine(optax.adamw), _grid(1e-4, 0.3)),
        Contender("adam", cosine(optax.adam), _grid(1e-4, 0.3)),
        Contender("sgd", cosine(lambda s: optax.sgd(s, momentum=0.9)), _grid(1e-3, 3.0)),
        Contender("adagrad", cosine(optax.adagrad), _grid(1e-3, 3.0)),
        Contender("rmsprop", cosine(optax.rmsprop), _grid(3e-5, 0.1)),
        Contender("adadelta", cosine(optax.adadelta), _grid(0.03, 100.0)),
        Contender("adafactor", cosine(optax.adafactor), _grid(3e-4, 1.0)),
        Contender("lion", cosine(optax.lion), _grid(1e-5, 0.03)),
        Contender("muon", cosine(optax.contrib.muon), _grid(3e-4, 1.0)),
        Contender("shampoo", cosine(shampoo), _grid(1e-4, 0.3)),
        Contender(
            "schedule_free_adamw", _schedule_free, _grid(1e-4, 0.3),
            optax.contrib.schedule_free_eval_params,
        ),
    ]  # fmt: skip
    return {contender.name: contender for contender in contenders}


def learned(name: str, weights: Weights) -> Contender:
    """A learned optimizer as it comes: with the learning rate and weight decay that its card names.

    And with the further arguments (`rule_options`) that it was meta-trained with. Directions that
    were meta-trained inside the recipe of `lopt` have it, and its schedule.
    """
    recommended = weights.metadata.get("recommended", {})
    trained = weights.metadata.get("meta_training", {})
    peak = float(recommended.get("learning_rate", trained.get("learning_rate_peak", 1.0)))
    decay = float(recommended.get("weight_decay", trained.get("weight_decay", 0.0)))
    options = dict(trained.get("rule_options", ()))
    recipe = trained.get("recipe", "own")
    rule = make_rule(
        weights.architecture, weights.config, weight_decay=decay, options=options, recipe=recipe
    )

    def build(rate: jax.Array, steps: jax.Array) -> optax.GradientTransformation:
        level = make_schedule("constant" if recipe == "lopt" else "cosine", steps)
        return rule(weights.params, steps, lambda step: rate * level(step))

    parts = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights.params)]
    settings: tuple[Any, ...] = (dict(weights.config), decay) + ((options,) if options else ())
    settings += () if recipe == "own" else (recipe,)
    parts.append(repr(settings).encode())
    return Contender(name, build, (peak,), digest=hashlib.sha256(b"".join(parts)).hexdigest()[:16])


def with_fewer_rates(contender: Contender, count: int) -> Contender:
    """The contender with at most `count` of its learning rates, evenly spaced among them.

    One is the middle one; two and more have the lowest and the highest.
    """
    rates = contender.learning_rates
    if count >= len(rates):
        return contender
    places = np.linspace(0, len(rates) - 1, count) if count > 1 else [len(rates) // 2]
    chosen = tuple(rates[round(float(place))] for place in places)
    return dataclasses.replace(contender, learning_rates=chosen)


class Curves(NamedTuple):
    """Losses along runs of one contender on one task: (rates, seeds, POINTS) each."""

    train: np.ndarray
    valid: np.ndarray
    initial_valid: np.ndarray  # (rates, seeds)


def _run_program(task: Task, contender: Contender, vary_content: bool) -> Callable[..., Any]:
    """A function (rates, seeds, num_steps) of losses along runs, to be compiled."""

    def one(rate: jax.Array, seed: jax.Array, num_steps: jax.Array) -> tuple[jax.Array, ...]:
        key_content = jax.random.key(0)
        if vary_content:
            key_content = jax.random.fold_in(key_content, seed)
        content = task.sample(key_content)
        splits = {split: task.examples(content, split, _EXAMPLES) for split in ("train", "valid")}
        key_init, key_batches = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
        params = task.init(key_init, content)
        optimizer = optax.with_extra_args_support(contender.build(rate, num_steps))

        def step(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state = carry
            batch = task.batch(jax.random.fold_in(key_batches, i), content, "train")
            loss, gradient = jax.value_and_grad(task.loss)(params, content, batch)
            updates, state = optimizer.update(gradient, state, params, value=loss)
            return optax.apply_updates(params, updates), state

        def measured(params: Any, state: Any) -> tuple[jax.Array, jax.Array]:
            if contender.evaluation_params is not None:
                params = contender.evaluation_params(state, params)
            train = task.loss(params, content, splits["train"])
            return train, task.loss(params, content, splits["valid"])

        def point(carry: Any, i: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            count = num_steps // POINTS
            carry = jax.lax.fori_loop(i * count, (i + 1) * count, step, carry)
            return carry, measured(*carry)

        state = optimizer.init(params)
        initial = task.loss(params, content, splits["valid"])
        _, (train, valid) = jax.lax.scan(point, (params, state), jnp.arange(POINTS))
        return train, valid, initial

    over_seeds = jax.vmap(one, (None, 0, None))
    return jax.vmap(over_seeds, (0, None, None))


def describe_duration(seconds: float) -> str:
    """A duration in words, to two digits: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


def describe_work(trainings: int, steps: int, items: int) -> str:
    """What an evaluation is going to do, and about how long that takes here.

    Args:
      trainings: number of runs.
      steps: their inner steps, in all.
      items: pairs of a task and an optimizer, each a program.
    """
    device = jax.devices()[0]
    rate = _STEPS_A_SECOND.get(device.platform, _STEPS_A_SECOND["gpu"])
    return (
        f"to run: {trainings:,} trainings of {steps:,} steps in all, by {items} programs; very "
        f"roughly {describe_duration(steps / rate)} on this {device.device_kind}. Less with "
        "--tasks, --optimizers, --horizons, --seeds, --rates"
    )


class _Prepared(NamedTuple):
    """An item that this process has claimed: its curves so far, and what runs the missing ones."""

    claim: IO[bytes] | None
    kept: dict[int, Curves]
    run: Callable[[int], Curves] | None  # from a horizon; None where nothing is missing


def run_curves(
    tasks: Mapping[str, Task],
    contenders: Sequence[Contender],
    horizons: Sequence[int] = HORIZONS,
    seeds: int = 5,
    on_progress: Callable[[str], None] | None = None,
    folder: Path | None = None,
    vary_content: bool = False,
    kept_only: bool = False,
    ahead: int = 8,
) -> dict[tuple[str, str, int], Curves]:
    """Trains every contender on every task at every horizon: the first contender on all, and so on.

    Several processes may share a folder: whoever comes first runs an item (a task and a contender),
    and all of them return all curves.

    Args:
      tasks: by name.
      contenders: the optimizers.
      horizons: numbers of steps, multiples of POINTS.
      seeds: runs a learning rate.
      on_progress: called with a line of text now and then.
      folder: keeps the curves of every task and contender as soon as they are there; what it holds
        already is not run again.
      vary_content: every seed draws a task's content of its own; otherwise seeds share it.
      kept_only: run nothing; what the folder does not hold is left out.
      ahead: items claimed and compiled while another runs.

    Returns:
      Curves by (task, contender, horizon).

    Raises:
      ValueError: for a horizon that is no multiple of POINTS, or two contenders of one name.
      Exception: the first of the errors that items ended with, when all the others are done.
    """
    bad = [horizon for horizon in horizons if horizon % POINTS or horizon <= 0]
    if bad:
        raise ValueError(f"horizons: expected positive multiples of {POINTS}, found {bad}")
    counts = collections.Counter(contender.name for contender in contenders)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"contenders: expected names that differ, found {twice} more than once")
    say = on_progress or (lambda text: None)
    # Who only reads curves needs no data, and takes what the folder holds.
    data = {name: "" if kept_only else _data_text(task) for name, task in tasks.items()}
    found: dict[tuple[str, str], dict[int, Curves]] = {}
    for name in tasks:
        for contender in contenders:
            kept = (
                _load_curves(folder, name, contender, seeds, data[name])
                if folder is not None
                else {}
            )
            found[name, contender.name] = kept
    failed: dict[tuple[str, str], Exception] = {}

    def runs(item: tuple[str, Contender]) -> list[int]:
        """The horizon of every training that is missing."""
        name, contender = item
        each = len(contender.learning_rates) * seeds
        return each * [h for h in horizons if h not in found[name, contender.name]]

    def prepare(item: tuple[str, Contender], wait: bool) -> _Prepared | None:
        """Claims and compiles an item; None where another process has it."""
        name, contender = item
        kept = found[name, contender.name]
        claim = None
        if folder is not None:
            claim = _claim(folder, name, contender, wait)
            if claim is None:
                return None
            kept = _load_curves(folder, name, contender, seeds, data[name])
        run = None
        if any(horizon not in kept for horizon in horizons):
            try:
                run = _compile(tasks[name], contender, seeds, vary_content)
            except BaseException:
                _release(claim)
                raise
        return _Prepared(claim, kept, run)

    def run(name: str, contender: Contender, item: _Prepared) -> None:
        by_horizon = found[name, contender.name] = item.kept
        if item.run is None:
            return
        start = time.perf_counter()
        for horizon in horizons:
            if horizon not in by_horizon:
                by_horizon[horizon] = item.run(horizon)
                if folder is not None:
                    _save_curves(folder, name, contender, by_horizon, data[name])
        final = by_horizon[horizons[-1]].valid[..., -1].mean(-1)
        best = float(np.nanmin(np.where(np.isfinite(final), final, np.inf)))
        say(
            f"{name} {contender.name}: validation loss {best:.4g} at {horizons[-1]} steps "
            f"({time.perf_counter() - start:.1f} s){progress()}"
        )

    def progress() -> str:
        """What is left, by what is done and how long that took; others may do some of it."""
        left = list(missing())
        steps = sum(sum(runs(item)) for item in left)
        seconds = (time.perf_counter() - began) * steps / max(all_steps - steps, 1)
        rest = f", about {describe_duration(seconds)} left" if left else ""
        return f"; {len(all_items) - len(left)} of {len(all_items)}{rest}"

    def missing() -> Iterator[tuple[str, Contender]]:
        for contender in contenders:
            for name in tasks:
                item = (name, contender.name)
                if item not in failed and any(h not in found[item] for h in horizons):
                    yield name, contender

    all_items = list(missing())
    all_runs = [horizon for item in all_items for horizon in runs(item)]
    all_steps = sum(all_runs)
    began = time.perf_counter()
    if all_items and not kept_only:
        say(describe_work(len(all_runs), all_steps, len(all_items)))
    # First what nobody has, then what others began: they may have been stopped.
    for wait in () if kept_only else (False, True):
        begin = functools.partial(prepare, wait=wait)
        # Who waits for others holds nothing that they may wait for.
        for (name, contender), future in _in_advance(begin, missing(), 1 if wait else ahead):
            prepared = None
            try:
                prepared = future.result()
                if prepared is not None:
                    run(name, contender, prepared)
            except Exception as error:
                failed[name, contender.name] = error
                say(f"{name} {contender.name}: {type(error).__name__}: {str(error)[:500]}")
            finally:
                if prepared is not None:
                    _release(prepared.claim)
    if failed:
        raise next(iter(failed.values()))
    return {
        (name, optimizer, horizon): curves[horizon]
        for (name, optimizer), curves in found.items()
        for horizon in horizons
        if horizon in curves
    }


def _in_advance[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[tuple[Item, concurrent.futures.Future[Result]]]:
    """Items with their finished calls, while `count` more calls go on in threads."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        queue = collections.deque((x, pool.submit(function, x)) for x in islice(items, count))
        while queue:
            item, future = queue.popleft()
            concurrent.futures.wait([future])
            queue.extend((x, pool.submit(function, x)) for x in islice(items, 1))
            yield item, future


def _compile(
    task: Task, contender: Contender, seeds: int, vary_content: bool
) -> Callable[[int], Curves]:
    rates = jnp.array(contender.learning_rates, jnp.float32)
    seed_array = jnp.arange(seeds, dtype=jnp.uint32)
    # GPUs would multiply with fewer bits by default: no numbers to compare with those of a CPU.
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(_run_program(task, contender, vary_content)).lower(
            rates, seed_array, jnp.int32(0)
        )
    # num_steps is traced: one program serves all horizons.
    program = lowered.compile()
    return lambda horizon: Curves(*jax.device_get(program(rates, seed_array, jnp.int32(horizon))))


def _file_name(task: str, contender: Contender) -> str:
    # A label may be a path.
    return f"{task}.{urllib.parse.quote(contender.name, safe='')}"


def _claim(folder: Path, task: str, contender: Contender, wait: bool) -> IO[bytes] | None:
    """A lock on an item, None where another process has it; its end, however it ends, frees it."""
    return lock(folder / f".{_file_name(task, contender)}.lock", wait)


def _release(claim: IO[bytes] | None) -> None:
    if claim is not None:
        claim.close()


def _data_text(task: Task) -> str:
    return json.dumps(data_hashes([task]), sort_keys=True)


def _save_curves(
    folder: Path, task: str, contender: Contender, curves: Mapping[int, Curves], data: str
) -> None:
    arrays = {
        f"{field}_{horizon}": np.asarray(array, np.float32)
        for horizon, found in curves.items()
        for field, array in found._asdict().items()
    }
    arrays["learning_rates"] = np.asarray(contender.learning_rates, np.float32)
    arrays["digest"] = np.array(contender.digest)
    arrays["data"] = np.array(data)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{_file_name(task, contender)}.{os.getpid()}.npz"
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(folder / f"{_file_name(task, contender)}.npz")


def _load_curves(
    folder: Path, task: str, contender: Contender, seeds: int, data: str
) -> dict[int, Curves]:
    path = folder / f"{_file_name(task, contender)}.npz"
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            rates = np.asarray(contender.learning_rates, np.float32)
            same = np.array_equal(arrays["learning_rates"], rates)
            if not same or str(arrays["digest"]) != contender.digest:
                return {}
            # Files from before data were recorded do not say; nor does who only reads.
            recorded = str(arrays["data"]) if "data" in arrays else ""
            if data and recorded not in ("", data):
                return {}
            horizons = [int(name.split("_")[1]) for name in arrays if name.startswith("train_")]
            found = {
                h: Curves(*(arrays[f"{field}_{h}"] for field in Curves._fields)) for h in horizons
            }
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"curves: {path} does not hold the curves of an evaluation ({error}); remove it"
        ) from error
    return {h: curves for h, curves in found.items() if curves.train.shape[1] == seeds}


def best_rate(curves: Curves) -> int:
    """Index of the learning rate with the lowest mean final validation loss; nan is the worst."""
    final = curves.valid[..., -1].mean(-1)
    return int(np.argmin(np.where(np.isfinite(final), final, np.inf)))


def first_step_below(curve: np.ndarray, level: float, horizon: int) -> int | None:
    """Steps until a loss curve (POINTS,) is at or below a level; None if it never is."""
    below = np.flatnonzero(curve <= level)
    return None if not len(below) else int((below[0] + 1) * horizon // len(curve))


def last_step_above(curve: np.ndarray, level: float, horizon: int) -> int | None:
    """Steps until a loss curve (POINTS,) is at or below a level for good; None if it never is."""
    above = np.flatnonzero(~(curve <= level))
    start = above[-1] + 1 if len(above) else 0
    return None if start == len(curve) else int((start + 1) * horizon // len(curve))


def make_records(
    curves: Mapping[tuple[str, str, int], Curves],
    contenders: Sequence[Contender],
    all_rates: bool = False,
) -> list[dict[str, Any]]:
    """One record a run: the table that `meta-eval` writes.

    Args:
      curves: of `run_curves`, adamw's among them.
      contenders: the optimizers.
      all_rates: also the runs of learning rates that were not the best.

    Returns:
      Dictionaries with task, held_out, horizon, optimizer, learning_rate, seed, train_loss,
      valid_loss, initial_loss, steps_to_adamw (None if never), steps_to_adamw_for_good (the same,
      but to stay there) and adamw_steps (steps adamw needed to this run's final validation loss;
      None if never). Losses that are not finite are None.
    """
    by_name = {contender.name: contender for contender in contenders}
    held_out = set(held_out_tasks())

    def number(x: Any) -> float | None:
        return float(x) if np.isfinite(x) else None

    records = []
    for (task, name, horizon), found in curves.items():
        reference = curves.get((task, "adamw", horizon))
        level = np.inf
        adamw = None
        if reference is not None:
            adamw = reference.valid[best_rate(reference)]
            level = float(adamw[:, -1].mean())
        rates = range(found.valid.shape[0]) if all_rates else [best_rate(found)]
        for rate in rates:
            for seed in range(found.valid.shape[1]):
                final = found.valid[rate, seed, -1]
                curve = found.valid[rate, seed]
                reached = lasting = back = None
                if adamw is not None:
                    reached = first_step_below(curve, level, horizon)
                    lasting = last_step_above(curve, level, horizon)
                    back = first_step_below(adamw.mean(0), float(final), horizon)
                records.append(
                    {
                        "task": task,
                        "held_out": task in held_out,
                        "horizon": int(horizon),
                        "optimizer": name,
                        "learning_rate": by_name[name].learning_rates[rate],
                        "seed": seed,
                        "train_loss": number(found.train[rate, seed, -1]),
                        "valid_loss": number(final),
                        "initial_loss": number(found.initial_valid[rate, seed]),
                        "steps_to_adamw": reached,
                        "steps_to_adamw_for_good": lasting,
                        "adamw_steps": back,
                    }
                )
    return records


_RECORD = {
    "task": str,
    "horizon": int,
    "optimizer": str,
    "learning_rate": float,
    "seed": int,
    "train_loss": float | None,
    "valid_loss": float | None,
    "initial_loss": float | None,
    "steps_to_adamw": int | None,
    "steps_to_adamw_for_good": int | None,
    "adamw_steps": int | None,
}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records that `meta-eval --json` wrote.

    Args:
      path: of the file.

    Returns:
      As `make_records`.

    Raises:
      ValueError: for a file that holds something else, naming it.
    """
    try:
        records = json.loads(path.read_text())
        check_value("records", records, tuple[dict, ...])
        for record in records:
            missing = sorted(_RECORD.keys() - record.keys())
            if missing:
                raise ValueError(f"a record has no {missing}")
            for field, hint in _RECORD.items():
                check_value(field, record[field], hint)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected records of `meta-eval --json`: {error}") from error
    return records


def speed_up(record: Mapping[str, Any], field: str = "steps_to_adamw") -> float:
    """How many times faster than tuned adamw a run was.

    With field="steps_to_adamw_for_good", a run that reaches adamw's loss and then overfits past it
    has not reached it.

    Where the run reached adamw's final validation loss: horizon / steps it took. Where it did not:
    steps adamw took to the run's final loss / horizon, below 1. A run that is not finite counts as
    the smallest step, 1 / POINTS.
    """
    horizon = record["horizon"]
    if record[field] is not None:
        return horizon / record[field]
    if record["valid_loss"] is None:
        return 1.0 / POINTS
    back = record["adamw_steps"]
    return (back if back is not None else horizon) / horizon


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half, as rliable defines it (a 25% trimmed mean)."""
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    cut = int(0.25 * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(
    scores: np.ndarray, repetitions: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """A 95% interval of the interquartile mean by the stratified bootstrap over runs.

    Args:
      scores: (runs, tasks); runs are drawn with replacement within each task.
      repetitions: bootstrap samples.
      seed: of the draws.

    Returns:
      The 2.5% and 97.5% percentiles.
    """
    generator = np.random.default_rng(seed)
    runs, tasks = scores.shape
    means = [
        interquartile_mean(
            np.take_along_axis(scores, generator.integers(0, runs, (runs, tasks)), 0)
        )
        for _ in range(repetitions)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Summary(NamedTuple):
    """One optimizer at one horizon over all tasks."""

    optimizer: str
    horizon: int
    tasks: int
    speed_up: float  # interquartile mean over runs
    low: float
    high: float
    lasting: float  # interquartile mean of the speed-up to adamw's loss for good
    wins: float  # fraction of tasks with a mean final validation loss at or below tuned adamw's
    train_ratio: float  # geometric mean over tasks of final training loss / tuned adamw's
    valid_ratio: float  # likewise of validation losses
    diverged: int  # tasks with a run that is not finite or not below its initial loss


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Summaries by optimizer and horizon, the fastest first within a horizon."""
    groups: dict[tuple[int, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        key = (record["horizon"], record["optimizer"])
        groups.setdefault(key, {}).setdefault(record["task"], []).append(record)

    def mean(rows: Sequence[Mapping[str, Any]], field: str) -> float:
        values = [np.inf if row[field] is None else row[field] for row in rows]
        return float(np.mean(values))

    summaries = []
    for (horizon, name), by_task in groups.items():
        reference = groups.get((horizon, "adamw"), {})
        shared = [task for task in by_task if task in reference]
        if not shared:
            continue
        scores = np.array([[speed_up(row) for row in by_task[task]] for task in shared]).T
        valid = np.array([mean(by_task[t], "valid_loss") for t in shared])
        adamw = np.array([mean(reference[t], "valid_loss") for t in shared])
        train = np.array([mean(by_task[t], "train_loss") for t in shared])
        adamw_train = np.array([mean(reference[t], "train_loss") for t in shared])
        for_good = [
            [speed_up(row, "steps_to_adamw_for_good") for row in by_task[task]] for task in shared
        ]
        bad = [
            any(r["valid_loss"] is None or r["valid_loss"] >= r["initial_loss"] for r in by_task[t])
            for t in shared
        ]
        low, high = bootstrap_interval(scores)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            ratios = [
                float(np.exp(np.mean(np.log(np.maximum(a, 1e-12) / np.maximum(b, 1e-12)))))
                for a, b in ((train, adamw_train), (valid, adamw))
            ]
        summaries.append(
            Summary(
                name, horizon, len(shared), interquartile_mean(scores), low, high,
                interquartile_mean(np.array(for_good)),
                float(np.mean(valid <= adamw)), ratios[0], ratios[1], int(sum(bad)),
            )
        )  # fmt: skip
    return sorted(summaries, key=lambda s: (s.horizon, -s.speed_up))
