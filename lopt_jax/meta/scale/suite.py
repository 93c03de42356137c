"""Runs the cells of the scale suite and keeps a record of each run; goes on where it stopped."""

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lopt_jax import cli
from lopt_jax.meta.files import write_whole
from lopt_jax.meta.scale import contenders as contenders_module
from lopt_jax.meta.scale import run
from lopt_jax.meta.scale.contenders import CONTENDERS, Contender
from lopt_jax.meta.scale.tasks import EVIDENCE, Split, Task, task_named

DATA, CACHE = Path("outputs/data"), Path("outputs/cache")
RECORDS = Path("docs/benchmarks/scale_eval.json")
_GROWTH = 3  # a grid grows by so many rates at most
_FIRST_GUESS = 20.0  # milliseconds a step, before one was measured


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one cell.

    Attributes:
      task: name of the task.
      horizon: steps.
      contender: name of the optimizer.
      settings: its numbers, sorted by name.
      seed: of parameters and data.
    """

    task: str
    horizon: int
    contender: str
    settings: tuple[tuple[str, float], ...]
    seed: int

    @property
    def key(self) -> str:
        """A text that is the same for the same run."""
        numbers = ",".join(f"{name}={value:.4g}" for name, value in self.settings)
        return f"{self.task}/{self.horizon}/{self.contender}/{numbers}/{self.seed}"


def run_of(
    task: str, horizon: int, contender: str, settings: Mapping[str, float], seed: int
) -> Run:
    """A run from a mapping of numbers."""
    return Run(task, horizon, contender, tuple(sorted(settings.items())), seed)


def key_of(record: Mapping[str, Any]) -> str:
    """The key of the run that a record is of."""
    return run_of(
        record["task"],
        record["steps"],
        record["optimizer"],
        record["settings"],
        record["seed"],
    ).key


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records, a line each, in the order of their keys."""
    lines = ",\n".join(json.dumps(record) for record in sorted(records, key=key_of))
    write_whole(path, f"[\n{lines}\n]\n".encode())


