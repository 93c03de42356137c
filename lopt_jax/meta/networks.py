"""Small networks as pairs of pure functions, to be trained by the thousand under `vmap`."""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Params = Any
_CONV_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class Network(Protocol):
    """A function with parameters; the activation is chosen by a traced index."""

    def init(self, key: jax.Array, scale: jax.Array) -> Params:
        """Draws parameters; `scale` multiplies the weights of every layer."""
        ...

    def apply(self, params: Params, inputs: jax.Array, activation: jax.Array) -> jax.Array:
        """Maps a batch of inputs to a batch of outputs."""
        ...


def activate(x: jax.Array, index: jax.Array) -> jax.Array:
    """One of relu, tanh, gelu and swish, by a traced index in [0, 4)."""
    return jnp.select(
        [index == 0, index == 1, index == 2],
        [jax.nn.relu(x), jnp.tanh(x), jax.nn.gelu(x)],
        jax.nn.silu(x),
    )


def _dense(key: jax.Array, fan_in: int, fan_out: int, scale: jax.Array) -> dict[str, jax.Array]:
    weights = jax.random.truncated_normal(key, -2.0, 2.0, (fan_in, fan_out))
    return {"w": weights * scale / math.sqrt(fan_in), "b": jnp.zeros((fan_out,))}


def _apply_dense(layer: Params, x: jax.Array) -> jax.Array:
    return x @ layer["w"] + layer["b"]


def _layer_norm(layer: Params, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6) * layer["scale"] + layer["bias"]


