"""The commands `lopt meta-train`, `lopt meta-select` and `lopt meta-eval`."""

import argparse
import collections
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt_jax import cli
from lopt_jax.meta.data import FOLDER_VARIABLE


def add_commands(subparsers: Any) -> None:
    """Adds `meta-train`, `meta-select` and `meta-eval` to the command line.

    Args:
      subparsers: of an argparse parser; each command sets `run`, a function of the arguments that
        returns the exit status.
    """
    from lopt_jax.meta.configs import CONFIGS

    train = subparsers.add_parser("meta-train", help="meta-train a learned optimizer")
    train.add_argument(
        "config", help=f"one of {', '.join(CONFIGS)}, or a JSON file of MetaTrainConfig"
    )
    train.add_argument("--out", default=None, help="folder for checkpoints, weights and curves")
    train.add_argument("--seconds", type=float, default=None, help="wall-clock budget")
    train.add_argument(
        "--steps",
        type=cli.positive_integer,
        default=None,
        help="outer steps, instead of the config's",
    )
    train.add_argument("--seed", type=int, default=None, help="instead of the config's")
    train.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    train.add_argument(
        "--campaign", default=None, metavar="FOLDER",
        help="begin a chain of runs, or go on with it, by small files in this folder",
    )  # fmt: skip
    train.add_argument("--weights", default=None, help="start from these weights (name or path)")
    train.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="override a setting; VALUE is JSON, for instance --set num_pairs=256",
    )  # fmt: skip
    _add_data(train)
    train.set_defaults(run=run_meta_train)

    _add_select(subparsers)
    evaluate = subparsers.add_parser("meta-eval", help="compare learned with tuned optimizers")
    evaluate.add_argument("weights", nargs="*", help="names or paths of weights, NAME=PATH labels")
    evaluate.add_argument("--tasks", default=None, help="comma-separated; default: all held out")
    evaluate.add_argument(
        "--horizons", type=_horizons, default="200,1000,5000",
        help="numbers of steps, comma-separated multiples of 40; default: %(default)s",
    )  # fmt: skip
    evaluate.add_argument(
        "--seeds", type=cli.positive_integer, default=5,
        help="runs of each learning rate; default: %(default)s",
    )  # fmt: skip
    evaluate.add_argument(
        "--optimizers", "--baselines", dest="baselines", default="all", metavar="NAMES",
        help="the usual optimizers to compare with, comma-separated; adamw always is among them; "
        "default: all",
    )  # fmt: skip
    evaluate.add_argument(
        "--rates", type=cli.positive_integer, default=None,
        help="tune over this many learning rates of each, evenly spaced, instead of twelve",
    )  # fmt: skip
    evaluate.add_argument("--json", default=None, help="write the records here")
    evaluate.add_argument(
        "--curves", default=None,
        help="folder that keeps the curves; what it holds already is not run again, and several "
        "processes may share it",
    )  # fmt: skip
    evaluate.add_argument(
        "--ahead", type=cli.positive_integer, default=min(8, os.cpu_count() or 1),
        help="programs compiled while one runs; 1 for processes that share a folder",
    )  # fmt: skip
    evaluate.add_argument(
        "--kept-only", action="store_true",
        help="run nothing: summarise what the folder of curves holds",
    )  # fmt: skip
    evaluate.add_argument("--plot", default=None, help="write a plot of the speed-ups here (PNG)")
    evaluate.add_argument("--all-rates", action="store_true", help="record every learning rate")
    evaluate.add_argument(
        "--merge", nargs="+", default=None, metavar="JSON",
        help="summarise these record files instead of running anything",
    )  # fmt: skip
    _add_data(evaluate)
    evaluate.set_defaults(run=run_meta_eval)


