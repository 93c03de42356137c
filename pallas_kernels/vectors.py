"""Row and column vectors between the passes.

They are joined, of all units: they are small, and computing them for all tensors at once saves
hundreds of launches.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.accumulators import row_factor, safe_rsqrt, update_average
from lopt_jax.compiler.slices import PartTaker
from lopt_jax.features import Operands, Varies
from lopt_jax.rows import concatenate
from lopt_jax.rules.rule import GradientStatistics
from pallas_kernels.first_pass import FirstSums
from pallas_kernels.launches import Launch
from pallas_kernels.lines import PIECE, Lines, pieces, totals_of
from pallas_kernels.operands import First
from pallas_kernels.tuning import FIRST, SUMS, Tuning
from pallas_kernels.units import Viewed


class Vectors:
    """Row and column vectors of some units after this step, in lines."""

    def __init__(
        self,
        units: Sequence[Viewed],
        moments: Sequence[GradientStatistics],
        decays: jax.Array,
        per_tensor: bool,
    ):
        self.units = units
        self.lines = {
            "row": Lines(tuple(unit.block(True) for unit in units)),
            "column": Lines(tuple(unit.block(False) for unit in units)),
        }

        def after(side: Varies) -> jax.Array:
            """The new accumulators, (n, pieces, PIECE)."""
            lines = self.lines[side]
            old, new = [], []
            for unit, of_unit in zip(units, moments, strict=True):
                view = unit.view(SUMS)
                arranged = view.row_lines if side == "row" else view.column_lines
                new.append(arranged(getattr(of_unit, side)))
                for part in unit.parts:
                    x = getattr(part.accumulators, side).astype(jnp.float32)
                    old.append(jax.vmap(arranged, in_axes=1)(x))
            rates = lines.of_tensors(decays.T) if per_tensor else decays[:, None, None]
            return update_average(lines.join(old), lines.join(new), rates)

        self.row, self.column = after("row"), after("column")
        mean = lambda x, *_, **__: self.lines["row"].line_means(x)  # noqa: E731
        self.row_factor = row_factor(self.row, -1, mean)
        self.column_factor = safe_rsqrt(self.column)
        of_decays = tuple(map(tuple, (self.row, self.column, self.row_factor, self.column_factor)))
        nothing: Any = None  # of elements: only row and column vectors are read
        self.operands = Operands(nothing, nothing, (), nothing, *of_decays)

    def starts(self, unit: int, tensor: int) -> tuple[int, int]:
        """Where the row and the column of a tensor of a unit start in `stacked`."""
        row, column = (self.lines[side].start(unit, tensor) for side in ("row", "column"))
        return row, self.lines["row"].size + column

    def stacked(self, tuning: Tuning, biases: Sequence[jax.Array] = ()) -> jax.Array:
        """Factors and then biases, (vectors, size): those of rows, then those of columns."""
        rows, columns = ([x] for x in (self.row_factor, self.column_factor))
        if biases:
            rows, columns = [*rows, biases[0]], [*columns, biases[1]]
        x = jnp.concatenate([concatenate(rows), concatenate(columns)], axis=1)
        x = x.reshape((x.shape[0], -1))
        unit = max(unit.view(tuning).vector_unit for unit in self.units)
        return jnp.pad(x, ((0, -x.shape[0] % unit), (0, 0)))

    def of_launches(
        self,
        launches: Sequence["Launch"],
        sides: Sequence[jax.Array],
        zero: jax.Array | None,
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """The lines of some launches alone.

        Args:
          launches: the launches.
          sides: (n, pieces, PIECE): of rows and of columns.
          zero: of `opaque_zero`, of what the launches before these made: so XLA does not make all
            lines at once, and at places that it does not know it takes the same code for all. None:
            places are known.

        Returns:
          (n, size), and for each launch where in it the lines down and across the tensors of each
          part begin.
        """
        own, end = [], 0
        starts: dict[tuple[int, int], tuple[int, ...]] = {}  # of the row, then of the column
        members = sorted(member for launch in launches for member in launch.members)
        for side, x in zip(self.lines.values(), sides, strict=True):
            ranges: list[list[int]] = []
            for i, k in members:
                unit = self.units[i]
                first = side.start(i, sum(unit.counts[:k]))
                last = first + unit.counts[k] * side.blocks[i].size
                if ranges and ranges[-1][1] == first:
                    ranges[-1][1] = last
                else:
                    ranges.append([first, last])
                starts[i, k] = (*starts.get((i, k), ()), end)
                end += last - first
            # in an array: XLA makes constants of one number part of the code
            places = numbers_of([first // PIECE for first, _ in ranges])
            places = places if zero is None else places + zero
            for place, (first, last) in zip(places, ranges, strict=True):
                size = (last - first) // PIECE
                is_all = size == x.shape[1]
                own.append(x if is_all else jax.lax.dynamic_slice_in_dim(x, place, size, axis=1))
        joined = jnp.concatenate(own, axis=1)
        first_of = [
            down_and_across(x, [(starts[m][0], starts[m][1]) for m in x.members]) for x in launches
        ]
        return joined.reshape((joined.shape[0], -1)), first_of

    def parts(self, take: PartTaker) -> list[list[tuple[jax.Array, jax.Array]]]:
        """The new row and column accumulators of each part of each unit."""
        rows, columns = jax.lax.optimization_barrier((self.row, self.column))
        sides: dict[Varies, jax.Array] = {"row": rows, "column": columns}
        pairs = [self._parts(side, x.reshape((x.shape[0], -1)), take) for side, x in sides.items()]
        return [list(zip(*unit, strict=True)) for unit in zip(*pairs, strict=True)]

    def _parts(self, side: Varies, x: jax.Array, take: PartTaker) -> list[list[jax.Array]]:
        lines, out = self.lines[side], []
        for i, (unit, block) in enumerate(zip(self.units, lines.blocks, strict=True)):
            start = lines.start(i, 0)
            view, stride = unit.view(SUMS), pieces(block.length) * PIECE
            is_down = view.down_is_row == (side == "row")
            restore = view.restore_down if is_down else view.restore_across
            made = []
            for part in unit.parts:
                count = part.gradient.shape[0] * block.count
                size = block.length if count == 1 else count * stride
                of_part = take(x, (0, start), (x.shape[0], size))
                of_part = of_part.reshape((x.shape[0], count, -1))[..., : block.length]
                made.append(jax.vmap(restore, out_axes=1)(of_part))
                start += count * stride
            out.append(made)
        return out


def starts_of(units: Sequence[Viewed], launch: Launch, vectors: Vectors | None) -> First:
    """Where the tensors of each part of a launch begin, for the kernels to read."""
    tensors = numbers_of([of_part[0] for of_part in launch.tensors])
    if vectors is None:
        return First(tensors, None, None)
    starts = [vectors.starts(i, sum(units[i].counts[:k])) for i, k in launch.members]
    return First(tensors, *down_and_across(launch, starts))


def down_and_across(
    launch: Launch, starts: Sequence[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Where lines down and across the tensors of each part begin, given rows and columns."""
    views = [x.view for x in launch.of(SUMS)]
    sides = [x if v.down_is_row else x[::-1] for v, x in zip(views, starts, strict=True)]
    down, across = zip(*sides, strict=True)
    return numbers_of(down), numbers_of(across)


