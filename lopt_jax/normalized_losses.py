"""Losses of training and validation, as rnn_mlp_lopt reads them: in units of their own spread.

Reference: google/learned_optimization, `learned_optimizers/rnn_mlp_lopt.py`, `_LossNormalizer`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TRAINING_DECAY, VALIDATION_DECAY = 0.9, 0.95
_EPSILON = 1e-8


class LossAverage(NamedTuple):
    """Moving averages of a loss, not corrected for their start at zero; each ()."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # type: ignore[assignment]  # int32, losses seen


def init_loss_average() -> LossAverage:
    """Averages of no loss."""
    zero = lambda dtype: jnp.zeros((), dtype)  # noqa: E731
    return LossAverage(zero(jnp.float32), zero(jnp.float32), zero(jnp.int32))


def update_loss_average(average: LossAverage, loss: jax.Array, decay: float) -> LossAverage:
    """Takes in a loss, unless it is not finite: it would stay in the averages for ever.

    Args:
      average: before this loss.
      loss: ().
      decay: of the averages.

    Returns:
      The new averages.
    """
    mean = decay * average.mean + (1 - decay) * loss
    variance = decay * average.variance + (1 - decay) * jnp.square(mean - loss)
    new = LossAverage(mean, variance, average.count + 1)
    is_finite = jnp.isfinite(loss)
    return jax.tree.map(lambda x, old: jnp.where(is_finite, x, old), new, average)


def corrected_mean(average: LossAverage, decay: float) -> jax.Array:
    """The mean of the losses seen; zero of none."""
    # the original divides zero by 1e-8 there, or by zero, as the compiler sums 1 - 1 + 1e-8
    mean = average.mean / _correction(average, decay)
    return jnp.where(average.count == 0, 0.0, mean)


def normalized_loss(average: LossAverage, loss: jax.Array, decay: float) -> jax.Array:
    """Where a loss lies among those seen, in standard deviations.

    Args:
      average: of these losses.
      loss: (); one that is not finite counts as their mean.
      decay: of the averages.

    Returns:
      (), in [-5, 5].
    """
    mean = corrected_mean(average, decay)
    loss = jnp.where(jnp.isfinite(loss), loss, mean)
    variance = average.variance / _correction(average, decay)
    return jnp.clip((loss - mean) * jax.lax.rsqrt(variance + _EPSILON), -5, 5)


def _correction(average: LossAverage, decay: float) -> jax.Array:
    count = jnp.maximum(average.count, 1).astype(jnp.float32)
    return 1 - decay**count + _EPSILON
