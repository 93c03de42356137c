"""Fills the tables and sentences of the pages that are made from records; it measures nothing.

    python benchmarks/report.py           # after a record in docs/benchmarks has changed
    python benchmarks/report.py --check   # says which pages differ from the records

A piece begins with a line `<!-- made from records: NAME -->` and ends with `<!-- end -->`.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gallery
import quirks
import sharded_step

from lopt_jax import benchmark
from lopt_jax.compiler.quirks import QUIRKS, SEEN_ON
from lopt_jax.meta.scale import report, suite

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "index",
            "choosing",
            "performance",
            "gallery",
            "scale",
            "design/compiled",
            "design/quirks",
        )
    ),
)
RECORDS = ROOT / "docs" / "benchmarks"
MATRICES = "step_time_matrices_h200.json"
PIECE = re.compile(r"(<!-- made from records: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)


def steps(file: str, model: str) -> str:
    """The table of one model's records."""
    return benchmark.markdown([r for r in read(file) if r.model == model])


def read(file: str) -> list[benchmark.Record]:
    return benchmark.read_records(RECORDS / file)


def two_gpus() -> str:
    """The newest run's records of the sharded step."""
    records: list[dict[str, Any]] = json.loads((RECORDS / "sharding_h200.json").read_text())
    newest = max(r["run"] for r in records)
    chosen = [r for r in records if r["run"] == newest]
    first = chosen[0]
    title = f"{first['device']}, jax {first['jax']}, {first['dtype']}, {first['date']}"
    return f"{title}\n\n{sharded_step.table(chosen)}"


_COMPILED = {  # columns of what was compiled ahead of time
    "main_bytes": "bytes",
    "on_chip_bytes": "on-chip bytes",
    "xla_bytes": "XLA's count",
    "flops": "operations",
    "temporary_mb": "temporary MB",
    "fusions": "fusions",
    "launches": "launches",
    "compile_processor_s": "compile, processor s",
}


def ahead_of_time(model: str) -> str:
    """What updates of a model do, compiled for devices that were not there."""
    rows = json.loads((RECORDS / "ahead_of_time.json").read_text())
    rows = [row for row in rows if row["model"] == model]
    versions = {
        f"{name} {row[name]}"
        for row in rows
        for name in ("jax", "libtpu", "nvidia-cuda-nvcc")
        if name in row
    }
    dates = sorted({row["date"] for row in rows})
    lines = [
        f"{', '.join(sorted(versions))}, {' and '.join(dates)}",
        "",
        "| target | optimizer | " + " | ".join(_COMPILED.values()) + " |",
        "| --- | --- |" + " ---: |" * len(_COMPILED),
    ]
    for row in rows:
        cells = [row[key] for key in _COMPILED] if "reason" not in row else [row["reason"]]
        cells += [None] * (len(_COMPILED) - len(cells))
        text = ["" if x is None else str(x).replace("|", "/") for x in cells]
        lines.append(f"| {row['target']} | {row['optimizer']} | {' | '.join(text)} |")
    return "\n".join(lines)


def quirks_known() -> str:
    """The quirks, as the library has them."""
    lines = [
        "| quirk | what XLA would do | what was measured | where |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| `{k}` | {q.why} | {q.gain} | `{q.where}` |" for k, q in QUIRKS.items()]
    return f"Measured with {SEEN_ON}.\n\n" + "\n".join(lines)


def quirks_gained() -> str:
    """What each quirk gains on CPUs."""
    records = [quirks.Record(**x) for x in json.loads((RECORDS / "quirks_cpu.json").read_text())]
    title = f"{records[0].device}, two cores, jax {records[0].jax}, {records[0].date}"
    return "\n".join([title, "", quirks.HEADER, *map(quirks.row, records)])


def scale_records() -> list[Mapping[str, Any]]:
    """The records of the scale suite, of optimizers as they are now."""
    return suite.current(suite.read_records(ROOT / suite.RECORDS))


def scale() -> str:
    """The table of the scale suite, without what `lopt` has not been run on."""
    records = scale_records()
    run = {(r["task"], r["steps"]) for r in records if r["optimizer"] == "lopt"}
    return report.table([r for r in records if (r["task"], r["steps"]) in run])


def scale_all() -> str:
    """The whole table of the scale suite."""
    return report.table(scale_records())


def scale_multiples() -> str:
    """What multiples of `lopt`'s rate give in the scale suite."""
    return report.multiples(scale_records())


