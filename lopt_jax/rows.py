"""Rows of arrays, many of them taken by few kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lopt_jax.partition import is_explicit

RowsTaker = Callable[[jax.Array, slice, int], jax.Array]


def rows_taker(array: jax.Array) -> RowsTaker:
    """A function that takes rows out of an array in few launches: x[rows, ..., :length].

    On GPUs XLA launches a kernel for every slice that lies at a known place, because it knows that
    slices do not overlap. Where places are known at run time only, it makes one kernel of all
    slices of an array that are of one shape.

    Args:
      array: any array, not empty, whose values are known at run time only. If it is split over
        devices, they exchange one number.

    Returns:
      The function.
    """
    if is_explicit(array):  # there an index may not be taken of an axis that is split
        return lambda x, rows, length: x[rows, ..., :length]
    # zero, but XLA does not know
    zero = (array[(0,) * array.ndim] < -jnp.inf).astype(jnp.int32)

    def take(x: jax.Array, rows: slice, length: int) -> jax.Array:
        starts = (rows.start + zero, *(0 for _ in x.shape[1:]))
        sizes = (rows.stop - rows.start, *x.shape[1:-1], length)
        return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)

    return take
