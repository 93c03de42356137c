"""Times each pass of the fused kernels by itself, against a plain copy.

Run on a Hopper GPU: python -m benchmarks.kernel_passes. Prints, for each shape and pass, milliseconds,
bytes a second (each input read once, each output written once) and the fraction of a copy's.
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
from lopt_jax.features import small_fc_features, velo_features
from lopt_jax.rule import Rule
from pallas_kernels import step, table
from pallas_kernels.passes import Inputs, Table
from pallas_kernels.view import View

SHAPES = ((8192, 8192), (50257, 1024), (4096, 1024))
L2_BYTES = 60 << 20


def seconds(function: Callable, arguments: Sequence[Any], repeats: int = 7) -> float:
    """Median seconds of a compiled function that takes many milliseconds, or of many calls."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sets_for(shape: tuple[int, ...]) -> int:
    """Number of copies of the arrays of a pass: together well over the L2, and milliseconds long."""
    return max(2, min(16, (1 << 28) // math.prod(shape)))


def tensors(shape: tuple[int, ...], count: int, seed: int = 0) -> list[step.Part]:
    """Random tensors with their accumulators."""

    @jax.jit
    def make(key: jax.Array) -> step.Part:
        keys = jax.random.split(key, 6)
        normal = lambda k, scale: scale * jax.random.normal(k, (1, *shape), jnp.float32)  # noqa: E731
        return step.Part(
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


def small_fc_rule() -> Rule:
    """small_fc_lopt's rule."""
    return Rule(features=small_fc_features())


def make_inputs(
    view: View, rule: Rule, part: step.Part, hidden: int, seed: int = 1
) -> tuple[Inputs, Any, Inputs, Table]:
    """Inputs of passes B and C, and the entries of their tables."""
    key = iter(jax.random.split(jax.random.key(seed), 20))
    normal = lambda *shape: jax.random.normal(next(key), shape, jnp.float32)  # noqa: E731
    decays = Decays(
        jnp.full((1, 3), 0.9), jnp.full((1,), 0.999), jnp.asarray([[0.9, 0.99, 0.999]])
    )
    count = sum(f.varies == "element" for f in rule.features.factored)
    numbers = Table(
        decays=decays,
        weights=0.3 * normal(1, count, hidden),
        bias=(),
        layers=(
            (0.3 * normal(1, hidden, hidden), normal(1, hidden)),
            (0.3 * normal(1, 2, hidden), normal(1, 2)),
        ),
        scale=jnp.ones((1,)),
        weight_decay=jnp.zeros((1,)),
        centres=jnp.zeros((1, 4)) if rule.accumulator_statistics else (),
    )
    elements = step._elements(view, part)
    down = lambda n: jnp.abs(normal(1, 1, n, view.tiles_down * view.rows))  # noqa: E731
    across = lambda n: jnp.abs(normal(1, 1, n, view.strips * view.width))  # noqa: E731
    rates, rate_entries = table.pack(decays, 1)
    packed, entries = table.pack(numbers, 1)
    first = jnp.zeros((1,), jnp.int32)
    vectors = -(-(3 + hidden) // 8) * 8
    return (
        Inputs(elements, rates, down(8), across(8), first),
        rate_entries,
        Inputs(elements, packed, down(vectors), across(vectors), first),
        entries,
    )


def time_pass(
    name: str,
    shape: tuple[int, ...],
    *,
    rule: Rule,
    hidden: int = 4,
    parts: list[step.Part] | None = None,
    rows: int | None = None,
    width: int | None = None,
    **plan_changes: Any,
) -> tuple[float, float]:
    """Milliseconds of a pass over one tensor, and the bytes that it moves.

    Args:
      name: "A", "B" or "C".
      shape: the tensor's.
      rule: the rule.
      hidden: units of a hidden layer.
      parts: tensors of this shape, to save making them.
      rows, width: of a tile; None: as the kernels choose.
      **plan_changes: fields of `Plan` to replace.

    Returns:
      Milliseconds and bytes.
    """
    parts = parts or tensors(shape, sets_for(shape))
    is_wide = hidden >= 16
    view = {
        "A": step.first_view(shape),
        "B": step.sums_view(shape),
        "C": step.update_view_of(shape, is_wide),
    }[name]
    if rows or width:
        view = replace(view, rows=rows or view.rows, width=width or view.width)
    elements = math.prod(shape)
    stages = {"A": 4, "B": 2, "C": 3}[name]
    plan = step.plan_for(view, 1, stages, is_wide=is_wide and name == "C", backwards=name == "C")
    if not plan_changes.get("block_rows") and rows and hidden < 16:
        plan = replace(plan, block_rows=rows)
    plan = replace(plan, **plan_changes)
    interpreted = step.mosaic.is_interpreting()
    if name == "A":
        call = functools.partial(step._first_sums, plan, rule, interpreted)
        inputs: list[Any] = [(view.arrange(p.gradient), view.arrange(p.parameter)) for p in parts]
        function = jax.jit(lambda xs: [call(*x) for x in xs])
        size = 8
    else:
        made = [make_inputs(view, rule, p, hidden) for p in parts]
        if name == "B":
            entries, inputs = made[0][1], [m[0] for m in made]
            call = functools.partial(step._square_sums, plan, rule, entries, interpreted)
            function = jax.jit(lambda xs: [call(x) for x in xs])
            size = 24
        else:
            table_entries, inputs = made[0][3], [m[2] for m in made]
            call = functools.partial(step._update, plan, rule, table_entries, interpreted)
            size = 44
            return _time_update(call, inputs) / len(parts) * 1e3, size * elements
    return seconds(function, (inputs,)) / len(parts) * 1e3, size * elements


def _time_update(call: Callable, inputs: Sequence[Inputs], repeats: int = 7) -> float:
    """Seconds of pass C on all inputs; momentum and second moment are donated, as in training."""
    state = [(x.elements.momentum, x.elements.second_moment) for x in inputs]
    rest = [
        x._replace(elements=x.elements._replace(momentum=(), second_moment=None)) for x in inputs
    ]

    @functools.partial(jax.jit, donate_argnums=0)
    def function(state: Any, rest: Any) -> Any:
        out = [
            call(x._replace(elements=x.elements._replace(momentum=m, second_moment=v)))
            for (m, v), x in zip(state, rest, strict=True)
        ]
        new = [(o.elements.momentum, o.elements.second_moment) for o in out]
        return new, [(o.elements.gradient, o.sums) for o in out]

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, updates = jax.block_until_ready(function(state, rest))
        times.append(time.perf_counter() - start)
        del updates
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a device-to-device copy of two gigabytes."""
    x = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.float32)
    copy = jax.jit(lambda x: [jax.lax.optimization_barrier(x + 0.0 * i) for i in range(1, 5)])
    return 4 * 2 * x.nbytes / seconds(copy, (x,))


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