def times_adamw(records: list[benchmark.Record], model: str, optimizer: str) -> float:
    """Milliseconds of a step as a multiple of AdamW's."""
    ms = {r.optimizer: r.ms for r in records if r.model == model}
    return ms[optimizer] / ms["optax.adamw"]


def cost() -> str:
    """What a step costs, in two sentences."""
    cpu, gpu = read("train_step_cpu.json"), read("train_step_h200.json")
    of_mlp = {
        name: f"{times_adamw(cpu, 'mlp', name):.0f}"
        for name in ("lopt", "optax.contrib.muon", "velo")
    }
    of_velo = [
        f"{times_adamw(gpu, model, 'velo'):.2f} on {name}"
        for model, name in (("gpt2_355m", "GPT-2 355M"), ("vit_b16", "ViT-B/16"))
    ]
    return (
        f"A whole training step, as a multiple of one with AdamW: on two CPU cores, for an MLP of "
        f"0.67M parameters, {of_mlp['lopt']} with `lopt`, {of_mlp['optax.contrib.muon']} with Muon "
        f"and {of_mlp['velo']} with VeLO; on one {gpu[0].device}, "
        f"{' and '.join(of_velo)} with VeLO (`python benchmarks/train_step.py`, {cpu[0].date} and "
        f"{gpu[0].date}). {update_cost()}"
    )


def update_cost() -> str:
    """What an update of `lopt` costs on a GPU, beside Muon's, in a sentence."""
    records = {r.optimizer: r for r in read(MATRICES)}
    lopt, muon = records["lopt"], records["optax.contrib.muon"]
    return (
        f"An update of `lopt` alone keeps an {lopt.device} busy for {lopt.busy_ms:.0f} ms on GPT-2 "
        f"355M, {lopt.busy_ms / muon.busy_ms:.2f} times as long as `optax.contrib.muon`'s "
        f"(`lopt bench`, {lopt.date})."
    )


def gallery_how() -> str:
    """On what the gallery's records were made."""
    first = gallery.read()[0]
    return (
        f"Two cores of a {first['device'].upper()}, jax {first['jax']}, {first['date']}, "
        f"{gallery.SEEDS} seeds."
    )


def scale_summary() -> str:
    """How far `lopt` is from the usual optimizers in the scale suite, in a few sentences."""
    cells = report.cells(scale_records())
    by_name = {(c.task, c.steps, c.optimizer): c for c in cells}
    ours = [c for c in cells if c.optimizer == "lopt"]

    def below(steps: int, usual: str) -> str:
        pairs = [(c, by_name.get((c.task, steps, usual))) for c in ours if c.steps == steps]
        percent = sorted(100 * (1 - c.mean / other.mean) for c, other in pairs if other)
        if not percent:
            return ""
        whose = {"adamw": "AdamW's", "muon": "Muon's"}[usual]
        worst, best = percent[0], percent[-1]
        low, high = (f"{abs(x):.0f}" if abs(x) >= 0.95 else f"{abs(x):.1f}" for x in (worst, best))
        if worst < 0 < best:
            return f"{high}% below to {low}% above {whose}"
        where = "above" if best < 0 else "below"
        return f"{low}% {where} {whose}" if low == high else f"{low}% to {high}% {where} {whose}"

    def at(steps: int) -> str:
        known = filter(None, (below(steps, usual) for usual in ("adamw", "muon")))
        return f"At {steps:,} steps its loss is {' and '.join(known)} at their best rates."

    sizes = sorted({round(c.record["parameters"] / 1e6) for c in ours})
    single = sum(len(c.losses) == 1 for c in ours)
    return (
        f"`lopt` was run on models of {sizes[0]}M to {sizes[-1]}M parameters. "
        f"{' '.join(map(at, sorted({c.steps for c in ours})))} {single} of these {len(ours)} "
        "results have one seed. The rest of the suite has not been run."
    )


def small_losses() -> dict[tuple[str, int, str], float]:
    """Final losses on the small held-out tasks by task, steps and optimizer; means over seeds."""
    losses: dict[tuple[str, int, str], list[float]] = {}
    for r in json.loads((RECORDS / "meta_eval.json").read_text()):
        if r["optimizer"] in ("adamw", "muon"):
            key = (r["task"], r["horizon"], r["optimizer"])
            losses.setdefault(key, []).append(r["valid_loss"])
    means = {key: sum(x) / len(x) for key, x in losses.items()}
    ours = json.loads((RECORDS / "small_lopt.json").read_text())
    return means | {(r["task"], r["steps"], "lopt"): r["valid"] for r in ours}


