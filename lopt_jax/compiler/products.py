"""Float32 products of a few hundred rows, which GPUs compile at once.

XLA compiles dozens of variants of a real product for a GPU and times them, to choose one: for the
four products of VeLO's LSTM that is ten seconds of compilation on an H200, for products that take
0.06 ms of a step. A complex product goes to cuBLAS instead, as it is, so here a real product is
half of a complex one of half the length (docs/kernels.md has the times of both). That takes memory
for cuBLAS to work in, so it is done for large models.
"""

import math

import jax
import jax.numpy as jnp

WORTH_IT = 1 << 22  # multiplications from which on it is done; of fewer, more launches cost more
WORKSPACE_BYTES = 1 << 25  # that cuBLAS takes


def may_work(largest_bytes: int) -> bool:
    """Whether cuBLAS's memory is at most twice a model's largest leaf, as all temporaries are."""
    return 2 * largest_bytes >= WORKSPACE_BYTES


def product(x: jax.Array, weight: jax.Array, quickly: bool = False) -> jax.Array:
    """Matrix product, as exact as float32 is.

    Args:
      x: (rows, n) float32.
      weight: (n, columns) float32.
      quickly: whether compilation may be shortened at the price of `WORKSPACE_BYTES`.

    Returns:
      (rows, columns) float32.
    """
    is_large = math.prod(x.shape) * weight.shape[1] >= WORTH_IT
    if not (quickly and is_large and x.dtype == jnp.float32):
        return _real(x, weight)
    return jax.lax.platform_dependent(x, weight, cuda=_complex, default=_real)


def _real(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.dot(x, weight, precision="highest")


def _complex(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The real part of (a + bi)(c - di) is ac + bd: the sum over both halves of the length."""
    half = -(-x.shape[1] // 2)
    short = 2 * half - x.shape[1]
    x, weight = jnp.pad(x, ((0, 0), (0, short))), jnp.pad(weight, ((0, short), (0, 0)))
    left = jax.lax.complex(x[:, :half], x[:, half:])
    right = jax.lax.complex(weight[:half], -weight[half:])
    return jnp.real(jnp.dot(left, right, precision="highest"))
