"""Maps a rule over a pytree of parameters.

Leaves become tensors: a leaf with stacked axes holds several. Small tensors of one shape are
stacked, so that hundreds of leaves do not become hundreds of copies of the code. Each stack is a
`Group`; a backend takes the arrays of a group with one leading axis, of tensors.
"""

import contextlib
import contextvars
import functools
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
    Dims,
    Partition,
    Partitions,
    is_local,
    match_sharding,
    partitions_of,
    say_once,
    spread,
    zeros,
)
from lopt_jax.rows import RowsTaker, rows_taker
from lopt_jax.rule import MLP, Moments, Rule, Statistics, TensorUpdate

BACKENDS = ("auto", "xla", "pallas")
STACKED_LEAF_ELEMENTS = 1 << 16  # tensors up to this size are stacked with others of their shape
PADDED_TIMES = 4  # the kernels stack vectors of different lengths, padded to at most so many times
# On a CPU, wide layers of so large groups are written out, unless that would take long to compile.
WRITTEN_OUT_ELEMENTS, WRITTEN_OUT_GROUPS = 1 << 17, 8
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
    take: RowsTaker | None,
    out: "Leaves",
) -> None:
    """Writes a group's results back into lists of leaves, the inverse of `gather`.

    Args:
      group: the group.
      tensors: of `tensors_of`.
      update: (B, *shape).
      accumulators: with a leading axis of tensors.
      take: takes rows out of an array; None: there is one leaf.
      out: lists of leaves: holds the old leaves, whose shapes and dtypes the new ones take.
    """
    if len(group.leaves) > 1:
        # else parts of their computation are repeated for every leaf, after its old value is gone:
        # XLA copies that value first
        update, accumulators = jax.lax.optimization_barrier((update, accumulators))
    start = 0
    for i in group.leaves:
        rows = slice(start, start + tensors[i].count)
        start += tensors[i].count
        whole = len(group.leaves) == 1
        length = None if group.lengths is None else tensors[i].shape[-1]

        def part(
            x: jax.Array, rows: slice = rows, whole: bool = whole, length: int | None = length
        ) -> jax.Array:
            return x if whole or take is None else take(x, rows, length or x.shape[-1])

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

    updates: list
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


class Prepared(NamedTuple):
    """A step after its first pass: what the second needs."""

    groups: list[Group]
    tensors: list[Tensors]
    inputs: list[GroupInputs]
    units: list[list[int]]  # groups that are updated together
    on_kernels: list[bool]  # of each unit: whether the fused kernels update it
    moments: list[list[Moments]]  # of each unit: in one or more pieces along the axis of tensors
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
    """Groups of vectors that differ in length alone, and not much; the longest come first."""
    if not is_local():
        return []
    kinds: dict[Any, list[list[int]]] = {}
    for i in sorted(range(len(groups)), key=lambda i: -groups[i].shape[0]):
        shape = groups[i].shape
        if len(shape) > 1 or shape[0] > STACKED_LEAF_ELEMENTS or groups[i].partition is not None:
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


def _make_units(
    on_kernels: Sequence[bool], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> tuple[list[list[int]], list[bool]]:
    """Groups that are updated together, and whether by the kernels.

    The kernels take together the groups whose tensors are equal in shape and dtypes. Where a
    partitioner may split them in different ways, only those of one tensor: stacks may be split
    along their axis of tensors.
    """
    units: dict[Any, list[int]] = {}
    joins = is_local()
    for i, (chosen, group, x) in enumerate(zip(on_kernels, groups, inputs, strict=True)):
        dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(x))
        key = (x.gradient.shape[1:], dtypes, group.partition, group.lengths)
        units.setdefault(key if chosen and (joins or len(group.tensors) == 1) else i, []).append(i)
    return list(units.values()), [on_kernels[unit[0]] for unit in units.values()]


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


def _all_split(groups: Sequence[Group], partition: Partition | None, parts: Sequence[Any]) -> bool:
    """Whether the kernels can update the shards of all parts; says of each that they cannot."""
    able = [_kernels_split(group, partition, x) for group, x in zip(groups, parts, strict=True)]
    return all(able)


def _alike(partitions: Partitions) -> dict[Partition | None, list[int]]:
    """The positions of parts that are split in the same way."""
    out: dict[Partition | None, list[int]] = {}
    for i, partition in enumerate(partitions):
        out.setdefault(partition, []).append(i)
    return out


