"""A direction that is a weighted sum of the gradient and of its momenta, each of one size."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lopt_jax.partition import Partition
from lopt_jax.reductions import mean

NORMALIZER_EPSILON = 1e-9


def normalized(x: jax.Array, axes: Sequence[int], partition: Partition | None = None) -> jax.Array:
    """An array of root mean square one over some of its axes; zeros stay zeros.

    Args:
      x: of any shape, or a shard.
      axes: from the first.
      partition: how the whole array is spread; None: it is here.

    Returns:
      The shape of x.
    """
    mean_square = mean(jnp.square(x), tuple(axes), partition, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + NORMALIZER_EPSILON)


def linear_direction(
    weights: jax.Array,
    gradient: jax.Array,
    momenta: Sequence[jax.Array],
    normalize: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The weighted sum.

    Args:
      weights: (1 + momenta,), of the gradient first.
      gradient: of any shape.
      momenta: the same shape.
      normalize: gives an array root mean square one.

    Returns:
      The shape of the gradient.
    """
    features = (gradient, *momenta)
    return sum(
        (weights[i] * normalize(x) for i, x in enumerate(features)), start=jnp.zeros_like(gradient)
    )
