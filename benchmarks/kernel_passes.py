"""Times each pass of the fused kernels by itself, against a plain copy.

Run on a Hopper GPU: python -m benchmarks.kernel_passes. Prints, for each shape and pass, the
milliseconds that the kernel runs, bytes a second (each input read once, each output written once)
and the fraction of a copy's. Times are the profiler's: launches can take longer than small kernels.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Accumulators, Decays
from lopt_jax.benchmark import gpu_events
from lopt_jax.features import small_fc_features, velo_features
from lopt_jax.rules.rule import Rule
from pallas_kernels import matrix_units, table, tuning
from pallas_kernels.first_pass import first_sums
from pallas_kernels.lines import PIECE, pieces
from pallas_kernels.operands import First, Inputs
from pallas_kernels.sums_pass import Rates, square_sums
from pallas_kernels.units import Part, elements_of
from pallas_kernels.update_pass import Table, update
from pallas_kernels.view import View

SHAPES = ((8192, 8192), (50257, 1024), (4096, 1024))


def seconds(function: Callable[[], Any], name: str, repeats: int = 5) -> float:
    """Median seconds that the kernels whose names contain `name` run."""
    jax.block_until_ready(function())
    events = gpu_events(lambda: [jax.block_until_ready(function()) for _ in range(repeats)])
    durations = [1e-9 * (event.end - event.start) for event in events if name in event.name]
    return statistics.median(durations)


def sets_for(shape: tuple[int, ...]) -> int:
    """Number of copies of the arrays of a pass: together well over the L2."""
    return max(2, min(16, (1 << 28) // math.prod(shape)))


def tensors(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Part]:
    """Random tensors with their accumulators."""

    @jax.jit
    def make(key: jax.Array) -> Part:
        keys = jax.random.split(key, 6)
        normal = lambda k, scale: scale * jax.random.normal(k, (1, *shape), jnp.float32)  # noqa: E731
        return Part(
            gradient=normal(keys[0], 0.1),
            parameter=normal(keys[1], 1.0),
            accumulators=Accumulators(
                momentum=tuple(normal(k, 0.1) for k in keys[2:5]),
                second_moment=jnp.square(normal(keys[5], 0.1)),
                row=jnp.zeros((1, 3, 1)),
                column=jnp.zeros((1, 3, 1)),
            ),
        )

    return [make(k) for k in jax.random.split(jax.random.key(seed), count)]


def velo_rule() -> Rule:
    """VeLO's rule."""
    return Rule(
        features=velo_features(),
        gradient_clip=1000.0,
        parameter_scale=True,
        accumulator_statistics=True,
    )


def small_fc_rule(precision: str = "highest") -> Rule:
    """small_fc_lopt's rule."""
    return Rule(features=small_fc_features(), precision=jax.lax.Precision(precision))


