"""Fills the tables and sentences of the pages that are made from records; it measures nothing.

    python benchmarks/report.py           # after a record in docs/benchmarks has changed
    python benchmarks/report.py --check   # says which pages differ from the records

A piece begins with a line `<!-- made from records: NAME -->` and ends with `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gallery
import sharded_step

from lopt_jax import benchmark
from lopt_jax.meta.scale import report, suite

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/index.md", "docs/performance.md", "docs/gallery.md")
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


def scale() -> str:
    """The table of the scale suite."""
    return report.table(suite.current(suite.read_records(ROOT / suite.RECORDS)))


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
        f"Whole training steps, as multiples of AdamW's: on two CPU cores, for an MLP of 0.67M "
        f"parameters, {of_mlp['lopt']} with `lopt`, {of_mlp['optax.contrib.muon']} with Muon (both "
        f"iterate on matrices) and {of_mlp['velo']} with VeLO; on one {gpu[0].device}, "
        f"{' and '.join(of_velo)} with VeLO (`python benchmarks/train_step.py`, {cpu[0].date} and "
        f"{gpu[0].date}). A step of `lopt` on a GPU is not in these records yet."
    )


def gallery_how() -> str:
    """On what the gallery's records were made."""
    first = gallery.read()[0]
    return (
        f"Two cores of a {first['device'].upper()}, jax {first['jax']}, {first['date']}, "
        f"{first['steps']} steps, {gallery.SEEDS} seeds."
    )


PIECES: dict[str, Callable[[], str]] = {
    "cost": cost,
    "scale": scale,
    "update-gpt2": lambda: steps("step_time_h200.json", "gpt2_355m"),
    "update-vit": lambda: steps("step_time_h200.json", "vit_b16"),
    "update-mlp": lambda: steps("step_time_h200.json", "mlp"),
    "update-cpu": lambda: steps("step_time_cpu.json", "mlp"),
    "train": lambda: benchmark.markdown(read("train_step_h200.json")),
    "two-gpus": two_gpus,
    "train-cpu": lambda: benchmark.markdown(read("train_step_cpu.json")),
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
