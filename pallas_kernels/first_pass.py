"""Pass A: sums of g² along rows and columns, and of p²."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import Rule
from pallas_kernels import early, mosaic
from pallas_kernels.plan import Plan, group_of, place_of, tile_of
from pallas_kernels.programs import Registers, split, store_sums, sums_of_programs, walk


class FirstSums(NamedTuple):
    """Sums of pass A, every program's. Of parts of several shapes sizes are the largest.

    What lies beyond a part's own is never written.
    """

    down: jax.Array | None  # (all groups, middle, strips, down rounded up): of g² across a strip
    across: jax.Array | None  # (all groups, middle, chunks, across rounded up): of g² down a chunk
    parameter: jax.Array | None  # (tensors, 1, programs and threads): of p²


@mosaic.compiled_apart(static_argnums=(0, 1))
def first_sums(
    plan: Plan,
    rule: Rule,
    gradients: Sequence[jax.Array],
    parameters: Sequence[jax.Array] | None,
) -> FirstSums:
    """Pass A.

    Args:
      plan: the plan.
      rule: the rule.
      gradients: of each part, arranged as the plan's view does.
      parameters: the same; None: their squares are not summed.

    Returns:
      The sums, of all parts.
    """
    view = plan.view
    parts: list[tuple[jax.Array, ...]] = [(g,) for g in gradients]
    if parameters is not None:
        parts = [(g, p) for g, p in zip(gradients, parameters, strict=True)]
    down_size = max(v.tiles_down for v in plan.views) * view.rows
    strips, chunks = max(plan.strips), max(plan.chunks)
    registers = Registers(plan)
    groups = plan.parts * plan.groups
    outputs = [
        jax.ShapeDtypeStruct((groups, view.middle, strips, down_size), jnp.float32),
        jax.ShapeDtypeStruct((groups, view.middle, chunks, strips * view.width), jnp.float32),
        sums_of_programs(plan, 1, registers.step),
    ]

    def body(program: Any, *refs: Any) -> None:
        inputs, others = split(refs, parts)
        down_out, across_out, parameter_out, *buffers, arrived = others
        place = place_of(plan, program)
        of_part = mosaic.any_of(inputs, place.part)

        def start(tile: Any, slot: Any) -> None:
            def start_part(sources: Any) -> None:
                for source, target in zip(sources, buffers, strict=True):
                    mosaic.copy_in(
                        source.at[tile_of(plan, place, tile)], target.at[slot], arrived.at[slot]
                    )

            of_part(start_part)

        def consume(tile: Any, slot: Any, carry: Any) -> Any:
            def take(row: Any, carry: Any) -> Any:
                across, squares = carry
                g = rules.prepare_gradient(rule, registers.load(buffers[0], slot, row))
                squared = jnp.square(g)
                rows = pl.ds(tile * view.rows + row, plan.block_rows)
                target = down_out.at[group_of(plan, place), place.middle, place.strip, rows]
                mosaic.store(target, jnp.sum(squared, axis=1), optimized=False)
                if parameters is not None:
                    p = registers.load(buffers[1], slot, row).astype(jnp.float32)
                    squares = squares + registers.fold(jnp.square(p))
                return across + registers.fold(squared), squares

            carry = registers.each_block(take, carry)
            mosaic.synchronize()
            return carry

        across, squares = walk(
            plan, place, start, lambda: consume, arrived, (registers.zeros(), registers.zeros())
        )
        columns = pl.ds(place.strip * view.width, view.width)
        target = across_out.at[group_of(plan, place), place.middle, place.chunk, columns]
        mosaic.store(target, jnp.sum(across, axis=0), optimized=False)
        store_sums(plan, place, parameter_out, [squares])

    down, across, squares = early.call(
        body,
        jax.tree.leaves(parts),
        programs=plan.programs,
        outputs=outputs,
        scratch=[
            *(mosaic.shared((plan.stages, *plan.tile), x.dtype) for x in parts[0]),
            mosaic.barrier(len(parts[0]), plan.stages),
        ],
        name="lopt_first_pass",
    )
    return FirstSums(down, across, None if parameters is None else squares)
