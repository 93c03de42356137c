"""From leaves to the groups of tensors that are updated together, and back.

Small tensors of one shape are stacked, so that hundreds of leaves do not become hundreds of copies
of the code. Each stack is a `Group`: arrays with one leading axis, of tensors. `gather` makes these
of leaves, `scatter` is its inverse. Groups that one call of a backend updates are a `Run`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import (
    FactoredDims,
    SecondMoments,
    factored_dims,
    factored_shapes,
    second_moments,
)
from lopt_jax.compiler.quirks import barrier
from lopt_jax.compiler.slices import PartTaker
from lopt_jax.context import LARGEST_INDEX, Tracing
from lopt_jax.partition import (
    REPLICATED_ELEMENTS,
    Partition,
    is_split,
    match_sharding,
    varying_axes,
)
from lopt_jax.rows import concatenate
from lopt_jax.rules.rule import TensorArrays, TensorUpdate
from lopt_jax.tensors import Tensors

STACKED_LEAF_ELEMENTS = 1 << 16  # tensors up to this size are stacked with others of their shape
PADDED_TIMES = 4  # the kernels stack vectors of different lengths, padded to at most so many times
# Off CPUs, so many large tensors of one shape take turns in a loop where there are many: compilers
# see one of them, for less than one more copy of each. (On CPUs a loop keeps to one core.)
TURNS, LARGE_GROUPS = 3, 16


@dataclass(frozen=True)
class Group:
    """Leaves that are updated together: their tensors have one shape."""

    leaves: tuple[int, ...]  # positions in the list of leaves
    tensors: tuple[int, ...]  # positions of their tensors among all tensors of the tree
    shape: tuple[int, ...]  # of each tensor
    partition: Partition | None  # where they are shards, of what
    name: str  # of the first leaf
    lengths: tuple[int, ...] | None = None  # of each tensor, where they are vectors padded to shape

    @property
    def size(self) -> int:
        """Number of elements of all tensors."""
        return len(self.tensors) * math.prod(self.shape)

    @property
    def dims(self) -> FactoredDims | None:
        """Factored dims of each tensor."""
        return factored_dims(self.shape if self.partition is None else self.partition.shape)


class Run(NamedTuple):
    """Groups that one call of a backend updates."""

    members: tuple[int, ...]  # positions of the groups
    on_kernels: bool  # whether it is the fused kernels that update them
    in_turn: bool = False  # on XLA: whether equal ones take turns in a loop


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
            partition=tensors[leaves[0]].partition,
            name=names[leaves[0]],
        )
        for leaves in groups.values()
    ]


def _joined(shape: tuple[int, ...], tensors: int, is_local: bool) -> tuple[int, ...]:
    """The shape of so many tensors of a shape that are joined: along their first axis.

    Leaves have it as they are; a reshape of each would be one more operation that XLA looks at
    again and again. Where a partitioner may have split that axis, or where places along it would be
    more than an int32 holds, the tensors' own axis is kept.
    """
    if shape and is_local and tensors * shape[0] <= LARGEST_INDEX:
        return (-1, *shape[1:])
    return (-1, *shape)


def gather(
    group: Group, tensors: Sequence[Tensors], leaves: Sequence[TensorArrays], is_local: bool
) -> TensorArrays:
    """Arrays of a group with one leading axis of tensors.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      leaves: the arrays of every leaf of the tree.
      is_local: as `Tracing.is_local`.

    Returns:
      The arrays: gradient (B, *shape) and so on; row (B, n, ...).
    """
    counts = [tensors[i].count for i in group.leaves]
    gradients, params, accumulators = zip(*(leaves[i] for i in group.leaves), strict=True)
    momentum, second_moment, rows, columns = zip(*accumulators, strict=True)

    def stack(arrays: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
        joined = concatenate([x.reshape(_joined(shape, 1, is_local)) for x in arrays])
        return joined.reshape((-1, *shape))

    def elementwise(*arrays: jax.Array) -> jax.Array:
        return stack(arrays, group.shape)

    def factored(arrays: Sequence[Any], which: int) -> jax.Array | None:
        if arrays[0] is None:
            return None
        moved = []
        for x, count in zip(arrays, counts, strict=True):
            shape = factored_shapes(group.shape, x.shape[0], group.dims)[which]
            if group.dims is None and which == 1:
                x = jnp.broadcast_to(x, (count, 1))
            elif count > 1:
                x = jnp.moveaxis(x.reshape((shape[0], count, *shape[1:])), 0, 1)
            moved.append(x)
        return stack(moved, shape)

    return TensorArrays(
        gradient=elementwise(*gradients),
        parameter=elementwise(*params),
        accumulators=accumulators[0]._replace(
            momentum=jax.tree.map(elementwise, *momentum),
            second_moment=jax.tree.map(elementwise, *second_moment),
            row=factored(rows, 0),
            column=factored(columns, 1),
        ),
    )


def scatter(
    group: Group,
    tensors: Sequence[Tensors],
    result: TensorUpdate,
    old: Sequence[TensorArrays],
    take: PartTaker,
    take_state: PartTaker,
    tracing: Tracing,
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
      tracing: what steers the trace.

    Returns:
      The result of every leaf of the group, without statistics.
    """
    new, before = result.accumulators, [x.accumulators for x in old]
    averages = (*second_moments(new.second_moment), *new.momentum)
    old_averages = zip(
        *((*second_moments(x.second_moment), *x.momentum) for x in before), strict=True
    )
    factored = [] if new.row is None else [(new.row, [x.row for x in before])]
    if factored and group.dims is not None:
        factored.append((new.column, [x.column for x in before]))
    kinds = [  # an array of the group, what takes parts of it, and arrays of the leaves like them
        (result.update, take, [x.parameter for x in old]),
        *((x, take_state, like) for x, like in zip(averages, old_averages, strict=True)),
        *((x, take_state, like) for x, like in factored),
    ]
    joined = [x.reshape(_joined(x.shape[1:], x.shape[0], tracing.is_local)) for x, _, _ in kinds]
    if len(old) > 1:
        joined = barrier("scattered_results", joined, tracing.without)
    first_factored = len(kinds) - len(factored)
    updates, *others = (
        _of_leaves(group, tensors, x, kind[0].shape[1:], *kind[1:], k >= first_factored)
        for k, (x, kind) in enumerate(zip(joined, kinds, strict=True))
    )
    out = []
    for update, leaf, *arrays in zip(updates, before, *others, strict=True):
        several = isinstance(leaf.second_moment, SecondMoments)
        count = len(second_moments(leaf.second_moment))
        second_moment, arrays = arrays[:count], arrays[count:]
        momentum, factors = arrays[: len(leaf.momentum)], arrays[len(leaf.momentum) :]
        accumulators = leaf._replace(
            momentum=tuple(momentum),
            second_moment=SecondMoments(tuple(second_moment)) if several else second_moment[0],
            **dict(zip(("row", "column"), factors, strict=False)),
        )
        out.append(TensorUpdate(update, accumulators, None))
    return out


