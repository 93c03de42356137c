"""What is computed between the passes for all tensors at once: networks and statistics."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lopt_jax import rule as rules
from lopt_jax.accumulators import Decays
from lopt_jax.features import Feature
from lopt_jax.rule import MLP, Folded, Rule, Statistics
from pallas_kernels import table
from pallas_kernels.vectors import Vectors


def folded(
    rule: Rule, features: Sequence[Feature], mlp: MLP, means: jax.Array, vectors: Vectors | None
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


def layers_of(mlp: MLP, mlp_per_tensor: bool, tensors: int) -> tuple:
    """The layers after the first, as the table holds them: of the last one what is read."""

    def layer(weight: jax.Array, bias: jax.Array, is_last: bool) -> tuple:
        if not mlp_per_tensor:
            weight, bias = table.repeat(weight, tensors), table.repeat(bias, tensors)
        if is_last:
            weight, bias = weight[..., :2], bias[..., :2]
        return jnp.swapaxes(weight, 1, 2), bias

    pairs = list(zip(mlp.weights[1:], mlp.biases[1:], strict=True))
    return tuple(layer(*pair, pair is pairs[-1]) for pair in pairs)


def centres_of(statistics: Statistics | None, decays: Decays, means: jax.Array) -> jax.Array:
    """What the means of the new accumulators are, but for rounding: (tensors, momenta + 1)."""
    if statistics is None:
        return jnp.zeros((means.shape[0], decays.momentum.shape[-1] + 1), jnp.float32)
    gradient, squared = means[:, -2:-1], means[:, -1]
    momentum = decays.momentum * statistics.momentum_mean + (1 - decays.momentum) * gradient
    rate = decays.second_moment
    second_moment = rate * statistics.second_moment_mean + (1 - rate) * squared
    return jnp.concatenate([momentum, second_moment[:, None]], axis=1)


def statistics_of(means: jax.Array, centres: jax.Array) -> Statistics:
    """From means of distances to the centres and of their squares."""
    first, second = jnp.split(means, 2, axis=1)
    mean, variance = centres + first, jnp.maximum(second - jnp.square(first), 0)
    return Statistics(mean[:, :-1], variance[:, :-1], mean[:, -1], variance[:, -1])
