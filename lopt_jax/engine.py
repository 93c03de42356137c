"""Maps a rule over a pytree of parameters.

Leaves become tensors: a leaf with stacked axes holds several. Small tensors of one shape are
stacked, so that hundreds of leaves do not become hundreds of copies of the code. Each stack is a
`Group`; a backend takes the arrays of a group with one leading axis, of tensors.
"""

import contextlib
import contextvars
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import rule as rules
from lopt_jax.accumulators import (
    Accumulators,
    Decays,
    FactoredDims,
    factored_dims,
    factored_shapes,
)
from lopt_jax.partition import (
    BATCH,
    REPLICATED_ELEMENTS,
    Dims,
    Partition,
    Partitions,
    is_local,
    is_split,
    match_sharding,
    partitions_of,
    say_once,
    spread,
    zeros,
)
from lopt_jax.rows import PartTaker, part_taker
from lopt_jax.rule import MLP, Moments, Rule, Statistics, TensorUpdate
from lopt_jax.turns import in_turn

BACKENDS = ("auto", "xla", "pallas")
STACKED_LEAF_ELEMENTS = 1 << 16  # tensors up to this size are stacked with others of their shape
PADDED_TIMES = 4  # the kernels stack vectors of different lengths, padded to at most so many times
# On a CPU, wide layers of so large groups are written out, unless that would take long to compile.
WRITTEN_OUT_ELEMENTS, WRITTEN_OUT_GROUPS = 1 << 17, 8
# Off CPUs, so many large tensors of one shape take turns in a loop where there are many: compilers
# see one of them, for less than one more copy of each. (On CPUs a loop keeps to one core.)
TURNS, LARGE_GROUPS = 3, 16
# On a GPU, small tensors of so many groups take the passes of large ones: a quarter of the bytes
# moved and fewer launches, for half as long again to compile.
FUSED_SMALL_GROUPS = 16

StackedAxes = Any  # int | tree of ints (a prefix of the params) | function (path, leaf) -> int


_batch: contextvars.ContextVar[int] = contextvars.ContextVar("batch", default=1)


@contextlib.contextmanager
def batch(size: int) -> Iterator[None]:
    """Says, while it is traced, that `jax.vmap` makes this many trainings of one.

    And that nothing differentiates through their updates: "auto" may take the kernels although the
    weights are traced, and counts the tensors of all trainings.
    """
    before = _batch.set(size)
    try:
        yield
    finally:
        _batch.reset(before)


def backend_for(backend: str, meta_parameters: Any) -> str:
    """The backend, "auto" decided where weights are traced: the kernels have no derivatives."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(meta_parameters))
    return "xla" if backend == "auto" and traced and _batch.get() == 1 else backend


class Tensors(NamedTuple):
    """How one leaf is seen as tensors."""

    stack: tuple[int, ...]  # the leaf's leading axes that hold tensors
    shape: tuple[int, ...]  # of each tensor; scalars are vectors of one element
    first: int  # position of the leaf's first tensor among all tensors of the tree
    partition: Partition | None = None  # where the leaf is a shard, of what

    @property
    def count(self) -> int:  # type: ignore[override]
        """Number of tensors in the leaf."""
        return math.prod(self.stack)

    @property
    def dims(self) -> FactoredDims | None:
        """Factored dims of each tensor."""
        return factored_dims(self.whole_shape)

    @property
    def leaf_partition(self) -> Partition | None:
        """The partition with the stacked axes, which are never split."""
        if self.partition is None:
            return None
        none = ((),) * len(self.stack)
        return Partition(self.stack + self.partition.shape, none + self.partition.axes)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of each tensor, also where the leaf is a shard."""
        return self.shape if self.partition is None else self.partition.shape


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


def is_box(x: Any) -> bool:
    """Whether it is a metadata box, such as `flax.linen.Partitioned`."""
    return hasattr(x, "replace_boxed") and hasattr(x, "unbox")


def _stacked_axes_of_leaves(params: Any, stacked_axes: StackedAxes) -> list[int]:
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    if not paths_and_leaves:  # also the placeholder that optax.tree.map_params initialises with
        return []
    if stacked_axes is None:
        axes = [0] * len(paths_and_leaves)
    elif callable(stacked_axes):
        axes = [stacked_axes(path, leaf) for path, leaf in paths_and_leaves]
    else:
        axes = jax.tree.leaves(
            jax.tree.map(
                lambda n, subtree: jax.tree.map(lambda _: n, subtree), stacked_axes, params
            )
        )
    for (path, leaf), n in zip(paths_and_leaves, axes, strict=True):
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= leaf.ndim:
            raise ValueError(
                f"stacked_axes: expected an integer from 0 to {leaf.ndim}, the rank of the leaf "
                f"{jax.tree_util.keystr(path)} of shape {tuple(leaf.shape)}; found {n!r}."
            )
    return [int(n) for n in axes]


def tensors_of(params: Any, stacked_axes: StackedAxes = None) -> list[Tensors]:
    """Sees every leaf of params as tensors.

    Args:
      params: pytree of arrays (or of anything with a shape).
      stacked_axes: how many leading axes of a leaf hold tensors: an int, a tree of ints, or a
        function of a leaf's path and the leaf; None means that every leaf is one tensor.

    Returns:
      One entry a leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: where a number of stacked axes is not in [0, rank].
    """
    out, first = [], 0
    leaves = jax.tree.leaves(params)
    partitions = partitions_of_leaves(params)
    stacks = _stacked_axes_of_leaves(params, stacked_axes)
    for leaf, n, partition in zip(leaves, stacks, partitions, strict=True):
        if partition is not None:
            if any(partition.axes[:n]):
                raise ValueError(
                    "distributed: stacked axes cannot be split over devices; give distributed the "
                    "same stacked_axes as the optimizer."
                )
            partition = Partition(partition.shape[n:] or (1,), partition.axes[n:] or ((),))
        entry = Tensors(tuple(leaf.shape[:n]), tuple(leaf.shape[n:]) or (1,), first, partition)
        out.append(entry)
        first += entry.count
    return out


