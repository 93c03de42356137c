"""Many parts of arrays, taken by few kernels.

On GPUs XLA launches a kernel for every slice that lies at a known place, because it knows that
slices do not overlap. Where places are known at run time only, it makes one kernel of all slices of
an array that are of one shape.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.context import Tracing
from lopt_jax.partition import is_explicit

PartTaker = Callable[[jax.Array, Sequence[int], Sequence[int]], jax.Array]


def opaque_zero(tracing: Tracing, array: jax.Array) -> jax.Array | None:
    """A zero that XLA does not know to be one, for `part_taker`.

    Args:
      tracing: what steers the trace.
      array: any array, not empty, whose values are known at run time only.

    Returns:
      () int32. None where nothing is done about it, and where shardings are part of types: an
      index may not be taken of a split axis.
    """
    if is_explicit(array) or "slices" in tracing.without:
        return None
    zero = (array[(0,) * array.ndim] < -jnp.inf).astype(jnp.int32)
    return jax.lax.optimization_barrier(zero)  # else made anew in every kernel, for every part


def part_taker(zero: jax.Array | None) -> PartTaker:
    """A function (x, starts, sizes) that takes parts out of arrays in few launches.

    Args:
      zero: of `opaque_zero`; with another one places are different, and slices are not joined.
        None: XLA is told where the parts lie.

    Returns:
      The function.
    """
    if zero is None:
        return lambda x, starts, sizes: x[
            tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))
        ]

    place_of = functools.cache(lambda i: i + zero)  # once for the parts of all arrays

    def take(x: jax.Array, starts: Sequence[int], sizes: Sequence[int]) -> jax.Array:
        whole = [n == size for n, size in zip(sizes, x.shape, strict=True)]
        places = [
            np.int32(i) if all_ else place_of(i) for i, all_ in zip(starts, whole, strict=True)
        ]
        return jax.lax.dynamic_slice(x, places, sizes, allow_negative_indices=False)

    return take
