"""From leaves to groups and batches of tensors that are updated together, and back.

Small tensors of one shape are stacked, so that hundreds of leaves do not become hundreds of copies
of the code. Each stack is a `Group`: arrays with one leading axis, of tensors. `gather` makes these
of leaves, `scatter` is its inverse. Groups whose code is the same are a `Batch`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import FactoredDims, factored_shapes
from lopt_jax.compiler.quirks import barrier
from lopt_jax.compiler.slices import PartTaker
from lopt_jax.context import LARGEST_INDEX, Tracing
from lopt_jax.partition import Partition, match_sharding, say_once, varying_axes
from lopt_jax.rows import join_trees
from lopt_jax.rules.rule import TensorArrays, TensorUpdate
from lopt_jax.tensors import Tensors

STACKED_LEAF_ELEMENTS = 1 << 16  # tensors up to this size are stacked with others of their shape
# Off CPUs, so many large tensors of one shape take turns in a loop where there are many: compilers
# see one of them, for less than one more copy of each. (On CPUs a loop keeps to one core.)
TURNS, LARGE_GROUPS = 3, 16


@dataclass(frozen=True)
class Group:
    """Leaves that are updated together: their tensors have one shape.

    Attributes:
      leaves: positions in the list of leaves.
      tensors: positions of their tensors among all tensors of the tree.
      shape: of each tensor.
      dims: factored dims of each tensor.
      partition: where the tensors are shards, of what.
      name: of the first leaf.
      lengths: of each tensor, where they are vectors padded to the shape.
      on_kernels: whether the fused kernels update it.
    """

    leaves: tuple[int, ...]
    tensors: tuple[int, ...]
    shape: tuple[int, ...]
    dims: FactoredDims | None
    partition: Partition | None
    name: str
    lengths: tuple[int, ...] | None = None
    on_kernels: bool = False

    @property
    def size(self) -> int:
        """Number of elements of all tensors."""
        return len(self.tensors) * math.prod(self.shape)


class Batch(NamedTuple):
    """Groups whose tensors are alike in shape and dtypes, and split alike.

    The kernels take the tensors of a batch as one array of them. XLA has its groups take turns.
    """

    members: tuple[int, ...]  # positions of the groups
    partition: Partition | None  # of each tensor
    on_kernels: bool


def _group_key(position: int, entry: Tensors, leaf: jax.Array, gradient: jax.Array) -> Any:
    if math.prod(entry.shape) > STACKED_LEAF_ELEMENTS:
        return position
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    return (
        entry.shape,
        len(entry.stack),
        leaf.dtype,
        gradient.dtype,
        entry.partition,
        sharding,
    )


def make_groups(
    tensors: Sequence[Tensors],
    params: Sequence[jax.Array],
    gradients: Sequence[jax.Array | None],
    names: Sequence[str],
) -> list[Group]:
    """Decides which leaves are updated together.

    Args:
      tensors: of `tensors_of`.
      params: the leaves.
      gradients: their gradients; leaves with None are left out, as are leaves without elements.
      names: of the leaves, for messages.

    Returns:
      The groups.
    """
    groups: dict[Any, list[int]] = {}
    for i, (entry, leaf, gradient) in enumerate(zip(tensors, params, gradients, strict=True)):
        if gradient is not None and leaf.size:
            groups.setdefault(_group_key(i, entry, leaf, gradient), []).append(i)
    return [
        Group(
            leaves=tuple(leaves),
            tensors=tuple(
                k
                for i in leaves
                for k in range(tensors[i].first, tensors[i].first + tensors[i].count)
            ),
            shape=tensors[leaves[0]].shape,
            dims=tensors[leaves[0]].dims,
            partition=tensors[leaves[0]].partition,
            name=names[leaves[0]],
        )
        for leaves in groups.values()
    ]


def _joined_shape(shape: Sequence[int], tensors: int) -> tuple[int, ...]:
    """The shape of so many tensors of a shape that are joined: along their first axis.

    Leaves have it as they are; a reshape of each would be one more operation that XLA looks at
    again and again. Where places along it would be more than an int32 holds, the tensors' own axis
    is kept.
    """
    if shape and tensors * shape[0] <= LARGEST_INDEX:
        return (-1, *shape[1:])
    return (-1, *shape)


def gather(
    group: Group, tensors: Sequence[Tensors], leaves: Sequence[TensorArrays]
) -> TensorArrays:
    """Arrays of a group with one leading axis of tensors.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      leaves: the arrays of every leaf of the tree.

    Returns:
      The arrays: gradient (B, *shape) and so on; row (B, n, ...).
    """
    first = leaves[group.leaves[0]]
    treedef = jax.tree.structure(first)
    row = first.accumulators.row
    factored = () if row is None else factored_shapes(group.shape, row.shape[0], group.dims)
    shapes = [group.shape] * (treedef.num_leaves - len(factored)) + [*factored]
    joined_shapes = [_joined_shape(shape, 1) for shape in shapes]

    def of_leaf(i: int) -> list[jax.Array]:
        arrays, count = jax.tree.leaves(leaves[i]), tensors[i].count
        for k in range(len(arrays) - len(factored), len(arrays)):
            if group.dims is None and k == len(arrays) - 1:  # the column, which nothing reads
                arrays[k] = jnp.broadcast_to(arrays[k], (count, 1))
            elif count > 1:
                decays, *others = shapes[k]
                arrays[k] = jnp.moveaxis(arrays[k].reshape((decays, count, *others)), 0, 1)
        return [x.reshape(shape) for x, shape in zip(arrays, joined_shapes, strict=True)]

    joined = join_trees([of_leaf(i) for i in group.leaves])
    arrays = [x.reshape((-1, *shape)) for x, shape in zip(joined, shapes, strict=True)]
    return treedef.unflatten(arrays)


def scatter(
    group: Group,
    tensors: Sequence[Tensors],
    result: TensorUpdate,
    old: Sequence[TensorArrays],
    take: PartTaker,
    take_state: PartTaker,
    without: tuple[str, ...] = (),
) -> list[TensorUpdate]:
    """A group's results leaf by leaf, the inverse of `gather`.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      result: of the group, with a leading axis of tensors.
      old: the arrays of every leaf of the group, whose shapes, dtypes and shardings the new ones
        take.
      take: takes parts of the update.
      take_state: takes parts of the accumulators.
      without: as in `Tracing`.

    Returns:
      The result of every leaf of the group, without statistics.
    """
    arrays, treedef = jax.tree.flatten(result._replace(statistics=None))
    has_factors = result.accumulators.row is not None
    like = [[x.parameter, *jax.tree.leaves(x.accumulators)] for x in old]
    unread = [x.pop() for x in like] if has_factors and group.dims is None else []  # the columns
    arrays = arrays[: len(like[0])]
    first_factored = treedef.num_leaves - 2 * has_factors
    joined = [x.reshape(_joined_shape(x.shape[1:], len(x))) for x in arrays]
    if len(old) > 1:
        joined = barrier("scattered_results", joined, without)
    results, first = [], 0
    for n, i in enumerate(group.leaves):
        parts = []
        for k, (x, made) in enumerate(zip(joined, arrays, strict=True)):
            shape, count, own = made.shape[1:], tensors[i].count, made.shape[1:]
            if group.lengths:
                own = (*shape[:-1], tensors[i].shape[-1])
            if len(old) > 1:
                taker = take_state if k else take
                x = taker(x, *_place_in(x, shape, first, count, own))
            if count > 1 and k >= first_factored:
                x = jnp.moveaxis(x.reshape((count, *own)), 1, 0)
            parts.append(x.reshape(like[n][k].shape).astype(like[n][k].dtype))
        parts = [match_sharding(x, before) for x, before in zip(parts, like[n], strict=True)]
        results.append(treedef.unflatten([*parts, *unread[n : n + 1]]))
        first += tensors[i].count
    return results


def _place_in(
    joined: jax.Array, shape: Sequence[int], first: int, count: int, own: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where some of the joined tensors of a shape lie, and the shape of that part.

    Args:
      joined: the array, as `_joined_shape` says.
      shape: of the tensors in it.
      first: the first of them.
      count: how many; one, where the last axis of its own is shorter.
      own: their own shape.
    """
    zeros = (0,) * len(shape)
    if joined.ndim > len(shape):
        return (first, *zeros), (count, *own)
    return (first * shape[0], *zeros[1:]), ((count - 1) * shape[0] + own[0], *own[1:])


