"""Sums of several arrays in one pass over memory."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lopt_jax.partition import Partition

_PARTS = (8, 7, 9, 6, 10, 5, 12, 4)  # of an axis that are added on CPUs, the best first
WORTH_PARTS = 1 << 15  # elements; of fewer, more operations cost more than they gain
_STORED = 3  # times an array, at most, is what lies between the two sums


def means(
    arrays: Sequence[jax.Array], axes: Sequence[int], partition: Partition | None = None
) -> tuple[jax.Array, ...]:
    """Mean of each array over the same axes, all arrays read in one pass.

    Separate reductions of expressions that share operands do not fuse on every backend; each would
    read (or materialise) its operands again. One reduction with several operands always fuses.

    Args:
      arrays: arrays of one shape and dtype, usually expressions to be fused into the reduction.
      axes: the axes to reduce over, each in [0, rank).
      partition: where the arrays are shards, of what: the means are those of the whole arrays.

    Returns:
      One array for each input, the reduced axes kept with size 1.
    """
    shape = arrays[0].shape
    kept = tuple(1 if i in axes else n for i, n in enumerate(shape))
    if partition is None:
        count = _number(shape, axes)
        return tuple(x.reshape(kept) / count for x in _sums(tuple(axes), *arrays))
    count = _number(partition.shape, axes)
    sums = _sums(tuple(axes), *(partition.clear_padding(x, axes) for x in arrays))
    if partition.names(axes):
        sums = tuple(partition.total(jnp.stack(sums), axes))
    return tuple(x.reshape(kept) / count for x in sums)


def mean(
    x: jax.Array,
    axes: int | Sequence[int],
    partition: Partition | None = None,
    *,
    keepdims: bool = False,
) -> jax.Array:
    """Mean of one array.

    Args:
      x: the array.
      axes: the axes to reduce over.
      partition: where the array is a shard, of what: the mean is that of the whole array.
      keepdims: keep the reduced axes with size 1.

    Returns:
      The mean.
    """
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if partition is None:
        return jnp.mean(x, axes, keepdims=keepdims)
    total = jnp.sum(partition.clear_padding(x, axes), axes, keepdims=keepdims)
    return partition.total(total, axes) / _number(partition.shape, axes)


def _number(shape: Sequence[int], axes: Sequence[int]) -> float:
    """How many elements are reduced to one: a float, since it may be more than an int32 holds."""
    return float(math.prod(shape[axis] for axis in axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(axes: tuple[int, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    last = arrays[0].ndim - 1
    leading = tuple(a for a in axes if a != last)
    if not leading or leading == axes:
        return _reduce(arrays, axes)
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *xs: _reduce_on_cpu(xs, axes),
        default=lambda *xs: _reduce(xs, axes),
    )


def _reduce_on_cpu(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """As `_reduce`, in two sums that round less than a long one.

    XLA's CPU reduces one element after another, several arrays at once on one core. Where a leading
    axis can be cut into a few equal parts, these are added first, which are vector operations on
    all cores; what they make is stored. Else the last axis is summed first: its sums stay in
    registers, twice as fast as the other order. The barrier stops XLA from merging the two sums
    into one.
    """
    shape, last = arrays[0].shape, arrays[0].ndim - 1
    long = max((a for a in axes if a != last), key=lambda a: shape[a])
    parts = next((n for n in _PARTS if shape[long] % n == 0), None)
    are_few = parts is not None and len(arrays) <= _STORED * parts
    if parts is None or not are_few or math.prod(shape) < WORTH_PARTS:
        first = _reduce(arrays, (last,))
        return _reduce(jax.lax.optimization_barrier(first), tuple(a for a in axes if a != last))

    def added(x: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, jnp.split(x, parts, long))

    return tuple(jnp.sum(jax.lax.optimization_barrier(added(x)), axes) for x in arrays)


@_sums.defjvp
def _sums_jvp(axes, primals, tangents):
    # Forward as above; the tangents are plain sums, which can be transposed.
    return _sums(axes, *primals), tuple(jnp.sum(t, axes) for t in tangents)


def _reduce(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return tuple(jax.lax.reduce(tuple(arrays), zeros, add, axes))