def _rows(tree: Any, start: int, stop: int) -> Any:
    """Some tensors of arrays with a leading axis of tensors."""
    return jax.tree.map(lambda x: x[start:stop], tree)


def _guides(inputs: Sequence[GroupInputs]) -> list[list[int]]:
    """For each part the positions of `_GUIDES` among the leaves of all."""
    starts = np.cumsum([0, *(len(jax.tree.leaves(x)) for x in inputs)])
    return [[int(start) + i for i in _GUIDES] for start in starts[:-1]]


def _first_pass(
    rule: Rule, on_kernels: bool, groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Moments]:
    """Pass A over the groups of a unit, on the shards of their tensors.

    Returns:
      Moments with a leading axis of tensors, in one or more pieces.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    in_one_piece = is_local()

    def first(partitions: Partitions, inputs: Sequence[GroupInputs]) -> list[Moments]:
        out: list[Any] = [None] * len(inputs)
        for partition, members in _alike(partitions).items():
            parts: list[Any] = [inputs[i] for i in members]
            if on_kernels and _all_split([groups[i] for i in members], partition, parts):
                from pallas_kernels import step

                lengths = groups[members[0]].lengths
                moments = step.first_pass(rule, parts, partition, lengths)
                if len(inputs) == 1 or in_one_piece:
                    return [moments]
                for row, i in enumerate(members):
                    out[i] = _rows(moments, row, row + 1)
            else:
                function = functools.partial(rules.first_pass, rule, partition=partition)
                for i in members:
                    out[i] = over_tensors(function, inputs[i].gradient, inputs[i].parameter)
        return out

    return spread(
        first,
        (list(inputs),),
        ([d.inputs(x) for d, x in zip(dims, inputs, strict=True)],),
        lambda result: [d.moments(x) for d, x in zip(dims, result, strict=True)],
        groups[0].shape,
        groups[0].partition,
        guides=_guides(inputs),
        names=[group.name for group in groups],
    )


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
    """What the tensors of a unit have beside their arrays."""

    mlp: MLP  # one for all, or with a leading axis of tensors
    scale: jax.Array  # (tensors,)
    weight_decay: jax.Array  # (tensors,)
    statistics: Statistics | None  # with a leading axis of tensors

    def rows(self, members: Sequence[int], mlp_per_tensor: bool) -> "Factors":
        """Those of some of the tensors."""
        of = lambda tree: jax.tree.map(lambda x: x[np.asarray(members)], tree)  # noqa: E731
        mlp = of(self.mlp) if mlp_per_tensor else self.mlp
        return Factors(mlp, *of((self.scale, self.weight_decay, self.statistics)))


def _second_pass(
    rule: Rule,
    on_kernels: bool,
    groups: Sequence[Group],
    inputs: Sequence[GroupInputs],
    moments: Sequence[Moments],
    mlp_per_tensor: bool,
    decays: Decays,
    factors: Factors,
    take: RowsTaker | None,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over the groups of a unit, on the shards of their tensors.

    Returns:
      The updates of each group, and where the kernels made them and the rule keeps statistics,
      these for all tensors.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    take = take if is_local() else None  # else it belongs to another program

    def passes(
        partitions: Partitions,
        inputs: Sequence[GroupInputs],
        moments: Sequence[Moments],
        decays: Decays,
        factors: Factors,
    ) -> tuple[list[TensorUpdate], Statistics | None]:
        updates: list[Any] = [None] * len(inputs)
        kept: list[Any] = []
        order: list[int] = []
        for partition, members in _alike(partitions).items():
            parts: list[Any] = [inputs[i] for i in members]
            is_all = len(members) == len(inputs)
            if on_kernels and _all_split([groups[i] for i in members], partition, parts):
                from pallas_kernels import step

                pieces = moments if is_all else [moments[i] for i in members]
                of = factors if is_all else factors.rows(members, mlp_per_tensor)
                made, statistics = step.second_pass(
                    rule,
                    parts,
                    jax.tree.map(lambda *xs: _concatenate(xs), *pieces),
                    of.mlp,
                    mlp_per_tensor,
                    decays,
                    of.scale,
                    of.weight_decay,
                    of.statistics,
                    partition,
                    take,
                    groups[members[0]].lengths,
                )
                for i, update in zip(members, made, strict=True):
                    updates[i] = update
                kept.append(statistics)
            else:
                run = (
                    _passes(rule, mlp_per_tensor)
                    if partition is None
                    else _on_xla(rule, mlp_per_tensor, partition)
                )
                for i in members:
                    of = factors if len(inputs) == 1 else factors.rows([i], mlp_per_tensor)
                    arguments = (of.mlp, moments[i], *inputs[i], decays)
                    update = run(*arguments, of.scale, of.weight_decay)
                    updates[i] = update._replace(statistics=None)
                    kept.append(update.statistics)
            order += members
        if None in kept or not jax.tree.leaves(kept):
            return updates, None
        joined = jax.tree.map(lambda *xs: _concatenate(xs), *kept)
        if order != sorted(order):
            joined = jax.tree.map(lambda x: x[np.argsort(order)], joined)
        return updates, joined

    shared, of_all = dims[0].shared, dims[0].by_tensor if len(dims) == 1 else dims[0].shared
    return spread(
        passes,
        (list(inputs), list(moments), decays, factors),
        (
            [d.inputs(x) for d, x in zip(dims, inputs, strict=True)],
            [d.moments(x) for d, x in zip(dims, moments, strict=False)],
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
        groups[0].shape,
        groups[0].partition,
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
    units, on_kernels = _make_units(chosen, groups, inputs)
    moments = [
        _first_pass(rule, on, [groups[i] for i in unit], [inputs[i] for i in unit])
        for unit, on in zip(units, on_kernels, strict=True)
    ]
    return Prepared(
        groups=groups,
        tensors=tensors,
        inputs=inputs,
        units=units,
        on_kernels=on_kernels,
        moments=moments,
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


def _joined_units(rule: Rule, prepared: Prepared, hidden: int, mlp_per_tensor: bool) -> list[int]:
    """Units of small tensors whose wide network runs once for all of them.

    On a GPU a launch takes longer than the products of a small tensor. Few groups at a time: every
    feature of each of them is code of one kernel.
    """
    joins = jax.default_backend() == "gpu" and len(prepared.groups) <= FUSED_SMALL_GROUPS
    apart = mlp_per_tensor or rule.accumulator_statistics or not is_local()
    if not joins or apart or hidden < rules.WIDE_HIDDEN_SIZE:
        return []

    def is_small(unit: Sequence[int]) -> bool:
        group = prepared.groups[unit[0]]
        return group.partition is None and math.prod(group.shape) <= rule.small_elements

    chosen = zip(prepared.units, prepared.on_kernels, strict=True)
    return [i for i, (unit, on) in enumerate(chosen) if not on and is_small(unit)]


def parameter_mean_squares(prepared: Prepared) -> jax.Array:
    """Mean square of the parameters of every tensor: (tensors,) float32, zero for empty ones."""
    pieces = [piece.parameter_mean_square for unit in prepared.moments for piece in unit]
    return _by_tensor(prepared, pieces)


def _tensor_count(tensors: Sequence[Tensors]) -> int:
    return sum(entry.count for entry in tensors)


def _by_tensor(prepared: Prepared, arrays: Sequence[jax.Array], default: Any = None) -> jax.Array:
    """Puts arrays with one row a tensor of each unit into the order of all tensors."""
    order = [k for unit in prepared.units for i in unit for k in prepared.groups[i].tensors]
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
      Updates like the params (in their dtypes; None where there was no gradient), the new
      accumulators, and the new statistics.
    """
    count = _tensor_count(prepared.tensors)
    scale, weight_decay = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (scale, weight_decay)
    )
    gradients = [x.gradient for x in prepared.inputs]
    # the smallest is the least likely to be split
    take = rows_taker(min(gradients, key=lambda x: x.size)) if gradients else None
    new_statistics = []
    joined = _joined_units(rule, prepared, mlp.biases[0].shape[-1], mlp_per_tensor)
    if joined:
        places = [prepared.units[i][0] for i in joined]  # XLA's units are of one group
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
    for i, (unit, chosen, moments) in enumerate(
        zip(prepared.units, prepared.on_kernels, prepared.moments, strict=True)
    ):
        if i in joined:
            continue
        tensors = np.asarray([k for place in unit for k in prepared.groups[place].tensors])
        by_row = lambda tree, rows=tensors: jax.tree.map(lambda w: w[rows], tree)  # noqa: E731
        network = by_row(mlp) if mlp_per_tensor else mlp
        groups = [prepared.groups[i] for i in unit]
        results, kept = _second_pass(
            _write_out(rule, groups[0], prepared.groups),
            chosen,
            groups,
            [prepared.inputs[i] for i in unit],
            moments,
            mlp_per_tensor,
            decays,
            Factors(network, *by_row((scale, weight_decay, statistics if chosen else None))),
            take,
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
        u if has else None
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
