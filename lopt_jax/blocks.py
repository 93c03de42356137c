"""Elementwise functions of a tensor, evaluated a block at a time to bound their temporaries."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def map_blocks(
    function: Callable[..., jax.Array],
    arguments: tuple,
    shape: Sequence[int],
    block_elements: int,
) -> jax.Array:
    """Evaluates a function that is elementwise over a tensor, block by block.

    A block takes every n-th index of one axis rather than a contiguous range: where that axis is
    sharded, every block stays spread over the same devices and nothing moves.

    Args:
      function: takes arrays like `arguments`, cut to a block; returns the block's result.
      arguments: pytrees of arrays whose last len(shape) axes broadcast against `shape`.
      shape: the tensor's shape.
      block_elements: elements of a block, about.

    Returns:
      The result for the whole tensor, of this shape.
    """
    wanted = math.ceil(math.prod(shape) / block_elements)
    axis = _block_axis(shape)
    size = shape[axis]
    blocks = _block_count(size, wanted)
    if blocks == 1:
        return function(*arguments)

    cut = size // blocks * blocks
    leaves, treedef = jax.tree.flatten(arguments)
    at = [x.ndim - len(shape) + axis for x in leaves]
    is_cut = [x.shape[i] != 1 for x, i in zip(leaves, at, strict=True)]

    def evaluate(choose: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
        chosen = [choose(x, i) if c else x for x, i, c in zip(leaves, at, is_cut, strict=True)]
        return function(*treedef.unflatten(chosen))

    def every(x: jax.Array, axis: int) -> jax.Array:
        """Splits an axis into (size // blocks, blocks)."""
        x = jax.lax.slice_in_dim(x, 0, cut, axis=axis)
        return x.reshape((*x.shape[:axis], cut // blocks, blocks, *x.shape[axis + 1 :]))

    split = {id(x): every(x, i) for x, i, c in zip(leaves, at, is_cut, strict=True) if c}

    def body(block: Any, out: jax.Array) -> jax.Array:
        result = evaluate(
            lambda x, i: jax.lax.dynamic_index_in_dim(split[id(x)], block, i + 1, keepdims=False)
        )
        return jax.lax.dynamic_update_index_in_dim(out, result, block, axis + 1)

    block_shape = (*shape[:axis], size // blocks, blocks, *shape[axis + 1 :])
    dtype = jnp.result_type(*leaves)
    out = jax.lax.fori_loop(0, blocks, body, jnp.zeros(block_shape, dtype))
    out = out.reshape((*shape[:axis], cut, *shape[axis + 1 :]))
    if cut == size:
        return out
    rest = evaluate(lambda x, i: jax.lax.slice_in_dim(x, cut, size, axis=i))
    return jnp.concatenate([out, rest], axis)


def _block_axis(shape: Sequence[int]) -> int:
    """The largest axis but the last, so that blocks are contiguous along the last."""
    leading = shape[:-1]
    if not leading or max(leading) * 64 < shape[-1]:
        return len(shape) - 1
    return max(range(len(leading)), key=lambda i: leading[i])


def _block_count(size: int, wanted: int) -> int:
    """A divisor of `size` within a factor of two of `wanted`, or else `wanted` itself."""
    wanted = min(wanted, size)
    candidates = [n for n in range(max(wanted // 2, 1), 2 * wanted + 1) if size % n == 0]
    return min(candidates, key=lambda n: abs(n - wanted), default=wanted)
