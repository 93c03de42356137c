"""Elementwise functions of a tensor, evaluated a block at a time to bound their temporaries."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.context import LARGEST_INDEX


def map_blocks(
    function: Callable[..., jax.Array],
    arguments: tuple,
    shape: Sequence[int],
    block_elements: int,
) -> jax.Array:
    """Evaluates a function that is elementwise over a tensor, block by block.

    A block takes every n-th index of one axis rather than a contiguous range, where their number
    divides it: if that axis is sharded, every block stays spread over the same devices and nothing
    moves.

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

    leaves, treedef = jax.tree.flatten(arguments)
    at = [x.ndim - len(shape) + axis for x in leaves]
    is_cut = [x.shape[i] != 1 for x, i in zip(leaves, at, strict=True)]
    dtype, each = jnp.result_type(*leaves), size // blocks

    def evaluate(choose: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
        chosen = [choose(x, i) if c else x for x, i, c in zip(leaves, at, is_cut, strict=True)]
        return function(*treedef.unflatten(chosen))

    if size % blocks:  # an axis of blocks would be a copy of all arrays: contiguous ranges then
        if size > LARGEST_INDEX:  # a range would begin where an int32 cannot say
            results = []
            for first, last in ((0, size // 2), (size // 2, size)):
                of_half = [
                    jax.lax.slice_in_dim(x, first, last, axis=i) if c else x
                    for x, i, c in zip(leaves, at, is_cut, strict=True)
                ]
                shape_of_half = (*shape[:axis], last - first, *shape[axis + 1 :])
                results.append(
                    map_blocks(function, treedef.unflatten(of_half), shape_of_half, block_elements)
                )
            return jnp.concatenate(results, axis)

        def body_of_range(block: Any, out: jax.Array) -> jax.Array:
            result = evaluate(
                lambda x, i: jax.lax.dynamic_slice_in_dim(x, block * each, each, axis=i)
            )
            return jax.lax.dynamic_update_slice_in_dim(out, result, block * each, axis)

        out = jax.lax.fori_loop(0, blocks, body_of_range, jnp.zeros(shape, dtype))
        rest = evaluate(lambda x, i: jax.lax.slice_in_dim(x, blocks * each, size, axis=i))
        return jax.lax.dynamic_update_slice_in_dim(out, rest, blocks * each, axis)

    def every(x: jax.Array, axis: int) -> jax.Array:
        """Splits an axis into (size // blocks, blocks)."""
        return x.reshape((*x.shape[:axis], each, blocks, *x.shape[axis + 1 :]))

    split = {id(x): every(x, i) for x, i, c in zip(leaves, at, is_cut, strict=True) if c}

    def body(block: Any, out: jax.Array) -> jax.Array:
        result = evaluate(
            lambda x, i: jax.lax.dynamic_index_in_dim(split[id(x)], block, i + 1, keepdims=False)
        )
        return jax.lax.dynamic_update_index_in_dim(out, result, block, axis + 1)

    block_shape = (*shape[:axis], each, blocks, *shape[axis + 1 :])
    return jax.lax.fori_loop(0, blocks, body, jnp.zeros(block_shape, dtype)).reshape(shape)


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
