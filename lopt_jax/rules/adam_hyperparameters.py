"""Adam's hyperparameters as nn_adam's LSTM moves them, and what it reads to do so.

Reference: google/learned_optimization, `learned_optimizers/nn_adam.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.rules.tensor_statistics import MeanAndVariance, log_magnitude


class Hyperparameters(NamedTuple):
    """Adam's hyperparameters of every tensor, each (tensors,)."""

    learning_rate: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    epsilon: jax.Array


class Statistics(NamedTuple):
    """What the LSTM reads of one tensor or of all."""

    gradient: MeanAndVariance  # clipped
    momentum: MeanAndVariance
    second_moment: MeanAndVariance
    parameter: MeanAndVariance  # before the step
    gradient_size: jax.Array  # mean of the absolute values


def values_of(logarithms: Hyperparameters) -> Hyperparameters:
    """The hyperparameters from what the state holds, within their bounds."""
    of_decay = lambda x: 1 - jnp.exp(jnp.clip(10 * x, -10, 0))  # noqa: E731
    return Hyperparameters(
        learning_rate=jnp.clip(jnp.exp(10 * logarithms.learning_rate), 1e-8, 1e3),
        beta1=of_decay(logarithms.beta1),
        beta2=of_decay(logarithms.beta2),
        epsilon=jnp.clip(jnp.exp(10 * logarithms.epsilon), 1e-11, 1e4),
    )


def logarithms_of(values: Hyperparameters) -> Hyperparameters:
    """What the state holds of hyperparameters.

    Of one minus a rounded beta the logarithm is off by up to 7e-4: the original's is, too, and the
    LSTM was meta-trained with it.
    """
    return Hyperparameters(
        learning_rate=0.1 * jnp.log(values.learning_rate),
        beta1=0.1 * jnp.log(1 - values.beta1),
        beta2=0.1 * jnp.log(1 - values.beta2),
        epsilon=0.1 * jnp.log(values.epsilon),
    )


def lstm_inputs(x: Statistics, logarithms: Hyperparameters, ranks: np.ndarray) -> jax.Array:
    """The LSTM's inputs, in the order of the original, its alphabetical names.

    Args:
      x: the statistics of every tensor.
      logarithms: with which this step was made.
      ranks: (tensors,), of the tensors.

    Returns:
      (tensors, 19).
    """
    place = jax.tree.map(lambda x: jnp.clip(x, -5, 5) / 5, logarithms)
    flag = lambda is_so: jnp.where(is_so, 1.0, -1.0)  # noqa: E731
    half = lambda x: 0.5 * log_magnitude(x)  # noqa: E731
    columns = [
        place.beta1,
        place.beta2,
        place.epsilon,
        flag(ranks == 1),
        flag(ranks == 0),
        place.learning_rate,
        half(x.gradient.mean),
        jnp.sign(x.gradient.mean),
        half(x.gradient_size),
        half(x.momentum.mean),
        jnp.sign(x.momentum.mean),
        half(x.parameter.mean),
        jnp.sign(x.parameter.mean),
        half(x.second_moment.mean),
        jnp.sign(x.second_moment.mean),
        half(x.gradient.variance),
        half(x.momentum.variance),
        half(x.parameter.variance),
        half(x.second_moment.variance),
    ]
    return jnp.stack(columns, axis=1)