def _add_select(subparsers: Any) -> None:
    select = subparsers.add_parser(
        "meta-select", help="find the best weights of a campaign of meta-train"
    )
    select.add_argument("campaign", help="folder of `lopt meta-train NAME --campaign FOLDER`")
    select.add_argument(
        "--tasks", default=None,
        help="comma-separated, tuning tasks of the scale suite or tasks of meta-training; default: "
        "a language model of 5M parameters and a vision transformer",
    )  # fmt: skip
    select.add_argument("--steps", type=cli.positive_integer, default=1000, help="of each training")
    select.add_argument("--seeds", type=cli.positive_integer, default=1, help="of each training")
    select.add_argument(
        "--checkpoints", type=cli.positive_integer, default=None,
        help="at most so many of the sets of weights, spread over the campaign; default: all",
    )  # fmt: skip
    select.add_argument(
        "--no-reference", action="store_true", help="do not train with the weights that ship"
    )
    select.add_argument("--seconds", type=float, default=math.inf, help="wall-clock budget")
    select.add_argument("--export", default=None, metavar="DST", help="write the best weights here")
    select.add_argument("--cache", default="outputs/cache", help="folder for tokens")
    _add_data(select)
    select.set_defaults(run=run_meta_select)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default=None, metavar="FOLDER",
        help=f"that `python -m lopt_jax.meta.prepare` wrote, for tasks of pictures; "
        f"default: ${FOLDER_VARIABLE}",
    )  # fmt: skip


def _use_data(folder: str | None) -> None:
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = folder


def _horizons(text: str) -> list[int]:
    return [cli.positive_integer(part) for part in text.split(",")]


def _load_config(arguments: argparse.Namespace) -> Any:
    from lopt_jax.meta.config import from_json, to_json
    from lopt_jax.meta.configs import CONFIGS

    name = arguments.config
    if name in CONFIGS:
        config = CONFIGS[name]
    elif Path(name).is_file():
        config = from_json(Path(name).read_text())
    else:
        raise ValueError(f"config: {name!r} is no file and none of {sorted(CONFIGS)}")
    fields = json.loads(to_json(config))
    for item in arguments.set:
        key, found, value = item.partition("=")
        if not found or key not in fields:
            raise ValueError(f"--set: expected NAME=VALUE with NAME in {sorted(fields)}: {item!r}")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    if arguments.steps is not None:
        fields["outer_steps"] = arguments.steps
    if arguments.seed is not None:
        fields["seed"] = arguments.seed
    return from_json(json.dumps(fields))


def _check_seconds(seconds: float | None) -> None:
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--seconds: expected a number above 0, found {seconds:g}")


