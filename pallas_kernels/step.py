"""The two calls of the engine: kernels, and the vectors between them.

Tensors come in units of equal shape. (Tensors with one axis may have different lengths, padded with
zeros to that of the longest.) A unit comes in parts: arrays with a leading axis of tensors, that
were never joined because that would copy them. The vectors between the passes are joined, of all
units: they are small, and computing them for all tensors at once saves hundreds of launches.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import rule as rules
from lopt_jax.accumulators import (
    Accumulators,
    Decays,
    FactoredDims,
    factored_dims,
    row_factor,
    safe_rsqrt,
    update_average,
)
from lopt_jax.features import Feature, Operands, Varies
from lopt_jax.groups import Factors
from lopt_jax.partition import Partition
from lopt_jax.rows import PartTaker, concatenate, join_trees, part_taker, unknown_zero
from lopt_jax.rule import MLP, Folded, Moments, Rule, Statistics, TensorUpdate
from pallas_kernels import batching, derivatives, matrix_units, mosaic, passes, table
from pallas_kernels.batching import Shared
from pallas_kernels.lines import PIECE, Block, Lines, pieces, totals, totals_of
from pallas_kernels.passes import Elements, First, Inputs, Plan, Rates, Table
from pallas_kernels.view import View, view_of

MULTIPROCESSORS = 132
LONG_SUM = 4096  # programs' numbers that are added up apart from those of other tensors
BIASES = 1 / 3  # of the largest array: what biases of wide layers may take at a time
LAUNCH_PARTS = 8  # arrays that one launch takes: each one more is code to compile


@dataclass(frozen=True)
class Tuning:
    """How a pass is cut; chosen by measurement (docs/kernels.md).

    Attributes:
      tile_elements, widest, narrowest, vector: as in `view_of`.
      stages: tiles in shared memory at once.
      block_rows: rows of a tile in registers at once, if possible; 0: all of them.
      loops: as in `Plan`.
      programs: that a multiprocessor holds at once.
      program_elements: of a program at most, about.
      together, in_flight: as in `Plan`.
    """

    tile_elements: int
    stages: int
    programs: int
    widest: int = 128
    narrowest: int = 16
    vector: int = 4
    block_rows: int = 0
    loops: bool = False
    program_elements: int = 1 << 15
    together: int = 1
    in_flight: int = 1


FIRST = Tuning(tile_elements=2048, widest=256, stages=4, programs=3)
# blocks in a loop: one to five percent slower than straight code, and a quarter of it to compile
SUMS = Tuning(
    tile_elements=2048, stages=2, programs=2, block_rows=4, program_elements=1 << 16, loops=True
)
UPDATE = Tuning(tile_elements=512, stages=3, programs=3, program_elements=1 << 13)
# wide layers leave few registers, so a thread takes few elements
WIDE_UPDATE = Tuning(
    tile_elements=1024, stages=3, programs=2, widest=64, vector=2, block_rows=1, loops=True
)
# on the matrix units: a row of a tile is what one instruction takes; a thread stores whole rows of
# features, which meets no bank twice if neighbouring threads hold neighbouring elements
MATRIX_UPDATE = Tuning(
    tile_elements=512,
    stages=3,
    programs=3,
    widest=matrix_units.WIDTH,
    narrowest=matrix_units.WIDTH,
    vector=1,
    block_rows=2,
    program_elements=1 << 14,
    loops=True,
    in_flight=2,
)


class Part(NamedTuple):
    """Arrays of some tensors, each with a leading axis of tensors."""

    gradient: jax.Array
    parameter: jax.Array
    accumulators: Accumulators


class Unit(NamedTuple):
    """Equally shaped tensors."""

    parts: Sequence[Part]
    partition: Partition | None = None  # where they are shards, without padding, of what
    lengths: Sequence[int] | None = None  # of all tensors, where they are padded vectors


class Updates(NamedTuple):
    """What a step makes of the tensors of some units."""

    parts: list[list[TensorUpdate]]  # of each unit, without statistics
    statistics: Statistics | None  # of all tensors, with a leading axis


@dataclass(frozen=True)
class _Unit:
    """A unit and how the kernels see it."""

    parts: Sequence[Part]
    shape: tuple[int, ...]
    whole: Partition
    lengths: Sequence[int] | None

    @classmethod
    def of(cls, unit: Unit) -> "_Unit":
        shape = unit.parts[0].gradient.shape[1:]
        whole = unit.partition or Partition(shape, ((),) * len(shape))
        return cls(unit.parts, shape, whole, unit.lengths)

    @property
    def dims(self) -> FactoredDims | None:
        return factored_dims(self.whole.shape)

    @property
    def tensors(self) -> int:
        return sum(self.counts)

    @property
    def elements(self) -> np.ndarray:
        """Elements of every tensor, float32."""
        if self.lengths is None:
            return np.full((self.tensors,), math.prod(self.whole.shape), np.float32)
        # a batch of those that have the lengths
        return np.tile(np.float32(self.lengths), self.tensors // len(self.lengths))

    def view(self, tuning: Tuning) -> View:
        return view_for(self.shape, tuning, self.whole.shape)

    @property
    def counts(self) -> list[int]:
        """Tensors of each part."""
        return [part.gradient.shape[0] for part in self.parts]

    @property
    def vector_axes(self) -> tuple[int, int]:
        """The dimensions that lie down and across."""
        view = self.view(FIRST)
        assert view.down_axis is not None
        return view.order[view.down_axis], view.order[-1]

    def block(self, is_row: bool) -> Block:
        """Its lines, of the row or the column."""
        assert self.dims is not None
        view, (d1, d0) = self.view(SUMS), self.dims
        length = view.down if view.down_is_row == is_row else view.across
        reduced, axis = (d0, d1) if is_row else (d1, d0)
        lines = view.batch * view.middle
        return Block(self.tensors, lines, length, self.whole.reduced(reduced), axis)


def first_pass(rule: Rule, units: Sequence[Unit]) -> list[Moments]:
    """Pass A, as `lopt_jax.rule.first_pass` on every tensor.

    Args:
      rule: the rule.
      units: the tensors.

    Returns:
      Moments of each unit, with a leading axis of tensors.
    """

    def passes(parts: Any, *_: Any) -> Any:
        given = [unit._replace(parts=x) for unit, x in zip(units, parts, strict=True)]
        return [[] for _ in parts], _first_pass(rule, list(map(_Unit.of, given))), ()

    def fused(parts: Any) -> list[Moments]:
        return batching.over_tensors(passes)(parts, [], ())[1]

    def plain(parts: Any) -> list[Moments]:
        return [
            derivatives.moments(rule, x, unit.partition, unit.lengths)
            for x, unit in zip(parts, units, strict=True)
        ]

    return derivatives.differentiated_as(plain, fused)([tuple(unit.parts) for unit in units])


def _first_pass(rule: Rule, units: Sequence[_Unit]) -> list[Moments]:
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    factored = [unit for unit in units if unit.dims is not None]
    launches = _launches(factored)
    sums = []
    for launch in launches:
        gradients = tuple(
            part.view.arrange(_as_laid_out(part.part.gradient)) for part in launch.of(FIRST)
        )
        parameters = None
        if needs_parameter:
            parameters = tuple(_arranged(x.view, x.part.parameter) for x in launch.of(FIRST))
        interpreted = mosaic.is_interpreting()
        sums.append(_first_sums(launch.plan(FIRST), rule, interpreted, gradients, parameters))
    vectors = iter(_vector_means(factored, launches, sums))
    mean_squares: Iterator[Any] = itertools.repeat(None)
    if needs_parameter and factored:
        added = _added(launches, FIRST, [x.parameter for x in sums])
        means = _means(added, factored)[:, 0]
        ends = itertools.accumulate((unit.tensors for unit in factored), initial=0)
        mean_squares = iter([means[i:j] for i, j in itertools.pairwise(ends)])
    return [
        _parameter_moments(rule, unit, needs_parameter)
        if unit.dims is None
        else Moments(*next(vectors), next(mean_squares))
        for unit in units
    ]


def _vector_means(
    units: Sequence[_Unit], launches: Sequence["_Launch"], sums: Sequence[passes.FirstSums]
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
        down = view.restore_down(next(totalled) / unit.whole.shape[across_axis])
        across = view.restore_across(next(totalled) / unit.whole.shape[down_axis])
        out.append((down, across) if view.down_is_row else (across, down))
    return out


def _summed(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays summed over their third axis, and joined: first those for which it is as long."""
    alike = itertools.groupby(arrays, lambda x: x.shape[2])
    return concatenate([jnp.sum(concatenate(list(run)), axis=2) for _, run in alike])


