"""Elementwise functions of a tensor, evaluated a block at a time to bound their temporaries."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.context import LARGEST_INDEX


def elements_for(platform: str) -> int:
    """Elements of a block that suit a platform: on a CPU, hidden layers stay in its cache."""
    return 1 << 16 if platform == "cpu" else 1 << 18


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
    with_nothing = lambda *block: (function(*block), ())  # noqa: E731
    return map_and_sum_blocks(with_nothing, arguments, shape, block_elements)[0]


def map_and_sum_blocks(
    function: Callable[..., tuple[jax.Array, Any]],
    arguments: tuple,
    shape: Sequence[int],
    block_elements: int,
) -> tuple[jax.Array, Any]:
    """As `map_blocks`, of a function that also returns what is to be summed over the blocks.

    Args:
      function: takes arrays like `arguments`, cut to a block; returns the block's result and a tree
        of arrays, sums over the block.
      arguments: as in `map_blocks`.
      shape: the tensor's shape.
      block_elements: elements of a block, about.

    Returns:
      The result for the whole tensor, of this shape, and the sums over the whole tensor.
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
    add = lambda sums, new: jax.tree.map(jnp.add, sums, new)  # noqa: E731

    def evaluate(choose: Callable[[jax.Array, int], jax.Array]) -> tuple[jax.Array, Any]:
        chosen = [choose(x, i) if c else x for x, i, c in zip(leaves, at, is_cut, strict=True)]
        return function(*treedef.unflatten(chosen))

    def no_sums() -> Any:
        first = functools.partial(jax.lax.slice_in_dim, start_index=0, limit_index=each)
        like = jax.eval_shape(lambda: evaluate(lambda x, i: first(x, axis=i))[1])
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

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
                    map_and_sum_blocks(
                        function, treedef.unflatten(of_half), shape_of_half, block_elements
                    )
                )
            (low, of_low), (high, of_high) = results
            return jnp.concatenate([low, high], axis), add(of_low, of_high)

        def body_of_range(block: Any, carry: Any) -> Any:
            out, sums = carry
            result, new = evaluate(
                lambda x, i: jax.lax.dynamic_slice_in_dim(x, block * each, each, axis=i)
            )
            out = jax.lax.dynamic_update_slice_in_dim(out, result, block * each, axis)
            return out, add(sums, new)

        start = (jnp.zeros(shape, dtype), no_sums())
        out, sums = jax.lax.fori_loop(0, blocks, body_of_range, start)
        rest, of_rest = evaluate(lambda x, i: jax.lax.slice_in_dim(x, blocks * each, size, axis=i))
        out = jax.lax.dynamic_update_slice_in_dim(out, rest, blocks * each, axis)
        return out, add(sums, of_rest)

    def every(x: jax.Array, axis: int) -> jax.Array:
        """Splits an axis into (size // blocks, blocks)."""
        return x.reshape((*x.shape[:axis], each, blocks, *x.shape[axis + 1 :]))

    split = {id(x): every(x, i) for x, i, c in zip(leaves, at, is_cut, strict=True) if c}

    def body(block: Any, carry: Any) -> Any:
        out, sums = carry
        result, new = evaluate(
            lambda x, i: jax.lax.dynamic_index_in_dim(split[id(x)], block, i + 1, keepdims=False)
        )
        out = jax.lax.dynamic_update_index_in_dim(out, result, block, axis + 1)
        return out, add(sums, new)

    block_shape = (*shape[:axis], each, blocks, *shape[axis + 1 :])
    start = (jnp.zeros(block_shape, dtype), no_sums())
    out, sums = jax.lax.fori_loop(0, blocks, body, start)
    return out.reshape(shape), sums


def replace_blocks(
    function: Callable[[Any, Any], tuple[Any, jax.Array]],
    state: Any,
    read: Any,
    shape: Sequence[int],
    block_elements: int,
) -> tuple[Any, jax.Array]:
    """Replaces arrays by an elementwise function of them, in place and a block at a time.

    Args:
      function: (state, read) -> (new state, result), elementwise, all cut to a block.
      state: tree of arrays of this shape; the new ones take their place and dtypes.
      read: tree of arrays whose last len(shape) axes broadcast against `shape`.
      shape: the tensor's shape.
      block_elements: elements of a block, about.

    Returns:
      The new state, and the result for the whole tensor.
    """
    axis = _block_axis(shape)
    size = shape[axis]
    blocks = _block_count(size, math.ceil(math.prod(shape) / block_elements))
    if blocks == 1:
        return function(state, read)
    if size > LARGEST_INDEX:  # a block would begin where an int32 cannot say
        halves = []
        for first, last in ((0, size // 2), (size // 2, size)):
            part = functools.partial(_part, shape=shape, axis=axis, first=first, count=last - first)
            of_half = (*shape[:axis], last - first, *shape[axis + 1 :])
            halves.append(
                replace_blocks(function, part(state), part(read), of_half, block_elements)
            )
        return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis), *halves)
    each = size // blocks if size % blocks == 0 else -(-size // blocks // 8) * 8
    blocks = size // each

    def step(carry: tuple[Any, jax.Array], first: Any, count: int) -> tuple[Any, jax.Array]:
        part = functools.partial(_part, shape=shape, axis=axis, first=first, count=count)
        made = function(part(carry[0]), part(read))
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis)  # noqa: E731
        return jax.tree.map(put, carry, made)

    like = jax.eval_shape(function, state, read)[1]
    carry = (state, jnp.zeros(like.shape, like.dtype))
    carry = jax.lax.fori_loop(0, blocks, lambda i, carry: step(carry, i * each, each), carry)
    return step(carry, blocks * each, size % each) if size % each else carry


def _part(tree: Any, shape: Sequence[int], axis: int, first: Any, count: int) -> Any:
    """A range along an axis of the tensor, of arrays that broadcast against it."""

    def of_array(x: jax.Array) -> jax.Array:
        own = x.ndim - len(shape) + axis
        return x if x.shape[own] == 1 else jax.lax.dynamic_slice_in_dim(x, first, count, own)

    return jax.tree.map(of_array, tree)


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