def make_batches(
    tracing: Tracing, groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[Batch]:
    """Which groups share their code.

    Args:
      tracing: what steers the trace.
      groups: the groups.
      inputs: their arrays.

    Returns:
      The batches; those of the kernels come first. What the kernels cannot take because of how it
      is split is XLA's.
    """
    kernels: dict[Any, list[int]] = {}
    xla = []
    for i, (group, x) in enumerate(zip(groups, inputs, strict=True)):
        if group.on_kernels and _divides_evenly(group, x):
            dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(x))
            key = (x.gradient.shape[1:], dtypes, group.partition, group.lengths)
            kernels.setdefault(key, []).append(i)
        else:
            xla.append(i)
    # what has vectors first: then what is by tensor lies as the kernels take it
    alike = sorted(kernels.values(), key=lambda members: groups[members[0]].dims is None)
    turns = _turns(tracing, xla, groups, inputs)
    taken = {i for members in turns for i in members}
    alone = [[i] for i in xla if i not in taken]
    batches = [Batch(tuple(members), groups[members[0]].partition, True) for members in alike]
    return batches + [Batch(tuple(m), groups[m[0]].partition, False) for m in [*turns, *alone]]


def _divides_evenly(group: Group, x: TensorArrays) -> bool:
    """Whether the kernels can update the shards of a group: they know of no padding."""
    partition = group.partition
    if partition is None or not partition.is_padded(x.gradient.shape[1:]):
        return True
    say_once(
        f"{group.name}: its shape {partition.shape} does not divide evenly over the devices; XLA "
        "updates its shards, as the fused kernels know of no padding."
    )
    return False


def _turns(
    tracing: Tracing,
    candidates: Sequence[int],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> list[list[int]]:
    """Large groups that XLA updates in turn: of arrays that are alike in all that a loop needs."""
    large = [i for i in candidates if math.prod(groups[i].shape) > STACKED_LEAF_ELEMENTS]
    if len(large) <= LARGE_GROUPS or tracing.platform == "cpu" or "turns" in tracing.without:
        return []
    alike: dict[Any, list[int]] = {}
    for i in large:
        leaves = jax.tree.leaves(inputs[i])
        if len(set(map(varying_axes, leaves))) > 1:
            continue  # what a loop carries keeps its type, which results may widen
        kinds = tuple(map(jax.typeof, leaves))  # shardings are part of types
        alike.setdefault((kinds, groups[i].partition), []).append(i)
    return [members for members in alike.values() if len(members) >= TURNS]