def run_meta_train(arguments: argparse.Namespace) -> int:
    """Runs `lopt meta-train`.

    Args:
      arguments: see `add_commands`.

    Returns:
      The exit status.

    Raises:
      ValueError: for wrong arguments, naming them.
    """
    from lopt_jax.meta.trainer import Interrupted, Trainer
    from lopt_jax.weights import load_weights

    began = time.monotonic()
    _use_data(arguments.data)
    config = _load_config(arguments)
    _check_seconds(arguments.seconds)
    if arguments.campaign is not None and (arguments.out is not None or arguments.resume):
        raise ValueError(
            "--campaign: expected neither --out nor --resume beside it: a campaign always goes on"
        )
    out = Path(arguments.out or f"outputs/meta/{config.name}")
    if arguments.campaign is None and not arguments.resume and (out / "weights").exists():
        raise ValueError(f"--out: {out} already holds weights; choose another folder")
    initial = None
    if arguments.weights is not None:
        start = load_weights(arguments.weights)
        if start.architecture != config.architecture:
            raise ValueError(
                f"--weights: {arguments.weights} holds {start.architecture!r}, "
                f"the config trains {config.architecture!r}"
            )
        initial = start.params
        # The weights only work with the config they came with.
        config = dataclasses.replace(config, architecture_config=tuple(dict(start.config).items()))
    if arguments.campaign is not None and not config.deal_every:
        raise ValueError(
            f"--campaign: the config {config.name} has no deal_every, the steps after which a run "
            "can go on; give it one: --set deal_every=500"
        )
    trainer = Trainer(config, initial)
    print(f"{config.name}: {config.outer_steps:,} outer steps of {len(config.tasks)} tasks, "
          f"{config.num_pairs} pairs each, on {_hardware()}; compiling", flush=True)  # fmt: skip
    if arguments.campaign is not None:
        return _run_campaign(trainer, Path(arguments.campaign), arguments.seconds, began)
    try:
        with _progress(config.outer_steps) as on_report:
            result = trainer.train(out, arguments.resume, arguments.seconds, on_report=on_report)
    except Interrupted as interruption:
        _write_run(out, config, trainer.data, interruption.result, arguments.weights)
        raise
    _write_run(out, config, trainer.data, result, arguments.weights)
    if result.ended == "budget":
        print(
            f"--seconds: the budget of {arguments.seconds:g} s ended the run "
            + ("before its programs were compiled, " if result.compiling else "")
            + f"after {result.steps:,} of {result.total:,} outer steps; "
            + (
                f"remove {out}, and start it again with more"
                if result.steps == 0
                else "--resume goes on"
            )
        )
    elif result.total < config.outer_steps:
        print(
            f"--seconds: {result.total:,} outer steps were planned to fit into "
            f"{arguments.seconds:g} s, of the config's {config.outer_steps:,}"
            if arguments.seconds
            else f"{result.total:,} outer steps were planned when the run began"
        )
    _end_compilation(result)
    return 0


def _end_compilation(result: Any) -> None:
    """Ends the process where compilation, which nothing can stop, goes on in the background.

    It may crash while Python ends.
    """
    if result.compiling:
        sys.stdout.flush()
        os._exit(0)


def _run_campaign(trainer: Any, folder: Path, seconds: float | None, began: float) -> int:
    """A run of a campaign, and what it did; it may take the seconds from when it began."""
    from lopt_jax.meta import campaign

    config = trainer.config
    before = campaign.read(folder).step if campaign.exists(folder) else 0
    with _progress(config.outer_steps) as on_report:
        left = None if seconds is None else began + seconds - time.monotonic()
        result = trainer.train(campaign=folder, max_seconds=left, on_report=on_report)
    wall = time.monotonic() - began
    if result.compiling:
        print(f"--seconds: {wall:.0f} s were over before the programs were compiled; give it more")
        _end_compilation(result)
        return 0
    kept = campaign.read(folder)
    done = kept.step - before
    seconds = kept.record["runs"][-1]["seconds"] if done else 0.0
    inner = 2 * config.num_pairs * config.truncation_length * len(config.tasks)
    print(
        f"{folder}: step {kept.step:,} of {config.outer_steps:,} after {wall:.0f} s, of which "
        f"{seconds:.0f} s for {done:,} outer steps"
        + (f" ({inner * done / seconds:,.0f} inner steps/s)" if seconds > 0 else "")
        + f"; {len(kept.steps)} sets of weights"
    )
    if result.steps > kept.step:
        print(
            f"the {result.steps - kept.step:,} steps after it are lost: a run can go on after "
            f"every {config.deal_every:,} alone (deal_every)"
        )
    if kept.step < config.outer_steps:
        print("the same command goes on")
    return 0