def make_inputs(
    view: View, rule: Rule, part: Part, hidden: int, seed: int = 1
) -> tuple[Inputs, Any, Inputs, Table]:
    """Inputs of passes B and C, and the entries of their tables."""
    key = iter(jax.random.split(jax.random.key(seed), 100))
    normal = lambda *shape: jax.random.normal(next(key), shape, jnp.float32)  # noqa: E731
    decays = Decays(jnp.full((1, 3), 0.9), jnp.full((1,), 0.999), jnp.asarray([[0.9, 0.99, 0.999]]))
    count = sum(f.varies == "element" for f in rule.features.factored)
    weights = 0.3 * normal(1, count, hidden)
    layers = (
        (0.3 * normal(1, hidden, hidden), normal(1, hidden)),
        (0.3 * normal(1, 2, hidden), normal(1, 2)),
    )
    across_start = pieces(view.down) * PIECE
    size = across_start + pieces(view.across) * PIECE
    matrices = None
    if tuning.uses_matrix_units(rule, hidden):
        packed = matrix_units.pack(jnp.swapaxes(weights, 1, 2), layers)
        biases = matrix_units.pack_biases(normal(hidden, size))
        starts = (jnp.full((1,), n, jnp.int32) for n in (0, across_start))
        matrices = matrix_units.Matrices(*packed, biases, *starts)
    numbers = Table(
        decays=decays,
        weights=weights if matrices is None else None,
        bias=(),
        layers=layers if matrices is None else layers[-1][1],
        scale=jnp.ones((1,)),
        weight_decay=jnp.zeros((1,)),
        centres=jnp.zeros((1, 4)) if rule.accumulator_statistics else (),
    )
    elements = elements_of(view, part)
    rounded = lambda n: -(-n // view.vector_unit) * view.vector_unit  # noqa: E731
    lines = lambda n: jnp.abs(normal(rounded(n), size))  # noqa: E731
    rates, rate_entries = table.pack(Rates(decays), 1)
    numbers_packed, entries = table.pack(numbers, 1)
    number = lambda n: jnp.full((1,), n, jnp.int32)  # noqa: E731
    first = First(number(0), number(0), number(across_start))
    vectors = 3 if matrices is not None else 3 + hidden
    return (
        Inputs([elements], rates, lines(3), first),
        rate_entries,
        Inputs([elements], numbers_packed, lines(vectors), first, matrices),
        entries,
    )


def time_pass(
    name: str,
    shape: tuple[int, ...],
    *,
    rule: Rule,
    hidden: int = 4,
    parts: list[Part] | None = None,
    **changes: Any,
) -> tuple[float, float]:
    """Milliseconds of a pass over one tensor, and the bytes that it moves.

    Args:
      name: "A", "B" or "C".
      shape: the tensor's.
      rule: the rule.
      hidden: units of a hidden layer.
      parts: tensors of this shape, to save making them.
      **changes: fields of the pass's `Tuning` to replace.

    Returns:
      Milliseconds and bytes.
    """
    parts = parts or tensors(shape, sets_for(shape))
    defaults = {"A": tuning.FIRST, "B": tuning.SUMS, "C": tuning.update_tuning(rule, hidden)}
    chosen = replace(defaults[name], **changes)
    view = tuning.view_for(shape, chosen)
    elements = math.prod(shape)
    plan = tuning.plan_for((view,), 1, chosen, backwards=name == "C")
    if name == "A":
        arranged = lambda x: (view.arrange(x),)  # noqa: E731
        inputs: list[Any] = [(arranged(p.gradient), arranged(p.parameter)) for p in parts]
        function = jax.jit(lambda xs: [first_sums(plan, rule, *x) for x in xs])
        return seconds(lambda: function(inputs), "lopt_first_pass") * 1e3, 8 * elements
    made = [make_inputs(view, rule, p, hidden) for p in parts]
    if name == "B":
        inputs = [m[0] for m in made]
        function = jax.jit(lambda xs: [square_sums(plan, rule, x, made[0][1]) for x in xs])
        return seconds(lambda: function(inputs), "lopt_square_sums") * 1e3, 24 * elements
    run = _updates(lambda x: update(plan, rule, x, made[0][3]), [m[2] for m in made])
    return seconds(run, "lopt_update") * 1e3, 44 * elements


def _updates(call: Callable, inputs: Sequence[Inputs]) -> Callable[[], Any]:
    """Pass C on all inputs; momentum and second moment are donated, as in training."""
    state = [(x.elements[0].momentum, x.elements[0].second_moment) for x in inputs]
    rest = [
        x._replace(elements=[x.elements[0]._replace(momentum=(), second_moment=None)])
        for x in inputs
    ]

    @functools.partial(jax.jit, donate_argnums=0)
    def function(state: Any, rest: Any) -> Any:
        out = [
            call(x._replace(elements=[x.elements[0]._replace(momentum=m, second_moment=v)]))
            for (m, v), x in zip(state, rest, strict=True)
        ]
        new = [(o.elements[0].momentum, o.elements[0].second_moment) for o in out]
        return new, [(o.elements[0].gradient, o.sums) for o in out]

    def run() -> Any:
        nonlocal state
        state, updates = function(state, rest)
        return updates

    return run


def copy_bandwidth(repeats: int = 10) -> float:
    """Bytes a second, read plus written, of copies of two gigabytes."""
    x = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.float32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([copy(x) for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return 2 * x.nbytes / statistics.median(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=4)
    hidden = parser.parse_args().hidden
    copy = copy_bandwidth()
    print(f"copy {copy / 1e12:.2f} TB/s")
    for shape in SHAPES:
        parts = tensors(shape, sets_for(shape))
        for name in "ABC":
            ms, size = time_pass(name, shape, rule=velo_rule(), hidden=hidden, parts=parts)
            rate = size / ms * 1e3
            print(f"{shape} {name} {ms:.3f} ms {rate / 1e12:.2f} TB/s {rate / copy:.0%}")


if __name__ == "__main__":
    main()
