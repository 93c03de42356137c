"""Tensors that are updated together.

Small tensors of one shape are stacked, so that hundreds of leaves do not become hundreds of copies
of the code. Each stack is a `Group`: arrays with one leading axis, of tensors. Groups that one call
of a backend updates are a `Call`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.accumulators import (
    Accumulators,
    FactoredDims,
    each_second_moment,
    factored_dims,
    factored_shapes,
    second_moments,
)
from lopt_jax.context import LARGEST_INDEX, platform
from lopt_jax.partition import (
    BATCH,
    REPLICATED_ELEMENTS,
    Dims,
    Partition,
    is_local,
    is_split,
    match_sharding,
    varying_axes,
)
from lopt_jax.rows import PartTaker, concatenate, take_rows
from lopt_jax.rule import MLP, Moments, Statistics, TensorUpdate
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


class GroupInputs(NamedTuple):
    """Arrays of a group, each with a leading axis of tensors."""

    gradient: Any
    parameter: Any
    accumulators: Accumulators


class Factors(NamedTuple):
    """What the tensors of a call have beside their arrays."""

    mlp: MLP  # one for all, or with a leading axis of tensors
    scale: jax.Array  # (tensors,)
    weight_decay: jax.Array  # (tensors,)
    statistics: Statistics | None  # with a leading axis of tensors

    def rows(self, members: Sequence[int], mlp_per_tensor: bool) -> "Factors":
        """Those of some of the tensors."""
        if list(members) == list(range(self.scale.shape[0])):
            return self
        mlp = take_rows(self.mlp, members) if mlp_per_tensor else self.mlp
        return Factors(mlp, *take_rows((self.scale, self.weight_decay, self.statistics), members))


class Leaves(NamedTuple):
    """Lists of leaves that a step fills in."""

    updates: list  # or new parameters, where the rule applies its updates
    accumulators: Accumulators


class GroupDims(NamedTuple):
    """What the dimensions of a group's arrays are, for `lopt_jax.partition.spread`."""

    elementwise: Dims
    row: Dims
    column: Dims

    part: int

    @classmethod
    def of(cls, group: Group, part: int = 0) -> "GroupDims":
        """The dims of a group's arrays, which is one of the parts that run together."""
        rank = len(group.shape)
        without = lambda d: Dims((BATCH, None, *(i for i in range(rank) if i != d)), part)  # noqa: E731
        dims = group.dims
        if group.lengths is not None:  # their positions are counted from the first on
            whole = Dims((None,) * (rank + 1), part)
            return cls(whole, Dims((None,) * (rank + 2), part), Dims((None, None), part), part)
        return cls(
            elementwise=Dims((BATCH, *range(rank)), part),
            row=without(dims.d0 if dims else None),
            column=without(dims.d1) if dims else Dims((BATCH, None), part),
            part=part,
        )

    def by_tensor(self, tree: Any) -> Any:
        """Arrays with a leading axis of tensors."""
        axes = lambda x: (BATCH,) + (None,) * (x.ndim - 1)  # noqa: E731
        return jax.tree.map(lambda x: Dims(axes(x), self.part), tree)

    @staticmethod
    def shared(tree: Any) -> Any:
        """Arrays that every tensor shares."""
        return jax.tree.map(lambda x: Dims((None,) * np.ndim(x)), tree)

    def accumulators(self, tree: Accumulators) -> Accumulators:
        """The accumulators."""
        return Accumulators(
            momentum=tuple(self.elementwise for _ in tree.momentum),
            second_moment=each_second_moment(lambda _: self.elementwise, tree.second_moment),
            row=None if tree.row is None else self.row,
            column=None if tree.column is None else self.column,
        )

    def inputs(self, tree: GroupInputs) -> GroupInputs:
        """The inputs of a step."""
        accumulators = self.accumulators(tree.accumulators)
        return GroupInputs(self.elementwise, self.elementwise, accumulators)

    def moments(self, tree: Moments) -> Moments:
        """The results of the first pass."""
        vector = lambda dims: Dims((BATCH, *dims.labels[2:]), self.part)  # noqa: E731
        return Moments(
            row=None if tree.row is None else vector(self.row),
            column=None if tree.column is None else vector(self.column),
            parameter_mean_square=self.by_tensor(tree.parameter_mean_square),
        )

    def result(self, tree: TensorUpdate) -> TensorUpdate:
        """The results of the second pass."""
        return TensorUpdate(
            update=self.elementwise,
            accumulators=self.accumulators(tree.accumulators),
            statistics=self.by_tensor(tree.statistics),
        )