def _parameter_moments(rule: Rule, unit: _Unit, needs_parameter: bool) -> Moments:
    """Moments of tensors that are not factored."""
    if not needs_parameter:
        return Moments(None, None, None)
    partition = unit.whole if unit.whole.is_split() else None
    lengths = None if unit.lengths is None else unit.elements
    return derivatives.moments(rule, unit.parts, partition, lengths)


def second_pass(
    rule: Rule,
    units: Sequence[Unit],
    moments: Sequence[Moments],
    mlp: MLP,
    mlp_per_tensor: bool,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None,
    zero: jax.Array | None = None,
) -> Updates:
    """Passes B and C, as `lopt_jax.rule.second_pass` on every tensor.

    Args:
      rule: the rule.
      units: the tensors.
      moments: of `first_pass`.
      mlp: the network, with a leading axis of all tensors if `mlp_per_tensor`.
      mlp_per_tensor: whether it has that axis.
      decays: decay rates.
      scale: (tensors,).
      weight_decay: (tensors,).
      statistics: of the accumulators before this step, with a leading axis of tensors: centres of
        the new ones' sums. None: zeros.
      zero: that parts are taken by, of `unknown_zero`; None: made here.

    Returns:
      The updates of each part, and the statistics of all.
    """

    def passes(
        parts: Any,
        moments: Sequence[Moments],
        by_tensor: tuple[jax.Array, jax.Array, Statistics | None],
        networks: Shared,
        rates: Shared,
        zero: Shared,
    ) -> Any:
        given = [unit._replace(parts=x) for unit, x in zip(units, parts, strict=True)]
        of = [_Unit.of(unit) for unit in given]
        take = part_taker(zero.tree[0] if zero.per_tensor else zero.tree, of_state=True)
        made, kept = _second_pass(rule, of, moments, networks, rates, *by_tensor, take)
        return made, [], kept

    def fused(
        parts: Any, moments: Any, by_tensor: Any, mlp: MLP, rates: Decays, zero: Any
    ) -> Updates:
        # nothing is closed over: that `jax.vmap` could not batch
        shared = Shared(mlp, mlp_per_tensor), Shared(rates, False), Shared(zero, False)
        out, _, kept = batching.over_tensors(passes)(parts, moments, by_tensor, *shared)
        return Updates(out, kept)

    def plain(
        parts: Any, moments: Any, by_tensor: Any, mlp: MLP, rates: Decays, zero: Any
    ) -> Updates:
        del zero
        factors, made, kept, first = Factors(mlp, *by_tensor), [], [], 0
        for x, unit, of_unit in zip(parts, units, moments, strict=True):
            own = range(first, first := first + sum(part.gradient.shape[0] for part in x))
            updates, of_unit_kept = derivatives.updates(
                rule,
                x,
                unit.partition,
                unit.lengths,
                of_unit,
                factors.rows(own, mlp_per_tensor),
                mlp_per_tensor,
                rates,
            )
            made.append(updates)
            kept.append(of_unit_kept)
        return Updates(made, join_trees(kept))

    rates = Decays(*(jnp.asarray(x, jnp.float32) for x in decays))
    zero = unknown_zero(units[0].parts[0].gradient) if zero is None else zero
    return derivatives.differentiated_as(plain, fused)(
        [tuple(unit.parts) for unit in units],
        list(moments),
        (scale, weight_decay, statistics),
        mlp,
        rates,
        zero,
    )


