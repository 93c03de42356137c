"""What LSTM and MLP of rnn_mlp_lopt read of every tensor, beside features of the elements.

Reference: google/learned_optimization, `learned_optimizers/rnn_mlp_lopt.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.compiler.products import product
from lopt_jax.features import sine_features
from lopt_jax.rules.messages import Statistics
from lopt_jax.rules.tensor_statistics import log_magnitude
from lopt_jax.tensors import Tensors, tensor_shapes

_RANKS = 4  # the LSTM reads the first dimensions


def linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer {"w", "b"} of rows."""
    return product(x, layer["w"]) + layer["b"]


def tensor_sizes(tensors: Sequence[Tensors], chosen: np.ndarray) -> np.ndarray:
    """The first four dimensions of chosen tensors, then the elements: (chosen, 5) float32."""
    shapes = [tensor_shapes(tensors)[k] for k in chosen]
    padded = [(*shape, *(1,) * _RANKS)[:_RANKS] for shape in shapes]
    return np.asarray(
        [(*map(float, dims), float(math.prod(s))) for dims, s in zip(padded, shapes, strict=True)],
        np.float32,
    )


def lstm_inputs(
    x: Statistics,
    from_mlp: jax.Array,
    from_lstm: jax.Array,
    losses: tuple[jax.Array, jax.Array],
    sizes: np.ndarray,
    ranks: np.ndarray,
) -> jax.Array:
    """The LSTM's inputs, in the order of the original, its alphabetical names.

    Args:
      x: the statistics of every tensor.
      from_mlp: (tensors, messages), means of the MLP's further outputs at the last step.
      from_lstm: (messages,), what the LSTM told itself there.
      losses: this loss and that of validation, as `normalized_losses` has them, each ().
      sizes: of `tensor_sizes`.
      ranks: (tensors,), of the tensors.

    Returns:
      (tensors, 18 + all messages).
    """
    tensors, elements = sizes.shape[0], sizes[:, _RANKS]
    norm = lambda mean_square: jnp.sqrt(elements * mean_square)  # noqa: E731
    every = lambda value: jnp.broadcast_to(value, (tensors,))  # noqa: E731
    columns: list[Any] = [
        log_magnitude(norm(x.gradient_mean_square)),
        np.where(ranks == 0, np.float32(1), np.float32(-1)),
        log_magnitude(x.momentum.mean),
        jnp.sign(x.momentum.mean),
        log_magnitude(x.second_moment.mean),
        jnp.sign(x.second_moment.mean),
        log_magnitude(x.parameter.mean),
        jnp.sign(x.parameter.mean),
        log_magnitude(norm(x.parameter_mean_square)),
        *(np.log(sizes[:, i]) - 1 for i in range(_RANKS)),
        *map(every, losses),
        log_magnitude(x.momentum.variance),
        log_magnitude(x.second_moment.variance),
        log_magnitude(x.parameter.variance),
    ]
    said = jnp.broadcast_to(from_lstm, (tensors, from_lstm.shape[0]))
    return jnp.concatenate([said, from_mlp, jnp.stack(columns, axis=1)], axis=1)


def first_biases(
    theta: Any,
    element_inputs: int,
    x: Statistics,
    hidden: jax.Array,
    count: jax.Array,
    sizes: np.ndarray,
) -> jax.Array:
    """The first bias of every tensor's network, with the inputs that its elements share.

    Args:
      theta: the meta-parameters.
      element_inputs: inputs that vary with the element; the others follow them.
      x: the statistics of every tensor.
      hidden: (tensors, N), the LSTM's output.
      count: () int32.
      sizes: of `tensor_sizes`.

    Returns:
      (tensors, hidden size).
    """
    tensors, elements = sizes.shape[0], sizes[:, _RANKS]
    time = sine_features(count)
    columns: list[Any] = [
        jnp.full((tensors,), math.log(tensors) - 1, jnp.float32),
        jnp.log(jnp.sqrt(elements * x.parameter_mean_square) + 1e-8),
        np.log(elements),
    ]
    shared = [
        jnp.broadcast_to(time, (tensors, time.shape[0])),
        jnp.stack(columns, axis=1),
        linear(theta["to_mlp"], hidden),
    ]
    first = theta["mlp"]["w0"][element_inputs:]
    return product(jnp.concatenate(shared, axis=1), first) + theta["mlp"]["b0"]
