"""What each quirk of `lopt_jax.compiler.quirks` gains: updates with it and without it, in one run.

JAX_PLATFORMS=cpu python benchmarks/quirks.py
python benchmarks/quirks.py --quirks slices turns --json quirks.json

Both programs are compiled for the device that jax sees, the first of them twice, so that what the
second compilation saves is not the quirk's. They take turns while they are timed. A quirk that
changes nothing on this device says so. docs/design/quirks.md has the table of the last run.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax import benchmark
from lopt_jax.applying import steering
from lopt_jax.compiler.quirks import QUIRKS
from lopt_jax.optimizers.rnn_mlp_lopt import rnn_mlp_lopt

TURNS = 7


@dataclass(frozen=True)
class Case:
    """An update that a quirk is about.

    Attributes:
      optimizer: its name.
      make: makes it.
      shapes: of the parameters.
      of: what the parameters are.
    """

    optimizer: str
    make: Callable[[], optax.GradientTransformation]
    shapes: benchmark.Shapes
    of: str


@dataclass(frozen=True)
class Record:
    """A quirk's row; "without": nothing is done about it."""

    quirk: str
    optimizer: str
    of: str
    changes: bool  # whether the two programs differ on this device
    compile_s: float
    compile_s_without: float
    temp_bytes: int
    temp_bytes_without: int
    ms: float
    ms_without: float
    device: str
    jax: str
    date: str


def _of_benchmark(name: str, backend: str = "auto") -> Callable[[], optax.GradientTransformation]:
    return lambda: benchmark.OPTIMIZERS[name].make(backend)


def _equal(count: int, shape: tuple[int, ...]) -> benchmark.Shapes:
    return {f"w_{i}": shape for i in range(count)}


_MLP = benchmark.mlp_shapes()
_RNN = lambda: rnn_mlp_lopt(benchmark.random_weights("rnn_mlp_lopt"))  # noqa: E731
CASES = {
    "shared_expressions": Case("velo", _of_benchmark("velo"), _MLP, "the MLP"),
    "row_factors": Case("velo", _of_benchmark("velo", "xla"), _MLP, "the MLP"),
    "unrolled_weights": Case(
        "small_fc_lopt_h32", _of_benchmark("small_fc_lopt_h32"), _MLP, "the MLP"
    ),
    "known_decays": Case("rnn_mlp_lopt", _RNN, {"w": (1024, 512)}, "one (1024, 512)"),
    "many_leaves": Case("velo", _of_benchmark("velo"), _equal(24, (128, 128)), "24 of (128, 128)"),
    "scattered_results": Case(
        "velo", _of_benchmark("velo"), _equal(24, (128, 128)), "24 of (128, 128)"
    ),
    "slices": Case("velo", _of_benchmark("velo"), _equal(24, (256, 256)), "24 of (256, 256)"),
    "turns": Case("velo", _of_benchmark("velo", "xla"), _equal(20, (512, 512)), "20 of (512, 512)"),
    "complex_products": Case("velo", _of_benchmark("velo"), _MLP, "the MLP"),
}


@dataclass
class Program:
    """A compiled update with its arguments."""

    text: str  # what XLA was given
    compile_s: float
    temp_bytes: int
    run: Callable[[], Any]


def program(tx: optax.GradientTransformation, shapes: benchmark.Shapes) -> Program:
    """Compiles an update, whose runs go on from its own state."""
    params = {k: jnp.ones(shape, jnp.float32) for k, shape in shapes.items()}
    gradients = {
        k: jax.random.normal(jax.random.key(i), shape)
        for i, (k, shape) in enumerate(shapes.items())
    }
    update = optax.with_extra_args_support(tx).update
    one = jnp.float32(1)
    step = jax.jit(lambda state, g, p: update(g, state, p, value=one), donate_argnums=0)
    states = [tx.init(params)]
    lowered = step.lower(states[0], gradients, params)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start

    def run() -> Any:
        updates, states[0] = compiled(states[0], gradients, params)
        return updates

    memory = compiled.memory_analysis()
    return Program(lowered.as_text(), seconds, memory.temp_size_in_bytes, run)


def seconds_of(run: Callable[[], Any], repetitions: int) -> float:
    """Seconds of one of some runs, one after another."""
    start = time.perf_counter()
    for _ in range(repetitions):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repetitions


def measure(quirk: str) -> Record:
    """Compiles and times a quirk's case with it and without it."""
    case = CASES[quirk]
    tx = case.make()
    program(tx, case.shapes)  # what a first compilation loads is loaded
    usual = program(tx, case.shapes)
    without = program(steering(tx, without=(quirk,)), case.shapes)
    first = max(seconds_of(p.run, 1) for p in (usual, without))  # they warm up, too
    repetitions = max(1, int(0.2 / first))
    turns = [[seconds_of(p.run, repetitions) for p in (usual, without)] for _ in range(TURNS)]
    ms, ms_without = (1e3 * statistics.median(x) for x in zip(*turns, strict=True))
    return Record(
        quirk=quirk,
        optimizer=case.optimizer,
        of=case.of,
        changes=usual.text != without.text,
        compile_s=usual.compile_s,
        compile_s_without=without.compile_s,
        temp_bytes=usual.temp_bytes,
        temp_bytes_without=without.temp_bytes,
        ms=ms,
        ms_without=ms_without,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        date=datetime.date.today().isoformat(),
    )


HEADER = (
    "| quirk | update | compile, s | without | temporaries, MB | without | ms a step | without |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def row(record: Record) -> str:
    """A row of the table."""
    update = f"{record.optimizer}, {record.of}"
    if not record.changes:
        return f"| {record.quirk} | {update} | the same program | | | | | |"
    numbers = (
        *(f"{x:.2f}" for x in (record.compile_s, record.compile_s_without)),
        *(f"{x / 1e6:.2f}" for x in (record.temp_bytes, record.temp_bytes_without)),
        *(f"{x:.2f}" for x in (record.ms, record.ms_without)),
    )
    return f"| {record.quirk} | {update} | {' | '.join(numbers)} |"


def main() -> None:
    """Prints the table, a row at a time, and writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quirks", nargs="+", choices=QUIRKS, default=list(QUIRKS), metavar="Q")
    parser.add_argument("--json", type=Path, help="where to write the records")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n{HEADER}", flush=True)
    records = []
    for quirk in options.quirks:
        records.append(measure(quirk))
        print(row(records[-1]), flush=True)
    if options.json is not None:
        text = json.dumps([dataclasses.asdict(x) for x in records], indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
