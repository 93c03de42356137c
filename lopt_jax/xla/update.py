"""Passes B and C of the rule over one tensor, so that XLA reads and writes no array twice a pass.

`lopt_jax.rules.rule.update` is the specification. XLA would store what passes B and C have in
common, the new accumulators among it. Here pass C computes them anew from the old ones, which are
replaced in place: pass B reads a tensor's six arrays, pass C reads them again and writes five. A
wide network takes a block of rows at a time, so that no hidden layer is as large as the tensor.
Storing them first is faster on CPUs, where XLA makes a loop of every array that it writes, and for
wide networks on GPUs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Accumulators, Decays, factored_dims
from lopt_jax.features import Feature, Operands
from lopt_jax.partition import Partition
from lopt_jax.reductions import WORTH_PARTS, mean, means
from lopt_jax.rules import rule as rules
from lopt_jax.rules.centred import expected_means, statistics_about
from lopt_jax.rules.rule import (
    MLP,
    AccumulatorStatistics,
    FactoredVectors,
    GradientStatistics,
    Network,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.xla.blocks import replace_blocks
from lopt_jax.xla.network import XlaNetwork, with_biases


class Rates(NamedTuple):
    """What a tensor has beside its arrays."""

    scale: Any  # (), as in `rules.update`
    weight_decay: Any  # ()
    statistics: AccumulatorStatistics | None  # of the accumulators before this step, where known


def update(
    rule: Rule,
    network: Network,
    partition: Partition | None,
    mlp: MLP,
    moments: GradientStatistics,
    arrays: TensorArrays,
    decays: Decays,
    rates: Rates,
) -> TensorUpdate:
    """As `rules.update`, in the passes over memory that XLA is to make.

    Args:
      rule: the rule.
      network: how the network runs.
      partition: where the arrays are shards of a tensor, how it is spread.
      mlp: the tensor's network.
      moments: of `rules.gradient_statistics`.
      arrays: of the tensor, before this step.
      decays: decay rates.
      rates: of the tensor.

    Returns:
      The update, the accumulators, and statistics if the rule asks for them.
    """
    shape = arrays.gradient.shape
    if not isinstance(network, XlaNetwork) or network.takes_at_once(arrays.gradient, partition):
        of_step = (moments, *arrays, decays, rates.scale, rates.weight_decay)
        return rules.update(rule, mlp, *of_step, partition, network)
    dims = factored_dims(shape if partition is None else partition.shape)
    features = rule.features.for_tensor(dims is not None)
    operands, row, column = rules.operands_after(
        rule, moments, *arrays, decays, dims, partition, network.store
    )
    normalizers, statistics = _pass_b(
        rule, features, operands, moments, decays, rates.statistics, partition
    )
    folded = network.prepared(rules.fold(mlp, features, normalizers, operands))

    def made(step: jax.Array, parameter: jax.Array) -> jax.Array:
        """What is added to the parameter."""
        return rules.tensor_update(rule, moments, step, parameter, rates.scale, rates.weight_decay)

    if network.stores_accumulators(folded):
        now = network.apart(operands)
        step = network.by_blocks(rule, features, folded, now)
        new = Accumulators(now.momentum, now.second_moment, row, column)
        stored = rules.as_stored(new, arrays.accumulators)
        return TensorUpdate(made(step, now.parameter), stored, statistics)

    def pass_c(old: Any, read: Any) -> tuple[Any, jax.Array]:
        """New averages and update, from a block's old averages and the other arrays."""
        (momentum, second_moment), (gradient, parameter, vectors, *biases) = old, read
        gradient = rules.prepare_gradient(rule, gradient).astype(operands.gradient.dtype)
        wide = lambda tree: jax.tree.map(lambda x: x.astype(gradient.dtype), tree)  # noqa: E731
        now = rules.element_operands(
            gradient, wide(parameter), wide(momentum), wide(second_moment), decays, vectors
        )
        step = network.outputs(rule, features, with_biases(folded, *biases), now)
        new = now.momentum, now.second_moment
        return jax.tree.map(lambda x, o: x.astype(o.dtype), new, old), made(step, now.parameter)

    gradient, old = network.read_anew(
        (arrays.gradient, (arrays.accumulators.momentum, arrays.accumulators.second_moment))
    )
    vectors = FactoredVectors(
        operands.row, operands.column, operands.row_factor, operands.column_factor
    )
    read = (gradient, arrays.parameter, vectors, folded.row_bias, folded.column_bias)
    elements = network.elements_at_once(folded)
    if elements is None:
        (momentum, second_moment), change = pass_c(old, read)
    else:
        (momentum, second_moment), change = replace_blocks(pass_c, old, read, shape, elements)
    new = Accumulators(momentum, second_moment, row, column)
    return TensorUpdate(change, rules.as_stored(new, arrays.accumulators), statistics)


def _pass_b(
    rule: Rule,
    features: Sequence[Feature],
    operands: Operands,
    moments: GradientStatistics,
    decays: Decays,
    old: AccumulatorStatistics | None,
    partition: Partition | None,
) -> tuple[jax.Array, AccumulatorStatistics | None]:
    """Pass B, with the statistics of the new accumulators if the rule asks for them.

    Args:
      rule: the rule.
      features: the features of this tensor.
      operands: their operands.
      moments: of `rules.gradient_statistics`.
      decays: decay rates.
      old: statistics before this step; None: they are not known.
      partition: where the operands are shards of a tensor, how it is spread.

    Returns:
      The normalisers of `rules.normalize`, and the statistics.
    """
    everywhere = range(operands.gradient.ndim)
    is_whole = rules.normalizer_axes(rule, operands.gradient.ndim) == tuple(everywhere)
    is_small = operands.gradient.size < WORTH_PARTS  # a pass costs nothing
    if not rule.accumulator_statistics or old is None or not is_whole or is_small:
        new = Accumulators(operands.momentum, operands.second_moment, None, None)
        return (
            rules.normalize(rule, features, operands, partition),
            rules.accumulator_statistics(new, partition) if rule.accumulator_statistics else None,
        )
    gradient = mean(operands.gradient, everywhere, partition)
    square = mean(jnp.square(operands.gradient), everywhere, partition)
    centres = expected_means(old, decays, gradient, square)
    averages = (*operands.momentum, operands.second_moment)
    distances = [x - c for x, c in zip(averages, centres, strict=True)]
    others: list[jax.Array] = []

    def with_others(arrays: Sequence[jax.Array], *where: Any) -> tuple[jax.Array, ...]:
        """The means of the squared features; those of the distances come of the same pass."""
        made = means([*arrays, *distances, *map(jnp.square, distances)], *where)
        others.extend(x.reshape(()) for x in made[len(arrays) :])
        return made[: len(arrays)]

    normalizers = rules.normalize(rule, features, operands, partition, with_others)
    first, second = jnp.split(jnp.stack(others), 2)
    return normalizers, statistics_about(centres, first, second)
