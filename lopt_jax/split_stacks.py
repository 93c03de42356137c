"""Rows of tensors where devices have different ones: stacked axes that are split.

Every device has whole what is by tensor, such as networks and rates. What a device computes is of
its own tensors, which are numbered anew. Where no stacked axis is split, all of this is the
identity.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.partition import Partition
from lopt_jax.tensors import Tensors


def own_tensors(tensors: Sequence[Tensors], leaves: Sequence[jax.Array]) -> list[Tensors]:
    """How leaves are seen as tensors of which this device has some.

    Args:
      tensors: of all devices, of `tensors_of`.
      leaves: this device's.

    Returns:
      Entries whose stacks and positions are this device's.
    """
    if not _is_any_split(tensors):
        return list(tensors)
    out, first = [], 0
    for entry, leaf in zip(tensors, leaves, strict=True):
        stack = tuple(leaf.shape[: len(entry.stack)])
        out.append(replace(entry, stack=stack, first=first, count=math.prod(stack)))
        first += math.prod(stack)
    return out


def own_rows(tensors: Sequence[Tensors], tree: Any) -> Any:
    """The rows of this device's tensors, from arrays with a row for each tensor.

    Args:
      tensors: of all devices.
      tree: tree of arrays.
    """
    if not _is_any_split(tensors):
        return tree

    def own(x: jax.Array) -> jax.Array:
        parts = []
        for entry in tensors:
            part = x[entry.first : entry.first + entry.count]
            if entry.stack_partition is not None:
                part = part.reshape((*entry.stack, *x.shape[1:]))
                part = _with_rows(entry, x.shape[1:]).shard(part)
            parts.append(part.reshape((-1, *x.shape[1:])))
        return jnp.concatenate(parts)

    return jax.tree.map(own, tree)


def whole_rows(tensors: Sequence[Tensors], own: Sequence[Tensors], tree: Any) -> Any:
    """The inverse of `own_rows`, by a sum over devices.

    Args:
      tensors: of all devices.
      own: of `own_tensors`.
      tree: tree of arrays with a row for each tensor of this device.
    """
    if not _is_any_split(tensors):
        return tree
    names = tuple(
        dict.fromkeys(
            name
            for entry in tensors
            if entry.stack_partition is not None
            for name in entry.stack_partition.names(range(len(entry.stack)))
        )
    )

    def whole(x: jax.Array) -> jax.Array:
        parts = []
        for entry, here in zip(tensors, own, strict=True):
            part = x[here.first : here.first + here.count]
            part = part.reshape((*here.stack, *x.shape[1:]))
            part = _with_rows(entry, x.shape[1:]).own_part(part, names)
            parts.append(part.reshape((-1, *x.shape[1:])))
        return jax.lax.psum(jnp.concatenate(parts), names)

    return jax.tree.map(whole, tree)


def _is_any_split(tensors: Sequence[Tensors]) -> bool:
    return any(entry.stack_partition is not None for entry in tensors)


def _with_rows(entry: Tensors, row: tuple[int, ...]) -> Partition:
    """How rows of this shape are spread that a leaf's tensors have, along its stacked axes."""
    split = entry.stack_partition or Partition(entry.stack, ((),) * len(entry.stack))
    return Partition((*split.shape, *row), (*split.axes, *((),) * len(row)))
