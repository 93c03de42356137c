"""What passes B and C share: their inputs, the copies of these, and the operands of features."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lopt_jax.accumulators import Decays, update_average
from lopt_jax.features import Feature, Operands
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import FactoredVectors, Rule
from pallas_kernels import mosaic
from pallas_kernels.lines import PIECE, pieces
from pallas_kernels.matrix_units import Blocks, Matrices
from pallas_kernels.plan import Place, Plan, of_part, tile_of
from pallas_kernels.programs import Registers, split
from pallas_kernels.table import read, sequence
from pallas_kernels.view import View


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


def tensor_of(plan: Plan, place: Place, refs: Inputs) -> jax.Array:
    """The tensor of a program, among the tables."""
    return refs.first.tensor[place.part] + jax.lax.div(place.group, plan.view.batch)


def _line(plan: Plan, place: Place, first: Any, lengths: Sequence[int]) -> jax.Array:
    """Where a program's line starts among the lines, which have a length for each part."""
    line = place.group * plan.view.middle + place.middle
    size = of_part(place.part, [pieces(length) * PIECE for length in lengths])
    return first[place.part] + line * size


def columns_of(plan: Plan, place: Place, first: Any) -> Any:
    """Where what belongs to the columns of a program's strip lies among lines."""
    start = _line(plan, place, first, [view.across for view in plan.views])
    return pl.ds(start + place.strip * plan.view.width, plan.view.width)


def rows_of(plan: Plan, place: Place, first: Any, tile: Any) -> Any:
    """The same for the rows of a tile."""
    start = _line(plan, place, first, [view.down for view in plan.views])
    return pl.ds(start + tile * plan.view.rows, plan.view.rows)


class Buffers(NamedTuple):
    """Shared memory of a program."""

    elements: Elements  # of one part
    table: Any
    down: Any = None
    across: Any = None
    weights: Any = None  # of the matrix units
    biases: Any = None


def buffers_of(inputs: Inputs, refs: Sequence[Any]) -> tuple[Buffers, Any, Any, Sequence[Any]]:
    """Buffers of one part, barriers, and what the matrix units use."""
    elements, refs = split(refs, inputs.elements[0])
    down = across = weights = biases = None
    if inputs.lines is not None:
        (down, *refs) = refs
    if inputs.matrices is not None and inputs.matrices.biases is not None:
        (biases, *refs) = refs
    (table, *refs) = refs
    if inputs.lines is not None:
        (across, *refs) = refs
    if inputs.matrices is not None:
        weights, refs = split(refs, inputs.matrices.weights)
    (arrived, once, *blocks) = refs
    return Buffers(elements, table, down, across, weights, biases), arrived, once, blocks


@dataclass(frozen=True)
class Blockwise:
    """What passes B and C share: refs, and the operands of a block."""

    plan: Plan
    rule: Rule
    decays: Any  # Decays of table entries

    @functools.cached_property
    def registers(self) -> Registers:
        """Loads and sums."""
        return Registers(self.plan)

    def scratch(self, inputs: Inputs) -> list:
        """Shared memory and barriers, as `buffers_of` takes them apart."""
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
        """Networks on the matrix units."""
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
            tensor = tensor_of(plan, place, refs)
            mosaic.copy_in(refs.table.at[0 if tables == 1 else tensor], buffers.table, once)
            if refs.lines is not None:
                columns = columns_of(plan, place, refs.first.across)
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
                        source.at[tile_of(plan, place, tile)], target.at[slot], arrived.at[slot]
                    )

            of_part(lambda part: start_part(part[0]))
            if refs.lines is not None:
                rows = rows_of(plan, place, refs.first.down, tile)
                mosaic.copy_in(refs.lines.at[:, rows], buffers.down.at[slot], arrived.at[slot])
                if refs.matrices is not None:
                    rows = rows_of(plan, place, refs.matrices.down, tile)
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


def element_features(rule: Rule, view: View) -> tuple[Feature, ...]:
    """The features that kernels compute: those that vary with the element."""
    features = rule.features.for_tensor(view.is_factored)
    return tuple(feature for feature in features if feature.varies == "element")


def rates_of(decays: Any, table: Any) -> Decays:
    """Decay rates, read from a table."""
    decays = read(decays, table)
    return Decays(
        momentum=sequence(decays.momentum),
        second_moment=decays.second_moment[()],
        factored=sequence(decays.factored),
    )
