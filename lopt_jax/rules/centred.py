"""Means and variances of the new accumulators in one pass, about centres that are known before.

The mean of an average is the average of the means, so that of the new accumulators follows from the
old one and the gradient's. Squares of distances to it lose no digits, however far from zero it is.
"""

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import Decays
from lopt_jax.rules.rule import AccumulatorStatistics


def expected_means(
    old: AccumulatorStatistics, decays: Decays, gradient: jax.Array, square: jax.Array
) -> jax.Array:
    """What the means of the new accumulators are, but for rounding.

    Args:
      old: of the accumulators before this step, of one tensor or with leading axes of tensors T.
      decays: decay rates.
      gradient: T, the mean of the gradient.
      square: T, the mean of its square.

    Returns:
      (*T, momenta + 1), the last is of the second moment.
    """
    decay = jnp.asarray(decays.momentum)
    momentum = decay * old.momentum_mean + (1 - decay) * gradient[..., None]
    rate = decays.second_moment
    second_moment = rate * old.second_moment_mean + (1 - rate) * square
    return jnp.concatenate([momentum, second_moment[..., None]], axis=-1)


def statistics_about(
    centres: jax.Array, distances: jax.Array, squares: jax.Array
) -> AccumulatorStatistics:
    """The statistics from means of distances to centres and of their squares.

    Args:
      centres: (*T, momenta + 1), any numbers near the means.
      distances: (*T, momenta + 1), means of the accumulators less these.
      squares: (*T, momenta + 1), means of the squares of that.

    Returns:
      The statistics.
    """
    mean, variance = centres + distances, jnp.maximum(squares - jnp.square(distances), 0)
    return AccumulatorStatistics(
        mean[..., :-1], variance[..., :-1], mean[..., -1], variance[..., -1]
    )
