"""What looks across tensors: loss features, tensor features, and the LSTM over tensors.

The formulas are those of google/learned_optimization, `research/general_lopt/hyper_v2.py` (VeLO,
arXiv 2211.09760) and amoudgl/celo, `optimizers/celo.py` (Celo, arXiv 2501.12670).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.compiler.products import product
from lopt_jax.lstm import LSTMState, lstm_cell
from lopt_jax.rules.rule import MLP, AccumulatorStatistics
from lopt_jax.rules.tensor_statistics import log_magnitude

LOSS_DECAYS = 10
FRACTION_SCALES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_RANKS = 5


class LossBuffer(NamedTuple):
    """Moving averages of the loss at ten time scales."""

    means: jax.Array  # (10,)
    running_min: jax.Array  # (10,), of the bias-corrected means
    count: jax.Array  # type: ignore[assignment]  # () int32, losses seen


class Controls(NamedTuple):
    """What the LSTM says of every tensor."""

    banks: jax.Array | None  # (tensors, K), the weights of the network's banks
    step_size: jax.Array  # (tensors,)
    state: LSTMState


def init_loss_buffer() -> LossBuffer:
    """An empty loss buffer."""
    return LossBuffer(
        means=jnp.zeros((LOSS_DECAYS,), jnp.float32),
        running_min=jnp.full((LOSS_DECAYS,), 999999999999.0, jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


def loss_decays(num_steps: jax.Array | float) -> jax.Array:
    """Decays whose time scales are spread from 10 steps to `num_steps`: (10,) float32."""
    halflife = jnp.logspace(1, jnp.log10(jnp.asarray(num_steps, jnp.float32)), LOSS_DECAYS)
    return jnp.exp(-1.0 / halflife).astype(jnp.float32)


def update_loss_buffer(buffer: LossBuffer, loss: jax.Array, decays: jax.Array) -> LossBuffer:
    """Takes in a loss, clipped to twice the largest of the averages.

    A loss that is not finite is left out: it would stay in the averages for ever. For finite ones
    the formula is the original's.

    Args:
      buffer: the buffer.
      loss: ().
      decays: (10,), of `loss_decays`.

    Returns:
      The new buffer; the old one where the loss is not finite.
    """
    is_finite = jnp.isfinite(loss)
    correction = 1 - decays ** (buffer.count + 1)
    largest = jnp.max(buffer.means / correction)
    largest = jnp.where(buffer.count == 0, loss, largest)
    loss = jnp.minimum(jnp.abs(largest) * 2, loss)
    means = buffer.means * decays + loss * (1 - decays)
    new = LossBuffer(
        means=means,
        running_min=jnp.minimum(buffer.running_min, means / correction),
        count=buffer.count + 1,
    )
    return jax.tree.map(lambda x, old: jnp.where(is_finite, x, old), new, buffer)


def loss_features(buffer: LossBuffer, decays: jax.Array) -> jax.Array:
    """Where each average lies between its minimum and the next slower average.

    Args:
      buffer: after this step's loss.
      decays: (10,).

    Returns:
      (9,), in [-1, 1]; zero for the first two losses.
    """
    means = buffer.means / (1 - decays ** jnp.maximum(buffer.count, 1))
    slower, faster, lowest = means[1:], means[:-1], buffer.running_min[:-1]
    position = (faster - lowest) / jnp.maximum(1e-8, slower - lowest)
    feature = jnp.clip(position - 1.0, -1, 1)
    return jnp.where(buffer.count <= 2, 0.0, feature)


def fraction_features(count: jax.Array, num_steps: jax.Array | float) -> jax.Array:
    """Embedding of the fraction of training done: (9,).

    Args:
      count: () int32, updates made before this one.
      num_steps: (), updates of the whole training.
    """
    fraction = count / jnp.asarray(num_steps, jnp.float32)
    return jnp.tanh((fraction - jnp.asarray(FRACTION_SCALES, jnp.float32)) * 10)


def _log_magnitude(x: jax.Array) -> jax.Array:
    return log_magnitude(x * 10.0) * 0.5


def tensor_features(
    shapes: Sequence[Sequence[int]],
    statistics: AccumulatorStatistics,
    parameter_mean_square: jax.Array,
    step_features: Sequence[jax.Array],
) -> jax.Array:
    """VeLO's inputs of the LSTM.

    Args:
      shapes: of every tensor.
      statistics: of the accumulators before this step's update, a row a tensor.
      parameter_mean_square: (tensors,).
      step_features: vectors that every tensor shares: the fraction of training, the loss features.

    Returns:
      (tensors, 30), in the order of the original: fraction, loss, mean second moment, rank,
      variance of the momenta, "variance" of the second moment. The last is taken around the means
      of the momenta, as the original takes it.
    """
    norm = jax.lax.rsqrt(jnp.maximum(1e-9, parameter_mean_square))[:, None]
    second_mean = statistics.second_moment_mean[:, None]
    second_variance = statistics.second_moment_variance[:, None]
    offset = second_mean - statistics.momentum_mean
    ranks = [min(sum(n > 1 for n in shape), _RANKS) for shape in shapes]
    return jnp.concatenate(
        [
            shared_features(len(shapes), step_features),
            _log_magnitude(second_mean * norm),
            jnp.asarray(np.eye(_RANKS + 1, _RANKS, dtype=np.float32)[ranks].reshape(-1, _RANKS)),
            _log_magnitude(statistics.momentum_variance * jnp.square(norm)),
            _log_magnitude((second_variance + jnp.square(offset)) * jnp.square(norm)),
        ],
        axis=1,
    )


def shared_features(tensors: int, step_features: Sequence[jax.Array]) -> jax.Array:
    """Celo's inputs of the LSTM: what every tensor shares.

    Args:
      tensors: number of tensors.
      step_features: vectors: the fraction of training, the loss features.

    Returns:
      (tensors, 18).
    """
    shared = jnp.concatenate(step_features)
    return jnp.broadcast_to(shared, (tensors, shared.shape[0]))


def run_lstm(
    meta_parameters: Mapping[str, Any],
    inputs: jax.Array,
    state: LSTMState,
    quickly: bool = False,
) -> Controls:
    """One step of the LSTM over tensors.

    Tensors exchange information through a maximum over all of them, added to each one's input.

    Args:
      meta_parameters: with "mix", "input", "lstm", "step_size" and perhaps "controls".
      inputs: (tensors, features).
      state: before this step.
      quickly: as in `products.product`.

    Returns:
      The controls, step sizes before any nonlinearity, and the new state.
    """
    if not inputs.shape[0]:
        banks = None
        if "controls" in meta_parameters:
            banks = jnp.zeros((0, meta_parameters["controls"]["b"].shape[0]))
        return Controls(banks, jnp.zeros((0,)), state)
    linear = lambda layer, x: product(x, layer["w"], quickly) + layer["b"]  # noqa: E731

    def linear_layers(names: Sequence[str], x: jax.Array) -> list[jax.Array]:
        """Layers with the same inputs, as one product."""
        layers = [meta_parameters[name] for name in names]
        joined = {k: jnp.concatenate([layer[k] for layer in layers], axis=-1) for k in ("w", "b")}
        sizes = [layer["b"].shape[0] for layer in layers]
        return jnp.split(linear(joined, x), list(itertools.accumulate(sizes[:-1])), axis=1)

    to_mix, own = linear_layers(["mix", "input"], inputs)
    x = own + jnp.max(jax.nn.relu(to_mix), axis=0, keepdims=True)
    state = lstm_cell(meta_parameters["lstm"], x, state, quickly)
    outputs = ["step_size", *(["controls"] if "controls" in meta_parameters else [])]
    step_size, *others = linear_layers(outputs, state.hidden)
    return Controls(others[0] if others else None, step_size[:, 0], state)


def mix_banks(mlp: Mapping[str, jax.Array], weights: jax.Array, quickly: bool = False) -> MLP:
    """Every tensor's network, a weighted mean of the banks.

    Args:
      mlp: {"w0": (K, features, H), "b0": (K, H), ...}.
      weights: (tensors, K).
      quickly: as in `products.product`.

    Returns:
      The networks, with a leading axis of tensors.
    """
    tensors, count = weights.shape
    layers = range(len(mlp) // 2)
    names = [f"{kind}{i}" for kind in "wb" for i in layers]
    sizes = [math.prod(mlp[name].shape[1:]) for name in names]
    # one product, not one a layer
    banks = jnp.concatenate([mlp[name].reshape((count, -1)) for name in names], axis=1)
    mixed = product(weights, banks, quickly) / count
    parts = jnp.split(mixed, list(itertools.accumulate(sizes[:-1])), axis=1)
    shaped = [
        x.reshape((tensors, *mlp[name].shape[1:])) for x, name in zip(parts, names, strict=True)
    ]
    return MLP(weights=tuple(shaped[: len(layers)]), biases=tuple(shaped[len(layers) :]))
