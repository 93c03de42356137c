"""The two calls of the engine, on equally shaped tensors: kernels, and the vectors between them.

(Tensors with one axis may have different lengths, padded with zeros to that of the longest.)
Tensors come in parts: arrays with a leading axis of tensors, that were never joined because that
would copy them. The vectors between the passes are joined: they are small, and computing them for
all tensors at once saves hundreds of launches.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax import rule as rules
from lopt_jax.accumulators import Accumulators, Decays, FactoredDims, factored_dims, update_factored
from lopt_jax.features import Operands
from lopt_jax.partition import Partition
from lopt_jax.rows import RowsTaker, rows_taker
from lopt_jax.rule import MLP, FactoredVectors, Folded, Moments, Rule, Statistics, TensorUpdate
from pallas_kernels import batching, matrix_units, mosaic, passes, table
from pallas_kernels.batching import Shared
from pallas_kernels.passes import Elements, Inputs, Plan, Rates, Table
from pallas_kernels.view import View, view_of

MULTIPROCESSORS = 132
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
SUMS = Tuning(tile_elements=2048, stages=2, programs=2, program_elements=1 << 16)
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
    block_rows=4,
    program_elements=1 << 14,
    loops=True,
    in_flight=2,
)


class Part(NamedTuple):
    """Arrays of some tensors, each with a leading axis of tensors."""

    gradient: jax.Array
    parameter: jax.Array
    accumulators: Accumulators


class Updates(NamedTuple):
    """What a step makes of the tensors of some parts."""

    parts: list[TensorUpdate]  # without statistics
    statistics: Statistics | None  # of all parts, with a leading axis of tensors


def first_pass(
    rule: Rule,
    parts: Sequence[Part],
    partition: Partition | None = None,
    lengths: Sequence[int] | None = None,
) -> Moments:
    """Pass A, as `lopt_jax.rule.first_pass` on every tensor.

    Args:
      rule: the rule.
      parts: the tensors.
      partition: where they are shards, without padding, of what.
      lengths: of all tensors, where they are padded vectors.

    Returns:
      Moments of all parts, with a leading axis of tensors.
    """
    run = batching.over_tensors(lambda parts: ([], _first_pass(rule, parts, partition, lengths)))
    return run(tuple(parts))[1]


def _first_pass(
    rule: Rule,
    parts: Sequence[Part],
    partition: Partition | None,
    lengths: Sequence[int] | None,
) -> Moments:
    shape = parts[0].gradient.shape[1:]
    whole = partition or _unsplit(shape)
    view = view_for(shape, FIRST, whole.shape)
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    if not view.is_factored:
        if not needs_parameter:
            return Moments(None, None, None)
        by_part = [
            jax.vmap(functools.partial(rules.first_pass, rule, partition=partition))(
                part.gradient, part.parameter
            )
            for part in parts
        ]
        moments = jax.tree.map(lambda *xs: _join(xs), *by_part)
        if lengths is None:
            return moments
        mean_square = moments.parameter_mean_square
        padded = math.prod(shape) / _for_all(lengths, mean_square.shape[0])
        return moments._replace(parameter_mean_square=padded * mean_square)
    sums = []
    arranged = lambda arrays: tuple(map(view.arrange, arrays))  # noqa: E731
    for chosen in _launches(parts):
        plan = _plan(view, chosen, FIRST)
        gradients = arranged(_as_laid_out(part.gradient) for part in chosen)
        parameters = arranged(part.parameter for part in chosen) if needs_parameter else None
        sums.append(_first_sums(plan, rule, mosaic.is_interpreting(), gradients, parameters))
    joined = passes.FirstSums(
        *(None if x[0] is None else _join(x) for x in zip(*sums, strict=True))
    )
    down_axis, across_axis = view.order[view.down_axis], view.order[-1]
    down = whole.total(jnp.sum(joined.down, axis=2)[..., : view.down], [across_axis])
    across = whole.total(jnp.sum(joined.across, axis=2)[..., : view.across], [down_axis])
    down, across = down / whole.shape[across_axis], across / whole.shape[down_axis]
    mean_square = None
    if joined.parameter is not None:
        mean_square = _mean(jnp.sum(joined.parameter, axis=2), whole)[:, 0]
    down, across = view.restore_down(down), view.restore_across(across)
    row, column = (down, across) if view.down_is_row else (across, down)
    return Moments(row, column, mean_square)


def second_pass(
    rule: Rule,
    parts: Sequence[Part],
    moments: Moments,
    mlp: MLP,
    mlp_per_tensor: bool,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None,
    partition: Partition | None = None,
    take: RowsTaker | None = None,
    lengths: Sequence[int] | None = None,
) -> Updates:
    """Passes B and C, as `lopt_jax.rule.second_pass` on every tensor.

    Args:
      rule: the rule.
      parts: the tensors.
      moments: of `first_pass`.
      mlp: the network, with a leading axis of tensors if `mlp_per_tensor`.
      mlp_per_tensor: whether it has that axis.
      decays: decay rates.
      scale: (tensors,).
      weight_decay: (tensors,).
      statistics: of the accumulators before this step, with a leading axis of tensors: centres of
        the new ones' sums. None: zeros.
      partition: where the tensors are shards, without padding, of what.
      take: takes rows out of an array, of `rows_taker`; None: made here.
      lengths: of all tensors, where they are padded vectors.

    Returns:
      The updates of each part, and the statistics of all.
    """

    def passes(
        parts: Sequence[Part],
        by_tensor: tuple[Moments, jax.Array, jax.Array, Statistics | None],
        networks: Shared,
        rates: Shared,
    ) -> tuple[list[TensorUpdate], Statistics | None]:
        moments, scale, weight_decay, statistics = by_tensor
        return _second_pass(
            rule,
            parts,
            moments,
            networks,
            rates,
            scale,
            weight_decay,
            statistics,
            partition,
            take,
            lengths,
        )

    rates = Decays(*(jnp.asarray(x, jnp.float32) for x in decays))
    updates = batching.over_tensors(passes)(
        tuple(parts),
        (moments, scale, weight_decay, statistics),
        Shared(mlp, mlp_per_tensor),
        Shared(rates, False),
    )
    return Updates(*updates)


def _second_pass(
    rule: Rule,
    parts: Sequence[Part],
    moments: Moments,
    networks_of: Shared,
    decays_of: Shared,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None,
    partition: Partition | None,
    take: RowsTaker | None,
    lengths: Sequence[int] | None,
) -> tuple[list[TensorUpdate], Statistics | None]:
    mlp, mlp_per_tensor = networks_of
    decays, decays_per_tensor = decays_of
    shape = parts[0].gradient.shape[1:]
    whole = partition or _unsplit(shape)
    hidden = range(mlp.biases[0].shape[-1])
    dims = factored_dims(whole.shape)
    on_matrix_units = uses_matrix_units(rule, len(hidden), dims is not None)
    tuning = UPDATE
    if len(hidden) >= rules.WIDE_HIDDEN_SIZE:
        tuning = MATRIX_UPDATE if on_matrix_units else WIDE_UPDATE
    view = view_for(shape, SUMS, whole.shape)
    update_view = view_for(shape, tuning, whole.shape)
    tensors = sum(part.gradient.shape[0] for part in parts)
    features = rule.features.for_tensor(view.is_factored)
    counts = None if lengths is None else _for_all(lengths, tensors)

    row = column = None
    vectors = FactoredVectors((), (), (), ())
    if dims is not None:
        row, column, vectors = jax.vmap(
            functools.partial(_factored_after, dims=dims, partition=partition),
            in_axes=(0, 0, 0, 0, 0 if decays_per_tensor else None),
        )(
            moments.row,
            moments.column,
            _join([part.accumulators.row for part in parts]),
            _join([part.accumulators.column for part in parts]),
            decays.factored,
        )
    launches = _launches(parts)
    elements = [[_elements(view, part) for part in chosen] for chosen in launches]
    starts = _starts(launches)

    # pass B
    tables = tensors if decays_per_tensor or counts is not None else 1
    repeated = lambda n: jax.tree.map(lambda x: table.repeat(x, n), decays)  # noqa: E731
    own = decays if decays_per_tensor else repeated(tables)
    rates, rate_entries = table.pack(Rates(own, counts), tables)
    # on the matrix units pass C reads the same vectors: stacked alike, they are stacked once
    unit = update_view.vector_unit if on_matrix_units else 1
    factors = _oriented(view, vectors.row_factor, vectors.column_factor, unit)
    sums = [
        _square_sums(
            _plan(view, chosen, SUMS),
            rule,
            rate_entries,
            mosaic.is_interpreting(),
            Inputs(x, rates, *factors, start),
        )
        for chosen, x, start in zip(launches, elements, starts, strict=True)
    ]
    means = _mean(jnp.sum(_join(sums), axis=2), whole, counts)

    # the network
    networks = jax.vmap(
        functools.partial(_folded, rule, features, len(whole.shape), partition),
        in_axes=(0 if mlp_per_tensor else None, 0, 0),
    )(mlp, means[:, :-2], vectors)
    if rule.parameter_scale:
        scale = scale * rules.parameter_scale(moments.parameter_mean_square)
    centres = _centres(statistics, decays, means) if rule.accumulator_statistics else ()
    layers = _layers(mlp, mlp_per_tensor, tensors)
    matrices = weights = None
    if on_matrix_units:
        matrices = matrix_units.pack(networks, layers, update_view)
        layers = layers[-1][1]
    else:
        weights = jnp.stack([w.reshape((tensors, -1)) for w in networks.weights], axis=1)
    numbers, entries = table.pack(
        Table(
            decays=decays if decays_per_tensor else repeated(tensors),
            weights=weights,
            bias=(networks.row_bias.reshape((tensors, -1)),) if dims is None else (),
            layers=layers,
            scale=scale,
            weight_decay=weight_decay,
            centres=centres,
            length=counts,
        ),
        tensors,
    )
    if dims is not None and not on_matrix_units:
        of_unit = lambda x: tuple(x[:, j] for j in hidden)  # noqa: E731
        factors = _oriented(
            update_view,
            (*vectors.row_factor, *of_unit(networks.row_bias)),
            (*vectors.column_factor, *of_unit(networks.column_bias)),
        )
    elif dims is not None:
        factors = _oriented(update_view, vectors.row_factor, vectors.column_factor)

    # pass C
    view = update_view
    results = [
        _update(
            _plan(view, chosen, tuning, backwards=True),
            rule,
            entries,
            mosaic.is_interpreting(),
            Inputs(x, numbers, *factors, start, matrices),
        )
        for chosen, x, start in zip(launches, elements, starts, strict=True)
    ]
    kept = None
    if rule.accumulator_statistics:
        kept = _statistics(_join([x.sums for x in results]), centres, whole, counts)
    out, first = [], 0
    take = take or rows_taker(parts[0].gradient)
    row, column = jax.lax.optimization_barrier((row, column))
    made = [x for result in results for x in result.elements]
    for new, part in zip(made, parts, strict=True):
        old = part.accumulators
        if dims is None:
            new_row = jnp.stack([view.restore(a) for a in new.average], axis=1)
            new_column = old.column
        else:
            last = first + part.gradient.shape[0]
            rows = slice(first, last)
            new_row, new_column = (
                x if len(parts) == 1 else take(x, rows, x.shape[-1]) for x in (row, column)
            )
            first = last
        accumulators = Accumulators(
            momentum=tuple(map(view.restore, new.momentum)),
            second_moment=view.restore(new.second_moment),
            row=new_row.astype(old.row.dtype),
            column=new_column.astype(old.column.dtype),
        )
        out.append(TensorUpdate(view.restore(new.gradient), accumulators, None))
    return out, kept


def uses_matrix_units(rule: Rule, hidden: int, is_factored: bool) -> bool:
    """Whether pass C of tensors takes the matrix units."""
    is_wide = hidden >= rules.WIDE_HIDDEN_SIZE
    return is_wide and is_factored and rule.precision != jax.lax.Precision.HIGHEST


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


def _launches(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Parts that one launch takes: neighbours with equally many tensors.

    As many as allowed, but where that leaves none over, a few less: launches of as many parts share
    a compiled kernel.
    """
    out: list[Sequence[Part]] = []
    for _, group in itertools.groupby(parts, lambda part: part.gradient.shape[0]):
        run = list(group)
        even = (n for n in range(LAUNCH_PARTS, LAUNCH_PARTS // 2, -1) if len(run) % n == 0)
        size = next(even, LAUNCH_PARTS)
        out += [run[i : i + size] for i in range(0, len(run), size)]
    return out


def _plan(view: View, parts: Sequence[Part], tuning: Tuning, backwards: bool = False) -> Plan:
    """The plan of a launch."""
    return plan_for(view, parts[0].gradient.shape[0], tuning, backwards, len(parts))


def plan_for(
    view: View, tensors: int, tuning: Tuning, backwards: bool = False, parts: int = 1
) -> Plan:
    """A plan whose programs fill the GPU once, or for large tensors a few times.

    Never a bit more than that: a wave of few programs takes as long as a full one.

    Args:
      view: how the pass sees a tensor.
      tensors: number of tensors in an array.
      tuning: how the pass is cut.
      backwards: as in `Plan`.
      parts: number of such arrays.

    Returns:
      The plan.
    """
    strips = parts * tensors * view.batch * view.middle * view.strips
    at_once = tuning.programs * MULTIPROCESSORS
    elements = strips * view.tiles_down * view.rows * view.width
    waves = -(-elements // (at_once * tuning.program_elements))
    chunks = max(1, at_once * waves // strips)
    tiles = -(-view.tiles_down // chunks)
    rows = min(tuning.block_rows or view.rows, view.rows)
    step = mosaic.tile_layout(view.width, view.vector)[1]
    rows = max(rows, step)
    stages = min(tuning.stages, tiles + 1)
    return Plan(
        view,
        tensors,
        tiles,
        stages,
        rows,
        tuning.loops,
        backwards,
        parts,
        tuning.together,
        tuning.in_flight,
    )


def _starts(launches: Sequence[Sequence[Part]]) -> list[jax.Array]:
    """The position of each launch's first tensor among all, for the kernels to read."""
    counts = [sum(part.gradient.shape[0] for part in chosen) for chosen in launches]
    return [jnp.full((1,), sum(counts[:i]), jnp.int32) for i in range(len(counts))]


def _join(arrays: Sequence[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _oriented(
    view: View, row: Sequence[Any], column: Sequence[Any], unit: int = 1
) -> tuple[Any, Any]:
    """Vectors as the kernels read them: (down, across)."""
    if not view.is_factored:
        return None, None
    down, across = (row, column) if view.down_is_row else (column, row)
    return view.down_vectors(down, unit), view.across_vectors(across, unit)


def _as_laid_out(x: jax.Array) -> jax.Array:
    """The array, in whatever layout its producer has it.

    The kernels take row-major arrays. XLA carries such a demand backwards, and of a gradient that
    is a sum over a batch it lays out the terms so that they lie side by side: with them a model's
    activations (docs/kernels.md). An array with one axis has no layout, so it carries no demand.
    """
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _elements(view: View, part: Part) -> Elements:
    old = part.accumulators
    averages = () if view.is_factored else tuple(jnp.moveaxis(old.row, 1, 0))
    return Elements(
        gradient=view.arrange(_as_laid_out(part.gradient)),
        parameter=view.arrange(part.parameter),
        momentum=tuple(map(view.arrange, old.momentum)),
        second_moment=view.arrange(old.second_moment),
        average=tuple(map(view.arrange, averages)),
    )


def _factored_after(
    row_mean: jax.Array,
    column_mean: jax.Array,
    row: jax.Array,
    column: jax.Array,
    decays: jax.Array,
    dims: FactoredDims,
    partition: Partition | None,
) -> tuple[jax.Array, jax.Array, FactoredVectors]:
    """One tensor's row and column accumulators after this step, and their vectors."""
    row = update_factored(row.astype(jnp.float32), row_mean, decays)
    column = update_factored(column.astype(jnp.float32), column_mean, decays)
    return row, column, rules.factored_vectors(row, column, dims, partition)


def _folded(
    rule: Rule,
    features: Any,
    rank: int,
    partition: Partition | None,
    mlp: MLP,
    means: jax.Array,
    vectors: FactoredVectors,
) -> Folded:
    """One tensor's folded network from the mean squares of its element features."""
    operands = Operands(None, None, (), None, *vectors)
    axes = rules.normalizer_axes(rule, rank)
    kept = [x.reshape((1,) * rank) for x in means]
    normalizers = rules.normalizers(rule, features, kept, operands, axes, partition)
    # computed once, or XLA takes features of a row for softmaxes and makes a kernel of each
    normalizers = jax.lax.optimization_barrier(normalizers)
    return rules.fold(mlp, features, normalizers, operands)


def _unsplit(shape: tuple[int, ...]) -> Partition:
    """The partition of tensors that are not split."""
    return Partition(shape, ((),) * len(shape))


def _for_all(lengths: Sequence[int], tensors: int) -> jax.Array:
    """Lengths of all tensors, float32, where these are a batch of those that have the lengths."""
    return jnp.tile(jnp.asarray(lengths, jnp.float32), tensors // len(lengths))


def _mean(sums: jax.Array, whole: Partition, counts: jax.Array | None = None) -> jax.Array:
    """Means over the whole tensors from sums over the shards, (tensors, sums).

    Args:
      sums: over the shards.
      whole: of what.
      counts: elements of every tensor, where they are not those of the whole.

    Returns:
      The means.
    """
    total = whole.total(sums, range(len(whole.shape)))
    return total / (math.prod(whole.shape) if counts is None else counts[:, None])


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


def _statistics(
    sums: jax.Array, centres: jax.Array, whole: Partition, counts: jax.Array | None
) -> Statistics:
    first, second = jnp.split(_mean(jnp.sum(sums, axis=2), whole, counts), 2, axis=1)
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