class _Result(NamedTuple):
    """What passes B and C make of some units."""

    elements: list[list[Elements]]  # of each part of each unit
    sums: Any  # of the accumulators' distances to the centres, (tensors, sums)
    vectors: list[list[tuple[jax.Array, jax.Array]]]  # new row and column of each part, or empty
    centres: Any


def _second_pass(
    rule: Rule,
    units: Sequence[_Unit],
    moments: Sequence[Moments],
    networks_of: Shared,
    decays_of: Shared,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None,
    take: PartTaker,
) -> tuple[list[list[TensorUpdate]], Statistics | None]:
    ends = [0, *itertools.accumulate(unit.tensors for unit in units)]
    # units whose vectors are computed together
    factored = [i for i, unit in enumerate(units) if unit.dims is not None]
    batches = [factored] if factored else []
    batches += [[i] for i, unit in enumerate(units) if unit.dims is None]
    order = [i for batch in batches for i in batch]
    of_batches = []
    for batch in batches:
        tensors = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in batch])
        of = functools.partial(_tensors, positions=tensors, count=ends[-1])
        own = lambda shared, of=of: Shared(  # noqa: E731
            of(shared.tree) if shared.per_tensor else shared.tree, shared.per_tensor
        )
        of_batches.append(
            _passes(
                rule,
                [units[i] for i in batch],
                [moments[i] for i in batch],
                own(networks_of),
                own(decays_of),
                of(scale),
                of(weight_decay),
                of(statistics),
                take,
            )
        )
    kept = None
    if rule.accumulator_statistics:
        sums = concatenate([batch.sums for batch in of_batches])
        means = _means(sums, [units[i] for i in order])
        kept = _statistics(means, concatenate([batch.centres for batch in of_batches]))
        tensors = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in order])
        kept = _tensors(kept, np.argsort(tensors), ends[-1])
    out: list[list[TensorUpdate]] = [[] for _ in units]
    made = [
        pair for batch in of_batches for pair in zip(batch.elements, batch.vectors, strict=True)
    ]
    for i, (elements, vectors) in zip(order, made, strict=True):
        view = units[i].view(_tuning(rule, networks_of.tree))
        out[i] = [_update_of(view, *x) for x in zip(units[i].parts, elements, vectors, strict=True)]
    return out, kept


