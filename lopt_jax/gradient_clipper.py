"""A bound for the elements of gradients that follows their size.

Reference: google/learned_optimization, `learned_optimizers/rnn_mlp_lopt.py`,
`_DynamicGradientClipper`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_DECAY = 0.99
_TIMES = 10.0  # the typical size


class GradientClipper(NamedTuple):
    """State of the bound."""

    size: jax.Array  # (), moving average of the root mean square of clipped gradients
    count: jax.Array  # type: ignore[assignment]  # () int32, updates of it made so far


def init_clipper() -> GradientClipper:
    """As if the gradients before had the root mean square one."""
    return GradientClipper(jnp.full((), 1 - _DECAY, jnp.float32), jnp.zeros((), jnp.int32))


def largest_element(clipper: GradientClipper) -> jax.Array:
    """The bound, (): ten times the average size, corrected for its start."""
    count = (clipper.count + 1).astype(jnp.float32)
    return _TIMES * (clipper.size / (1 - _DECAY**count))


def update_clipper(clipper: GradientClipper, mean_squares: jax.Array) -> GradientClipper:
    """Takes in a step's gradients.

    Args:
      clipper: before this step.
      mean_squares: (tensors,), of the clipped gradient of every tensor; not none.

    Returns:
      The new state.
    """
    size = jnp.sqrt(1e-8 + jnp.mean(mean_squares))
    return GradientClipper(_DECAY * clipper.size + (1 - _DECAY) * size, clipper.count + 1)