def numbers_of(x: Sequence[int]) -> jax.Array:
    """Integers for kernels to read."""
    return jnp.asarray(np.asarray(x, np.int32))


def vector_means(
    units: Sequence[Viewed], launches: Sequence["Launch"], sums: Sequence[FirstSums]
) -> list[tuple[jax.Array, jax.Array]]:
    """Means of g² of the rows and columns of each unit."""
    pieces: list[list[tuple[int, jax.Array, jax.Array]]] = [[] for _ in units]
    for launch, of_launch in zip(launches, sums, strict=True):
        plan = launch.plan(FIRST)
        # neighbours at once
        keys = [(i, k - place) for place, (i, k) in enumerate(launch.members)]
        for (i, shift), run in itertools.groupby(range(plan.parts), keys.__getitem__):
            places = list(run)
            first, view = places[0], units[i].view(FIRST)
            rows = slice(first * plan.groups, (first + len(places)) * plan.groups)
            assert of_launch.down is not None  # the tensors are factored
            assert of_launch.across is not None
            down = of_launch.down[rows, :, : plan.strips[first], : view.down]
            across = of_launch.across[rows, :, : plan.chunks[first], : view.across]
            pieces[i].append((first + shift, down, across))
    partial: list[tuple[jax.Array, tuple[str, ...]]] = []
    for unit, of_unit in zip(units, pieces, strict=True):
        _, *sides = zip(*sorted(of_unit, key=lambda x: x[0]), strict=True)
        down, across = map(_summed, sides)
        down_axis, across_axis = unit.vector_axes
        partial += [(down, unit.whole.names([across_axis]))]
        partial += [(across, unit.whole.names([down_axis]))]
    totalled = iter(totals_of(partial))
    out = []
    for unit in units:
        view, (down_axis, across_axis) = unit.view(FIRST), unit.vector_axes
        # floats: an axis may be longer than an int32 holds
        down = view.restore_down(next(totalled) / float(unit.whole.shape[across_axis]))
        across = view.restore_across(next(totalled) / float(unit.whole.shape[down_axis]))
        out.append((down, across) if view.down_is_row else (across, down))
    return out


def _summed(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays summed over their third axis, and joined: first those for which it is as long."""
    alike = itertools.groupby(arrays, lambda x: x.shape[2])
    return concatenate([jnp.sum(concatenate(list(run)), axis=2) for _, run in alike])