def _of_leaves(
    group: Group,
    tensors: Sequence[Tensors],
    joined: jax.Array,
    shape: tuple[int, ...],
    take: PartTaker,
    like: Sequence[jax.Array],
    decays_come_first: bool,
) -> list[jax.Array]:
    """The parts of an array that belong to the leaves of a group.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      joined: the tensors of all leaves, as `_joined` says.
      shape: of each tensor in it.
      take: takes parts.
      like: an array for each leaf, whose shape, dtype and sharding the part takes.
      decays_come_first: whether in a leaf the axis of decays comes before the stacked axes.
    """
    parts, first = [], 0
    for i, old in zip(group.leaves, like, strict=True):
        part, count, own = joined, tensors[i].count, shape
        if group.lengths:
            own = (*shape[:-1], tensors[i].shape[-1])
        if len(group.leaves) > 1:
            part = take(joined, *_place_in(joined, shape, first, count, own))
        if count > 1 and decays_come_first:
            part = jnp.moveaxis(part.reshape((count, *own)), 1, 0)
        parts.append(match_sharding(part.reshape(old.shape).astype(old.dtype), old))
        first += count
    return parts


def _place_in(
    joined: jax.Array, shape: tuple[int, ...], first: int, count: int, own: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where some of the tensors of a shape that `_joined` joined lie, and the shape of that part.

    Args:
      joined: the array.
      shape: of the tensors in it.
      first: the first of them.
      count: how many; one, where the last axis of its own is shorter.
      own: their own shape.
    """
    zeros = (0,) * len(shape)
    if joined.ndim > len(shape):
        return (first, *zeros), (count, *own)
    return (first * shape[0], *zeros[1:]), ((count - 1) * shape[0] + own[0], *own[1:])


def alike_vectors(
    groups: Sequence[Group], inputs: Sequence[TensorArrays], is_local: bool
) -> list[list[int]]:
    """Groups of vectors that differ in length alone, and not much; the longest come first.

    Where a partitioner may split tensors, only vectors that are best left whole: joined they are.
    """
    longest = STACKED_LEAF_ELEMENTS if is_local else REPLICATED_ELEMENTS
    kinds: dict[Any, list[list[int]]] = {}
    for i in sorted(range(len(groups)), key=lambda i: -groups[i].shape[0]):
        shape = groups[i].shape
        if len(shape) > 1 or shape[0] > longest or groups[i].partition is not None:
            continue
        if any(map(is_split, jax.tree.leaves(inputs[i]))):
            continue
        alike = kinds.setdefault(tuple(x.dtype for x in jax.tree.leaves(inputs[i])), [])
        if not alike or groups[alike[-1][0]].shape[0] > PADDED_TIMES * shape[0]:
            alike.append([])
        alike[-1].append(i)
    return [members for alike in kinds.values() for members in alike if len(members) > 1]


def pad_vectors(
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    on_kernels: Sequence[bool],
    vectors: Sequence[Sequence[int]],
) -> tuple[list[Group], list[TensorArrays], list[bool]]:
    """The groups, where the kernels take vectors of different lengths as one padded group.

    Args:
      groups: the groups.
      inputs: their arrays.
      on_kernels: for each, whether the kernels update it.
      vectors: of `alike_vectors`.

    Returns:
      Groups, arrays, and whether the kernels update them.
    """
    first = {members[0]: members for members in vectors if on_kernels[members[0]]}
    gone = {i for members in first.values() for i in members[1:]}
    kept = [i for i in range(len(groups)) if i not in gone]
    joined = [
        join_vectors([groups[k] for k in first[i]], [inputs[k] for k in first[i]])
        if i in first
        else (groups[i], inputs[i])
        for i in kept
    ]
    return [x for x, _ in joined], [x for _, x in joined], [on_kernels[i] for i in kept]


def join_vectors(
    groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> tuple[Group, TensorArrays]:
    """One group of vectors of different lengths, the longest first, from one a length."""
    longest = groups[0].shape[0]

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, longest - x.shape[-1]),))

    columns = [x.accumulators.column for x in inputs]  # of no meaning, and of one length
    joined = jax.tree.map(lambda *xs: jnp.concatenate([padded(x) for x in xs]), *inputs)
    group = Group(
        leaves=tuple(i for group in groups for i in group.leaves),
        tensors=tuple(k for group in groups for k in group.tensors),
        shape=groups[0].shape,
        partition=None,
        name=groups[0].name,
        lengths=tuple(group.shape[0] for group in groups for _ in group.tensors),
    )
    column = jnp.concatenate(columns)
    return group, joined._replace(accumulators=joined.accumulators._replace(column=column))


def make_runs(
    tracing: Tracing,
    on_kernels: Sequence[bool],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> list[Run]:
    """Which groups are updated by one call of a backend.

    One call of the kernels takes all that it can, and so does one of XLA where a partitioner may
    split tensors: each call is an operation of the partitioner, whose code XLA asks for, traces and
    lowers apart. It may split tensors in different ways, so these are groups of one tensor, and
    vectors that it may not split: other stacks may be split along their axis of tensors. On XLA it
    is large tensors that take turns.

    Args:
      tracing: what steers the trace.
      on_kernels: for each group, whether the kernels update it.
      groups: the groups.
      inputs: their arrays.

    Returns:
      The runs; that of the kernels comes first.
    """
    everything = range(len(groups))
    joins = tracing.is_local or any(group.partition is not None for group in groups)
    joinable = {i for i in everything if joins or _is_one(groups[i])}
    xla = [i for i in everything if not on_kernels[i]]
    kernels = [i for i in everything if on_kernels[i] and i in joinable]
    if joins:
        together = _turns(tracing, xla, groups, inputs)
        runs = [Run(tuple(members), False, in_turn=True) for members in together]
    else:
        together = [members] if (members := [i for i in xla if i in joinable]) else []
        runs = []
    gone = {i for members in (kernels, *together) for i in members}
    runs += [Run((i,), on_kernels[i]) for i in everything if i not in gone]
    if not joins:
        in_turn = [_takes_turns(tracing, members, groups) for members in together]
        runs += [Run(tuple(m), False, t) for m, t in zip(together, in_turn, strict=True)]
    if kernels:
        # what has vectors first: then what is by tensor lies as the kernels take it
        alike = [i for members in equal(kernels, groups, inputs) for i in members]
        alike.sort(key=lambda i: groups[i].dims is None)
        runs.insert(0, Run(tuple(alike), True))
    return runs


def _is_one(group: Group) -> bool:
    """Whether a partitioner may not split a group along its axis of tensors."""
    return len(group.tensors) == 1 or group.lengths is not None


def equal(
    members: Sequence[int],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    partitions: Sequence[Partition | None] | None = None,
) -> list[list[int]]:
    """The groups whose tensors are equal in shape and dtypes, and in how they are split.

    Args:
      members: positions of groups.
      groups: all groups.
      inputs: their arrays.
      partitions: how the tensors of each are split, where that is known only now.

    Returns:
      Lists of positions.
    """
    alike: dict[Any, list[int]] = {}
    for i in members:
        partition = groups[i].partition if partitions is None else partitions[i]
        dtypes = tuple(x.dtype for x in jax.tree.leaves(inputs[i]))
        key = (inputs[i].gradient.shape[1:], dtypes, partition, groups[i].lengths)
        alike.setdefault(key, []).append(i)
    return list(alike.values())


def is_large(group: Group) -> bool:
    """Whether a group's tensors are not stacked with others of their shape."""
    return math.prod(group.shape) > STACKED_LEAF_ELEMENTS


def _takes_turns(tracing: Tracing, candidates: Sequence[int], groups: Sequence[Group]) -> bool:
    """Whether there are so many large groups that equal ones should take turns."""
    large = sum(is_large(groups[i]) for i in candidates)
    may_take = tracing.platform != "cpu" and "turns" not in tracing.without
    return may_take and large > LARGE_GROUPS


def _turns(
    tracing: Tracing,
    candidates: Sequence[int],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> list[list[int]]:
    """Large groups that XLA updates in turn: of arrays that are alike in all that a loop needs."""
    if not _takes_turns(tracing, candidates, groups):
        return []
    alike: dict[Any, list[int]] = {}
    for i in candidates:
        leaves = jax.tree.leaves(inputs[i])
        if not is_large(groups[i]) or len(set(map(varying_axes, leaves))) > 1:
            continue  # what a loop carries keeps its type, which results may widen
        kinds = tuple(map(jax.typeof, leaves))  # shardings are part of types
        alike.setdefault((kinds, groups[i].partition), []).append(i)
    return [members for members in alike.values() if len(members) >= TURNS]
