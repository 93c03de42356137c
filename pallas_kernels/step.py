"""The two calls of the engine: kernels, and what lies between them."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.accumulators import Accumulators, Decays
from lopt_jax.compiler.slices import PartTaker, opaque_zero, part_taker
from lopt_jax.context import Tracing
from lopt_jax.rows import concatenate, join_trees
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import (
    MLP,
    AccumulatorStatistics,
    GradientStatistics,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.settings import TensorSettings
from pallas_kernels import batching, derivatives, matrix_units, table
from pallas_kernels.batching import Shared
from pallas_kernels.first_pass import first_sums
from pallas_kernels.launches import Launch, added_up, launches_of, sharing_biases
from pallas_kernels.matrix_units import Matrices
from pallas_kernels.networks import Network, centres_of, folded, network_of, statistics_of
from pallas_kernels.operands import Elements, First, Inputs
from pallas_kernels.sums_pass import Rates, square_sums
from pallas_kernels.tuning import FIRST, SUMS, multiprocessors, update_tuning
from pallas_kernels.units import (
    Unit,
    Viewed,
    arranged,
    as_laid_out,
    elements_of,
    take_tensors,
    whole_means,
)
from pallas_kernels.update_pass import StepOutputs, Table, update
from pallas_kernels.vectors import Vectors, starts_of, vector_means
from pallas_kernels.view import View


class Updates(NamedTuple):
    """What a step makes of the tensors of some units."""

    parts: list[list[TensorUpdate]]  # of each unit, without statistics
    statistics: AccumulatorStatistics | None  # of all tensors, with a leading axis


def first_pass(rule: Rule, tracing: Tracing, units: Sequence[Unit]) -> list[GradientStatistics]:
    """Pass A, as `lopt_jax.rules.rule.gradient_statistics` on every tensor.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      units: the tensors.

    Returns:
      Gradient statistics of each unit, with a leading axis of tensors.
    """

    def passes(parts: Any, *_: Any) -> Any:
        given = [unit._replace(parts=x) for unit, x in zip(units, parts, strict=True)]
        return [[] for _ in parts], _first_pass(rule, tracing, list(map(Viewed.of, given))), ()

    def fused(parts: Any) -> list[GradientStatistics]:
        return batching.over_tensors(passes)(parts, [], ())[1]

    def plain(parts: Any) -> list[GradientStatistics]:
        return [
            derivatives.moments(rule, x, unit.partition, unit.lengths)
            for x, unit in zip(parts, units, strict=True)
        ]

    return derivatives.differentiated_as(plain, fused)([tuple(unit.parts) for unit in units])


def _first_pass(rule: Rule, tracing: Tracing, units: Sequence[Viewed]) -> list[GradientStatistics]:
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    factored = [unit for unit in units if unit.dims is not None]
    launches = launches_of(factored, multiprocessors(tracing.runs_on))
    sums = []
    for launch in launches:
        gradients = tuple(
            part.view.arrange(as_laid_out(part.part.gradient)) for part in launch.of(FIRST)
        )
        parameters = None
        if needs_parameter:
            parameters = tuple(arranged(x.view, x.part.parameter) for x in launch.of(FIRST))
        sums.append(first_sums(launch.plan(FIRST), rule, gradients, parameters))
    vectors = iter(vector_means(factored, launches, sums))
    mean_squares: Iterator[Any] = itertools.repeat(None)
    if needs_parameter and factored:
        added = added_up(launches, FIRST, [x.parameter for x in sums])
        means = whole_means(added, factored)[:, 0]
        ends = itertools.accumulate((unit.tensors for unit in factored), initial=0)
        mean_squares = iter([means[i:j] for i, j in itertools.pairwise(ends)])
    return [
        _parameter_moments(rule, unit, needs_parameter)
        if unit.dims is None
        else GradientStatistics(*next(vectors), next(mean_squares))
        for unit in units
    ]


def _parameter_moments(rule: Rule, unit: Viewed, needs_parameter: bool) -> GradientStatistics:
    """Statistics of the gradients of tensors that are not factored."""
    if not needs_parameter:
        return GradientStatistics(None, None, None)
    partition = unit.whole if unit.whole.is_split() else None
    lengths = None if unit.lengths is None else unit.elements
    return derivatives.moments(rule, unit.parts, partition, lengths)


def second_pass(
    rule: Rule,
    tracing: Tracing,
    units: Sequence[Unit],
    moments: Sequence[GradientStatistics],
    settings: TensorSettings,
    decays: Decays,
    zero: jax.Array | None = None,
) -> Updates:
    """Passes B and C, as `lopt_jax.rules.rule.update` on every tensor.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      units: the tensors.
      moments: of `first_pass`.
      settings: of all tensors; the statistics are centres of the new ones' sums, None: zeros.
      decays: decay rates.
      zero: that parts are taken by, of `opaque_zero`; None: made here.

    Returns:
      The updates of each part, and the statistics of all.
    """

    def passes(
        parts: Any,
        moments: Sequence[GradientStatistics],
        by_tensor: tuple[jax.Array, jax.Array, AccumulatorStatistics | None],
        networks: Shared,
        rates: Shared,
        zero: Shared,
    ) -> Any:
        given = [unit._replace(parts=x) for unit, x in zip(units, parts, strict=True)]
        of = [Viewed.of(unit) for unit in given]
        own = zero.tree[0] if zero.per_tensor else zero.tree
        take = part_taker(None if tracing.joined_state else own)
        made, kept = _second_pass(rule, tracing, of, moments, networks, rates, *by_tensor, take)
        return made, [], kept

    def fused(
        parts: Any, moments: Any, by_tensor: Any, mlp: MLP, rates: Decays, zero: Any
    ) -> Updates:
        # nothing is closed over: that `jax.vmap` could not batch
        shared = Shared(mlp, settings.mlp_per_tensor), Shared(rates, False), Shared(zero, False)
        out, _, kept = batching.over_tensors(passes)(parts, moments, by_tensor, *shared)
        return Updates(out, kept)

    def plain(
        parts: Any, moments: Any, by_tensor: Any, mlp: MLP, rates: Decays, zero: Any
    ) -> Updates:
        del zero
        scale, weight_decay, statistics = by_tensor
        of_all = TensorSettings(mlp, scale, weight_decay, statistics, settings.mlp_per_tensor)
        made, kept, first = [], [], 0
        for x, unit, of_unit in zip(parts, units, moments, strict=True):
            own = range(first, first := first + sum(part.gradient.shape[0] for part in x))
            updates, of_unit_kept = derivatives.updates(
                rule,
                tracing.platform,
                x,
                unit.partition,
                unit.lengths,
                of_unit,
                of_all.rows(own),
                rates,
            )
            made.append(updates)
            kept.append(of_unit_kept)
        return Updates(made, join_trees(kept))

    rates = Decays(*(jnp.asarray(x, jnp.float32) for x in decays))
    zero = opaque_zero(tracing, units[0].parts[0].gradient) if zero is None else zero
    return derivatives.differentiated_as(plain, fused)(
        [tuple(unit.parts) for unit in units],
        list(moments),
        (settings.scale, settings.weight_decay, settings.statistics),
        settings.mlp,
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
    tracing: Tracing,
    units: Sequence[Viewed],
    moments: Sequence[GradientStatistics],
    networks_of: Shared,
    decays_of: Shared,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: AccumulatorStatistics | None,
    take: PartTaker,
) -> tuple[list[list[TensorUpdate]], AccumulatorStatistics | None]:
    ends = [0, *itertools.accumulate(unit.tensors for unit in units)]
    # units whose vectors are computed together
    factored = [i for i, unit in enumerate(units) if unit.dims is not None]
    batches = [factored] if factored else []
    batches += [[i] for i, unit in enumerate(units) if unit.dims is None]
    order = [i for batch in batches for i in batch]
    of_batches = []
    for batch in batches:
        tensors = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in batch])
        of = functools.partial(take_tensors, positions=tensors, count=ends[-1])
        own = lambda shared, of=of: Shared(  # noqa: E731
            of(shared.tree) if shared.per_tensor else shared.tree, shared.per_tensor
        )
        of_batches.append(
            _passes(
                rule,
                tracing,
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
        means = whole_means(sums, [units[i] for i in order])
        kept = statistics_of(means, concatenate([batch.centres for batch in of_batches]))
        tensors = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in order])
        kept = take_tensors(kept, np.argsort(tensors), ends[-1])
    out: list[list[TensorUpdate]] = [[] for _ in units]
    made = [
        pair for batch in of_batches for pair in zip(batch.elements, batch.vectors, strict=True)
    ]
    for i, (elements, vectors) in zip(order, made, strict=True):
        view = units[i].view(update_tuning(rule, networks_of.tree.biases[0].shape[-1]))
        out[i] = [_update_of(view, *x) for x in zip(units[i].parts, elements, vectors, strict=True)]
    return out, kept


def _update_of(
    view: View, part: TensorArrays, new: Elements, vectors: tuple[jax.Array, jax.Array] | None
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


class _Batch(NamedTuple):
    """What passes B and C take together: factored units, or one that is not factored."""

    rule: Rule
    tracing: Tracing
    units: Sequence[Viewed]
    launches: Sequence[Launch]
    elements: Sequence[Sequence[Elements]]  # of each launch, of each part
    starts: Sequence[First]  # of each launch
    vectors: Vectors | None  # None: not factored
    decays: Shared
    lengths: jax.Array | None  # of the tensors, where they are padded vectors

    def rates(self, tensors: int) -> Decays:
        """Decay rates with a leading axis of tensors."""
        decays, per_tensor = self.decays
        return decays if per_tensor else jax.tree.map(lambda x: table.repeat(x, tensors), decays)


def _passes(
    rule: Rule,
    tracing: Tracing,
    units: Sequence[Viewed],
    moments: Sequence[GradientStatistics],
    networks_of: Shared,
    decays_of: Shared,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: AccumulatorStatistics | None,
    take: PartTaker,
) -> _Result:
    """Passes B and C over factored units, or over one that is not factored."""
    vectors = None
    if units[0].dims is not None:
        vectors = Vectors(units, moments, decays_of.tree.factored, decays_of.per_tensor)
    lengths = None if units[0].lengths is None else jnp.asarray(units[0].elements)
    launches = launches_of(units, multiprocessors(tracing.runs_on))
    joined = lengths is not None
    elements = [[elements_of(*x, joined) for x in launch.of(SUMS)] for launch in launches]
    starts = [starts_of(units, launch, vectors) for launch in launches]
    batch = _Batch(rule, tracing, units, launches, elements, starts, vectors, decays_of, lengths)

    means = _square_means(batch)
    first_layer = folded(rule, networks_of, means[:, :-2], vectors)
    if rule.parameter_scale:
        squares = concatenate([x.parameter_mean_square for x in moments])
        scale = scale * rules.parameter_scale(squares)
    centres: Any = ()
    if rule.accumulator_statistics:
        centres = centres_of(statistics, decays_of.tree, means)
    tensors = sum(unit.tensors for unit in units)
    network = network_of(rule, first_layer, networks_of, tensors, vectors is not None)
    numbers, entries = table.pack(
        Table(
            decays=batch.rates(tensors),
            weights=network.weights,
            bias=network.bias,
            layers=network.layers,
            scale=scale,
            weight_decay=weight_decay,
            centres=centres,
            length=lengths,
        ),
        tensors,
    )
    results = _updates(batch, network, numbers, entries)

    made: list[list[Any]] = [[None] * len(unit.parts) for unit in units]
    for launch, result in zip(launches, results, strict=True):
        for (i, k), x in zip(launch.members, result.elements, strict=True):
            made[i][k] = x
    kept = None
    if rule.accumulator_statistics:
        tuning = update_tuning(rule, network.hidden)
        kept = added_up(launches, tuning, [x.sums for x in results if x.sums is not None])
    new_vectors: Any = [[None] * len(unit.parts) for unit in units]
    if vectors is not None:
        new_vectors = vectors.parts(take)
    return _Result(made, kept, new_vectors, centres)


def _square_means(batch: _Batch) -> jax.Array:
    """Pass B: means over each tensor of what `square_sums` sums, (tensors, sums)."""
    tensors = sum(unit.tensors for unit in batch.units)
    tables = tensors if batch.decays.per_tensor or batch.lengths is not None else 1
    rates, entries = table.pack(Rates(batch.rates(tables), batch.lengths), tables)
    factors = None if batch.vectors is None else batch.vectors.stacked(SUMS)
    sums = [
        square_sums(launch.plan(SUMS), batch.rule, Inputs(x, rates, factors, first), entries)
        for launch, x, first in zip(batch.launches, batch.elements, batch.starts, strict=True)
    ]
    return whole_means(added_up(batch.launches, SUMS, sums), batch.units)


def _updates(
    batch: _Batch, network: Network, numbers: jax.Array, entries: Table
) -> list[StepOutputs]:
    """Pass C, launch by launch; numbers and entries are the tables."""
    vectors, launches, rule = batch.vectors, batch.launches, batch.rule
    tuning = update_tuning(rule, network.hidden)
    has_biases = network.matrices is not None and vectors is not None
    factors: Any = None
    if vectors is not None:
        factors = vectors.stacked(tuning, () if has_biases else network.biases)
    results: list[StepOutputs] = []
    remaining = zip(batch.elements, batch.starts, strict=True)
    for sharing in sharing_biases(launches, network.hidden) if has_biases else [launches]:
        before = results[-1].elements if results else numbers
        own = _matrices_of(batch, network, sharing, jax.tree.leaves(before)[0])
        for launch, matrices in zip(sharing, own, strict=True):
            x, first = next(remaining)
            inputs = Inputs(x, numbers, factors, first, matrices)
            results.append(update(launch.plan(tuning, backwards=True), rule, inputs, entries))
    return results


def _matrices_of(
    batch: _Batch, network: Network, sharing: Sequence[Launch], before: jax.Array
) -> list[Matrices | None]:
    """The network of each of some launches for the matrix units, with the launch's own biases.

    Args:
      batch: the batch.
      network: the network.
      sharing: launches whose biases are made at once.
      before: an array that the launches before these made.
    """
    matrices, vectors = network.matrices, batch.vectors
    if matrices is None or vectors is None:
        return [matrices] * len(sharing)
    alone = len(sharing) == len(batch.launches)
    zero = None if alone else opaque_zero(batch.tracing, before)
    biases, first_of = vectors.of_launches(sharing, network.biases, zero)
    packed = matrix_units.pack_biases(biases)
    return [matrices._replace(biases=packed, down=x, across=y) for x, y in first_of]
