"""The models of the benchmarks: parameter lists, and the Flax modules that they are of."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Shapes = dict[str, Any]  # nested dicts of jax.ShapeDtypeStruct


class Block(nn.Module):
    """A pre-norm transformer block with a fused projection to queries, keys and values."""

    heads: int
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, width) to the same shape."""
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        h = nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        qkv = dense(3 * width, name="qkv")(h)
        q, k, v = (y.reshape((*y.shape[:-1], self.heads, -1)) for y in jnp.split(qkv, 3, axis=-1))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + dense(width, name="attention_out")(h.reshape(x.shape))
        h = nn.LayerNorm(dtype=self.dtype, name="norm_2")(x)
        h = nn.gelu(dense(4 * width, name="mlp_in")(h))
        return x + dense(width, name="mlp_out")(h)


class GPT2(nn.Module):
    """GPT-2: token ids (batch, length) to logits (batch, length, vocabulary); tied embeddings."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50257
    positions: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps (batch, length) int32 to float32 logits (batch, length, vocabulary)."""
        init = nn.initializers.normal(0.02)
        wte = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=init, name="wte"
        )
        wpe = nn.Embed(
            self.positions, self.width, dtype=self.dtype, embedding_init=init, name="wpe"
        )
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = Block(self.heads, causal=True, dtype=self.dtype, name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return wte.attend(x).astype(jnp.float32)


class ViT(nn.Module):
    """ViT-B/16: images (batch, 224, 224, 3) to logits (batch, classes)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 16
    classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (batch, height, width, 3) to float32 logits (batch, classes)."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, dtype=self.dtype, name="patches")(images)
        x = x.reshape((x.shape[0], -1, self.width))
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = x.astype(self.dtype)
        for i in range(self.layers):
            x = Block(self.heads, causal=False, dtype=self.dtype, name=f"block_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x[:, 0]).astype(jnp.float32)


def _shapes(module: nn.Module, example: jax.ShapeDtypeStruct) -> Shapes:
    return jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def gpt2_355m() -> Shapes:
    """The 292 tensors (354.8M parameters) of the 24-layer GPT-2."""
    return _shapes(GPT2(), jax.ShapeDtypeStruct((1, 8), jnp.int32))


def vit_b16() -> Shapes:
    """The 152 tensors (86.6M parameters) of ViT-B/16 with 1000 classes."""
    return _shapes(ViT(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))


def mlp() -> Shapes:
    """The 6 tensors (0.67M parameters) of an MLP for MNIST, 784-512-512-10."""
    sizes = (784, 512, 512, 10)
    return {
        f"dense_{i}": {
            "kernel": jax.ShapeDtypeStruct((a, b), jnp.float32),
            "bias": jax.ShapeDtypeStruct((b,), jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }


MODELS = {"mlp": mlp, "vit_b16": vit_b16, "gpt2_355m": gpt2_355m}
