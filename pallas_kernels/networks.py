"""What is computed between the passes for all tensors at once: networks and statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Decays
from lopt_jax.rules import rule as rules
from lopt_jax.rules.centred import expected_means, statistics_about
from lopt_jax.rules.rule import MLP, AccumulatorStatistics, Folded, Rule
from pallas_kernels import matrix_units, table
from pallas_kernels.batching import Shared
from pallas_kernels.matrix_units import Matrices
from pallas_kernels.tuning import uses_matrix_units
from pallas_kernels.vectors import Vectors


class Network(NamedTuple):
    """The networks of all tensors, as pass C reads them: in tables, or on the matrix units."""

    hidden: int  # units of the first hidden layer
    weights: jax.Array | None  # (tensors, element features, H); None: in matrices
    bias: tuple[jax.Array, ...]  # one (tensors, H) where it is in tables and not along lines
    layers: Any  # those after the first; what is left of them where they are in matrices
    biases: tuple[Any, Any]  # of the first layer, along lines of rows and of columns
    matrices: Matrices | None


def folded(rule: Rule, networks: Shared, means: jax.Array, vectors: Vectors | None) -> Folded:
    """The folded networks of all tensors from the mean squares (tensors, element features).

    The first layer's weights and biases have a last axis of tensors, or of size one.
    """
    mlp, per_tensor = networks
    last = lambda x: jnp.moveaxis(x, 0, -1) if per_tensor else x[..., None]  # noqa: E731
    first_layer = (last(mlp.weights[0]), *mlp.weights[1:]), (last(mlp.biases[0]), *mlp.biases[1:])
    features = rule.features.for_tensor(vectors is not None)
    operands: Any = None  # of vectors that are not factored no formula reads any here
    lines = {}
    if vectors is not None:
        operands, lines = vectors.operands, vectors.lines
    mean_of = lambda varies, x: lines[varies].tensor_means(x)  # noqa: E731
    normalizers = rules.normalizers(rule, features, list(means.T), operands, mean_of)
    # computed once, or XLA takes features of a row for softmaxes and makes a kernel of each
    normalizers = jax.lax.optimization_barrier(normalizers)
    along = lambda varies, x: lines[varies].of_tensors(x) if lines else x  # noqa: E731
    return rules.fold(MLP(*first_layer), features, normalizers, operands, along)


def network_of(
    rule: Rule, first_layer: Any, networks: Shared, tensors: int, has_lines: bool
) -> Network:
    """Lays networks out for pass C.

    Args:
      rule: the rule.
      first_layer: of `folded`.
      networks: the networks, for the layers after the first.
      tensors: number of tensors.
      has_lines: whether the first layer's biases are along lines.

    Returns:
      The networks.
    """
    layers = _layers(networks.tree, networks.per_tensor, tensors)
    weights = jnp.stack(first_layer.weights)  # (features, H, tensors)
    hidden = weights.shape[1]
    weights = jnp.moveaxis(weights, -1, 0)
    bias: tuple = ()
    if not has_lines:
        bias = (jnp.broadcast_to(first_layer.row_bias, (hidden, tensors)).T,)
    biases = first_layer.row_bias, first_layer.column_bias
    if not uses_matrix_units(rule, hidden):
        return Network(hidden, weights, bias, layers, biases, None)
    packed = matrix_units.pack(jnp.swapaxes(weights, 1, 2), layers, *bias)
    return Network(hidden, None, (), layers[-1][1], biases, Matrices(*packed))


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


def centres_of(
    statistics: AccumulatorStatistics | None, decays: Decays, means: jax.Array
) -> jax.Array:
    """What the means of the new accumulators are, but for rounding: (tensors, momenta + 1)."""
    if statistics is None:
        return jnp.zeros((means.shape[0], decays.momentum.shape[-1] + 1), jnp.float32)
    return expected_means(statistics, decays, means[:, -2], means[:, -1])


def statistics_of(means: jax.Array, centres: jax.Array) -> AccumulatorStatistics:
    """From means of distances to the centres and of their squares."""
    return statistics_about(centres, *jnp.split(means, 2, axis=1))
