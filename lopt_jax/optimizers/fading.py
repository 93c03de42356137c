"""How much smaller steps become where the gradient has died, as in a training without loss left.

The size of an orthogonal step does not depend on the gradient's. So it would stay as large as ever
where all examples are learned, and only noise is left of the gradient. So do Adam's steps, once its
second moment has forgotten larger gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_RECENT = 0.9  # decay of the recent average


class SquaredNorms(NamedTuple):
    """Averages of the squared global norm of gradients, each () float32.

    Fields:
      recent: exponential, of decay 0.9, from zero.
      mean: over all updates so far.
    """

    recent: jax.Array
    mean: jax.Array


def no_norms() -> SquaredNorms:
    """Those before the first update."""
    return SquaredNorms(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def with_norm(norms: SquaredNorms, squared: jax.Array, count: jax.Array) -> SquaredNorms:
    """The averages with one more gradient.

    Args:
      norms: those before.
      squared: () float32, the gradient's squared global norm.
      count: () int32, updates made, this one included.

    Returns:
      The averages.
    """
    recent = norms.recent + (1 - _RECENT) * (squared - norms.recent)
    return SquaredNorms(recent, norms.mean + (squared - norms.mean) / count)


def fading_factor(norms: SquaredNorms, count: jax.Array, threshold: Any) -> jax.Array:
    """What steps are multiplied by.

    It is (ratio / threshold)^2 where the ratio is below the threshold, and else exactly one. The
    ratio is that of the recent gradients' root mean square to that of all so far.

    Args:
      norms: with the gradient of this update.
      count: () int32, updates made, this one included.
      threshold: a number or () float32; at zero the factor is one.

    Returns:
      () float32 in [0, 1]; one where all gradients so far were zero.
    """
    recent = norms.recent / (1 - _RECENT ** count.astype(jnp.float32))
    limit = jnp.square(jnp.asarray(threshold, jnp.float32)) * norms.mean
    is_below = recent < limit
    return jnp.where(is_below, recent / jnp.where(is_below, limit, 1), 1)