class Call(NamedTuple):
    """Groups that one call of a backend updates, by their positions."""

    units: list[list[int]]  # those of a unit have tensors that are equal in shape and dtypes
    on_kernels: bool  # whether it is the fused kernels that update them
    in_turn: bool = False  # on XLA: whether those that are alike take turns in a loop

    @property
    def members(self) -> list[int]:
        """All of them."""
        return [i for unit in self.units for i in unit]


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


def _joined(shape: tuple[int, ...], tensors: int = 1) -> tuple[int, ...]:
    """The shape of so many tensors of a shape that are joined: along their first axis.

    Leaves have it as they are; a reshape of each would be one more operation that XLA looks at
    again and again. Where a partitioner may have split that axis, or where places along it would be
    more than an int32 holds, the tensors' own axis is kept.
    """
    if shape and is_local() and tensors * shape[0] <= LARGEST_INDEX:
        return (-1, *shape[1:])
    return (-1, *shape)


def gather(
    group: Group,
    tensors: Sequence[Tensors],
    gradients: Sequence[Any],
    params: Sequence[jax.Array],
    accumulators: Accumulators,
) -> GroupInputs:
    """Arrays of a group with one leading axis of tensors, from lists of leaves.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      gradients: leaves.
      params: leaves.
      accumulators: lists of leaves in place of trees.

    Returns:
      The group's inputs: gradient (B, *shape) and so on; row (B, n, ...).
    """

    def stack(arrays: Sequence[jax.Array], shape: tuple[int, ...]) -> jax.Array:
        joined = concatenate([x.reshape(_joined(shape)) for x in arrays])
        return joined.reshape((-1, *shape))

    def elementwise(leaves: Sequence[jax.Array]) -> jax.Array:
        return stack([leaves[i] for i in group.leaves], group.shape)

    def factored(leaves: Sequence[jax.Array], which: int) -> jax.Array | None:
        if not leaves:  # the rule has none
            return None
        arrays = []
        for i in group.leaves:
            leaf, count = leaves[i], tensors[i].count
            shape = factored_shapes(group.shape, leaf.shape[0], group.dims)[which]
            if group.dims is None and which == 1:
                leaf = jnp.broadcast_to(leaf, (count, 1))
            elif count > 1:
                leaf = jnp.moveaxis(leaf.reshape((shape[0], count, *shape[1:])), 0, 1)
            arrays.append(leaf)
        return stack(arrays, shape)

    return GroupInputs(
        gradient=elementwise(gradients),
        parameter=elementwise(params),
        accumulators=Accumulators(
            momentum=tuple(elementwise(m) for m in accumulators.momentum),
            second_moment=each_second_moment(elementwise, accumulators.second_moment),
            row=factored(accumulators.row, 0),
            column=factored(accumulators.column, 1),
        ),
    )


def scatter(
    group: Group,
    tensors: Sequence[Tensors],
    update: jax.Array,
    accumulators: Accumulators,
    takers: tuple[PartTaker, PartTaker],
    out: Leaves,
) -> None:
    """Writes a group's results back into lists of leaves, the inverse of `gather`.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      update: (B, *shape).
      accumulators: with a leading axis of tensors.
      takers: take parts of the update and of the accumulators.
      out: lists of leaves: holds the old leaves, whose shapes and dtypes the new ones take.
    """
    old, (of_update, of_state) = out.accumulators, takers
    moments = (accumulators.second_moment, old.second_moment)
    elementwise = list(zip(*map(second_moments, moments), strict=True))
    elementwise += zip(accumulators.momentum, old.momentum, strict=True)
    factored = [] if accumulators.row is None else [(accumulators.row, old.row)]
    if factored and group.dims is not None:
        factored.append((accumulators.column, old.column))
    targets = [
        (update, out.updates, of_update, False),
        *((x, leaves, of_state, False) for x, leaves in elementwise),
        *((x, leaves, of_state, True) for x, leaves in factored),
    ]
    new = [x.reshape(_joined(x.shape[1:], x.shape[0])) for x, *_ in targets]
    if len(group.leaves) > 1:
        # else parts of their computation are repeated for every leaf, after its old value is gone:
        # XLA copies that value first
        new = jax.lax.optimization_barrier(new)
    for joined, (x, leaves, take, decays_come_first) in zip(new, targets, strict=True):
        shape = x.shape[1:]
        first = 0
        for i in group.leaves:
            part, count, own = joined, tensors[i].count, shape
            if group.lengths:
                own = (*shape[:-1], tensors[i].shape[-1])
            if len(group.leaves) > 1:
                part = take(joined, *_place_in(joined, shape, first, count, own))
            if count > 1 and decays_come_first:
                part = jnp.moveaxis(part.reshape((count, *own)), 1, 0)
            part = part.reshape(leaves[i].shape).astype(leaves[i].dtype)
            leaves[i] = match_sharding(part, leaves[i])
            first += count


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


