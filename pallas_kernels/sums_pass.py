"""Pass B: sums of the squares of the features of elements."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Decays
from lopt_jax.rules.rule import Rule
from pallas_kernels import early, mosaic
from pallas_kernels.operands import Blockwise, Inputs, buffers_of, element_features, rates_of
from pallas_kernels.plan import Plan, place_of
from pallas_kernels.programs import masked, split, store_sums, sums_of_programs, walk
from pallas_kernels.table import read


class Rates(NamedTuple):
    """What pass B reads of a tensor, number by number."""

    decays: Decays
    length: Any = None  # (): elements, where tensors have different numbers of them


@mosaic.compiled_apart(static_argnums=(0, 1, 3))
def square_sums(plan: Plan, rule: Rule, inputs: Inputs, entries: Rates) -> jax.Array:
    """Pass B: sums of the squares of the element features, of the gradient and of its square.

    Args:
      plan: the plan.
      rule: the rule.
      inputs: vectors: the factors of each decay.
      entries: of the table.

    Returns:
      (tensors, element features + 2, programs and threads) float32.
    """
    features = element_features(rule, plan.view)
    kernel = Blockwise(plan, rule, entries.decays)
    registers = kernel.registers
    width = len(features) + 2

    def body(program: Any, *refs: Any) -> None:
        sources, (out, *others) = split(refs, inputs)
        buffers, arrived, once, _ = buffers_of(inputs, others)
        place = place_of(plan, program)
        of_part = mosaic.any_of([(x,) for x in sources.elements], place.part)
        start, start_constants = kernel.copies(place, of_part, sources, buffers, arrived, once)

        def consume(rates: Decays, length: Any, tile: Any, slot: Any, sums: tuple) -> tuple:
            def take(row: Any, sums: tuple) -> tuple:
                operands, _ = kernel.operands(buffers, slot, row, rates)
                inside = registers.inside(place, tile, row, length)
                values = [jnp.square(feature.formula(operands)) for feature in features]
                values += [operands.gradient, jnp.square(operands.gradient)]
                return tuple(
                    s + registers.fold(masked(inside, x)) for s, x in zip(sums, values, strict=True)
                )

            sums = registers.each_block(take, sums)
            mosaic.synchronize()
            return sums

        def prepare() -> Callable:
            start_constants()
            mosaic.barrier_wait(once)
            numbers = mosaic.scalars(buffers.table)
            return functools.partial(
                consume, rates_of(entries.decays, numbers), _number(entries.length, numbers)
            )

        sums = walk(plan, place, start, prepare, arrived, (registers.zeros(),) * width)
        store_sums(plan, place, out, sums)

    (out,) = early.call(
        body,
        jax.tree.leaves(inputs),
        programs=plan.programs,
        outputs=[sums_of_programs(plan, width, registers.step)],
        scratch=kernel.scratch(inputs),
        name="lopt_square_sums",
    )
    return out


def _number(entry: Any, table: Any) -> Any:
    return None if entry is None else read(entry, table)[()]