def small_wins(losses: dict[tuple[str, int, str], float], usual: str) -> dict[int, int]:
    """By the number of steps, on how many small tasks `lopt` is at or below another."""
    wins: dict[int, int] = {}
    for (task, steps, name), loss in losses.items():
        if name == "lopt":
            wins[steps] = wins.get(steps, 0) + (loss <= losses[task, steps, usual])
    return dict(sorted(wins.items()))


def small() -> str:
    """On how many small held-out tasks `lopt` is at or below tuned AdamW."""
    losses = small_losses()
    counts = [f"{n} at {steps:,} steps" for steps, n in small_wins(losses, "adamw").items()]
    tasks = {task for task, _, name in losses if name == "lopt"}
    return (
        f"On {len(tasks)} small held-out tasks `lopt` is at or below tuned AdamW on "
        f"{', '.join(counts)}: it loses where few examples are seen hundreds of times."
    )


def small_table() -> str:
    """Losses of `lopt`, AdamW and Muon on the small held-out tasks."""
    losses = small_losses()
    ours = json.loads((RECORDS / "small_lopt.json").read_text())
    marks = {(r["task"], r["steps"]): f" ({r['seeds']})" if r["seeds"] != 5 else "" for r in ours}
    horizons = sorted({r["steps"] for r in ours})
    titles = ["task", *(f"{h:,}: lopt | AdamW | Muon" for h in horizons)]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: | ---: | ---: |" * len(horizons)]
    for task in sorted({r["task"] for r in ours}):
        cells = [task]
        for h in horizons:
            lopt, adamw, muon = (losses[task, h, name] for name in ("lopt", "adamw", "muon"))
            text = f"**{lopt:.3g}**" if lopt <= adamw else f"{lopt:.3g}"
            cells += [text + marks[task, h], f"{adamw:.3g}", f"{muon:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    of = lambda usual: " / ".join(map(str, small_wins(losses, usual).values()))  # noqa: E731
    lines += [
        "",
        f"At or below AdamW on {of('adamw')} of {len(lines) - 2} tasks, at or below Muon on "
        f"{of('muon')}.",
    ]
    return "\n".join(lines)


def noise_free() -> str:
    """Losses of `lopt` and of AdamW's best rate where there is nothing to regularise."""
    best = {
        (r["task"], r["optimizer"]): min(r["valid"])
        for r in json.loads((RECORDS / "noise_free.json").read_text())
    }
    lines = ["| task | lopt | AdamW | lopt / AdamW |", "| --- | ---: | ---: | ---: |"]
    for task in dict.fromkeys(task for task, _ in best):
        lopt, adamw = best[task, "lopt"], best[task, "adamw"]
        lines.append(f"| {task} | {lopt:.3g} | {adamw:.3g} | {lopt / adamw:.2f} |")
    return "\n".join(lines)


PIECES: dict[str, Callable[[], str]] = {
    "cost": cost,
    "scale": scale,
    "scale-all": scale_all,
    "scale-multiples": scale_multiples,
    "scale-summary": scale_summary,
    "small": small,
    "small-table": small_table,
    "noise-free": noise_free,
    "update-matrices": lambda: steps(MATRICES, "gpt2_355m"),
    "update-gpt2": lambda: steps("step_time_h200.json", "gpt2_355m"),
    "update-vit": lambda: steps("step_time_h200.json", "vit_b16"),
    "update-mlp": lambda: steps("step_time_h200.json", "mlp"),
    "update-cpu": lambda: steps("step_time_cpu.json", "mlp"),
    **{
        f"compiled-{model.split('_')[0]}": functools.partial(ahead_of_time, model)
        for model in ("4m", "67m", "vit_b16")
    },
    "train": lambda: benchmark.markdown(read("train_step_h200.json")),
    "two-gpus": two_gpus,
    "train-cpu": lambda: benchmark.markdown(read("train_step_cpu.json")),
    "quirks": quirks_known,
    "quirks-cpu": quirks_gained,
    "gallery": lambda: gallery.table(gallery.read()),
    "gallery-how": gallery_how,
}


def filled(text: str) -> str:
    """The page with its pieces made anew."""
    return PIECE.sub(lambda found: f"{found[1]}\n{PIECES[found[2]]()}\n\n{found[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where pages differ")
    check = parser.parse_args().check
    differing = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        if (new := filled(text)) != text:
            differing.append(page)
            if not check:
                (ROOT / page).write_text(new)
    for page in differing:
        print(f"{page}: {'differs from the records' if check else 'written'}")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
