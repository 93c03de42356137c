"""Gradient statistics of whole tensors, from those of shards by one sum over devices."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import FactoredDims
from lopt_jax.batches import Group
from lopt_jax.partition import Partition, Partitions
from lopt_jax.rules.rule import GradientStatistics, Rule


def shapes_of(rule: Rule, group: Group, tensors: int) -> GradientStatistics:
    """Shapes of the moments of so many whole tensors like a group's."""
    shape = group.shape if group.partition is None else group.partition.shape

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((tensors, *shape), jnp.float32)

    row = column = None
    if group.dims is not None:
        row, column = (array(*shape[:d], *shape[d + 1 :]) for d in (group.dims.d0, group.dims.d1))
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    return GradientStatistics(row, column, array() if needs_parameter else None)


def joined(
    pieces: Sequence[tuple[Sequence[int], GradientStatistics]],
    groups: Sequence[Group],
    partitions: Partitions,
    counts: Sequence[int],
) -> jax.Array:
    """Statistics of the gradients of whole tensors in one array, by one sum over devices.

    Args:
      pieces: positions of groups that are split alike, and the moments of their shards.
      groups: the groups.
      partitions: of the groups.
      counts: tensors of each group.

    Returns:
      What `split` takes apart: group by group, row, column and the parameter's mean square.
    """
    used = [p for p in partitions if p is not None]
    names = tuple(dict.fromkeys(name for p in used for name in p.names(range(len(p.shape)))))
    whole: dict[int, GradientStatistics] = {}
    for members, moments in pieces:
        group, partition = groups[members[0]], partitions[members[0]]
        own = _own_part(
            moments,
            partition or Partition(group.shape, ((),) * len(group.shape)),
            group.dims,
            names,
        )
        ends = itertools.accumulate((counts[k] for k in members), initial=0)
        for k, (i, j) in zip(members, itertools.pairwise(ends), strict=True):
            whole[k] = jax.tree.map(lambda x, i=i, j=j: x[i:j], own)
    in_order = jax.tree.leaves([whole[k] for k in range(len(groups))])
    nothing = jnp.zeros((0,), jnp.float32)  # where no tensor has moments
    flat = jnp.concatenate([nothing, *(x.reshape(-1) for x in in_order)])
    return jax.lax.psum(flat, names) if names else flat


def _own_part(
    moments: GradientStatistics,
    partition: Partition,
    dims: FactoredDims | None,
    names: Sequence[str],
) -> GradientStatistics:
    """Gradient statistics with zeros where other devices have what they are of."""

    def part(array: Any, dim: int | None) -> Any:
        if array is None:
            return None
        kept = Partition((), ()) if dim is None else partition.without(dim)
        return kept.stacked(array.shape[0]).own_part(array, names)

    return GradientStatistics(
        part(moments.row, None if dims is None else dims.d0),
        part(moments.column, None if dims is None else dims.d1),
        part(moments.parameter_mean_square, None),
    )


def split(flat: jax.Array, like: Any) -> Any:
    """The inverse of `joined`: a tree of arrays like these."""
    leaves, treedef = jax.tree.flatten(like)
    ends = itertools.accumulate((x.size for x in leaves), initial=0)
    parts = zip(leaves, itertools.pairwise(ends), strict=True)
    return treedef.unflatten([flat[i:j].reshape(x.shape) for x, (i, j) in parts])


def of_shards(
    moments: GradientStatistics, partition: Partition | None, dims: FactoredDims | None
) -> GradientStatistics:
    """Statistics of the gradients of this device's shards from those of whole tensors."""
    if partition is None or dims is None or moments.row is None:
        return moments

    def part(x: jax.Array, dim: int) -> jax.Array:
        return partition.without(dim).stacked(x.shape[0]).shard(x)

    return moments._replace(row=part(moments.row, dims.d0), column=part(moments.column, dims.d1))