def run_meta_select(arguments: argparse.Namespace) -> int:
    """Runs `lopt meta-select`.

    Args:
      arguments: see `add_commands`.

    Returns:
      The exit status.

    Raises:
      ValueError: for wrong arguments, naming them.
    """
    from lopt_jax.meta import campaign, ranking, selection
    from lopt_jax.weights import save_weights

    began = time.monotonic()
    _use_data(arguments.data)
    _check_seconds(arguments.seconds)
    if arguments.export is not None and Path(arguments.export).exists():
        raise ValueError(f"--export: {arguments.export} already exists; choose another folder")
    kept = campaign.read(Path(arguments.campaign))
    names = arguments.tasks.split(",") if arguments.tasks else selection.DEFAULT_TASKS
    tasks = [selection.selection_task(name) for name in dict.fromkeys(names)]
    selected = selection.select(
        kept, tasks, arguments.steps,
        seeds=arguments.seeds,
        checkpoints=arguments.checkpoints,
        with_reference=not arguments.no_reference,
        seconds=arguments.seconds - (time.monotonic() - began),
        data_folder=Path(os.environ.get(FOLDER_VARIABLE, "outputs/data")),
        cache=Path(arguments.cache),
        say=lambda text: print(text, flush=True),
    )  # fmt: skip
    records = selected.records
    if records:
        _show_selection(kept, records)
    if not selected.complete:
        print("Not complete: the same command goes on.")
    best = ranking.best_of(ranking.rank(records)[0]) if records else None
    if best is not None and arguments.export is not None:
        weights = kept.weights(int(best.label))
        save_weights(Path(arguments.export), ranking.with_evidence(weights, records, best))
        print(f"{arguments.export}: the weights of step {best.label}")
    elif arguments.export is not None:
        print("--export: nothing was written, as no set of weights has been trained on every task")
    _end_compilation(selected)
    return 0


def _show_selection(kept: Any, records: Sequence[Any]) -> None:
    """Prints the table, and writes it and the picture into the campaign's folder."""
    from lopt_jax.meta import ranking
    from lopt_jax.meta.files import write_whole

    rows, base = ranking.rank(records)
    text = ranking.table(kept, rows, base)
    best = ranking.best_of(rows)
    if best is not None:
        change = 100 * math.expm1(best.score)
        text += f"\n\nThe best: step {best.label}, with losses {change:+.2f}% against {base}."
    write_whole(kept.folder / "selection.md", f"{text}\n".encode())
    print(text)
    try:
        ranking.plot(kept, rows, base, kept.folder / "selection.png")
    except ImportError:
        print("no picture: matplotlib is not installed")


def _hardware() -> str:
    import jax

    return f"{len(jax.devices())} {jax.devices()[0].device_kind}"


