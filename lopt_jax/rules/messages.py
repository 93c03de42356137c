"""The network of rnn_mlp_lopt on one tensor: an MLP that hears from an LSTM, and answers it.

Beside the element's features it reads what the LSTM says to the tensor; beside the step it returns
outputs whose means over the tensor the LSTM reads at the next step. What all elements share is part
of the first bias, and the normalisers of the features are factors of the first layer's rows: so no
(elements x features) array exists, but in blocks.

Reference: google/learned_optimization, `learned_optimizers/rnn_mlp_lopt.py`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Accumulators, Decays, SecondMoments
from lopt_jax.compiler.precision import product_precision
from lopt_jax.features import FeatureSet, Operands
from lopt_jax.partition import Partition
from lopt_jax.rules.rule import MLP, FactoredVectors, element_operands, output_step
from lopt_jax.rules.tensor_statistics import MeanAndVariance, tensor_statistics
from lopt_jax.xla.blocks import elements_for, map_and_sum_blocks

_NO_FACTORS = FactoredVectors((), (), (), ())


class Statistics(NamedTuple):
    """Of one tensor, or of all with a leading axis, after the accumulators' update."""

    momentum: MeanAndVariance  # of all decays together
    second_moment: MeanAndVariance
    parameter: MeanAndVariance
    gradient_mean_square: jax.Array  # ()
    parameter_mean_square: jax.Array  # ()
    normalizers: jax.Array  # (features,)


def operands_of(
    gradient: jax.Array,
    parameter: jax.Array,
    accumulators: Accumulators,
    decays: Decays,
    clip: jax.Array,
) -> Operands:
    """What the features read of one tensor: clipped gradient, new averages; float32 at least.

    Args:
      gradient: S, any float dtype.
      parameter: S, any float dtype.
      accumulators: before this step.
      decays: decay rates.
      clip: (), the largest element of a gradient.

    Returns:
      The operands.
    """
    dtype = jnp.result_type(gradient.dtype, accumulators.momentum[0].dtype, jnp.float32)
    wide = lambda x: x.astype(dtype)  # noqa: E731
    return element_operands(
        _clipped(wide(gradient), clip),
        wide(parameter),
        tuple(map(wide, accumulators.momentum)),
        jax.tree.map(wide, accumulators.second_moment),
        decays,
        _NO_FACTORS,
    )


def _clipped(gradient: jax.Array, clip: jax.Array) -> jax.Array:
    return jnp.clip(gradient, -clip, clip)


def statistics_of(
    features: FeatureSet, operands: Operands, partition: Partition | None
) -> Statistics:
    """What the LSTM reads of one tensor, and the normalisers of its features.

    Args:
      features: the network's inputs.
      operands: of `operands_of`.
      partition: where they are shards of a tensor, how it is spread.

    Returns:
      The statistics of the whole tensor.
    """
    second_moments: SecondMoments = operands.second_moment
    pools = (operands.momentum, second_moments.averages, (operands.parameter,))
    squares = [jnp.square(feature.formula(operands)) for feature in features.factored]
    of_squares = (jnp.square(operands.gradient), jnp.square(operands.parameter), *squares)
    pairs, (gradient, parameter, *of_features) = tensor_statistics(pools, of_squares, partition)
    normalizers = jax.lax.rsqrt(jnp.stack(of_features) + features.normalizer_epsilon)
    return Statistics(pairs[0], pairs[1], pairs[2], gradient, parameter, normalizers)


def step_and_answer(
    features: FeatureSet,
    mlp: MLP,
    normalizers: jax.Array,
    gradient: jax.Array,
    operands: Operands,
    clip: jax.Array,
    exp_mult: float,
    precision: jax.lax.Precision,
    platform: str,
    partition: Partition | None,
) -> tuple[jax.Array, jax.Array]:
    """The network on every element of one tensor.

    Every block of the gradient is clipped anew: a whole clipped one would take memory of its own.

    Args:
      features: the network's inputs.
      mlp: the tensor's network; what its elements share is part of the first bias.
      normalizers: (features,), of `statistics_of`.
      gradient: S, any float dtype.
      operands: of `operands_of`, S.
      clip: (), as there.
      exp_mult: the step is direction * exp(magnitude * exp_mult).
      precision: of the products.
      platform: of the device: "cpu", "gpu" or "tpu".
      partition: where the operands are shards of a tensor, how it is spread.

    Returns:
      The step, S, and the means over the whole tensor of the outputs after the first two.
    """
    shape = gradient.shape
    ones = (1,) * len(shape)
    *hidden, (last, last_bias) = zip(
        (mlp.weights[0] * normalizers[:, None], *mlp.weights[1:]), mlp.biases, strict=True
    )

    def layer(weight: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        how = product_precision(precision, x.dtype, platform)
        made = jnp.tensordot(weight.T, x, axes=1, precision=how)
        return made + bias.reshape((-1, *ones))

    def block(operands: Operands, counts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        of_block = operands.gradient.shape
        clipped = _clipped(operands.gradient.astype(operands.parameter.dtype), clip)
        operands = operands._replace(gradient=clipped)
        values = [f.formula(operands) for f in features.factored]
        x = jnp.stack([jnp.broadcast_to(value, of_block) for value in values])
        for weight, bias in hidden:
            x = jnp.maximum(layer(weight, bias, x), 0)
        direction, magnitude = layer(last[:, :2], last_bias[:2], x)
        counted = x if counts is None else x * counts
        sums = jnp.sum(counted, range(1, x.ndim))
        return output_step(direction, magnitude, exp_mult), sums

    counts = _counts(shape, mlp.biases[0].dtype, partition)
    unclipped = operands._replace(gradient=gradient)
    step, sums = map_and_sum_blocks(block, (unclipped, counts), shape, elements_for(platform))
    whole = shape
    if partition is not None:
        sums, whole = partition.total(sums, range(len(shape))), partition.shape
    answer = jnp.dot(sums / float(math.prod(whole)), last[:, 2:], precision="highest")
    return step, answer + last_bias[2:]


def _counts(shape: Sequence[int], dtype: Any, partition: Partition | None) -> jax.Array | None:
    """One where a shard holds elements and zero where it is padding; None without padding."""
    if partition is None or not partition.is_padded(shape):
        return None
    return partition.clear_padding(jnp.ones(shape, dtype), range(len(shape)))