def _norm_params(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A multilayer perceptron; `sizes` are the widths from input to output."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    def init(self, key: jax.Array, scale: jax.Array) -> Params:
        """Draws parameters: fan-in scaled truncated normal weights, zero biases."""
        keys = jax.random.split(key, len(self.sizes) - 1)
        pairs = zip(self.sizes[:-1], self.sizes[1:], strict=True)
        layers = [_dense(k, m, n, scale) for k, (m, n) in zip(keys, pairs, strict=True)]
        norms = [_norm_params(n) for n in self.sizes[1:-1]] if self.layer_norm else []
        return {f"layer{i}": layer for i, layer in enumerate(layers)} | {
            f"norm{i}": norm for i, norm in enumerate(norms)
        }

    def apply(self, params: Params, inputs: jax.Array, activation: jax.Array) -> jax.Array:
        """Maps (batch, sizes[0]) to (batch, sizes[-1])."""
        x = inputs
        for i in range(len(self.sizes) - 1):
            x = _apply_dense(params[f"layer{i}"], x)
            if i < len(self.sizes) - 2:
                if self.layer_norm:
                    x = _layer_norm(params[f"norm{i}"], x)
                x = activate(x, activation)
        return x


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """Two 3x3 convolutions (the second with stride 2), a mean over places, a linear layer.

    Args:
      side: height and width of the pictures.
      channels: outputs of the two convolutions.
      num_classes: outputs.
      inputs: channels of the pictures.
    """

    side: int
    channels: tuple[int, int]
    num_classes: int
    inputs: int = 1

    def init(self, key: jax.Array, scale: jax.Array) -> Params:
        """Draws parameters: fan-in scaled kernels, zero biases."""
        keys = jax.random.split(key, 3)
        params = {}
        channels_in = self.inputs
        for i, channels in enumerate(self.channels):
            kernel = jax.random.truncated_normal(keys[i], -2.0, 2.0, (3, 3, channels_in, channels))
            params[f"conv{i}"] = {
                "w": kernel * scale / math.sqrt(9 * channels_in),
                "b": jnp.zeros((channels,)),
            }
            channels_in = channels
        params["head"] = _dense(keys[2], channels_in, self.num_classes, scale)
        return params

    def apply(self, params: Params, inputs: jax.Array, activation: jax.Array) -> jax.Array:
        """Maps (batch, side * side * inputs) to (batch, num_classes)."""
        x = inputs.reshape(-1, self.side, self.side, self.inputs)
        for i in range(2):
            layer = params[f"conv{i}"]
            x = _convolve(x, layer["w"], 1 + i) + layer["b"]
            x = activate(x, activation)
        return _apply_dense(params["head"], jnp.mean(x, (1, 2)))


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    # Patches and a matrix product: under vmap over kernels this stays one batched product, where a
    # convolution would become a grouped one, which is slow on every backend.
    patches = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1], x.shape[2]
    columns = [
        patches[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    stacked = jnp.concatenate(columns, -1)
    return stacked @ kernel.reshape(-1, kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class Rnn:
    """A gated recurrent unit over tokens that predicts the next one."""

    vocabulary: int
    width: int

    def init(self, key: jax.Array, scale: jax.Array) -> Params:
        """Draws parameters; the recurrent matrices are fan-in scaled."""
        keys = jax.random.split(key, 4)
        return {
            "embedding": jax.random.normal(keys[0], (self.vocabulary, self.width)) * 0.1 * scale,
            "gates": _dense(keys[1], 2 * self.width, 2 * self.width, scale),
            "candidate": _dense(keys[2], 2 * self.width, self.width, scale),
            "head": _dense(keys[3], self.width, self.vocabulary, scale),
        }

    def apply(self, params: Params, inputs: jax.Array, activation: jax.Array) -> jax.Array:
        """Maps tokens (batch, length) to logits (batch, length, vocabulary)."""
        del activation

        def cell(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            both = jnp.concatenate([x, hidden], -1)
            gates = jax.nn.sigmoid(_apply_dense(params["gates"], both))
            reset, update = jnp.split(gates, 2, -1)
            both = jnp.concatenate([x, reset * hidden], -1)
            candidate = jnp.tanh(_apply_dense(params["candidate"], both))
            hidden = update * hidden + (1 - update) * candidate
            return hidden, hidden

        embedded = _embed(params["embedding"], inputs)
        start = jnp.zeros((inputs.shape[0], self.width))
        # A short loop, unrolled: 16 small steps cost less as one program than as a loop.
        _, hidden = jax.lax.scan(cell, start, jnp.swapaxes(embedded, 0, 1), unroll=True)
        return _apply_dense(params["head"], jnp.swapaxes(hidden, 0, 1))


def _embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    # A product with one-hot rows: its gradient is a product too, not a scatter, so that runs are
    # bitwise reproducible and fast under vmap.
    return jax.nn.one_hot(tokens, table.shape[0]) @ table


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pre-norm transformer blocks over tokens (causal) or over vectors (a classifier).

    Args:
      vocabulary: number of tokens, or of classes where `input_width` is given.
      width: residual width, divisible by `heads`.
      layers: number of blocks.
      heads: attention heads.
      length: positions.
      input_width: size of an input vector a position; 0 for tokens.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int
    input_width: int = 0

    def init(self, key: jax.Array, scale: jax.Array) -> Params:
        """Draws parameters."""
        keys = iter(jax.random.split(key, 3 + 4 * self.layers))
        width = self.width
        if self.input_width:
            embedding: Any = _dense(next(keys), self.input_width, width, scale)
        else:
            embedding = jax.random.normal(next(keys), (self.vocabulary, width)) * 0.1 * scale
        params: dict[str, Any] = {
            "embedding": embedding,
            "position": jax.random.normal(next(keys), (self.length, width)) * 0.1 * scale,
            "norm": _norm_params(width),
            "head": _dense(next(keys), width, self.vocabulary, scale),
        }
        for i in range(self.layers):
            params[f"block{i}"] = {
                "norm1": _norm_params(width),
                "qkv": _dense(next(keys), width, 3 * width, scale),
                "out": _dense(next(keys), width, width, scale),
                "norm2": _norm_params(width),
                "up": _dense(next(keys), width, 4 * width, scale),
                "down": _dense(next(keys), 4 * width, width, scale),
            }
        return params

    def apply(self, params: Params, inputs: jax.Array, activation: jax.Array) -> jax.Array:
        """Maps tokens (batch, length) or vectors (batch, length * input_width) to logits."""
        del activation
        if self.input_width:
            vectors = inputs.reshape(inputs.shape[0], self.length, self.input_width)
            x = _apply_dense(params["embedding"], vectors)
        else:
            x = _embed(params["embedding"], inputs)
        x = x + params["position"][: x.shape[1]]
        mask = None
        if not self.input_width:
            mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        for i in range(self.layers):
            block = params[f"block{i}"]
            x = x + _attention(block, _layer_norm(block["norm1"], x), self.heads, mask)
            hidden = jax.nn.gelu(_apply_dense(block["up"], _layer_norm(block["norm2"], x)))
            x = x + _apply_dense(block["down"], hidden)
        x = _layer_norm(params["norm"], x)
        if self.input_width:
            x = jnp.mean(x, 1)
        return _apply_dense(params["head"], x)


def _attention(block: Params, x: jax.Array, heads: int, mask: jax.Array | None) -> jax.Array:
    batch, length, width = x.shape
    qkv = _apply_dense(block["qkv"], x).reshape(batch, length, 3, heads, width // heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // heads)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
    return _apply_dense(block["out"], mixed.reshape(batch, length, width))
