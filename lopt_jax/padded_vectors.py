"""Vectors of different lengths as one padded group: the kernels launch once for all of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax import batches
from lopt_jax.batches import Group
from lopt_jax.rules.rule import TensorArrays

PADDED_TIMES = 4  # vectors are padded to at most so many times their length


def alike_vectors(groups: Sequence[Group], inputs: Sequence[TensorArrays]) -> list[list[int]]:
    """Groups of vectors that differ in length alone, and not much; the longest come first."""
    kinds: dict[Any, list[list[int]]] = {}
    for i in sorted(range(len(groups)), key=lambda i: -groups[i].shape[0]):
        shape = groups[i].shape
        is_short = shape[0] <= batches.STACKED_LEAF_ELEMENTS
        if len(shape) > 1 or not is_short or groups[i].partition is not None:
            continue
        alike = kinds.setdefault(tuple(x.dtype for x in jax.tree.leaves(inputs[i])), [])
        if not alike or groups[alike[-1][0]].shape[0] > PADDED_TIMES * shape[0]:
            alike.append([])
        alike[-1].append(i)
    return [members for alike in kinds.values() for members in alike if len(members) > 1]


def pad_vectors(
    groups: Sequence[Group], inputs: Sequence[TensorArrays], vectors: Sequence[Sequence[int]]
) -> tuple[list[Group], list[TensorArrays]]:
    """The groups, where the kernels take vectors of different lengths as one padded group.

    Args:
      groups: the groups.
      inputs: their arrays.
      vectors: of `alike_vectors`.

    Returns:
      Groups and arrays.
    """
    first = {members[0]: members for members in vectors if groups[members[0]].on_kernels}
    gone = {i for members in first.values() for i in members[1:]}
    kept = [
        _joined([groups[k] for k in first[i]], [inputs[k] for k in first[i]])
        if i in first
        else (groups[i], inputs[i])
        for i in range(len(groups))
        if i not in gone
    ]
    return [group for group, _ in kept], [x for _, x in kept]


def _joined(groups: Sequence[Group], inputs: Sequence[TensorArrays]) -> tuple[Group, TensorArrays]:
    """One group of vectors of different lengths, the longest first, from one a length."""
    longest = groups[0].shape[0]

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, longest - x.shape[-1]),))

    columns = [x.accumulators.column for x in inputs]  # of no meaning, and of one length
    joined = jax.tree.map(lambda *xs: jnp.concatenate([padded(x) for x in xs]), *inputs)
    group = replace(
        groups[0],
        leaves=tuple(i for group in groups for i in group.leaves),
        tensors=tuple(k for group in groups for k in group.tensors),
        lengths=tuple(group.shape[0] for group in groups for _ in group.tensors),
    )
    column = jnp.concatenate(columns)
    return group, joined._replace(accumulators=joined.accumulators._replace(column=column))
