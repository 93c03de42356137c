"""What a program does in every pass: it walks down a strip of tiles, and sums.

A program is one warpgroup. Copies of the next tiles into shared memory run while it computes. They
clip at the ends of the arrays, so no size needs padding; sums leave out what lies beyond the ends.

Sums are deterministic: every program writes its own, and they are added outside in a fixed order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.plan import Place, Plan, group_of, of_part


def walk(
    plan: Plan,
    place: Place,
    start: Callable[[Any, Any], None],
    prepare: Callable[[], Callable[[Any, Any, Any], Any]],
    arrived: Any,
    carry: Any,
) -> Any:
    """Goes over a program's tiles, keeping copies of the next ones in flight.

    Args:
      plan: the plan.
      place: the program's.
      start: (tile, slot) starts the copies of a tile into a slot of the buffers.
      prepare: called when the first copies are on their way; returns a function
        (tile, slot, carry) -> carry, by whose end no thread reads the slot any more, nor does a
        copy read the slot of the tile before.
      arrived: barriers, one a slot.
      carry: the first carry.

    Returns:
      The last carry.
    """
    tiles = of_part(place.part, plan.tiles)
    first = place.chunk * tiles
    tiles_down = of_part(place.part, [view.tiles_down for view in plan.views])
    count = jnp.minimum(tiles, tiles_down - first)
    tile_at = lambda i: first + (count - 1 - i if plan.backwards else i)  # noqa: E731
    ahead = plan.stages - 1

    def start_at(i: Any) -> None:
        @pl.when(i < count)
        def _() -> None:
            start(tile_at(i), jax.lax.rem(i, plan.stages))

    for i in range(ahead):
        start_at(jnp.int32(i))
    consume = prepare()

    def step(i: Any, carry: Any) -> Any:
        slot = jax.lax.rem(i, plan.stages)
        mosaic.barrier_wait(arrived.at[slot])
        carry = consume(tile_at(i), slot, carry)
        start_at(i + ahead)
        return carry

    return jax.lax.fori_loop(0, count, step, carry)


@dataclass(frozen=True)
class Registers:
    """Loads and sums of the blocks of a tile."""

    plan: Plan

    @functools.cached_property
    def layout(self) -> Any:
        """Which thread holds what of a block."""
        return mosaic.tile_layout(self.plan.view.width, self.plan.view.vector)[0]

    @functools.cached_property
    def step(self) -> int:
        """Rows that the threads cover at once."""
        return mosaic.tile_layout(self.plan.view.width, self.plan.view.vector)[1]

    def each_block(self, take: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Passes a carry through (row, carry) -> carry for every block of a tile."""
        rows, block = self.plan.view.rows, self.plan.block_rows
        if self.plan.loops:
            body = lambda i, carry: take(i * block, carry)  # noqa: E731
            return jax.lax.fori_loop(0, rows // block, body, carry)
        for row in range(0, rows, block):
            carry = take(row, carry)
        return carry

    def load(self, ref: Any, slot: Any, row: Any) -> jax.Array:
        """A block of a tile, from its row on."""
        return mosaic.load(ref.at[slot, pl.ds(row, self.plan.block_rows)], self.layout)

    def down(self, ref: Any, slot: Any, row: Any, k: int) -> jax.Array:
        """Vector k down the tile, the same in every column of the block."""
        rows = pl.ds(row, self.plan.block_rows)
        vector = mosaic.load(ref.at[slot, k, rows], self.layout.reduce(1), optimized=False)
        return mosaic.spread(vector, self.plan.block, 0, self.layout)

    def across(self, ref: Any, k: int) -> jax.Array:
        """Vector k across the strip, the same in every row of the block."""
        vector = mosaic.load(ref.at[k], self.layout.reduce(0), optimized=False)
        return mosaic.spread(vector, self.plan.block, 1, self.layout)

    def zeros(self) -> jax.Array:
        """What `fold` gives is added to."""
        return mosaic.constant(0.0, (self.step, self.plan.view.width), self.layout)

    def fold(self, x: jax.Array) -> jax.Array:
        """Adds up the rows that one thread holds."""
        parts = [x[i : i + self.step] for i in range(0, self.plan.block_rows, self.step)]
        return functools.reduce(jnp.add, parts)

    def inside(self, place: Place, tile: Any, row: Any, length: Any = None) -> jax.Array | None:
        """Which elements of a block lie in the tensor; None: all of them.

        Args:
          place: the program's.
          tile: where the block is.
          row: the same, in the tile.
          length: the tensor's elements, float32; None: as the view says.
        """
        view = self.plan.view
        position = lambda axis: mosaic.positions(self.plan.block, axis, self.layout)  # noqa: E731
        down = tile * view.rows + row
        lines, columns = position(0) + down, position(1) + place.strip * view.width
        if length is not None:
            return (lines * view.across + columns).astype(jnp.float32) < length
        if not view.is_factored:
            elements = math.prod(view.shape)
            if elements % (view.rows * view.across) == 0:
                return None
            full, rest = divmod(elements, view.across)
            return (lines < full) | ((lines == full) & (columns < rest))
        inside = None
        views, part = self.plan.views, place.part
        if any(v.down % v.rows for v in views):
            inside = lines < of_part(part, [v.down for v in views])
        if any(v.across % v.width for v in views):
            size = of_part(part, [v.across for v in views])
            inside = columns < size if inside is None else inside & (columns < size)
        return inside


def masked(inside: jax.Array | None, x: jax.Array) -> jax.Array:
    """Zero outside of the tensor."""
    return x if inside is None else jnp.where(inside, x, 0.0)


def sums_of_programs(plan: Plan, sums: int, step: int) -> jax.ShapeDtypeStruct:
    """What `store_sums` stores into; its last axis is left to be added up.

    Of a part whose tensors take fewer programs than others, the end of that axis is never written.
    """
    shape = (plan.parts * plan.tensors, sums, max(plan.programs_of_tensor) * step)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def store_sums(plan: Plan, place: Place, ref: Any, sums: Sequence[jax.Array]) -> None:
    """Stores a program's sums, each as one number a row of the threads.

    Adding these up takes no exchange between warps, and programs lie in a fixed order.
    """
    group = group_of(plan, place)
    tensor = jax.lax.div(group, plan.view.batch)
    program = jax.lax.rem(group, plan.view.batch) * plan.view.middle + place.middle
    program = program * of_part(place.part, plan.chunks) + place.chunk
    program = program * of_part(place.part, plan.strips) + place.strip
    for k, x in enumerate(sums):
        numbers = pl.ds(program * x.shape[0], x.shape[0])
        mosaic.store(ref.at[tensor, k, numbers], jnp.sum(x, axis=1), optimized=False)


def split(refs: Sequence[Any], tree: Any) -> tuple[Any, Sequence[Any]]:
    """The first refs in the structure of a tree, and the rest."""
    treedef = jax.tree.structure(tree)
    count = treedef.num_leaves
    return treedef.unflatten(refs[:count]), refs[count:]