def alike_vectors(groups: Sequence[Group], inputs: Sequence[GroupInputs]) -> list[list[int]]:
    """Groups of vectors that differ in length alone, and not much; the longest come first.

    Where a partitioner may split tensors, only vectors that are best left whole: joined they are.
    """
    longest = STACKED_LEAF_ELEMENTS if is_local() else REPLICATED_ELEMENTS
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


def join_vectors(
    groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> tuple[Group, GroupInputs]:
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


def make_calls(
    on_kernels: Sequence[bool], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Call]:
    """Which groups are updated together.

    One call of the kernels takes all that it can, and so does one of XLA where a partitioner may
    split tensors: each call is an operation of the partitioner, whose code XLA asks for, traces and
    lowers apart. It may split tensors in different ways, so these are groups of one tensor, and
    vectors that it may not split: other stacks may be split along their axis of tensors. On XLA it
    is large tensors that take turns.
    """
    joins = is_local() or any(group.partition is not None for group in groups)
    turns: list[list[int]] = []
    if joins:
        xla = [i for i, chosen in enumerate(on_kernels) if not chosen]
        turns = _turns(xla, groups, inputs)
    in_turn = {i for members in turns for i in members}
    calls = [Call([members], False, in_turn=True) for members in turns]
    of_xla: list[int] = []
    units: dict[Any, list[int]] = {}
    for i, (chosen, group, x) in enumerate(zip(on_kernels, groups, inputs, strict=True)):
        is_one = len(group.tensors) == 1 or group.lengths is not None
        if chosen and (joins or is_one):
            key = (x.gradient.shape[1:], dtypes_of(x), group.partition, group.lengths)
            units.setdefault(key, []).append(i)
        elif is_one and not joins:
            of_xla.append(i)
        elif i not in in_turn:
            calls.append(Call([[i]], chosen))
    if of_xla:
        calls.append(Call([[i] for i in of_xla], False, _takes_turns(of_xla, groups)))
    if units:
        # what has vectors first: then what is by tensor lies as the kernels take it
        in_order = sorted(units.values(), key=lambda unit: groups[unit[0]].dims is None)
        calls.insert(0, Call(in_order, True))
    return calls


def dtypes_of(x: GroupInputs) -> tuple[Any, ...]:
    """The dtypes of all arrays of a group."""
    return tuple(leaf.dtype for leaf in jax.tree.leaves(x))


def is_large(group: Group) -> bool:
    """Whether a group's tensors are not stacked with others of their shape."""
    return math.prod(group.shape) > STACKED_LEAF_ELEMENTS


def _takes_turns(candidates: Sequence[int], groups: Sequence[Group]) -> bool:
    """Whether there are so many large groups that equal ones should take turns."""
    return platform() != "cpu" and sum(is_large(groups[i]) for i in candidates) > LARGE_GROUPS


def _turns(
    candidates: Sequence[int], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[list[int]]:
    """Large groups that XLA updates in turn: of arrays that are alike in all that a loop needs."""
    large = [i for i in candidates if is_large(groups[i])]
    if not _takes_turns(candidates, groups):
        return []
    alike: dict[Any, list[int]] = {}
    for i in large:
        leaves = jax.tree.leaves(inputs[i])
        if len(set(map(varying_axes, leaves))) > 1:
            continue  # what a loop carries keeps its type, which results may widen
        kinds = tuple(map(jax.typeof, leaves))  # shardings are part of types
        alike.setdefault((kinds, groups[i].partition), []).append(i)
    return [members for members in alike.values() if len(members) >= TURNS]