def _update_of(
    view: View, part: Part, new: Elements, vectors: tuple[jax.Array, jax.Array] | None
) -> TensorUpdate:
    """The update of a part, its arrays arranged as the tensors are."""
    old = part.accumulators
    row, column = vectors or (
        jnp.stack([view.restore(a) for a in new.average], axis=1),
        old.column,
    )
    accumulators = Accumulators(
        momentum=tuple(map(view.restore, new.momentum)),
        second_moment=view.restore(new.second_moment),
        row=row.astype(old.row.dtype),
        column=column.astype(old.column.dtype),
    )
    return TensorUpdate(view.restore(new.gradient), accumulators, None)


def _tensors(tree: Any, positions: np.ndarray, count: int) -> Any:
    """What belongs to some of the tensors, from arrays for all of them."""
    if np.array_equal(positions, np.arange(count)):
        return tree
    first, last = int(positions[0]), int(positions[-1]) + 1
    if np.array_equal(positions, np.arange(first, last)):
        return jax.tree.map(lambda x: x[first:last], tree)
    return jax.tree.map(lambda x: x[positions], tree)


class _Vectors:
    """Row and column vectors of some units after this step, in lines."""

    def __init__(
        self,
        units: Sequence[_Unit],
        moments: Sequence[Moments],
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
        self.operands = Operands(None, None, (), None, *of_decays)

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
        launches: Sequence["_Launch"],
        sides: Sequence[jax.Array],
        zero: jax.Array | None,
    ) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        """The lines of some launches alone.

        Args:
          launches: the launches.
          sides: (n, pieces, PIECE): of rows and of columns.
          zero: of `unknown_zero`, of what the launches before these made: so XLA does not make all
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
            places = _numbers([first // PIECE for first, _ in ranges])
            places = places if zero is None else places + zero
            for place, (first, last) in zip(places, ranges, strict=True):
                size = (last - first) // PIECE
                is_all = size == x.shape[1]
                own.append(x if is_all else jax.lax.dynamic_slice_in_dim(x, place, size, axis=1))
        joined = jnp.concatenate(own, axis=1)
        first_of = [_down_and_across(x, [starts[member] for member in x.members]) for x in launches]
        return joined.reshape((joined.shape[0], -1)), first_of

    def parts(self, take: PartTaker) -> list[list[tuple[jax.Array, jax.Array]]]:
        """The new row and column accumulators of each part of each unit."""
        rows, columns = jax.lax.optimization_barrier((self.row, self.column))
        sides = (("row", rows), ("column", columns))
        pairs = [self._parts(side, x.reshape((x.shape[0], -1)), take) for side, x in sides]
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


def _passes(
    rule: Rule,
    units: Sequence[_Unit],
    moments: Sequence[Moments],
    networks_of: Shared,
    decays_of: Shared,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None,
    take: PartTaker,
) -> _Result:
    """Passes B and C over factored units, or over one that is not factored."""
    mlp, mlp_per_tensor = networks_of
    decays, decays_per_tensor = decays_of
    tensors = sum(unit.tensors for unit in units)
    is_factored = units[0].dims is not None
    features = rule.features.for_tensor(is_factored)
    lengths = None if units[0].lengths is None else jnp.asarray(units[0].elements)
    vectors = _Vectors(units, moments, decays.factored, decays_per_tensor) if is_factored else None
    launches = _launches(units)
    are_joined = lengths is not None
    elements = [[_elements(*x, are_joined) for x in launch.of(SUMS)] for launch in launches]
    starts = [_first(units, launch, vectors) for launch in launches]

    # pass B
    tables = tensors if decays_per_tensor or lengths is not None else 1
    repeated = lambda n: jax.tree.map(lambda x: table.repeat(x, n), decays)  # noqa: E731
    own = decays if decays_per_tensor else repeated(tables)
    rates, rate_entries = table.pack(Rates(own, lengths), tables)
    factors: Any = None if vectors is None else vectors.stacked(SUMS)
    sums = [
        _square_sums(
            launch.plan(SUMS),
            rule,
            rate_entries,
            mosaic.is_interpreting(),
            Inputs(x, rates, factors, first),
        )
        for launch, x, first in zip(launches, elements, starts, strict=True)
    ]
    means = _means(_added(launches, SUMS, sums), units)

    # the network
    last = lambda x: jnp.moveaxis(x, 0, -1) if mlp_per_tensor else x[..., None]  # noqa: E731
    first_layer = (last(mlp.weights[0]), *mlp.weights[1:]), (last(mlp.biases[0]), *mlp.biases[1:])
    networks: Any = _folded(rule, features, MLP(*first_layer), means[:, :-2], vectors)
    if rule.parameter_scale:
        squares = concatenate([x.parameter_mean_square for x in moments])
        scale = scale * rules.parameter_scale(squares)
    centres = _centres(statistics, decays, means) if rule.accumulator_statistics else ()
    layers = _layers(mlp, mlp_per_tensor, tensors)
    weights: Any = jnp.stack(networks.weights)  # (features, H, tensors)
    hidden = weights.shape[1]
    weights, bias, matrices = jnp.moveaxis(weights, -1, 0), (), None
    if vectors is None:
        bias = (jnp.broadcast_to(networks.row_bias, (hidden, tensors)).T,)
    if uses_matrix_units(rule, hidden):
        matrices = matrix_units.Matrices(
            *matrix_units.pack(jnp.swapaxes(weights, 1, 2), layers, *bias)
        )
        weights, bias, layers = None, (), layers[-1][1]
    numbers, entries = table.pack(
        Table(
            decays=decays if decays_per_tensor else repeated(tensors),
            weights=weights,
            bias=bias,
            layers=layers,
            scale=scale,
            weight_decay=weight_decay,
            centres=centres,
            length=lengths,
        ),
        tensors,
    )

    # pass C
    tuning = _tuning(rule, mlp)
    if vectors is not None:
        biases_of = (networks.row_bias, networks.column_bias)
        factors = vectors.stacked(tuning, () if matrices else biases_of)
    results: list[Any] = []
    remaining = zip(elements, starts, strict=True)
    has_biases = matrices is not None and vectors is not None
    batches = _sharing_biases(launches, hidden) if has_biases else [launches]
    for batch in batches:
        own = [matrices] * len(batch)
        if has_biases:
            before = results[-1].elements if results else numbers
            zero = unknown_zero(jax.tree.leaves(before)[0]) if len(batches) > 1 else None
            biases, first_of = vectors.of_launches(batch, biases_of, zero)
            packed = matrix_units.pack_biases(biases)
            own = [matrices._replace(biases=packed, down=x, across=y) for x, y in first_of]
        for launch, network in zip(batch, own, strict=True):
            x, first = next(remaining)
            inputs = Inputs(x, numbers, factors, first, network)
            plan = launch.plan(tuning, backwards=True)
            results.append(_update(plan, rule, entries, mosaic.is_interpreting(), inputs))
    made: list[list[Any]] = [[None] * len(unit.parts) for unit in units]
    for launch, result in zip(launches, results, strict=True):
        for (i, k), x in zip(launch.members, result.elements, strict=True):
            made[i][k] = x
    kept = None
    if rule.accumulator_statistics:
        kept = _added(launches, tuning, [x.sums for x in results])
    new_vectors: Any = [[None] * len(unit.parts) for unit in units]
    if vectors is not None:
        new_vectors = vectors.parts(take)
    return _Result(made, kept, new_vectors, centres)


def _sharing_biases(launches: Sequence["_Launch"], hidden: int) -> list[list["_Launch"]]:
    """Launches whose biases are made at once: as many as take `BIASES` of the largest array."""
    units = launches[0].units
    limit = BIASES * max(part.gradient.size for unit in units for part in unit.parts)
    out: list[list[_Launch]] = []
    size = 0.0
    for launch in launches:
        of_members = (
            units[i].counts[k] * units[i].block(is_row).size
            for i, k in launch.members
            for is_row in (True, False)
        )
        own = hidden * sum(of_members)
        size += own
        if not out or size > limit:
            out.append([])
            size = own
        out[-1].append(launch)
    return out


def _tuning(rule: Rule, mlp: MLP) -> Tuning:
    """How pass C is cut."""
    hidden = mlp.biases[0].shape[-1]
    if hidden < rules.WIDE_HIDDEN_SIZE:
        return UPDATE
    return MATRIX_UPDATE if uses_matrix_units(rule, hidden) else WIDE_UPDATE


def uses_matrix_units(rule: Rule, hidden: int) -> bool:
    """Whether pass C takes the matrix units."""
    is_wide = hidden >= rules.WIDE_HIDDEN_SIZE
    return is_wide and rule.precision != jax.lax.Precision.HIGHEST


def view_for(shape: tuple[int, ...], tuning: Tuning, whole: tuple[int, ...] | None = None) -> View:
    """How a pass sees a shape, of a tensor or of a shard of the whole one."""
    return view_of(
        shape,
        tuning.tile_elements,
        tuning.vector,
        tuning.widest,
        tuning.narrowest,
        whole=whole,
    )


class _InLaunch(NamedTuple):
    """A part, and how a pass sees its tensors."""

    view: View
    part: Part


@dataclass(frozen=True)
class _Launch:
    """Parts that one launch of a pass takes."""

    units: Sequence[_Unit]  # of the batch
    members: Sequence[tuple[int, int]]  # positions: of the unit, of the part in it

    def of(self, tuning: Tuning) -> list[_InLaunch]:
        return [
            _InLaunch(self.units[i].view(tuning), self.units[i].parts[k]) for i, k in self.members
        ]

    def plan(self, tuning: Tuning, backwards: bool = False) -> Plan:
        views = tuple(x.view for x in self.of(tuning))
        return plan_for(views, self.of(tuning)[0].part.gradient.shape[0], tuning, backwards)

    @property
    def tensors(self) -> list[np.ndarray]:
        """Positions of each part's tensors among those of the batch."""
        ends = np.cumsum([0, *(unit.tensors for unit in self.units)])
        out = []
        for i, k in self.members:
            counts = self.units[i].counts
            first = ends[i] + sum(counts[:k])
            out.append(np.arange(first, first + counts[k]))
        return out