def current(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of optimizers as they are now, not of what had their names before."""
    return [
        record
        for record in records
        if record["optimizer"] in CONTENDERS
        and record.get("version", "") == CONTENDERS[record["optimizer"]].version()
    ]


def final_loss(record: Mapping[str, Any]) -> float:
    """The last validation loss; infinite where the run did not stay finite."""
    loss = float(record["validation"][-1])
    return loss if loss == loss else float("inf")


def wanted(
    task: Task,
    horizon: int,
    contender: Contender,
    records: Sequence[Mapping[str, Any]],
    seeds: int,
    multiples: bool,
) -> list[Run]:
    """The runs of a cell that are still to be made, given those that were.

    First every setting with the first seed; then, where the best lies at an end, the grid grows;
    then the best with the other seeds.

    Args:
      task: the task.
      horizon: steps.
      contender: the optimizer.
      records: of all runs so far.
      seeds: seeds of the best setting.
      multiples: whether multiples of an untuned optimizer's rate are tried, for the record.

    Returns:
      The runs; empty where the cell is complete.
    """
    here = {
        key_of(r): r
        for r in current(records)
        if (r["task"], r["steps"], r["optimizer"]) == (task.name, horizon, contender.name)
    }
    of = lambda settings, seed: run_of(task.name, horizon, contender.name, settings, seed)  # noqa: E731
    settings: Sequence[Mapping[str, float]] = contender.settings
    extra = contenders_module.MULTIPLES if multiples and not contender.widen else ()
    missing = [one for one in (of(s, 0) for s in (*settings, *extra)) if one.key not in here]
    if missing:
        return missing
    if contender.widen:
        settings, more = _grown(contender, lambda s: here.get(of(s, 0).key))
        if more is not None:
            return [of(more, 0)]
    best = min(settings, key=lambda s: final_loss(here[of(s, 0).key]))
    return [of(best, seed) for seed in range(1, seeds) if of(best, seed).key not in here]


def _grown(
    contender: Contender, record_of: Callable[[Mapping[str, float]], Mapping[str, Any] | None]
) -> tuple[list[Mapping[str, float]], Mapping[str, float] | None]:
    """The grid with what it has grown by, and the setting that it grows by next, if any."""
    name = contender.widen
    grid = sorted(contender.settings, key=lambda s: s[name])
    ratio = grid[1][name] / grid[0][name]
    for _ in range(_GROWTH):
        losses = [final_loss(record_of(s) or {"validation": [float("inf")]}) for s in grid]
        best = losses.index(min(losses))
        if 0 < best < len(grid) - 1:
            break
        factor = ratio if best else 1 / ratio
        more = {**grid[best], name: grid[best][name] * factor}
        if record_of(more) is None:
            return grid, more
        grid = sorted([*grid, more], key=lambda s: s[name])
    return grid, None


def record_of_run(one: Run, task: Task, data: Split, curve: run.Curve, parameters: int) -> Any:
    """What is kept of a run: JSON values alone."""
    rounded = lambda values: [float(f"{value:.6g}") for value in values]  # noqa: E731
    return {
        "task": one.task,
        "parameters": parameters,
        "steps": one.horizon,
        "items": one.horizon * task.batch * task.items,
        "optimizer": one.contender,
        "version": CONTENDERS[one.contender].version(),
        "settings": dict(one.settings),
        "seed": one.seed,
        "validation": rounded(curve.validation),
        "training": rounded(curve.training),
        "at": curve.steps,
        "milliseconds": float(f"{curve.milliseconds:.4g}"),
        "data": data.digest[:16],
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


def run_suite(
    tasks: Sequence[Task],
    names: Sequence[str],
    records: list[dict[str, Any]],
    *,
    horizons: Sequence[int] | None,
    seeds: int,
    multiples: bool,
    seconds: float,
    data_folder: Path = DATA,
    cache: Path = CACHE,
    save: Callable[[list[dict[str, Any]]], None],
    say: Callable[[str], None] = print,
) -> bool:
    """Makes the runs of cells that are missing, until the time is over.

    Args:
      tasks: the tasks.
      names: of contenders.
      records: of runs so far; new ones are appended.
      horizons: those of every task that are run; None: all.
      seeds: seeds of every best setting.
      multiples: as `wanted`'s.
      seconds: no run is started that would end later.
      data_folder: prepared data.
      cache: for tokens.
      save: called with the records after every group of runs.
      say: prints a line of progress.

    Returns:
      Whether every cell is complete.
    """
    begin = time.perf_counter()
    clock = lambda: time.perf_counter() - begin  # noqa: E731
    cells = [
        (task, horizon, CONTENDERS[name])
        for task in tasks
        for horizon in task.horizons
        if horizons is None or horizon in horizons
        for name in names
    ]
    open_cells = [c for c in cells if wanted(*c, records, seeds, multiples)]
    data: dict[str, Split] = {}
    for task, _, _ in open_cells:
        if task.name not in data:
            data[task.name] = task.load(data_folder, cache)
            say(f"{clock():6.0f} s  data of {task.name}")
    jobs = {
        (task.name, contender.name): _job(task, contender, data[task.name])
        for task, _, contender in open_cells
    }
    programs = run.compile_all(jobs, max((os.cpu_count() or 2) - 2, 2))
    complete = True
    for task, horizon, contender in open_cells:
        while runs := wanted(task, horizon, contender, records, seeds, multiples):
            compiled = programs[task.name, contender.name].result()
            milliseconds = _milliseconds(records, task.name, contender.name)
            if clock() + milliseconds * horizon / 1e3 > seconds:
                say(f"{clock():6.0f} s  no time for {runs[0].key}")
                complete = False
                break
            group = runs[: compiled.lanes]
            settings = [dict(one.settings) for one in group]
            curves = run.train(
                compiled, task, data[task.name], settings, [one.seed for one in group], horizon
            )
            for one, curve in zip(group, curves, strict=True):
                records.append(record_of_run(one, task, data[task.name], curve, _size(task, data)))
                say(f"{clock():6.0f} s  {one.key}: {curve.validation[-1]:.4f}")
            save(records)
    return complete


def _job(task: Task, contender: Contender, data: Split) -> Callable[[], run.Program]:
    names = tuple(contender.settings[0])
    return lambda: run.program(task, contender.build, data, names, task.lanes)


def _size(task: Task, data: Mapping[str, Split]) -> int:
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), data[task.name]))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _milliseconds(records: Sequence[Mapping[str, Any]], task: str, contender: str) -> float:
    known = [
        r["milliseconds"] for r in records if (r["task"], r["optimizer"]) == (task, contender)
    ] or [r["milliseconds"] for r in records if r["task"] == task]
    return max(known[-5:], default=_FIRST_GUESS)


def _chosen(names: str | None) -> Iterator[Task]:
    if names is None:
        yield from EVIDENCE
    else:
        yield from map(task_named, names.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the suite."""
    parser.add_argument("--tasks", help="names with commas; left out: all that are evidence")
    parser.add_argument("--optimizers", default=",".join(CONTENDERS), help="names with commas")
    parser.add_argument("--horizons", help="numbers of steps with commas; left out: all")
    parser.add_argument("--seeds", type=int, default=2, help="of every best setting")
    parser.add_argument("--multiples", action="store_true", help="try multiples of untuned rates")
    parser.add_argument("--seconds", type=float, default=540, help="no run is to end later")
    parser.add_argument("--records", type=Path, default=RECORDS, help="records to go on with")
    parser.add_argument("--out", type=Path, help="where records go; left out: --records")
    parser.add_argument("--data", type=Path, default=DATA, help="prepared data")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for tokens")
    parser.add_argument("--show", action="store_true", help="print the table, run nothing")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the curves")


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line `python -m lopt_jax.meta.scale`.

    Args:
      arguments: without the program's name; those of the process where None.

    Returns:
      0; 2 after an error of the user or of a file, which is printed as one message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lopt_jax.meta.scale", description="The scale suite."
    )
    add_arguments(parser)
    try:
        return main(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"scale: {cli.message(error)}", file=sys.stderr)
        return 2


def main(options: argparse.Namespace) -> int:
    """Runs the suite, then prints its table and draws its plot.

    Raises:
      ValueError: an unknown optimizer, or no records to show.
      ImportError, OSError: a package or prepared data is missing; the message says how to get it.
    """
    from lopt_jax.meta.scale import report

    unknown = [name for name in options.optimizers.split(",") if name not in CONTENDERS]
    if unknown:
        raise ValueError(
            f"--optimizers: expected names of {', '.join(CONTENDERS)}; found {unknown[0]!r}."
        )
    out = options.out or options.records
    records = read_records(options.records)
    if options.show and not records:
        raise ValueError(f"--records: expected records to show, found none in {options.records}.")
    complete = options.show or run_suite(
        list(_chosen(options.tasks)),
        options.optimizers.split(","),
        records,
        horizons=options.horizons and [int(h) for h in options.horizons.split(",")],
        seeds=options.seeds,
        multiples=options.multiples,
        seconds=options.seconds,
        data_folder=options.data,
        cache=options.cache,
        save=lambda kept: write_records(out, kept),
        say=lambda text: print(text, flush=True),
    )
    print(report.table(current(records)))
    if options.plot:
        report.plot(current(records), options.plot)
    if not complete:
        print("Not complete: the same command goes on.")
    return 0