def partitions_of_leaves(params: Any) -> list[Partition | None]:
    """How the leaves of a tree like the params are spread; None where they are whole."""
    return partitions_of(_paths(params))


def zeros_like(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A tree of zeros like the params, sharded as they are."""
    return jax.tree.map(lambda x: zeros(x.shape, dtype, x, range(len(x.shape))), params)


def _paths(params: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def init_accumulators(
    params: Any,
    momenta: int,
    factored: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    stacked_axes: StackedAxes = None,
) -> Accumulators:
    """Zero accumulators of a tree of parameters.

    Args:
      params: pytree of arrays.
      momenta: number of momentum decays.
      factored: number of factored decays.
      dtype: of every accumulator.
      stacked_axes: as in `tensors_of`.

    Returns:
      Trees with the structure of params: momentum (one tree a decay) and second moment shaped like
      the parameters; row and column as `factored_shapes` says, stacked axes after the axis of
      decays. Metadata boxes (such as `flax.linen.Partitioned`) are kept, their names following the
      axes.
    """
    entries = iter(tensors_of(params, stacked_axes))

    def factored_of(leaf: Any, box: Any) -> tuple[Any, Any]:
        entry = next(entries)
        n, dims = len(entry.stack), entry.dims
        stack, shape = leaf.shape[:n], leaf.shape[n:]
        row, column = factored_shapes(shape, factored, dims)
        kept = lambda d: (None, *(i for i in range(leaf.ndim) if d is None or i != n + d))  # noqa: E731
        arrays = (
            zeros((row[0], *stack, *row[1:]), dtype, leaf, kept(dims.d0 if dims else None)),
            zeros((column[0], *stack, *column[1:]), dtype, leaf, kept(dims.d1))
            if dims
            else jnp.zeros((1,), dtype),
        )
        if box is None:
            return arrays
        names = getattr(box, "names", None)
        if names is None:
            return tuple(box.replace_boxed(x) for x in arrays)
        drop = lambda d: tuple(a for i, a in enumerate(names) if i != n + d)  # noqa: E731
        row_names = (None, *(drop(dims.d0) if dims else names))
        column_names = (None, *drop(dims.d1)) if dims else (None,)
        return tuple(
            box.replace_boxed(x).replace(names=axes)
            for x, axes in zip(arrays, (row_names, column_names), strict=True)
        )

    pairs = jax.tree.map(
        lambda x: factored_of(x.unbox(), x) if is_box(x) else factored_of(x, None),
        params,
        is_leaf=is_box,
    )
    take = lambda i: jax.tree.map(lambda _, pair: pair[i], params, pairs, is_leaf=is_box)  # noqa: E731
    return Accumulators(
        momentum=tuple(zeros_like(params, dtype) for _ in range(momenta)),
        second_moment=zeros_like(params, dtype),
        row=take(0),
        column=take(1),
    )


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


def _concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


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

    def elementwise(leaves: Sequence[jax.Array]) -> jax.Array:
        return _concatenate([leaves[i].reshape((-1, *group.shape)) for i in group.leaves])

    def factored(leaves: Sequence[jax.Array], which: int) -> jax.Array:
        dims = group.dims
        arrays = []
        for i in group.leaves:
            leaf, count = leaves[i], tensors[i].count
            if dims is None and which == 1:
                arrays.append(jnp.broadcast_to(leaf, (count, 1)))
                continue
            shape = factored_shapes(group.shape, leaf.shape[0], dims)[which]
            arrays.append(jnp.moveaxis(leaf.reshape((shape[0], count, *shape[1:])), 0, 1))
        return _concatenate(arrays)

    return GroupInputs(
        gradient=elementwise(gradients),
        parameter=elementwise(params),
        accumulators=Accumulators(
            momentum=tuple(elementwise(m) for m in accumulators.momentum),
            second_moment=elementwise(accumulators.second_moment),
            row=factored(accumulators.row, 0),
            column=factored(accumulators.column, 1),
        ),
    )


def scatter(
    group: Group,
    tensors: Sequence[Tensors],
    update: jax.Array,
    accumulators: Accumulators,
    take: PartTaker | None,
    out: "Leaves",
) -> None:
    """Writes a group's results back into lists of leaves, the inverse of `gather`.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      update: (B, *shape).
      accumulators: with a leading axis of tensors.
      take: takes parts of arrays; None: there is one leaf.
      out: lists of leaves: holds the old leaves, whose shapes and dtypes the new ones take.
    """
    if len(group.leaves) > 1:
        # else parts of their computation are repeated for every leaf, after its old value is gone:
        # XLA copies that value first
        update, accumulators = jax.lax.optimization_barrier((update, accumulators))
    start = 0
    for i in group.leaves:
        first, count = start, tensors[i].count
        start += count
        whole = len(group.leaves) == 1
        length = None if group.lengths is None else tensors[i].shape[-1]

        def part(
            x: jax.Array,
            first: int = first,
            count: int = count,
            whole: bool = whole,
            length: int | None = length,
        ) -> jax.Array:
            if whole or take is None:
                return x
            starts = (first, *(0 for _ in x.shape[1:]))
            return take(x, starts, (count, *x.shape[1:-1], length or x.shape[-1]))

        def elementwise(leaves: list, x: jax.Array, i: int = i, part: Callable = part) -> None:
            x = part(x).reshape(leaves[i].shape).astype(leaves[i].dtype)
            leaves[i] = match_sharding(x, leaves[i])

        def factored(leaves: list, x: jax.Array, i: int = i, part: Callable = part) -> None:
            x = jnp.moveaxis(part(x), 1, 0)
            x = x.reshape(leaves[i].shape).astype(leaves[i].dtype)
            leaves[i] = match_sharding(x, leaves[i])

        elementwise(out.updates, update)
        for leaves, x in zip(out.accumulators.momentum, accumulators.momentum, strict=True):
            elementwise(leaves, x)
        elementwise(out.accumulators.second_moment, accumulators.second_moment)
        factored(out.accumulators.row, accumulators.row)
        if tensors[i].dims is not None:
            factored(out.accumulators.column, accumulators.column)


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
            second_moment=self.elementwise,
            row=self.row,
            column=self.column,
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

    @property
    def members(self) -> list[int]:
        """All of them."""
        return [i for unit in self.units for i in unit]


class Prepared(NamedTuple):
    """A step after its first pass: what the second needs."""

    groups: list[Group]
    tensors: list[Tensors]
    inputs: list[GroupInputs]
    calls: list[Call]  # groups that are updated together
    moments: list[list[Moments]]  # of each unit of each call
    params: list  # the leaves
    out: Leaves
    treedef: Any  # of the params
    accumulators_treedef: Any  # boxes of rows and columns name other axes than the params' boxes
    has_gradient: list[bool]


def over_tensors(function: Callable, *arguments: Any, in_axes: Any = 0) -> Any:
    """`jax.vmap`, but a single tensor keeps its rank: XLA then sees no axis of size one."""
    axes = (in_axes,) * len(arguments) if isinstance(in_axes, int) else in_axes
    sizes = {
        x.shape[0]
        for argument, axis in zip(arguments, axes, strict=True)
        if axis == 0
        for x in jax.tree.leaves(argument)
    }
    if sizes != {1}:
        return jax.vmap(function, in_axes=axes)(*arguments)
    single = [
        jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
        for argument, axis in zip(arguments, axes, strict=True)
    ]
    return jax.tree.map(lambda x: x[None], function(*single))


_logger = logging.getLogger(__name__)


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)


def _choose_backend(
    rule: Rule,
    backend: str,
    groups: Sequence[Group],
    inputs: Sequence[GroupInputs],
    vectors: Sequence[Sequence[int]] = (),
) -> list[bool]:
    """For each group, whether the fused kernels update it.

    Args:
      rule: the rule.
      backend: "auto", "xla" or "pallas".
      groups: the groups.
      inputs: of the groups.
      vectors: of `_alike_vectors`: where the kernels take one of them, they take all.

    Raises:
      NotImplementedError: the backend is "pallas" and they cannot.
    """
    if backend == "xla" or not inputs:
        return [False] * len(inputs)
    must = backend == "pallas"
    reason: str | None
    try:
        from pallas_kernels import choice
    except ImportError as error:
        reason = f"this jax has no Mosaic GPU backend ({error})"
        choices: list[str | None] = [reason] * len(inputs)
    else:
        reason = choice.unsupported_reason()
        choices = [
            reason
            or choice.unsupported_group_reason(
                rule,
                (_batch.get() * x.gradient.shape[0], *x.gradient.shape[1:]),
                [leaf.dtype for leaf in jax.tree.leaves(x)],
                must,
            )
            for x in inputs
        ]
    for members in vectors:
        if any(choices[i] is None for i in members):
            for i in members:
                choices[i] = None
    if must and any(choices):
        reason = next(filter(None, choices))
        raise NotImplementedError(
            f"backend='pallas' cannot run here: {reason}. backend='auto' uses XLA then."
        )
    if reason is not None:
        _log_once(f"Updates run as XLA operations, not as fused kernels: {reason}.")
    else:
        elements = sum(x.gradient.size for x in inputs)
        fused = sum(x.gradient.size for x, why in zip(inputs, choices, strict=True) if why is None)
        _log_once(
            f"Fused kernels update {fused:,} of {elements:,} parameters"
            + ("." if fused == elements else f"; XLA the others, for {_reasons(choices)}.")
        )
    return [
        why is None and _kernels_split(group, group.partition, x)
        for why, group, x in zip(choices, groups, inputs, strict=True)
    ]


def _reasons(choices: Sequence[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, choices)))


def _alike_vectors(groups: Sequence[Group], inputs: Sequence[GroupInputs]) -> list[list[int]]:
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


def _join_vectors(
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


def _make_calls(
    on_kernels: Sequence[bool], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Call]:
    """Which groups are updated together.

    One call of the kernels takes all that it can. Where a partitioner may split tensors in
    different ways, that is groups of one tensor, and vectors that it may not split: other stacks
    may be split along their axis of tensors. On XLA it is large tensors that take turns.
    """
    joins = is_local() or any(group.partition is not None for group in groups)
    xla = [i for i, chosen in enumerate(on_kernels) if not chosen]
    turns = _turns([i for i in xla if joins], groups, inputs)
    alone = [[i] for i in sorted(set(xla) - {i for members in turns for i in members})]
    calls = [Call([members], False) for members in turns + alone]
    units: dict[Any, list[int]] = {}
    for i, (chosen, group, x) in enumerate(zip(on_kernels, groups, inputs, strict=True)):
        is_joined = joins or len(group.tensors) == 1 or group.lengths is not None
        if not chosen:
            continue
        if not is_joined:
            calls.append(Call([[i]], True))
            continue
        dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(x))
        key = (x.gradient.shape[1:], dtypes, group.partition, group.lengths)
        units.setdefault(key, []).append(i)
    if units:
        # what has vectors first: then what is by tensor lies as the kernels take it
        in_order = sorted(units.values(), key=lambda unit: groups[unit[0]].dims is None)
        calls.insert(0, Call(in_order, True))
    return calls


def _turns(
    candidates: Sequence[int], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[list[int]]:
    """Large groups that XLA updates in turn: of arrays that are alike in all that a loop needs."""
    large = [i for i in candidates if math.prod(groups[i].shape) > STACKED_LEAF_ELEMENTS]
    if jax.default_backend() == "cpu" or len(large) <= LARGE_GROUPS:
        return []
    alike: dict[Any, list[int]] = {}
    for i in large:
        kinds = tuple(map(jax.typeof, jax.tree.leaves(inputs[i])))  # shardings are part of types
        alike.setdefault((kinds, groups[i].partition), []).append(i)
    return [members for members in alike.values() if len(members) >= TURNS]


# The first accumulator and the parameter decide how a group is split, in a draw the accumulator: it
# stands for more arrays. A gradient that comes otherwise is no news: its way is the batch's sum.
_GUIDES = (2, 1)


def _kernels_split(group: Group, partition: Partition | None, x: GroupInputs) -> bool:
    """Whether the kernels can update shards: they know of no padding."""
    if partition is None or not partition.is_padded(x.gradient.shape[1:]):
        return True
    say_once(
        f"{group.name}: its shape {partition.shape} does not divide evenly over the devices; XLA "
        "updates its shards, as the fused kernels know of no padding."
    )
    return False


class _Shards(NamedTuple):
    """Parts of a call that are equal in shape and split alike."""

    unit: int
    members: list[int]  # positions among all parts of the call
    partition: Partition | None
    on_kernels: bool


def _shards_of(
    call: Call, groups: Sequence[Group], inputs: Sequence[GroupInputs], partitions: Partitions
) -> list[_Shards]:
    """The parts of a call, by unit and by how they are split."""
    out, first = [], 0
    for i, unit in enumerate(call.units):
        alike: dict[Partition | None, list[int]] = {}
        for k in range(first, first + len(unit)):
            alike.setdefault(partitions[k], []).append(k)
        first += len(unit)
        for partition, members in alike.items():
            # of each it is said if they cannot
            able = [_kernels_split(groups[k], partition, inputs[k]) for k in members]
            out.append(_Shards(i, members, partition, call.on_kernels and all(able)))
    return out


def _rows(tree: Any, positions: Any) -> Any:
    """Some tensors of arrays with a leading axis of tensors."""
    return jax.tree.map(lambda x: x[np.asarray(positions)], tree)


def _moments_like(rule: Rule, group: Group, tensors: int) -> Moments:
    """Shapes of the moments of so many whole tensors like a group's."""
    shape = group.shape if group.partition is None else group.partition.shape
    of = lambda *shape: jax.ShapeDtypeStruct((tensors, *shape), jnp.float32)  # noqa: E731
    row = column = None
    if group.dims is not None:
        row, column = (of(*shape[:d], *shape[d + 1 :]) for d in (group.dims.d0, group.dims.d1))
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    return Moments(row, column, of() if needs_parameter else None)


def _whole_moments(
    pieces: Sequence[Sequence[tuple[_Shards, list[int], Moments]]],
    groups: Sequence[Group],
) -> jax.Array:
    """Moments of whole tensors in one array, by one sum over devices, from those of shards."""
    split = [x.partition for unit in pieces for x, _, _ in unit if x.partition is not None]
    of_all = [name for p in split for name in p.names(range(len(p.shape)))]
    names = tuple(dict.fromkeys(of_all))

    def own(x: _Shards, members: list[int], moments: Moments) -> Moments:
        dims = groups[members[0]].dims
        shape = groups[members[0]].shape
        partition = x.partition or Partition(shape, ((),) * len(shape))

        def part(array: Any, dim: int | None) -> Any:
            if array is None:
                return None
            kept = Partition((), ()) if dim is None else partition.without(dim)
            return kept.stacked(array.shape[0]).own_part(array, names)

        return Moments(
            part(moments.row, None if dims is None else dims.d0),
            part(moments.column, None if dims is None else dims.d1),
            part(moments.parameter_mean_square, None),
        )

    whole = [
        _in_order([(members, own(x, members, m)) for x, members, m in unit]) for unit in pieces
    ]
    nothing = jnp.zeros((0,), jnp.float32)  # where no tensor has moments
    flat = jnp.concatenate([nothing, *(x.reshape(-1) for x in jax.tree.leaves(whole))])
    return jax.lax.psum(flat, names) if names else flat


def _apart(flat: jax.Array, like: Any) -> Any:
    """The inverse of joining a tree's arrays, flattened, in one."""
    leaves, treedef = jax.tree.flatten(like)
    ends = list(itertools.accumulate((x.size for x in leaves), initial=0))
    return treedef.unflatten(
        [
            flat[i:j].reshape(x.shape)
            for x, (i, j) in zip(leaves, itertools.pairwise(ends), strict=True)
        ]
    )


def _of_shards(moments: Moments, partition: Partition | None, dims: FactoredDims | None) -> Moments:
    """Moments of this device's shards from those of whole tensors."""
    if partition is None or dims is None:
        return moments

    def part(x: jax.Array, dim: int) -> jax.Array:
        return partition.without(dim).stacked(x.shape[0]).shard(x)

    return moments._replace(row=part(moments.row, dims.d0), column=part(moments.column, dims.d1))


def _guides(inputs: Sequence[GroupInputs]) -> list[list[int]]:
    """For each part the positions of `_GUIDES` among the leaves of all."""
    starts = np.cumsum([0, *(len(jax.tree.leaves(x)) for x in inputs)])
    return [[int(start) + i for i in _GUIDES] for start in starts[:-1]]


def _crosses(groups: Sequence[Group]) -> bool:
    """Whether a call's moments leave the code of a shard: they are those of whole tensors then.

    What one call makes of tensors that are split in different ways is no array of shards.
    """
    return len(groups) > 1 and not is_local() and groups[0].partition is None


def _first_pass(
    rule: Rule, call: Call, groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Moments]:
    """Pass A over the groups of a call, on the shards of their tensors.

    Returns:
      Moments of each unit, with a leading axis of tensors.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    crosses = _crosses(groups)

    def first(partitions: Partitions, inputs: Sequence[GroupInputs]) -> Any:
        shards = _shards_of(call, groups, inputs, partitions)
        on_kernels = [x for x in shards if x.on_kernels]
        made: Iterator[Moments] = iter(())
        if on_kernels:
            from pallas_kernels import step

            made = iter(step.first_pass(rule, _step_units(on_kernels, groups, inputs)))
        pieces: list[list[tuple[_Shards, list[int], Moments]]] = [[] for _ in call.units]
        for x in shards:
            function = functools.partial(rules.first_pass, rule, partition=x.partition)
            pairs = [(inputs[k].gradient, inputs[k].parameter) for k in x.members]
            of_shards = next(made) if x.on_kernels else _moments_in_turn(function, pairs)
            pieces[x.unit].append((x, x.members, of_shards))
        if crosses:
            return _whole_moments(pieces, groups)
        return [_in_order([piece[1:] for piece in unit]) for unit in pieces]

    moments = spread(
        first,
        (list(inputs),),
        ([d.inputs(x) for d, x in zip(dims, inputs, strict=True)],),
        lambda result: dims[0].shared(result) if crosses else [dims[0].moments(result[0])],
        [group.shape for group in groups],
        [group.partition for group in groups],
        guides=_guides(inputs),
        names=[group.name for group in groups],
    )
    if not crosses:
        return moments
    by_unit = iter(zip(groups, inputs, strict=True))
    like = []
    for unit in call.units:
        members = list(itertools.islice(by_unit, len(unit)))
        tensors = sum(x.gradient.shape[0] for _, x in members)
        like.append(_moments_like(rule, members[0][0], tensors))
    return _apart(moments, like)


def _step_units(
    shards: Sequence[_Shards], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Any]:
    """The parts of a call as the kernels take them."""
    from pallas_kernels import step

    return [
        step.Unit(
            [step.Part(*inputs[k]) for k in x.members], x.partition, groups[x.members[0]].lengths
        )
        for x in shards
    ]


def _in_order(pieces: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Joins trees of arrays with a leading axis of tensors, given the positions of these."""
    joined = jax.tree.map(lambda *xs: _concatenate(xs), *(tree for _, tree in pieces))
    positions = [k for members, _ in pieces for k in members]
    if positions == sorted(positions):
        return joined
    return _rows(joined, np.argsort(positions))


def _on_xla(
    rule: Rule, mlp_per_tensor: bool, partition: Partition | None
) -> Callable[..., TensorUpdate]:
    """Passes B and C over tensors of one shape, or the shards of them."""
    axes = (0 if mlp_per_tensor else None, 0, 0, 0, 0, None, 0, 0)

    def lopt_passes(*arguments: Any) -> TensorUpdate:
        function = functools.partial(rules.second_pass, rule, partition=partition)
        return over_tensors(function, *arguments, in_axes=axes)

    return lopt_passes


@functools.lru_cache(maxsize=64)
def _passes(rule: Rule, mlp_per_tensor: bool) -> Callable[..., TensorUpdate]:
    """The same over whole tensors, traced once for all groups of that shape."""
    return jax.jit(_on_xla(rule, mlp_per_tensor, None))


def _moments_in_turn(
    function: Callable[..., Moments], pairs: Sequence[tuple[jax.Array, jax.Array]]
) -> Moments:
    """Pass A over groups of equal arrays, one after another.

    Args:
      function: of `rule.first_pass`.
      pairs: gradients and parameters of each group, with a leading axis of tensors.

    Returns:
      Moments, with a leading axis of the tensors of all groups.
    """
    if len(pairs) == 1:
        return over_tensors(function, *pairs[0])
    nothing = [()] * len(pairs)
    turn = lambda read, *_: ((), (), over_tensors(function, *read))  # noqa: E731
    *_, moments = in_turn(turn, pairs, nothing, nothing, ())
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), moments)


