"""The three passes over arrays of equally shaped tensors, as Mosaic GPU kernels.

A program (a warpgroup) walks down a strip of tiles. Copies of the next tiles into shared memory run
while it computes; what it writes goes into the same buffers and from there to global memory. Copies
clip at the ends of the arrays, so no size needs padding; sums leave out what lies beyond the ends.

Sums are deterministic: every program writes its own, and they are added outside in a fixed order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lopt_jax import rule as rules
from lopt_jax.accumulators import Decays, update_average
from lopt_jax.features import Feature, Operands
from lopt_jax.rule import FactoredVectors, Folded, Rule
from pallas_kernels import early, mosaic
from pallas_kernels.lines import PIECE, pieces
from pallas_kernels.matrix_units import Blocks, Matrices
from pallas_kernels.table import Numbers, read, sequence
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


def _of_part(part: Any, numbers: Sequence[int]) -> Any:
    """The number of a program's part; known at once where all parts have the same."""
    out: Any = numbers[0]
    for i, n in enumerate(numbers):
        if n != numbers[0]:
            out = jnp.where(part == i, jnp.int32(n), out)
    return out


def _place(plan: Plan, program: jax.Array) -> Place:
    if plan.backwards:
        program = plan.programs - 1 - program
    each = plan.programs_of_part
    if len(set(each)) == 1:
        part, program = jax.lax.div(program, each[0]), jax.lax.rem(program, each[0])
    else:
        firsts = [sum(each[:i]) for i in range(plan.parts)]
        part = sum(jnp.where(program >= first, 1, 0) for first in firsts[1:])
        program = program - _of_part(part, firsts)
    strips, chunks = _of_part(part, plan.strips), _of_part(part, plan.chunks)
    strip = jax.lax.rem(program, strips)
    program = jax.lax.div(program, strips)
    chunk = jax.lax.rem(program, chunks)
    program = jax.lax.div(program, chunks)
    middle = jax.lax.rem(program, plan.view.middle)
    return Place(part, jax.lax.div(program, plan.view.middle), middle, chunk, strip)


def _group(plan: Plan, place: Place) -> jax.Array:
    """Position of a program's matrix among those of all parts."""
    return place.part * plan.groups + place.group


def _sums_of_programs(plan: Plan, sums: int, step: int) -> jax.ShapeDtypeStruct:
    """What `_store_sums` stores into; its last axis is left to be added up.

    Of a part whose tensors take fewer programs than others, the end of that axis is never written.
    """
    shape = (plan.parts * plan.tensors, sums, max(plan.programs_of_tensor) * step)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _store_sums(plan: Plan, place: Place, ref: Any, sums: Sequence[jax.Array]) -> None:
    """Stores a program's sums, each as one number a row of the threads.

    Adding these up takes no exchange between warps, and programs lie in a fixed order.
    """
    group = _group(plan, place)
    tensor = jax.lax.div(group, plan.view.batch)
    program = jax.lax.rem(group, plan.view.batch) * plan.view.middle + place.middle
    program = program * _of_part(place.part, plan.chunks) + place.chunk
    program = program * _of_part(place.part, plan.strips) + place.strip
    for k, x in enumerate(sums):
        numbers = pl.ds(program * x.shape[0], x.shape[0])
        mosaic.store(ref.at[tensor, k, numbers], jnp.sum(x, axis=1), optimized=False)


def _tile_of(plan: Plan, place: Place, tile: Any) -> tuple[Any, ...]:
    """The index of a tile in an arranged array."""
    view = plan.view
    rows = pl.ds(tile * view.rows, view.rows)
    return place.group, rows, place.middle, pl.ds(place.strip * view.width, view.width)


