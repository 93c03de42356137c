"""Rows of arrays, many of them taken by few kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lopt_jax.partition import is_local


def rows_taker(number: jax.Array) -> Callable[[jax.Array, slice], jax.Array]:
    """A function that takes rows out of an array: x[rows], but in few launches.

    On GPUs XLA launches a kernel for every slice that lies at a known place, because it knows that
    slices do not overlap. Where places are known at run time only, it makes one kernel of all
    slices of an array that are of one shape.

    Args:
      number: any number or numbers that are only known at run time.

    Returns:
      The function.
    """
    if not is_local():
        return lambda x, rows: x[rows]
    # zero, which XLA does not know
    zero = jnp.any(number < -jnp.inf).astype(jnp.int32)
    return lambda x, rows: jax.lax.dynamic_slice_in_dim(
        x, rows.start + zero, rows.stop - rows.start
    )
