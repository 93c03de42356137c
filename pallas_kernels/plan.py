"""How a pass goes over arrays of tensors, and where in them a program works."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.view import View


@dataclass(frozen=True)
class Plan:
    """How a pass goes over arrays of tensors.

    Attributes:
      views: of the tensors of each array, its part: they lie in different places, but one launch
        takes them all. Shapes may differ, but not what a tile is, nor batch and middle.
      tensors: their number in an array.
      tiles: for each part, tiles that a program takes, down a strip.
      stages: tiles in shared memory at once.
      block_rows: rows of a tile that are in registers at once.
      loops: take the blocks of a tile in a loop, not one after another in straight code.
      backwards: walk from the end, where the pass before left off: what it read last is in L2.
      together, in_flight: as in `matrix_units.Blocks`.
    """

    views: tuple[View, ...]
    tensors: int
    tiles: tuple[int, ...]
    stages: int
    block_rows: int
    loops: bool = False
    backwards: bool = False
    together: int = 1
    in_flight: int = 1

    @property
    def view(self) -> View:
        """For what does not differ between parts."""
        return self.views[0]

    @property
    def parts(self) -> int:
        """Number of arrays."""
        return len(self.views)

    @property
    def chunks(self) -> tuple[int, ...]:
        """For each part, programs down a strip."""
        return tuple(-(-v.tiles_down // n) for v, n in zip(self.views, self.tiles, strict=True))

    @property
    def strips(self) -> tuple[int, ...]:
        """For each part, strips of a matrix."""
        return tuple(view.strips for view in self.views)

    @property
    def programs_of_tensor(self) -> tuple[int, ...]:
        """For each part, programs that one tensor takes."""
        of_matrix = (n * m for n, m in zip(self.chunks, self.strips, strict=True))
        return tuple(self.view.batch * self.view.middle * n for n in of_matrix)

    @property
    def programs_of_part(self) -> tuple[int, ...]:
        """For each part, programs."""
        return tuple(self.tensors * n for n in self.programs_of_tensor)

    @property
    def programs(self) -> int:
        """Number of programs."""
        return sum(self.programs_of_part)

    @property
    def groups(self) -> int:
        """Number of matrices of a part: tensors times their batch."""
        return self.tensors * self.view.batch

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a tile."""
        return self.view.rows, self.view.width

    @property
    def block(self) -> tuple[int, int]:
        """Shape of what is in registers at once."""
        return self.block_rows, self.view.width


class Place(NamedTuple):
    """Where a program works."""

    part: Any
    group: Any  # within the part
    middle: Any
    chunk: Any
    strip: Any


def of_part(part: Any, numbers: Sequence[int]) -> Any:
    """The number of a program's part; known at once where all parts have the same."""
    out: Any = numbers[0]
    for i, n in enumerate(numbers):
        if n != numbers[0]:
            out = jnp.where(part == i, jnp.int32(n), out)
    return out


def place_of(plan: Plan, program: jax.Array) -> Place:
    """Where a program works."""
    if plan.backwards:
        program = plan.programs - 1 - program
    each = plan.programs_of_part
    part: Any
    if len(set(each)) == 1:
        part, program = jax.lax.div(program, each[0]), jax.lax.rem(program, each[0])
    else:
        firsts = [sum(each[:i]) for i in range(plan.parts)]
        part = sum(jnp.where(program >= first, 1, 0) for first in firsts[1:])
        program = program - of_part(part, firsts)
    strips, chunks = of_part(part, plan.strips), of_part(part, plan.chunks)
    strip = jax.lax.rem(program, strips)
    program = jax.lax.div(program, strips)
    chunk = jax.lax.rem(program, chunks)
    program = jax.lax.div(program, chunks)
    middle = jax.lax.rem(program, plan.view.middle)
    return Place(part, jax.lax.div(program, plan.view.middle), middle, chunk, strip)


def group_of(plan: Plan, place: Place) -> jax.Array:
    """Position of a program's matrix among those of all parts."""
    return place.part * plan.groups + place.group


def tile_of(plan: Plan, place: Place, tile: Any) -> tuple[Any, ...]:
    """The index of a tile in an arranged array."""
    view = plan.view
    rows = pl.ds(tile * view.rows, view.rows)
    return place.group, rows, place.middle, pl.ds(place.strip * view.width, view.width)
