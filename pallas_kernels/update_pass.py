"""Pass C: the network, the update, and the accumulators, changed in place.

What a program writes goes into the buffers that its tile came in, and from there to global memory.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lopt_jax.accumulators import Decays
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import Folded, Rule
from pallas_kernels import early, mosaic
from pallas_kernels.operands import (
    Blockwise,
    Elements,
    Inputs,
    buffers_of,
    columns_of,
    element_features,
    rates_of,
    tensor_of,
)
from pallas_kernels.plan import Plan, place_of, tile_of
from pallas_kernels.programs import masked, split, store_sums, sums_of_programs, walk
from pallas_kernels.table import Numbers, read, sequence


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


@mosaic.compiled_apart(static_argnums=(0, 1, 3))
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
    features = element_features(rule, view)
    kernel = Blockwise(plan, rule, entries.decays)
    registers = kernel.registers
    matrices = inputs.matrices
    hidden = 0 if matrices is not None else entries.weights.shape[1]
    momenta = len(inputs.elements[0].momentum)
    statistics = momenta + 1 if rule.accumulator_statistics else 0
    # updates are arrays of their own; new parameters take the places of the old ones
    updates = () if rule.applies else tuple(x.parameter for x in inputs.elements)
    outputs = [
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in updates),
        sums_of_programs(plan, max(2 * statistics, 1), registers.step),
    ]

    def body(program: Any, *refs: Any) -> None:
        sources, others = split(refs, inputs)
        update_outs: Any = others[: len(updates)] or (None,) * plan.parts
        sums_out, *scratch = others[len(updates) :]
        buffers, arrived, once, blocks = buffers_of(inputs, scratch)
        place = place_of(plan, program)
        of_part = mosaic.any_of(list(zip(sources.elements, update_outs, strict=True)), place.part)
        start, start_constants = kernel.copies(place, of_part, sources, buffers, arrived, once)
        stored = lambda x: [*x.momentum, x.second_moment, *x.average]  # noqa: E731
        written = [buffers.elements.parameter, *stored(buffers.elements)]

        def folded(numbers: Table, rates: Decays, slot: Any, row: Any) -> Folded:
            # views of the table stand for the arrays that the rule's formulas read
            weights: Any = tuple(_Row(numbers.weights, k) for k in range(len(features)))
            layers: Any = tuple((_Transposed(weight), bias) for weight, bias in numbers.layers)
            if not view.is_factored:
                return Folded(weights, numbers.bias[0], None, layers)
            factors = len(rates.factored)
            down: Any = _VectorBias(
                (hidden,), lambda j: registers.down(buffers.down, slot, row, factors + j)
            )
            across: Any = _VectorBias(
                (hidden,), lambda j: registers.across(buffers.across, factors + j)
            )
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
                        masked(inside, x - numbers.centres[k])
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
                    [x.at[tile_of(plan, place, tile)] for x in outs],
                )

            of_part(store_part)
            mosaic.await_reads(1)
            return sums

        def prepare() -> Callable:
            start_constants()
            mosaic.barrier_wait(once)
            numbers = mosaic.scalars(buffers.table)
            rates = rates_of(entries.decays, numbers)
            numbers, held = read(entries, numbers), None
            if matrices is not None:
                across = None
                if view.is_factored:
                    columns = columns_of(plan, place, sources.matrices.across)
                    across = sources.matrices.biases.at[columns]
                vectors = sources.matrices.vectors.at[tensor_of(plan, place, sources)]
                held = kernel.blocks.held(across, vectors)
                numbers = numbers._replace(  # read once
                    layers=sequence(numbers.layers),
                    scale={(): numbers.scale[()]},
                    weight_decay={(): numbers.weight_decay[()]},
                )
            return functools.partial(consume, numbers, rates, held)

        carry = (registers.zeros(),) * (2 * statistics)
        sums = walk(plan, place, start, prepare, arrived, carry)
        store_sums(plan, place, sums_out, sums)
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
class _VectorBias:
    """A bias of the first layer that lies in vectors: one a hidden unit."""

    shape: tuple[int, ...]
    load: Callable[[int], jax.Array]

    def __getitem__(self, j: int) -> jax.Array:
        return self.load(j)


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