def _in_turn(
    run: Callable[..., TensorUpdate],
    inputs: Sequence[GroupInputs],
    moments: Moments,
    decays: Decays,
    factors: "Factors",
    mlp_per_tensor: bool,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over groups of equal arrays, one after another.

    Args:
      run: of `_on_xla`.
      inputs: of each group.
      moments: with a leading axis of the tensors of all groups.
      decays: decay rates.
      factors: what these tensors have.
      mlp_per_tensor: whether each has a network of its own.

    Returns:
      The updates of each group, and the statistics of all tensors.
    """

    def update(x: GroupInputs, moments: Moments, factors: Factors) -> TensorUpdate:
        return run(factors.mlp, moments, *x, decays, factors.scale, factors.weight_decay)

    if len(inputs) == 1:
        alone = update(inputs[0], moments, factors)
        return [alone._replace(statistics=None)], alone.statistics

    by_turn = lambda x: x.reshape((len(inputs), -1, *x.shape[1:]))  # noqa: E731
    by_tensor = lambda x: x.reshape((-1, *x.shape[2:]))  # noqa: E731
    vectors = [(x.accumulators.row, x.accumulators.column) for x in inputs]
    mlp = factors.mlp if mlp_per_tensor else ()
    of_tensors = jax.tree.map(by_turn, (moments, factors[1:], mlp))
    small = (jax.tree.map(lambda *xs: jnp.stack(xs), *vectors), of_tensors)

    def turn(read: Any, state: Any, small: Any) -> Any:
        (gradient, parameter), (momentum, second_moment) = read, state
        (row, column), (moments, others, mlp) = small
        accumulators = Accumulators(momentum, second_moment, row, column)
        of = Factors(mlp if mlp_per_tensor else factors.mlp, *others)
        made = update(GroupInputs(gradient, parameter, accumulators), moments, of)
        new = made.accumulators
        out = made.update.astype(parameter.dtype)
        return (new.momentum, new.second_moment), out, (new.row, new.column, made.statistics)

    states, updates, (rows, columns, statistics) = in_turn(
        turn,
        [(x.gradient, x.parameter) for x in inputs],
        [(x.accumulators.momentum, x.accumulators.second_moment) for x in inputs],
        [x.parameter for x in inputs],
        small,
    )
    take = part_taker(inputs[0].gradient)

    def own(x: jax.Array, k: int) -> jax.Array:
        return take(x, (k, *(0 for _ in x.shape[1:])), (1, *x.shape[1:]))[0]

    made = []
    for k, ((momentum, second_moment), x) in enumerate(zip(states, updates, strict=True)):
        new = Accumulators(momentum, second_moment, own(rows, k), own(columns, k))
        made.append(TensorUpdate(x, new, None))
    return made, jax.tree.map(by_tensor, statistics)


def _small_passes(
    rule: Rule,
    mlp: MLP,
    inputs: Sequence[GroupInputs],
    moments: Sequence[Moments],
    decays: Decays,
    rates: Sequence[tuple[jax.Array, jax.Array]],
) -> list[TensorUpdate]:
    """Passes B and C over small tensors of several shapes, whose network runs once for all.

    Args:
      rule: the rule; it keeps no statistics.
      mlp: the network, which they share.
      inputs: of each group.
      moments: of each group, with a leading axis of tensors.
      decays: decay rates.
      rates: scale and weight decay of each group, (tensors,).

    Returns:
      The updates of each group.
    """

    def before(moments: Moments, x: GroupInputs) -> tuple[jax.Array, jax.Array, Accumulators]:
        dims = factored_dims(x.gradient.shape)
        operands, row, column = rules.operands_after(rule, moments, *x, decays, dims)
        features = rule.features.for_tensor(dims is not None)
        new = Accumulators(operands.momentum, operands.second_moment, row, column)
        stored = rules.as_stored(new, x.accumulators)
        return rules.small_tensor_inputs(rule, features, operands), operands.parameter, stored

    prepared = [over_tensors(before, *pair) for pair in zip(moments, inputs, strict=True)]
    flat = [jnp.moveaxis(x, 1, 0).reshape((x.shape[1], -1)) for x, *_ in prepared]
    ends = np.cumsum([x.shape[1] for x in flat])
    # rows of a product that are not whole multiples of 64 bytes are read a word at a time
    flat.append(jnp.zeros((flat[0].shape[0], -int(ends[-1]) % 16), flat[0].dtype))
    steps = rules.small_tensor_step(rule, mlp, jnp.concatenate(flat, axis=1))
    after = functools.partial(rules.tensor_update, rule)
    return [
        TensorUpdate(over_tensors(after, of, x.reshape(p.shape), p, *pair), stored, None)
        for x, of, (_, p, stored), pair in zip(
            jnp.split(steps, ends)[:-1], moments, prepared, rates, strict=True
        )
    ]


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
        mlp = _rows(self.mlp, members) if mlp_per_tensor else self.mlp
        return Factors(mlp, *_rows((self.scale, self.weight_decay, self.statistics), members))


def _second_pass(
    rule: Rule,
    call: Call,
    groups: Sequence[Group],
    inputs: Sequence[GroupInputs],
    moments: Sequence[Moments],
    mlp_per_tensor: bool,
    decays: Decays,
    factors: Factors,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over the groups of a call, on the shards of their tensors.

    Returns:
      The updates of each group, and where the kernels made them and the rule keeps statistics,
      these for all tensors.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    crosses = _crosses(groups)

    def passes(
        partitions: Partitions,
        inputs: Sequence[GroupInputs],
        moments: Sequence[Moments],
        decays: Decays,
        factors: Factors,
    ) -> tuple[list[TensorUpdate], Statistics | None]:
        updates: list[Any] = [None] * len(inputs)
        kept: list[tuple[list[int], Any]] = []
        ends = np.cumsum([0, *(x.gradient.shape[0] for x in inputs)])
        tensors = lambda members: [i for k in members for i in range(ends[k], ends[k + 1])]  # noqa: E731

        def moments_of(x: _Shards, members: Sequence[int]) -> Moments:
            of_unit = [k for k, group in enumerate(call.members) if group in call.units[x.unit]]
            out = moments[x.unit]
            if list(members) != of_unit:
                first = ends[of_unit[0]]
                out = _rows(out, [i - first for i in tensors(members)])
            return _of_shards(out, x.partition, groups[members[0]].dims) if crosses else out

        shards = _shards_of(call, groups, inputs, partitions)
        on_kernels = [x for x in shards if x.on_kernels]
        if on_kernels:
            from pallas_kernels import step

            positions = tensors([k for x in on_kernels for k in x.members])
            of = factors.rows(positions, mlp_per_tensor)
            made, statistics = step.second_pass(
                rule,
                _step_units(on_kernels, groups, inputs),
                [moments_of(x, x.members) for x in on_kernels],
                of.mlp,
                mlp_per_tensor,
                decays,
                of.scale,
                of.weight_decay,
                of.statistics,
            )
            for x, of_unit in zip(on_kernels, made, strict=True):
                for k, update in zip(x.members, of_unit, strict=True):
                    updates[k] = update
            kept.append((positions, statistics))
        for x in shards:
            if x.on_kernels:
                continue
            run = (
                _passes(rule, mlp_per_tensor)
                if x.partition is None
                else _on_xla(rule, mlp_per_tensor, x.partition)
            )
            of = factors.rows(tensors(x.members), mlp_per_tensor)
            of_members = [inputs[k] for k in x.members]
            results, statistics = _in_turn(
                run, of_members, moments_of(x, x.members), decays, of, mlp_per_tensor
            )
            for k, update in zip(x.members, results, strict=True):
                updates[k] = update
            kept.append((tensors(x.members), statistics))
        if any(statistics is None for _, statistics in kept):
            return updates, None
        return updates, _in_order(kept)

    shared, of_all = dims[0].shared, dims[0].by_tensor if len(dims) == 1 else dims[0].shared
    return spread(
        passes,
        (list(inputs), list(moments), decays, factors),
        (
            [d.inputs(x) for d, x in zip(dims, inputs, strict=True)],
            shared(list(moments)) if crosses else [dims[0].moments(moments[0])],
            shared(decays),
            Factors(
                of_all(factors.mlp) if mlp_per_tensor else shared(factors.mlp),
                *of_all((factors.scale, factors.weight_decay, factors.statistics)),
            ),
        ),
        lambda result: (
            [d.result(x) for d, x in zip(dims, result[0], strict=True)],
            of_all(result[1]),
        ),
        [group.shape for group in groups],
        [group.partition for group in groups],
        guides=_guides(inputs),
        names=[group.name for group in groups],
    )


def first_pass(
    rule: Rule,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    stacked_axes: StackedAxes,
    backend: str = "auto",
) -> Prepared:
    """Pass A over every tensor of a tree.

    Args:
      rule: the rule.
      gradients: tree like params; None where a parameter has no gradient: it is not updated.
      params: pytree of arrays.
      accumulators: trees, of `init_accumulators`.
      stacked_axes: as in `tensors_of`.
      backend: "auto", "xla" or "pallas".

    Returns:
      The prepared step.

    Raises:
      NotImplementedError: the backend is "pallas" and the kernels cannot run here.
    """
    leaves, treedef = jax.tree.flatten(params)
    gradient_leaves = treedef.flatten_up_to(gradients)
    tensors = tensors_of(params, stacked_axes)
    lists = Accumulators(
        momentum=tuple(jax.tree.leaves(m) for m in accumulators.momentum),
        second_moment=jax.tree.leaves(accumulators.second_moment),
        row=jax.tree.leaves(accumulators.row),
        column=jax.tree.leaves(accumulators.column),
    )
    groups = make_groups(tensors, leaves, gradient_leaves, _paths(params))
    inputs = [gather(group, tensors, gradient_leaves, leaves, lists) for group in groups]
    vectors = _alike_vectors(groups, inputs)
    chosen = _choose_backend(rule, backend, groups, inputs, vectors)
    for members in vectors:
        if chosen[members[0]]:
            joined = _join_vectors([groups[i] for i in members], [inputs[i] for i in members])
            groups[members[0]], inputs[members[0]] = joined
    gone = {i for members in vectors if chosen[members[0]] for i in members[1:]}
    kept = [i for i in range(len(groups)) if i not in gone]
    groups, inputs = [groups[i] for i in kept], [inputs[i] for i in kept]
    chosen = [chosen[i] for i in kept]
    calls = _make_calls(chosen, groups, inputs)
    moments = [
        _first_pass(rule, call, [groups[i] for i in of], [inputs[i] for i in of])
        for call, of in zip(calls, [call.members for call in calls], strict=True)
    ]
    return Prepared(
        groups=groups,
        tensors=tensors,
        inputs=inputs,
        calls=calls,
        moments=moments,
        params=leaves,
        out=Leaves(updates=[jnp.zeros_like(x) for x in leaves], accumulators=lists),
        treedef=treedef,
        accumulators_treedef=jax.tree.structure(accumulators),
        has_gradient=[g is not None for g in gradient_leaves],
    )


def _write_out(rule: Rule, group: Group, groups: Sequence[Group]) -> Rule:
    """The rule for a group: with its network written out where that is worth its compilation."""
    device = jax.default_backend()
    if device == "cpu":
        is_large = lambda group: group.size >= WRITTEN_OUT_ELEMENTS  # noqa: E731
        few = sum(map(is_large, groups)) <= WRITTEN_OUT_GROUPS
        return replace(rule, write_out=few and is_large(group))
    if device == "gpu" and len(groups) <= FUSED_SMALL_GROUPS:
        return replace(rule, small_elements=0)
    return rule


def _joined_calls(rule: Rule, prepared: Prepared, hidden: int, mlp_per_tensor: bool) -> list[int]:
    """Calls of small tensors whose wide network runs once for all of them.

    On a GPU a launch takes longer than the products of a small tensor. Few groups at a time: every
    feature of each of them is code of one kernel.
    """
    joins = jax.default_backend() == "gpu" and len(prepared.groups) <= FUSED_SMALL_GROUPS
    apart = mlp_per_tensor or rule.accumulator_statistics or not is_local()
    if not joins or apart or hidden < rules.WIDE_HIDDEN_SIZE:
        return []

    def is_small(call: Call) -> bool:
        group = prepared.groups[call.members[0]]  # XLA's calls are of one
        return group.partition is None and math.prod(group.shape) <= rule.small_elements

    calls = enumerate(prepared.calls)
    return [i for i, call in calls if not call.on_kernels and is_small(call)]


def parameter_mean_squares(prepared: Prepared) -> jax.Array:
    """Mean square of the parameters of every tensor: (tensors,) float32, zero for empty ones."""
    pieces = [unit.parameter_mean_square for call in prepared.moments for unit in call]
    return _by_tensor(prepared, pieces)


def _tensor_count(tensors: Sequence[Tensors]) -> int:
    return sum(entry.count for entry in tensors)


def _by_tensor(prepared: Prepared, arrays: Sequence[jax.Array], default: Any = None) -> jax.Array:
    """Puts arrays with one row a tensor of each call into the order of all tensors."""
    order = [k for call in prepared.calls for i in call.members for k in prepared.groups[i].tensors]
    count = _tensor_count(prepared.tensors)
    if not arrays:
        return jnp.zeros((count,), jnp.float32) if default is None else default
    joined = _concatenate(arrays)
    if len(order) == count:
        return joined[np.argsort(np.asarray(order))]
    if default is None:
        default = jnp.zeros((count, *joined.shape[1:]), joined.dtype)
    return default.at[np.asarray(order)].set(joined)


def second_pass(
    rule: Rule,
    prepared: Prepared,
    mlp: MLP,
    mlp_per_tensor: bool,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None = None,
) -> tuple[Any, Accumulators, Statistics | None]:
    """Passes B and C over every tensor of a tree.

    Args:
      rule: the rule.
      prepared: of `first_pass`.
      mlp: the network: one for all tensors, or with a leading axis of tensors.
      mlp_per_tensor: whether it has that axis.
      decays: decay rates.
      scale: () or (tensors,), as in `rule.second_pass`.
      weight_decay: () or (tensors,), as in `rule.second_pass`.
      statistics: the last step's, each with a leading axis of tensors, where the rule keeps them;
        tensors that are not updated keep theirs.

    Returns:
      Updates like the params (in their dtypes; None where there was no gradient), or the new params
      where the rule applies its updates; the new accumulators, and the new statistics.
    """
    count = _tensor_count(prepared.tensors)
    if rule.applies:  # of a copy: what is not updated stays
        prepared = prepared._replace(out=prepared.out._replace(updates=list(prepared.params)))
    scale, weight_decay = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (scale, weight_decay)
    )
    gradients = [x.gradient for x in prepared.inputs]
    # the smallest is the least likely to be split
    take = part_taker(min(gradients, key=lambda x: x.size)) if gradients else None
    new_statistics = []
    joined = _joined_calls(rule, prepared, mlp.biases[0].shape[-1], mlp_per_tensor)
    if joined:
        places = [prepared.calls[i].members[0] for i in joined]
        groups = [prepared.groups[place] for place in places]
        rows = [np.asarray(group.tensors) for group in groups]
        results = _small_passes(
            rule,
            mlp,
            [prepared.inputs[place] for place in places],
            [prepared.moments[i][0] for i in joined],
            decays,
            [(scale[of_group], weight_decay[of_group]) for of_group in rows],
        )
        for group, result in zip(groups, results, strict=True):
            out = prepared.out
            scatter(group, prepared.tensors, result.update, result.accumulators, take, out)
    for i, (call, moments) in enumerate(zip(prepared.calls, prepared.moments, strict=True)):
        if i in joined:
            continue
        groups = [prepared.groups[i] for i in call.members]
        of_all = Factors(mlp, scale, weight_decay, statistics if call.on_kernels else None)
        results, kept = _second_pass(
            _write_out(rule, groups[0], prepared.groups),
            call,
            groups,
            [prepared.inputs[i] for i in call.members],
            moments,
            mlp_per_tensor,
            decays,
            of_all.rows([k for group in groups for k in group.tensors], mlp_per_tensor),
        )
        for group, result in zip(groups, results, strict=True):
            out = prepared.out
            scatter(group, prepared.tensors, result.update, result.accumulators, take, out)
        new_statistics.append(kept)
    accumulators = prepared.accumulators_treedef.unflatten(
        jax.tree.leaves(prepared.out.accumulators)
    )
    if statistics is not None and new_statistics:
        statistics = jax.tree.map(
            lambda default, *rows: _by_tensor(prepared, rows, default), statistics, *new_statistics
        )
    updates = [
        u if has or rule.applies else None
        for u, has in zip(prepared.out.updates, prepared.has_gradient, strict=True)
    ]
    return prepared.treedef.unflatten(updates), accumulators, statistics


def per_leaf(values: jax.Array, entry: Tensors, leaf: jax.Array) -> jax.Array:
    """The values of a leaf's tensors, broadcastable against the leaf.

    Args:
      values: (), or (tensors,), one for every tensor of the tree.
      entry: how the leaf is seen as tensors.
      leaf: the leaf.

    Returns:
      The stacked axes of the leaf, then axes of size one.
    """
    if not values.ndim:
        return values
    chosen = values[entry.first : entry.first + entry.count]
    return chosen.reshape(entry.stack + (1,) * (leaf.ndim - len(entry.stack)))


def count_tensors(params: Any, stacked_axes: StackedAxes = None) -> int:
    """Number of tensors that a tree of parameters holds."""
    return _tensor_count(tensors_of(params, stacked_axes))


def tensor_shapes(tensors: Sequence[Tensors]) -> list[tuple[int, ...]]:
    """The shape of every tensor of a tree, in the tree's order."""
    return [entry.whole_shape for entry in tensors for _ in range(entry.count)]


def init_statistics(tensors: int, momenta: int) -> Statistics:
    """Statistics of zero accumulators: zeros, with a leading axis of tensors."""
    return Statistics(
        momentum_mean=jnp.zeros((tensors, momenta), jnp.float32),
        momentum_variance=jnp.zeros((tensors, momenta), jnp.float32),
        second_moment_mean=jnp.zeros((tensors,), jnp.float32),
        second_moment_variance=jnp.zeros((tensors,), jnp.float32),
    )