def _write_run(
    out: Path, config: Any, data: Mapping[str, str], result: Any, started_from: str | None
) -> None:
    """Writes a run's weights with their record, its settings, history and curves."""
    import jax

    from lopt_jax.meta.config import to_json
    from lopt_jax.weights import Weights, save_weights

    record = {
        **json.loads(to_json(config)),
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "finished": result.finished,
        "planned_steps": result.total,
        "hardware": _hardware(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "data": dict(data),
        "final_loss": _finite(result.history[-1].loss) if result.history else None,
        "not_good_for": config.notes,
        "started_from": started_from or "an Adam-like start",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(to_json(config))
    (out / "history.json").write_text(
        json.dumps(_finite([report._asdict() for report in result.history]), indent=0)
    )
    if config.architecture not in ("learned_adam", "learned_sgd"):
        metadata = {
            "source": "meta-trained with lopt_jax.meta",
            "licence": "Apache-2.0",
            "recommended": {
                "learning_rate": config.learning_rate_peak,
                "weight_decay": config.weight_decay,
                "chosen": "the values of the meta-training",
            },
            "meta_training": record,
        }
        weights = Weights(
            config.architecture, dict(config.architecture_config), result.meta_parameters, metadata
        )
        save_weights(out / "weights", weights)
        print(f"weights: {out / 'weights'}")
    if result.history:
        _plot_history(result.history, config, out / "curves.png")


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: nan and the infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _progress:
    """A progress bar on a terminal, lines of text elsewhere."""

    def __init__(self, total: int):
        self._total = total
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Any:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("meta-loss {task.fields[loss]:.4f} at the end {task.fields[final]:.4f}"),
                TextColumn("{task.fields[rate]:.1f} steps/s"),
                TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self._total, loss=math.nan, final=math.nan, rate=0.0
            )
        return self._report

    def __exit__(self, *unused: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _report(self, report: Any, total: int, left: float) -> None:
        rate = (total - report.step) / left if left > 0 else 0.0
        if self._bar is not None:
            self._bar.update(
                self._task, completed=report.step, total=total, loss=report.loss,
                final=report.final_score, rate=rate,
            )  # fmt: skip
            return
        print(
            f"step {report.step}/{total} {report.seconds:.0f}s meta-loss {report.loss:.4f} "
            f"at the end {report.final_score:.4f} diverged {report.diverged:.3f} "
            f"rejected {report.rejected:.3f} gradient {report.gradient_norm:.3g} "
            f"{rate:.2f} steps/s, {left:.0f} s left",
            flush=True,
        )


def _plot_history(history: Sequence[Any], config: Any, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no curves: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = [report.step for report in history]
    axes[0].plot(steps, [report.loss for report in history], alpha=0.5, label="mean over a life")
    axes[0].plot(steps, [report.final_score for report in history], label="near the horizon")
    axes[0].set_ylabel("meta-loss")
    axes[0].legend()
    count = len(history[0].task_scores)
    joined = [f"program {i + 1}" for i in range(count)]
    for i, label in enumerate(config.tasks if count == len(config.tasks) else joined):
        axes[1].plot(steps, [report.task_scores[i] for report in history], label=label)
    axes[1].set_ylabel("score near the horizon")
    axes[1].legend(fontsize="x-small")
    for axis in axes:
        axis.set_xlabel("outer step")
    figure.suptitle(config.name)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parse_list(text: str, known: Sequence[str], argument: str) -> list[str]:
    names = list(known) if text in ("all", None) else text.split(",")
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{argument}: unknown {missing}; known: {list(known)}")
    return names


def label_weights(items: Sequence[str], reserved: Sequence[str]) -> dict[str, str]:
    """Labels of weights for tables: the NAME of NAME=PATH, else the path's last part.

    Where others have that last part too, the label is the whole path: `meta-train` calls every
    folder of weights the same.

    Args:
      items: names or paths of weights, or NAME=PATH.
      reserved: labels of other optimizers in the tables.

    Returns:
      Names or paths by label, in the order given.

    Raises:
      ValueError: for a label that is given twice or reserved.
    """
    pairs = [item.split("=", 1) if "=" in item else [Path(item).name, item] for item in items]
    count = collections.Counter([*(label for label, _ in pairs), *reserved])
    paths: dict[str, str] = {}
    for item, (short, path) in zip(items, pairs, strict=True):
        label = short if "=" in item or count[short] == 1 else path
        if not label or label in paths or label in reserved:
            what = "another optimizer is called" if label in reserved else "there already is"
            raise ValueError(
                f"weights: expected labels that differ, found {item!r} where {what} {label!r}; "
                "give it one of its own, NAME=PATH"
            )
        paths[label] = path
    return paths


def _prepare_output(option: str, path: Path) -> None:
    """Makes the folder of a file that is written when all the work is done."""
    if option == "--plot":
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{option}: matplotlib is not installed: pip install 'lopt_jax[plot]'"
            ) from error

        known = FigureCanvasBase.get_supported_filetypes()
        if path.suffix and path.suffix[1:].lower() not in known:
            raise ValueError(
                f"{option}: expected a file of a type out of {', '.join(known)}, found {path}"
            )
    if path.is_dir():
        raise ValueError(f"{option}: expected a file, found the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def run_meta_eval(arguments: argparse.Namespace) -> int:
    """Runs `lopt meta-eval`.

    Args:
      arguments: see `add_commands`.

    Returns:
      The exit status.

    Raises:
      ValueError: for wrong arguments, naming them.
    """
    from lopt_jax.meta import evaluate
    from lopt_jax.meta.tasks import data_hashes, held_out_tasks, training_tasks
    from lopt_jax.weights import load_weights

    _use_data(arguments.data)
    if arguments.kept_only and not arguments.curves:
        raise ValueError("--kept-only: expected --curves with it, the folder that holds them")
    outputs = {"--json": arguments.json, "--plot": arguments.plot}
    for option, path in outputs.items():
        if path is not None:
            _prepare_output(option, Path(path))
    if arguments.merge is not None:
        records = [row for path in arguments.merge for row in evaluate.read_records(Path(path))]
        unique = {
            (r["task"], r["optimizer"], r["horizon"], r["learning_rate"], r["seed"]): r
            for r in records
        }
        records = list(unique.values())
    else:
        known = {**training_tasks(), **held_out_tasks()}
        names = _parse_list(arguments.tasks or ",".join(held_out_tasks()), list(known), "--tasks")
        every = evaluate.baselines()
        wanted = _parse_list(arguments.baselines, list(every), "--baselines")
        contenders = [every["adamw"]]  # what the others are measured against
        for label, path in label_weights(arguments.weights, list(every)).items():
            contenders.append(evaluate.learned(label, load_weights(path)))
        contenders += [every[name] for name in wanted if name != "adamw"]
        if arguments.rates is not None:
            contenders = [evaluate.with_fewer_rates(c, arguments.rates) for c in contenders]
        if not arguments.kept_only:
            data_hashes(known[name] for name in names)  # what cannot be read is said here
        curves = evaluate.run_curves(
            {name: known[name] for name in names}, contenders, arguments.horizons, arguments.seeds,
            lambda text: print(text, flush=True),
            Path(arguments.curves) if arguments.curves else None, kept_only=arguments.kept_only,
            ahead=arguments.ahead,
        )  # fmt: skip
        records = evaluate.make_records(curves, contenders, arguments.all_rates)
    if not records:
        source = "--merge" if arguments.merge is not None else "--curves"
        raise ValueError(f"{source}: expected records of runs, found none to summarise")
    if arguments.json:
        lines = ",\n".join(json.dumps(record) for record in records)
        Path(arguments.json).write_text(f"[\n{lines}\n]\n")
    summaries = evaluate.summarise(records)
    tuned = tuple(evaluate.baselines())
    tables = format_table(summaries), format_against_tuned(records, tuned), format_tasks(records)
    print(*tables, sep="\n\n")
    if arguments.plot:
        plot_speed_ups(summaries, tuned, Path(arguments.plot))
    return 0


def format_table(summaries: Sequence[Any]) -> str:
    """The summaries as a Markdown table."""
    lines = [
        "| steps | optimizer | tasks | speed-up over tuned adamw (interquartile mean, 95%) "
        "| the same, to stay | at or below adamw | training loss / adamw's "
        "| validation loss / adamw's | diverged |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in summaries:
        lines.append(
            f"| {s.horizon} | {s.optimizer} | {s.tasks} | {s.speed_up:.2f} "
            f"({s.low:.2f} to {s.high:.2f}) | {s.lasting:.2f} | {s.wins:.0%} | {s.train_ratio:.3g} "
            f"| {s.valid_ratio:.3g} | {s.diverged} |"
        )
    return "\n".join(lines)


def format_tasks(records: Sequence[Any]) -> str:
    """Mean final validation (and training) losses, a Markdown table a horizon.

    Optimizers are rows and tasks are columns; validation losses are in bold where they are below
    adamw's.
    """
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    tasks = sorted({record["task"] for record in records})
    cells: dict[tuple[int, str, str], list[Any]] = {}
    for record in records:
        key = record["horizon"], record["optimizer"], record["task"]
        cells.setdefault(key, []).append(record)

    def mean(rows: Sequence[Any], field: str) -> float:
        values = [math.inf if row[field] is None else row[field] for row in rows]
        return sum(values) / len(values) if values else math.nan

    tables = []
    for horizon in sorted({horizon for horizon, _, _ in cells}):
        lines = [f"| {horizon} steps | " + " | ".join(tasks) + " |",
                 "| --- |" + " ---: |" * len(tasks)]  # fmt: skip
        for optimizer in optimizers:
            texts = []
            for task in tasks:
                rows = cells.get((horizon, optimizer, task), [])
                valid = mean(rows, "valid_loss")
                text = f"{valid:.4g}"
                if valid < mean(cells.get((horizon, "adamw", task), []), "valid_loss"):
                    text = f"**{text}**"
                texts.append(f"{text} ({mean(rows, 'train_loss'):.2g})" if rows else "not run")
            lines.append(f"| {optimizer} | " + " | ".join(texts) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def format_against_tuned(records: Sequence[Any], tuned: Sequence[str]) -> str:
    """Mean final validation losses as a Markdown table: tuned adamw's, the others' best, the rest.

    Args:
      records: of `evaluate.make_records`.
      tuned: names of the optimizers with tuned rates; the rest has a column each, in bold where at
        or below adamw.
    """
    losses: dict[tuple[int, str], dict[str, list[float]]] = {}
    for record in records:
        row = losses.setdefault((record["horizon"], record["task"]), {})
        loss = math.inf if record["valid_loss"] is None else record["valid_loss"]
        row.setdefault(record["optimizer"], []).append(loss)
    rest = [n for n in dict.fromkeys(r["optimizer"] for r in records) if n not in tuned]
    lines = ["| task | steps | adamw | best of the other tuned ones | " + " | ".join(rest) + " |",
             "| --- | --- | --- | --- |" + " --- |" * len(rest)]  # fmt: skip
    for (horizon, task), row in sorted(losses.items()):
        means = {name: sum(values) / len(values) for name, values in row.items()}
        adamw = means.get("adamw", math.nan)
        others = {name: means[name] for name in tuned if name in means and name != "adamw"}
        best = "none"
        if others:
            name = min(others, key=lambda name: others[name])
            best = f"{others[name]:.4g} ({name}, of {len(others)})"
        cells = []
        for name in rest:
            text = f"{means[name]:.4g}" if name in means else "not run"
            cells.append(f"**{text}**" if means.get(name, math.nan) <= adamw else text)
        lines.append(f"| {task} | {horizon} | {adamw:.4g} | {best} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_speed_ups(summaries: Sequence[Any], tuned: Sequence[str], path: Path) -> None:
    """Each optimizer's speed-up with its interval, and the one to stay; one panel a horizon.

    Args:
      summaries: of `evaluate.summarise`.
      tuned: names of the optimizers with tuned rates; the rest has another colour.
      path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    horizons = sorted({s.horizon for s in summaries})
    most = max(s.tasks for s in summaries)
    figure, axes = plt.subplots(
        1, len(horizons), figsize=(4.6 * len(horizons), 5), layout="constrained", squeeze=False
    )
    for axis, horizon in zip(axes[0], horizons, strict=True):
        rows = sorted((s for s in summaries if s.horizon == horizon), key=lambda s: s.speed_up)
        for place, s in enumerate(rows):
            color = "tab:blue" if s.optimizer in tuned else "tab:red"
            axis.plot([s.low, s.high], [place, place], color=color, linewidth=2)
            axis.plot(s.speed_up, place, "o", color=color)
            axis.plot(s.lasting, place, "o", color=color, markerfacecolor="white", zorder=1)
        # Means over fewer tasks are of other tasks, and say so.
        labels = [s.optimizer if s.tasks == most else f"{s.optimizer} ({s.tasks})" for s in rows]
        axis.set_yticks(range(len(rows)), labels)
        for label, s in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_color("black" if s.optimizer in tuned else "tab:red")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.set_title(f"{horizon:,} steps, {most} tasks")
        axis.set_xlabel("speed-up over adamw (hollow: to stay)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lopt_jax.meta.cli meta-train ...`: as `lopt meta-train ...`."""
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