def launch_kind(part: Part, whole: tuple[int, ...]) -> tuple | None:
    """What parts of different shapes have in common where one launch may take them all.

    Args:
      part: the part, or a group's inputs, which are the same arrays.
      whole: the shape of its tensors, where they are shards of the whole ones.

    Returns:
      The number of tensors, their dtypes and what tiles are; None for tensors that are vectors, or
      have a batch or a middle.
    """
    tensors, *shape = part.gradient.shape
    tunings = (FIRST, SUMS, UPDATE, WIDE_UPDATE)
    views = [view_for(tuple(shape), tuning, whole) for tuning in tunings]
    if not views[0].is_factored or views[0].batch * views[0].middle > 1:
        return None
    dtypes = tuple(x.dtype for x in jax.tree.leaves(part))
    return tensors, dtypes, tuple((view.rows, view.width) for view in views)


def _launches(units: Sequence[_Unit]) -> list[_Launch]:
    """Which parts one launch takes: of equal numbers of tensors, up to `LAUNCH_PARTS`.

    Launches of parts of the same shapes share a compiled kernel, so each takes as many of every
    shape, as far as possible. Tensors that have a batch or a middle are not mixed with others.
    """
    alike: dict[Any, dict[int, list[tuple[int, int]]]] = {}
    for i, unit in enumerate(units):
        for k, part in enumerate(unit.parts):
            key = launch_kind(part, unit.whole.shape) or (i, part.gradient.shape[0])
            alike.setdefault(key, {}).setdefault(i, []).append((i, k))
    return [_Launch(units, x) for by_unit in alike.values() for x in _shares(by_unit)]


