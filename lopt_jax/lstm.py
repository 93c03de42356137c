"""An LSTM with one row a tensor: the memory of the controllers that look at a model's tensors.

The cell is Haiku's (`hk.LSTM`): gates of [input, hidden] in the order input, candidate, forget,
output, with one added to the forget gate.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.compiler.products import product


class LSTMState(NamedTuple):
    """Hidden state of the LSTM, a row a tensor."""

    hidden: jax.Array  # (tensors, N)
    cell: jax.Array  # (tensors, N)


def init_lstm(lstm: Mapping[str, jax.Array], tensors: int) -> LSTMState:
    """The learned initial state, a copy a tensor.

    Args:
      lstm: with "initial_hidden" (N,) and "initial_cell" (N,).
      tensors: number of tensors.

    Returns:
      The state.
    """
    return LSTMState(*(rows(lstm[name], tensors) for name in ("initial_hidden", "initial_cell")))


def rows(x: jax.Array, tensors: int) -> jax.Array:
    """A copy of an array for every tensor: (tensors, *shape of x).

    Zeros are added: each result is an array of its own, safe to donate.
    """
    return jnp.zeros((tensors, *(1 for _ in x.shape)), x.dtype) + x


def lstm_cell(
    lstm: Mapping[str, jax.Array], inputs: jax.Array, state: LSTMState, quickly: bool = False
) -> LSTMState:
    """One step of the LSTM.

    Args:
      lstm: with "w" (inputs + N, 4 N) and "b" (4 N,).
      inputs: (tensors, inputs).
      state: before this step.
      quickly: as in `products.product`.

    Returns:
      The new state; its `hidden` is the output.
    """
    both = jnp.concatenate([inputs, state.hidden], axis=1)
    gates = product(both, lstm["w"], quickly) + lstm["b"]
    write, candidate, forget, read = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(forget + 1) * state.cell + jax.nn.sigmoid(write) * jnp.tanh(candidate)
    return LSTMState(jax.nn.sigmoid(read) * jnp.tanh(cell), cell)