def _walk(
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
    tiles = _of_part(place.part, plan.tiles)
    first = place.chunk * tiles
    tiles_down = _of_part(place.part, [view.tiles_down for view in plan.views])
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
class _Registers:
    """Loads and sums of the blocks of a tile."""

    plan: Plan

    @functools.cached_property
    def layout(self) -> Any:
        return mosaic.tile_layout(self.plan.view.width, self.plan.view.vector)[0]

    @functools.cached_property
    def step(self) -> int:
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
        return mosaic.load(ref.at[slot, pl.ds(row, self.plan.block_rows)], self.layout)

    def down(self, ref: Any, slot: Any, row: Any, k: int) -> jax.Array:
        rows = pl.ds(row, self.plan.block_rows)
        vector = mosaic.load(ref.at[slot, k, rows], self.layout.reduce(1), optimized=False)
        return mosaic.spread(vector, self.plan.block, 0, self.layout)

    def across(self, ref: Any, k: int) -> jax.Array:
        vector = mosaic.load(ref.at[k], self.layout.reduce(0), optimized=False)
        return mosaic.spread(vector, self.plan.block, 1, self.layout)

    def zeros(self) -> jax.Array:
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
            inside = lines < _of_part(part, [v.down for v in views])
        if any(v.across % v.width for v in views):
            size = _of_part(part, [v.across for v in views])
            inside = columns < size if inside is None else inside & (columns < size)
        return inside


def _masked(inside: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if inside is None else jnp.where(inside, x, 0.0)


# ------------------------------------------------------------------------------------------------
# pass A


class FirstSums(NamedTuple):
    """Sums of pass A, every program's. Of parts of several shapes sizes are the largest.

    What lies beyond a part's own is never written.
    """

    down: jax.Array | None  # (all groups, middle, strips, down rounded up): of g² across a strip
    across: jax.Array | None  # (all groups, middle, chunks, across rounded up): of g² down a chunk
    parameter: jax.Array | None  # (tensors, 1, programs and threads): of p²


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
    parts = [(g,) for g in gradients]
    if parameters is not None:
        parts = [(g, p) for g, p in zip(gradients, parameters, strict=True)]
    down_size = max(v.tiles_down for v in plan.views) * view.rows
    strips, chunks = max(plan.strips), max(plan.chunks)
    registers = _Registers(plan)
    groups = plan.parts * plan.groups
    outputs = [
        jax.ShapeDtypeStruct((groups, view.middle, strips, down_size), jnp.float32),
        jax.ShapeDtypeStruct((groups, view.middle, chunks, strips * view.width), jnp.float32),
        _sums_of_programs(plan, 1, registers.step),
    ]

    def body(program: Any, *refs: Any) -> None:
        inputs, refs = _split(refs, parts)
        (down_out, across_out, parameter_out), refs = refs[:3], refs[3:]
        buffers, arrived = refs[:-1], refs[-1]
        place = _place(plan, program)
        of_part = mosaic.any_of(inputs, place.part)

        def start(tile: Any, slot: Any) -> None:
            def start_part(sources: Any) -> None:
                for source, target in zip(sources, buffers, strict=True):
                    mosaic.copy_in(
                        source.at[_tile_of(plan, place, tile)], target.at[slot], arrived.at[slot]
                    )

            of_part(start_part)

        def consume(tile: Any, slot: Any, carry: Any) -> Any:
            def take(row: Any, carry: Any) -> Any:
                across, squares = carry
                g = rules.prepare_gradient(rule, registers.load(buffers[0], slot, row))
                squared = jnp.square(g)
                rows = pl.ds(tile * view.rows + row, plan.block_rows)
                target = down_out.at[_group(plan, place), place.middle, place.strip, rows]
                mosaic.store(target, jnp.sum(squared, axis=1), optimized=False)
                if parameters is not None:
                    p = registers.load(buffers[1], slot, row).astype(jnp.float32)
                    squares = squares + registers.fold(jnp.square(p))
                return across + registers.fold(squared), squares

            carry = registers.each_block(take, carry)
            mosaic.synchronize()
            return carry

        across, squares = _walk(
            plan, place, start, lambda: consume, arrived, (registers.zeros(), registers.zeros())
        )
        columns = pl.ds(place.strip * view.width, view.width)
        target = across_out.at[_group(plan, place), place.middle, place.chunk, columns]
        mosaic.store(target, jnp.sum(across, axis=0), optimized=False)
        _store_sums(plan, place, parameter_out, [squares])

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


# ------------------------------------------------------------------------------------------------
# passes B and C


class Elements(NamedTuple):
    """Arrays of a pass, each arranged as the plan's view does; or refs of them."""

    gradient: Any
    parameter: Any
    momentum: tuple
    second_moment: Any
    average: tuple  # the factored second moments where the tensor is not factored, one a decay


class First(NamedTuple):
    """Where what belongs to the tensors of each part begins, (parts,) int32."""

    tensor: jax.Array  # among the tables
    down: jax.Array | None  # along the lines, those down the tensor
    across: jax.Array | None  # those across


class Inputs(NamedTuple):
    """What passes B and C read."""

    elements: Sequence[Elements]  # of each part
    table: jax.Array  # (all tensors or 1, rows, 256), of `table.pack`
    lines: jax.Array | None  # (vectors, size), as `lines.Lines` has them; None: not factored
    first: Any  # `First`
    matrices: Matrices | None = None  # the network for the matrix units; None: it is in the table


def _tensor(plan: Plan, place: Place, refs: Inputs) -> jax.Array:
    """The tensor of a program, among the tables."""
    return refs.first.tensor[place.part] + jax.lax.div(place.group, plan.view.batch)


def _line(plan: Plan, place: Place, first: Any, lengths: Sequence[int]) -> jax.Array:
    """Where a program's line starts among the lines, which have a length for each part."""
    line = place.group * plan.view.middle + place.middle
    size = _of_part(place.part, [pieces(length) * PIECE for length in lengths])
    return first[place.part] + line * size


def _columns(plan: Plan, place: Place, first: Any) -> Any:
    """Where what belongs to the columns of a program's strip lies among lines."""
    start = _line(plan, place, first, [view.across for view in plan.views])
    return pl.ds(start + place.strip * plan.view.width, plan.view.width)


def _rows(plan: Plan, place: Place, first: Any, tile: Any) -> Any:
    """The same for the rows of a tile."""
    start = _line(plan, place, first, [view.down for view in plan.views])
    return pl.ds(start + tile * plan.view.rows, plan.view.rows)


class _Buffers(NamedTuple):
    """Shared memory of a program."""

    elements: Elements  # of one part
    table: Any
    down: Any = None
    across: Any = None
    weights: Any = None  # of the matrix units
    biases: Any = None


@dataclass(frozen=True)
class _Kernel:
    """What passes B and C share: refs, and the operands of a block."""

    plan: Plan
    rule: Rule
    decays: Any  # Decays of table entries

    @functools.cached_property
    def registers(self) -> _Registers:
        return _Registers(self.plan)

    def scratch(self, inputs: Inputs) -> list:
        plan = self.plan
        out = [
            mosaic.shared((plan.stages, *plan.tile), x.dtype)
            for x in jax.tree.leaves(inputs.elements[0])
        ]
        constants = [mosaic.shared(inputs.table.shape[1:], jnp.float32)]
        if inputs.lines is not None:
            vectors = inputs.lines.shape[0]
            out.append(mosaic.shared((plan.stages, vectors, plan.view.rows), jnp.float32))
            constants.append(mosaic.shared((vectors, plan.view.width), jnp.float32))
        blocks = []
        if inputs.matrices is not None:
            matrices = inputs.matrices
            if matrices.biases is not None:
                units = matrices.biases.shape[-1]
                out.append(mosaic.shared((plan.stages, plan.view.rows, units), jnp.float32))
            constants += [mosaic.operand(w.shape[1:]) for w in matrices.weights]
            blocks = self.blocks.scratch(matrices)
        return [
            *out,
            *constants,
            mosaic.barrier(len(out), plan.stages),
            mosaic.barrier(len(constants)),
            *blocks,
        ]

    @functools.cached_property
    def blocks(self) -> Blocks:
        return Blocks(
            self.plan.block, self.registers.layout, self.plan.together, self.plan.in_flight
        )

    def copies(
        self,
        place: Place,
        of_part: Callable[[Callable[[Any], None]], None],
        refs: Inputs,
        buffers: Any,
        arrived: Any,
        once: Any,
    ) -> tuple[Callable[[Any, Any], None], Callable[[], None]]:
        """Functions that start the copies of a tile, and those that a program needs once.

        Args:
          place: the program's.
          of_part: calls a function of (elements, ...) of the program's part.
          refs: the inputs.
          buffers: in shared memory, of the elements of one part.
          arrived: barriers of the tiles.
          once: barrier of what a program needs once.
        """
        plan = self.plan
        tables = refs.table.shape[0]

        def start_constants() -> None:
            tensor = _tensor(plan, place, refs)
            mosaic.copy_in(refs.table.at[0 if tables == 1 else tensor], buffers.table, once)
            if refs.lines is not None:
                columns = _columns(plan, place, refs.first.across)
                mosaic.copy_in(refs.lines.at[:, columns], buffers.across, once)
            if refs.matrices is not None:
                pairs = zip(refs.matrices.weights, buffers.weights, strict=True)
                for source, target in pairs:
                    mosaic.copy_in(source.at[tensor], target, once)

        def start(tile: Any, slot: Any) -> None:
            def start_part(sources: Elements) -> None:
                pairs = zip(
                    jax.tree.leaves(sources), jax.tree.leaves(buffers.elements), strict=True
                )
                for source, target in pairs:
                    mosaic.copy_in(
                        source.at[_tile_of(plan, place, tile)], target.at[slot], arrived.at[slot]
                    )

            of_part(lambda part: start_part(part[0]))
            if refs.lines is not None:
                rows = _rows(plan, place, refs.first.down, tile)
                mosaic.copy_in(refs.lines.at[:, rows], buffers.down.at[slot], arrived.at[slot])
                if refs.matrices is not None:
                    rows = _rows(plan, place, refs.matrices.down, tile)
                    source = refs.matrices.biases.at[rows]
                    mosaic.copy_in(source, buffers.biases.at[slot], arrived.at[slot])

        return start, start_constants

    def operands(self, buffers: Any, slot: Any, row: Any, decays: Decays) -> tuple[Operands, tuple]:
        """Operands of a block of one part, and new averages where the tensor is not factored."""
        load = lambda ref: self.registers.load(ref, slot, row)  # noqa: E731
        wide = lambda ref: load(ref).astype(jnp.float32)  # noqa: E731
        elements = buffers.elements
        gradient = rules.prepare_gradient(self.rule, load(elements.gradient))
        averages: tuple = ()
        if self.plan.view.is_factored:
            factors = range(len(decays.factored))
            down = tuple(self.registers.down(buffers.down, slot, row, k) for k in factors)
            across = tuple(self.registers.across(buffers.across, k) for k in factors)
            # whichever of them is the row: to features of elements that is the same
            vectors = FactoredVectors((), (), down, across)
        else:
            squared = jnp.square(gradient)
            averages = tuple(
                update_average(wide(x), squared, decay)
                for x, decay in zip(elements.average, decays.factored, strict=True)
            )
            vectors = FactoredVectors(averages, (), (), ())
        operands = rules.element_operands(
            gradient,
            wide(elements.parameter),
            tuple(wide(m) for m in elements.momentum),
            wide(elements.second_moment),
            decays,
            vectors,
        )
        return operands, averages


def _element_features(rule: Rule, view: View) -> tuple[Feature, ...]:
    features = rule.features.for_tensor(view.is_factored)
    return tuple(feature for feature in features if feature.varies == "element")


def _split(refs: Sequence[Any], tree: Any) -> tuple[Any, Sequence[Any]]:
    treedef = jax.tree.structure(tree)
    count = treedef.num_leaves
    return treedef.unflatten(refs[:count]), refs[count:]


def _buffers(inputs: Inputs, refs: Sequence[Any]) -> tuple[_Buffers, Any, Any, Sequence[Any]]:
    """Buffers of one part, barriers, and what the matrix units use."""
    elements, refs = _split(refs, inputs.elements[0])
    down = across = weights = biases = None
    if inputs.lines is not None:
        (down, *refs) = refs
    if inputs.matrices is not None and inputs.matrices.biases is not None:
        (biases, *refs) = refs
    (table, *refs) = refs
    if inputs.lines is not None:
        (across, *refs) = refs
    if inputs.matrices is not None:
        weights, refs = _split(refs, inputs.matrices.weights)
    (arrived, once, *blocks) = refs
    return _Buffers(elements, table, down, across, weights, biases), arrived, once, blocks


class Rates(NamedTuple):
    """What pass B reads of a tensor, number by number."""

    decays: Decays
    length: Any = None  # (): elements, where tensors have different numbers of them


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
    features = _element_features(rule, plan.view)
    kernel = _Kernel(plan, rule, entries.decays)
    registers = kernel.registers
    width = len(features) + 2

    def body(program: Any, *refs: Any) -> None:
        sources, refs = _split(refs, inputs)
        out, refs = refs[0], refs[1:]
        buffers, arrived, once, _ = _buffers(inputs, refs)
        place = _place(plan, program)
        of_part = mosaic.any_of([(x,) for x in sources.elements], place.part)
        start, start_constants = kernel.copies(place, of_part, sources, buffers, arrived, once)

        def consume(rates: Decays, length: Any, tile: Any, slot: Any, sums: tuple) -> tuple:
            def take(row: Any, sums: tuple) -> tuple:
                operands, _ = kernel.operands(buffers, slot, row, rates)
                inside = registers.inside(place, tile, row, length)
                values = [jnp.square(feature.formula(operands)) for feature in features]
                values += [operands.gradient, jnp.square(operands.gradient)]
                return tuple(
                    s + registers.fold(_masked(inside, x))
                    for s, x in zip(sums, values, strict=True)
                )

            sums = registers.each_block(take, sums)
            mosaic.synchronize()
            return sums

        def prepare() -> Callable:
            start_constants()
            mosaic.barrier_wait(once)
            numbers = mosaic.scalars(buffers.table)
            return functools.partial(
                consume, _rates(entries.decays, numbers), _number(entries.length, numbers)
            )

        sums = _walk(plan, place, start, prepare, arrived, (registers.zeros(),) * width)
        _store_sums(plan, place, out, sums)

    (out,) = early.call(
        body,
        jax.tree.leaves(inputs),
        programs=plan.programs,
        outputs=[_sums_of_programs(plan, width, registers.step)],
        scratch=kernel.scratch(inputs),
        name="lopt_square_sums",
    )
    return out


def _number(entry: Any, table: Any) -> Any:
    return None if entry is None else read(entry, table)[()]


def _rates(decays: Any, table: Any) -> Decays:
    decays = read(decays, table)
    return Decays(
        momentum=sequence(decays.momentum),
        second_moment=decays.second_moment[()],
        factored=sequence(decays.factored),
    )


class Table(NamedTuple):
    """What pass C reads of a tensor, number by number."""

    decays: Decays
    weights: Any  # (element features, H); none where the network is in matrices
    bias: tuple  # one (H,); none where the tensor is factored, or the network is in matrices
    layers: tuple  # (weight (outputs, inputs), bias (outputs,)) each; or the last bias alone
    scale: Any  # ()
    weight_decay: Any  # ()
    centres: Any  # (momenta + 1,): about the means of the accumulators
    length: Any = None  # as in `Rates`


class StepOutputs(NamedTuple):
    """What pass C makes."""

    elements: list[Elements]  # the gradients' places hold the results, the parameters' nothing
    sums: jax.Array | None  # (all tensors, 2 * accumulators, programs and threads)


@dataclass(frozen=True)
class _VectorBias:
    """A bias of the first layer that lies in vectors: one a hidden unit."""

    shape: tuple[int, ...]
    load: Callable[[int], jax.Array]

    def __getitem__(self, j: int) -> jax.Array:
        return self.load(j)


def update(plan: Plan, rule: Rule, inputs: Inputs, entries: Table) -> StepOutputs:
    """Pass C: the network, the update and the accumulators.

    Args:
      plan: the plan.
      rule: the rule.
      inputs: vectors: the factors of each decay, then a bias for each hidden unit.
      entries: of the table.

    Returns:
      The update, or the new parameter, in the parameter's dtype, the accumulators; the sums of the
      accumulators' distances to their centres, and of the squares of these, if the rule keeps
      statistics.
    """
    view = plan.view
    features = _element_features(rule, view)
    kernel = _Kernel(plan, rule, entries.decays)
    registers = kernel.registers
    matrices = inputs.matrices
    hidden = 0 if matrices is not None else entries.weights.shape[1]
    momenta = len(inputs.elements[0].momentum)
    statistics = momenta + 1 if rule.accumulator_statistics else 0
    # updates are arrays of their own; new parameters take the places of the old ones
    updates = () if rule.applies else tuple(x.parameter for x in inputs.elements)
    outputs = [
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in updates),
        _sums_of_programs(plan, max(2 * statistics, 1), registers.step),
    ]

    def body(program: Any, *refs: Any) -> None:
        sources, refs = _split(refs, inputs)
        update_outs: Any = refs[: len(updates)] or (None,) * plan.parts
        sums_out, *refs = refs[len(updates) :]
        buffers, arrived, once, blocks = _buffers(inputs, refs)
        place = _place(plan, program)
        of_part = mosaic.any_of(list(zip(sources.elements, update_outs, strict=True)), place.part)
        start, start_constants = kernel.copies(place, of_part, sources, buffers, arrived, once)
        stored = lambda x: [*x.momentum, x.second_moment, *x.average]  # noqa: E731
        written = [buffers.elements.parameter, *stored(buffers.elements)]

        def folded(numbers: Table, rates: Decays, slot: Any, row: Any) -> Folded:
            weights = tuple(_Row(numbers.weights, k) for k in range(len(features)))
            layers = tuple((_Transposed(weight), bias) for weight, bias in numbers.layers)
            if not view.is_factored:
                return Folded(weights, numbers.bias[0], None, layers)
            factors = len(rates.factored)
            down = _VectorBias(
                (hidden,), lambda j: registers.down(buffers.down, slot, row, factors + j)
            )
            across = _VectorBias((hidden,), lambda j: registers.across(buffers.across, factors + j))
            return Folded(weights, down, across, layers)

        def network(
            values: Sequence[jax.Array],
            numbers: Table,
            rates: Decays,
            held: Any,
            slot: Any,
            row: Any,
        ) -> tuple[jax.Array, jax.Array]:
            if matrices is None:
                return rules.network_outputs(values, folded(numbers, rates, slot, row))
            down = None
            if buffers.biases is not None:
                down = buffers.biases.at[slot, pl.ds(row, plan.block_rows)]
            outputs = kernel.blocks.outputs(values, buffers.weights, down, held, blocks)
            return outputs[0] + numbers.layers[0], outputs[1] + numbers.layers[1]

        def consume(
            numbers: Table, rates: Decays, held: Any, tile: Any, slot: Any, sums: tuple
        ) -> tuple:
            def take(row: Any, sums: tuple) -> tuple:
                operands, averages = kernel.operands(buffers, slot, row, rates)
                values = [feature.formula(operands) for feature in features]
                new = [*operands.momentum, operands.second_moment, *averages]
                rows = pl.ds(row, plan.block_rows)
                for buffer, value in zip(written[1:], new, strict=True):
                    mosaic.store(buffer.at[slot, rows], value.astype(buffer.dtype))
                outputs = network(values, numbers, rates, held, slot, row)
                step = rules.output_step(*outputs, rule.exp_mult)
                change = rules.parameter_update(
                    rule, step, operands.parameter, numbers.scale[()], numbers.weight_decay[()]
                )
                buffer = written[0]
                mosaic.store(buffer.at[slot, rows], change.astype(buffer.dtype))
                if statistics:
                    length = None if numbers.length is None else numbers.length[()]
                    inside = registers.inside(place, tile, row, length)
                    distances = [
                        _masked(inside, x - numbers.centres[k])
                        for k, x in enumerate(new[:statistics])
                    ]
                    distances += [jnp.square(x) for x in distances]
                    sums = tuple(
                        s + registers.fold(x) for s, x in zip(sums, distances, strict=True)
                    )
                return sums

            sums = registers.each_block(take, sums)
            mosaic.synchronize()

            def store_part(part: tuple[Elements, Any]) -> None:
                elements, update_out = part
                outs = (elements.parameter if rule.applies else update_out, *stored(elements))
                mosaic.copy_out(
                    [buffer.at[slot] for buffer in written],
                    [x.at[_tile_of(plan, place, tile)] for x in outs],
                )

            of_part(store_part)
            mosaic.await_reads(1)
            return sums

        def prepare() -> Callable:
            start_constants()
            mosaic.barrier_wait(once)
            numbers = mosaic.scalars(buffers.table)
            rates = _rates(entries.decays, numbers)
            numbers, held = read(entries, numbers), None
            if matrices is not None:
                across = None
                if view.is_factored:
                    columns = _columns(plan, place, sources.matrices.across)
                    across = sources.matrices.biases.at[columns]
                vectors = sources.matrices.vectors.at[_tensor(plan, place, sources)]
                held = kernel.blocks.held(across, vectors)
                numbers = numbers._replace(  # read once
                    layers=sequence(numbers.layers),
                    scale={(): numbers.scale[()]},
                    weight_decay={(): numbers.weight_decay[()]},
                )
            return functools.partial(consume, numbers, rates, held)

        carry = (registers.zeros(),) * (2 * statistics)
        sums = _walk(plan, place, start, prepare, arrived, carry)
        _store_sums(plan, place, sums_out, sums)
        mosaic.await_writes()

    # the tensors' arrays are whole already, for pass B
    others = mosaic.materialized(inputs._replace(elements=()))
    inputs = others._replace(elements=inputs.elements)
    # all but the gradients, and but the parameters where these stay
    changed = [
        x._replace(gradient=None, parameter=x.parameter if rule.applies else None)
        for x in inputs.elements
    ]

    def run(changed: Any) -> tuple[jax.Array, ...]:
        elements = [
            new._replace(
                gradient=x.gradient, parameter=new.parameter if rule.applies else x.parameter
            )
            for x, new in zip(inputs.elements, changed, strict=True)
        ]
        return early.call(
            body,
            jax.tree.leaves(inputs._replace(elements=elements)),
            programs=plan.programs,
            outputs=outputs,
            scratch=kernel.scratch(inputs),
            name="lopt_update",
            # a row of a tile of the matrix units' width is one warp's: its sum needs no exchange
            reduction_bytes=6144 if matrices is None else 0,
        )

    changed, (*made, sums) = mosaic.in_place(run, changed, outputs)
    made = made or [x.parameter for x in changed]
    return StepOutputs(
        elements=[
            new._replace(gradient=x, parameter=None) for new, x in zip(changed, made, strict=True)
        ],
        sums=sums if statistics else None,
    )


@dataclass(frozen=True)
class _Row:
    """A row of a matrix of numbers."""

    matrix: Numbers
    row: int

    def __getitem__(self, j: int) -> jax.Array:
        return self.matrix[self.row, j]


@dataclass(frozen=True)
class _Transposed:
    """The transpose of a matrix of numbers: what is read one after another lies side by side."""

    matrix: Numbers

    def __getitem__(self, index: tuple[int, int]) -> jax.Array:
        return self.matrix[index[1], index[0]]
