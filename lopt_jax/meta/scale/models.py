"""The models of the scale suite, in linen: a GPT, a ViT, a ResNet and a denoiser.

Blocks of transformers are scanned over: their leaves have an axis of layers first, so the suite
also exercises `stacked_axes`. Arithmetic is in bfloat16, parameters are float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_HEAD_SIZE = 64


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of four times the width.

    Attributes:
      heads: attention heads.
      causal: whether a position sees those after it.
      dtype: of the arithmetic.
    """

    heads: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """From (batch, length, width) to the same and None, as `nn.scan` wants it."""
        batch, length, width = x.shape
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        y = nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x)
        qkv = dense(3 * width, name="qkv")(y).reshape(batch, length, 3, self.heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        y = _attention(query, key, value, self.causal)
        x = x + dense(width, name="projection")(y.reshape(batch, length, width))
        y = nn.RMSNorm(dtype=self.dtype, name="mlp_norm")(x)
        y = nn.gelu(dense(4 * width, name="up")(y))
        return x + dense(width, name="down")(y), None


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    on_gpu = jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16
    fused = on_gpu and query.shape[1] % 64 == 0
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, implementation="cudnn" if fused else "xla"
    )


def _blocks(layers: int, heads: int, causal: bool, dtype: Any) -> nn.Module:
    scanned = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers
    )
    return scanned(heads, causal, dtype, name="blocks")


class Gpt(nn.Module):
    """A decoder of tokens: learned positions, no biases, a head of its own.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream; heads have 64 features.
      layers: number of blocks.
      dtype: of the arithmetic.
    """

    vocabulary: int
    width: int
    layers: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From (batch, length) int32 to logits (batch, length, vocabulary) float32."""
        embed = functools.partial(
            nn.Embed, features=self.width, embedding_init=nn.initializers.normal(0.02)
        )
        x = embed(self.vocabulary, name="embedding")(tokens)
        x = x + embed(tokens.shape[1], name="positions")(jnp.arange(tokens.shape[1]))
        heads = max(self.width // _HEAD_SIZE, 1)
        x, _ = _blocks(self.layers, heads, True, self.dtype)(x.astype(self.dtype), None)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        logits = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.float32)


class Vit(nn.Module):
    """A vision transformer over 4x4 patches; the mean over positions is classified.

    Attributes:
      classes: number of classes.
      width: of the residual stream.
      layers: number of blocks.
      dtype: of the arithmetic.
    """

    classes: int
    width: int
    layers: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From (batch, height, width, channels) float32 to logits (batch, classes) float32."""
        patches = nn.Conv(self.width, (4, 4), strides=(4, 4), dtype=self.dtype, name="patches")
        x = patches(images)
        x = x.reshape(len(x), -1, self.width)
        position = self.param("position", nn.initializers.normal(0.02), (x.shape[1], self.width))
        x = x + position.astype(self.dtype)
        x, _ = _blocks(self.layers, max(self.width // _HEAD_SIZE, 1), False, self.dtype)(x, None)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x).mean(1)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class Residual(nn.Module):
    """A residual block of two 3x3 convolutions with group normalisation.

    Attributes:
      features: of its output.
      stride: of the first convolution.
      dtype: of the arithmetic.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From (batch, height, width, channels) to (batch, height/s, width/s, features)."""
        conv = functools.partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, num_groups=8, dtype=self.dtype)
        y = conv((3, 3), strides=self.stride)(x)
        y = conv((3, 3))(nn.relu(norm()(y)))
        if x.shape != y.shape:
            x = conv((1, 1), strides=self.stride, name="shortcut")(x)
        return nn.relu(x + norm()(y))


class ResNet(nn.Module):
    """A small ResNet: a stem, then stages of residual blocks, each of twice the width.

    Attributes:
      classes: number of classes.
      width: features of the first stage.
      blocks: residual blocks in each stage.
      dtype: of the arithmetic.
    """

    classes: int
    width: int
    blocks: tuple[int, ...] = (2, 2, 2)
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From (batch, height, width, channels) float32 to logits (batch, classes) float32."""
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype, name="stem")(images)
        x = nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Residual(self.width * 2**stage, stride, self.dtype)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.mean((1, 2))).astype(
            jnp.float32
        )


class Denoiser(nn.Module):
    """Predicts the noise in an image, given its level: residual blocks with a bottleneck.

    Attributes:
      width: features at full resolution.
      dtype: of the arithmetic.
    """

    width: int
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, images: jax.Array, level: jax.Array) -> jax.Array:
        """From noisy images (batch, height, width, channels) and level (batch,) to the noise."""
        channels = images.shape[-1]
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        frequencies = jnp.exp(jnp.linspace(0.0, 6.0, 16))
        angles = level[:, None] * frequencies
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        time = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="time")(time))
        x = conv(self.width, name="stem")(images) + time[:, None, None]
        wide = Residual(self.width, 1, self.dtype)(x)
        deep = Residual(2 * self.width, 2, self.dtype)(wide)
        shift = nn.Dense(2 * self.width, dtype=self.dtype, name="time_deep")(time)
        deep = Residual(2 * self.width, 1, self.dtype)(deep + shift[:, None, None])
        up = jax.image.resize(deep, (*wide.shape[:3], deep.shape[-1]), "nearest")
        x = Residual(self.width, 1, self.dtype)(jnp.concatenate([wide, up], axis=-1))
        return conv(channels, name="out")(x).astype(jnp.float32)
