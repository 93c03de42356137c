"""Adam on one array: for the leaves and optimizers whose direction is not learned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import update_momentum, update_second_moment
from lopt_jax.optimizers import common


class AdamSettings(NamedTuple):
    """What Adam needs to know."""

    betas: tuple[Any, Any]  # decays of momentum and second moment
    epsilon: Any  # added to the root
    root_epsilon: Any = 0.0  # added inside the root
    gradient_clip: float | None = common.GRADIENT_CLIP  # of every element; None: not clipped
    bias_correction: bool = True  # of both averages, which start at zero


class AdamStep(NamedTuple):
    """What Adam makes of one array of shape S."""

    step: jax.Array  # S, float32 at least
    momentum: jax.Array  # S
    second_moment: jax.Array  # S


def adam_step(
    settings: AdamSettings,
    gradient: jax.Array,
    momentum: jax.Array,
    second_moment: jax.Array,
    count: jax.Array,
) -> AdamStep:
    """One step of Adam.

    Args:
      settings: the settings.
      gradient: S, any float dtype.
      momentum: S, any float dtype.
      second_moment: S, any float dtype.
      count: () int32, updates made, this one included.

    Returns:
      The step to be subtracted, and the new moments in their dtypes.
    """
    dtype = jnp.promote_types(jnp.promote_types(gradient.dtype, momentum.dtype), jnp.float32)
    gradient = gradient.astype(dtype)
    if settings.gradient_clip is not None:
        gradient = jnp.clip(gradient, -settings.gradient_clip, settings.gradient_clip)
    beta1, beta2 = (jnp.asarray(beta, jnp.float32) for beta in settings.betas)
    m = update_momentum(momentum.astype(dtype), gradient, beta1)
    v = update_second_moment(second_moment.astype(dtype), gradient, beta2)
    mean, mean_square = m, v
    if settings.bias_correction:
        mean, mean_square = m / (1 - beta1**count), v / (1 - beta2**count)
    root = jnp.sqrt(mean_square + settings.root_epsilon)
    step = mean / (_not_rounded_to_zero(settings.epsilon) + root)
    return AdamStep(step, m.astype(momentum.dtype), v.astype(second_moment.dtype))


def _not_rounded_to_zero(epsilon: Any) -> Any:
    """The epsilon, at least the smallest number of its dtype where that is short.

    `optax.inject_hyperparams` makes arrays of the params' dtype. In float16 1e-8 is zero, and where
    a gradient is zero the denominator would be, too.
    """
    dtype = getattr(epsilon, "dtype", jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits >= 32:
        return epsilon
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    return jnp.maximum(jnp.asarray(epsilon, jnp.float32), smallest)