def _shares(by_unit: dict[int, list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Deals parts out to few launches, most of which have as many parts of every unit."""
    total = sum(map(len, by_unit.values()))

    def cost(launches: int) -> tuple[int, int]:
        dealt = launches * sum(len(parts) // launches for parts in by_unit.values())
        rest = total - dealt
        return launches + -(-rest // LAUNCH_PARTS), rest

    def fits(launches: int) -> bool:
        return 0 < sum(len(parts) // launches for parts in by_unit.values()) <= LAUNCH_PARTS

    count = min(filter(fits, range(1, total + 1)), key=cost)
    out: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    rest = []
    for parts in by_unit.values():
        each = len(parts) // count
        for i, launch in enumerate(out):
            launch += parts[i * each : (i + 1) * each]
        rest += parts[count * each :]
    return out + [rest[i : i + LAUNCH_PARTS] for i in range(0, len(rest), LAUNCH_PARTS)]


@functools.lru_cache(maxsize=1024)
def plan_for(
    views: tuple[View, ...], tensors: int, tuning: Tuning, backwards: bool = False
) -> Plan:
    """A plan whose programs fill the GPU once, or for large tensors a few times.

    Never a bit more than that: a wave of few programs takes as long as a full one.

    Args:
      views: how the pass sees the tensors of each part.
      tensors: number of tensors in a part.
      tuning: how the pass is cut.
      backwards: as in `Plan`.

    Returns:
      The plan.
    """
    view = views[0]
    matrices = tensors * view.batch * view.middle
    at_once = tuning.programs * MULTIPROCESSORS
    tile = view.rows * view.width
    elements = matrices * tile * sum(v.strips * v.tiles_down for v in views)
    waves = -(-elements // (at_once * tuning.program_elements))

    def programs(tiles: int) -> int:
        return matrices * sum(v.strips * -(-v.tiles_down // tiles) for v in views)

    most = max(v.tiles_down for v in views)
    fits = (n for n in range(1, most) if programs(n) <= at_once * waves)
    tiles = next(fits, most)
    rows = min(tuning.block_rows or view.rows, view.rows)
    step = mosaic.tile_layout(view.width, view.vector)[1]
    return Plan(
        views,
        tensors,
        # as equal as they can be
        tuple(-(-v.tiles_down // -(-v.tiles_down // tiles)) for v in views),
        min(tuning.stages, tiles + 1),
        max(rows, step),
        tuning.loops,
        backwards,
        tuning.together,
        tuning.in_flight,
    )


def _first(units: Sequence[_Unit], launch: _Launch, vectors: _Vectors | None) -> First:
    """Where the tensors of each part of a launch begin, for the kernels to read."""
    tensors = _numbers([of_part[0] for of_part in launch.tensors])
    if vectors is None:
        return First(tensors, None, None)
    starts = [vectors.starts(i, sum(units[i].counts[:k])) for i, k in launch.members]
    return First(tensors, *_down_and_across(launch, starts))


def _down_and_across(
    launch: _Launch, starts: Sequence[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Where lines down and across the tensors of each part begin, given rows and columns."""
    views = [x.view for x in launch.of(SUMS)]
    sides = [x if v.down_is_row else x[::-1] for v, x in zip(views, starts, strict=True)]
    down, across = zip(*sides, strict=True)
    return _numbers(down), _numbers(across)


def _numbers(x: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.asarray(x, np.int32))


def _added(launches: Sequence[_Launch], tuning: Tuning, sums: Sequence[jax.Array]) -> jax.Array:
    """The sums of all programs added up, for the tensors in their order.

    Args:
      launches: of a pass.
      tuning: of the pass.
      sums: (tensors, sums, programs) of each launch.

    Returns:
      (tensors, sums).
    """
    short = []
    for launch, x in zip(launches, sums, strict=True):
        plan = launch.plan(tuning)
        each = plan.programs_of_tensor
        if len(set(each)) > 1:
            written = np.asarray(each, np.int32) * (x.shape[2] // max(each))
            written = np.repeat(written, plan.tensors)[:, None, None]
            position = jax.lax.broadcasted_iota(jnp.int32, (1, 1, x.shape[2]), 2)
            x = jnp.where(position < written, x, 0)
        # where others have a few, those of large tensors are added up first
        short.append(x if x.shape[2] <= LONG_SUM else jnp.sum(x, axis=2, keepdims=True))
    most = max(x.shape[2] for x in short)
    added = jnp.sum(concatenate([_padded_to(x, most) for x in short]), axis=2)
    order = np.argsort(np.concatenate([x for launch in launches for x in launch.tensors]))
    return _tensors(added, order, len(order))


def _padded_to(x: jax.Array, size: int) -> jax.Array:
    short = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def _as_laid_out(x: jax.Array) -> jax.Array:
    """The array, in whatever layout its producer has it.

    The kernels take row-major arrays. XLA carries such a demand backwards, and of a gradient that
    is a sum over a batch it lays out the terms so that they lie side by side: with them a model's
    activations (docs/kernels.md). An array with one axis has no layout, so it carries no demand.
    """
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _arranged(view: View, x: jax.Array) -> jax.Array:
    return view.arrange(mosaic.materialized(x))


def _elements(view: View, part: Part, are_joined: bool = False) -> Elements:
    """The arrays of a part for B and C, which share what copies these take.

    Joined parameters are whole; behind a barrier, those of pass A would be kept until then.
    """
    old, whole = part.accumulators, functools.partial(_arranged, view)
    averages = () if view.is_factored else tuple(jnp.moveaxis(old.row, 1, 0))
    return Elements(
        gradient=view.arrange(_as_laid_out(part.gradient)),
        parameter=(view.arrange if are_joined else whole)(part.parameter),
        momentum=tuple(map(whole, old.momentum)),
        second_moment=whole(old.second_moment),
        average=tuple(map(whole, averages)),
    )


def _folded(
    rule: Rule, features: Sequence[Feature], mlp: MLP, means: jax.Array, vectors: _Vectors | None
) -> Folded:
    """The folded networks of all tensors from the mean squares (tensors, element features).

    The first layer's weights and biases have a last axis of tensors, or of size one.
    """
    operands, lines = None, {}
    if vectors is not None:
        operands, lines = vectors.operands, vectors.lines
    mean_of = lambda varies, x: lines[varies].tensor_means(x)  # noqa: E731
    normalizers = rules.normalizers(rule, features, list(means.T), operands, mean_of)
    # computed once, or XLA takes features of a row for softmaxes and makes a kernel of each
    normalizers = jax.lax.optimization_barrier(normalizers)
    along = lambda varies, x: lines[varies].of_tensors(x) if lines else x  # noqa: E731
    return rules.fold(mlp, features, normalizers, operands, along)


def _means(sums: jax.Array, units: Sequence[_Unit]) -> jax.Array:
    """Means over the whole tensors of some units from sums over shards, (tensors, sums)."""
    counts = [unit.tensors for unit in units]
    names = [unit.whole.names(range(len(unit.shape))) for unit in units]
    elements = np.concatenate([unit.elements for unit in units])
    return totals(sums.T, counts, names).T / elements[:, None]


def _layers(mlp: MLP, mlp_per_tensor: bool, tensors: int) -> tuple:
    """The layers after the first, as the table holds them: of the last one what is read."""

    def layer(weight: jax.Array, bias: jax.Array, is_last: bool) -> tuple:
        if not mlp_per_tensor:
            weight, bias = table.repeat(weight, tensors), table.repeat(bias, tensors)
        if is_last:
            weight, bias = weight[..., :2], bias[..., :2]
        return jnp.swapaxes(weight, 1, 2), bias

    pairs = list(zip(mlp.weights[1:], mlp.biases[1:], strict=True))
    return tuple(layer(*pair, pair is pairs[-1]) for pair in pairs)


def _centres(statistics: Statistics | None, decays: Decays, means: jax.Array) -> jax.Array:
    """What the means of the new accumulators are, but for rounding: (tensors, momenta + 1)."""
    if statistics is None:
        return jnp.zeros((means.shape[0], decays.momentum.shape[-1] + 1), jnp.float32)
    gradient, squared = means[:, -2:-1], means[:, -1]
    momentum = decays.momentum * statistics.momentum_mean + (1 - decays.momentum) * gradient
    rate = decays.second_moment
    second_moment = rate * statistics.second_moment_mean + (1 - rate) * squared
    return jnp.concatenate([momentum, second_moment[:, None]], axis=1)


def _statistics(means: jax.Array, centres: jax.Array) -> Statistics:
    """From means of distances to the centres and of their squares."""
    first, second = jnp.split(means, 2, axis=1)
    mean, variance = centres + first, jnp.maximum(second - jnp.square(first), 0)
    return Statistics(mean[:, :-1], variance[:, :-1], mean[:, -1], variance[:, -1])


# Compiled apart, so that equally shaped arrays share their code. The kernels differ in interpreted
# and compiled form, so that is part of the key.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_sums(plan: Plan, rule: Rule, interpreted: bool, gradients: Any, parameters: Any) -> Any:
    del interpreted
    return passes.first_sums(plan, rule, gradients, parameters)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _square_sums(plan: Plan, rule: Rule, entries: Any, interpreted: bool, inputs: Inputs) -> Any:
    del interpreted
    return passes.square_sums(plan, rule, inputs, entries)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _update(plan: Plan, rule: Rule, entries: Any, interpreted: bool, inputs: Inputs) -> Any:
    del interpreted
    return passes.update(plan, rule, inputs, entries)
