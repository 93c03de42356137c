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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharded_step

from lopt_jax import benchmark
from lopt_jax.meta.scale import report, suite

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/design/compiled.md")
RECORDS = ROOT / "docs" / "benchmarks"
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


def others() -> str:
    """Other libraries' times."""
    records = json.loads((RECORDS / "others_h200.json").read_text())
    lines = ["| optimizer | GPT-2 355M, ms | ViT-B/16, ms |", "| --- | ---: | ---: |"]
    for r in records["milliseconds"]:
        cells = [r[model] if r[model] is not None else "" for model in ("gpt2_355m", "vit_b16")]
        lines.append(f"| {r['optimizer']} | {cells[0]} | {cells[1]} |")
    return f"{records['how']}\n\n" + "\n".join(lines)


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


def scale() -> str:
    """The table of the scale suite."""
    return report.table(suite.current(suite.read_records(ROOT / suite.RECORDS)))


def cost() -> str:
    """What a step costs, in a sentence."""
    train = {(r.model, r.optimizer): r for r in read("train_step_h200.json")}
    first = train["gpt2_355m", "velo"]
    ratios = [
        f"{train[model, 'velo'].ms / train[model, 'optax.adamw'].ms:.2f} times as long on {name}"
        for model, name in (("gpt2_355m", "GPT-2 355M"), ("vit_b16", "ViT-B/16"))
    ]
    return (
        f"A training step with VeLO takes {' and '.join(ratios)} as with AdamW (one "
        f"{first.device}, jax {first.jax}, {first.date}, `python benchmarks/train_step.py`)."
    )


PIECES: dict[str, Callable[[], str]] = {
    "cost": cost,
    "scale": scale,
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
    "others": others,
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
