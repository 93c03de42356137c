"""Rows and other parts of arrays: joined, and many of them taken by few kernels."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.context import steering, tracing
from lopt_jax.partition import is_explicit

PartTaker = Callable[[jax.Array, Sequence[int], Sequence[int]], jax.Array]


def concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays joined along their leading axis; a single one is no operation."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def join_trees(trees: Sequence[Any]) -> Any:
    """Trees of arrays with a leading axis, joined along it."""
    return jax.tree.map(lambda *xs: concatenate(xs), *trees)


def in_order(pieces: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Joins trees of arrays with a leading axis of tensors, given the positions of these."""
    joined = join_trees([tree for _, tree in pieces])
    positions = [k for members, _ in pieces for k in members]
    if positions == sorted(positions):
        return joined
    return take_rows(joined, np.argsort(positions))


def take_rows(tree: Any, positions: Any) -> Any:
    """Some tensors of arrays with a leading axis of tensors."""
    return jax.tree.map(lambda x: x[np.asarray(positions)], tree)


def unknown_zero(array: jax.Array) -> jax.Array | None:
    """A zero that XLA does not know to be one, for `part_taker`.

    Args:
      array: any array, not empty, whose values are known at run time only. If it is split over
        devices, they exchange one number.

    Returns:
      () int32. None where shardings are part of types: an index may not be taken of a split axis.
    """
    if is_explicit(array):
        return None
    zero = (array[(0,) * array.ndim] < -jnp.inf).astype(jnp.int32)
    return jax.lax.optimization_barrier(zero)  # else made anew in every kernel, for every part


def joined_state() -> AbstractContextManager[None]:
    """Where the arrays of the new state are joined again, XLA is told where the parts lie.

    It sees then which joins undo what took the parts.
    """
    return steering(joined_state=True)


def part_taker(zero: jax.Array | None, of_state: bool = False) -> PartTaker:
    """A function (x, starts, sizes) that takes parts out of arrays in few launches.

    On GPUs XLA launches a kernel for every slice that lies at a known place, because it knows that
    slices do not overlap. Where places are known at run time only, it makes one kernel of all
    slices of an array that are of one shape.

    Args:
      zero: of `unknown_zero`; with another one places are different, and slices are not joined.
      of_state: whether the parts are arrays of the new state, see `joined_state`.

    Returns:
      The function.
    """
    if zero is None or (of_state and tracing().joined_state):
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
