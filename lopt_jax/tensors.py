"""The leaves of a tree of parameters, seen as tensors.

A leaf with stacked axes holds several. Rules are functions of one tensor, so what an optimizer
keeps is by tensor too: accumulators like the leaves, and numbers with one row a tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.accumulators import Accumulators, FactoredDims, factored_dims
from lopt_jax.boxes import content, is_box, reboxed
from lopt_jax.brief import brief
from lopt_jax.context import Shards
from lopt_jax.partition import Layout, Partition, partitions_of, zeros
from lopt_jax.rules.rule import AccumulatorStatistics

StackedAxes = Any  # int | tree of ints (a prefix of the params) | function (path, leaf) -> int


# `optax.inject_hyperparams` makes an array of every number that it is not told to leave alone
IN_STATIC_ARGS = " Inside optax.inject_hyperparams, name it in static_args."


@dataclass(frozen=True)
class Tensors:
    """How one leaf is seen as tensors.

    Attributes:
      stack: the leaf's leading axes that hold tensors.
      shape: of each tensor; scalars are vectors of one element.
      first: position of the leaf's first tensor among all tensors of the tree.
      count: number of tensors in the leaf.
      dims: factored dims of each tensor, of the whole one where the leaf is a shard.
      partition: where the leaf is a shard, of what each tensor is one; None: it has whole tensors.
      stack_partition: where the leaf has some of the tensors alone, how its stacked axes are split.
    """

    stack: tuple[int, ...]
    shape: tuple[int, ...]
    first: int
    count: int
    dims: FactoredDims | None
    partition: Partition | None = None
    stack_partition: Partition | None = None

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


def prefix_of_params(name: str, tree: Any, params: Any) -> list[Any]:
    """What a tree that is a prefix of the params says of each leaf, in the order of the leaves.

    Args:
      name: the argument that holds the tree, for the message.
      tree: the tree.
      params: the parameters.

    Returns:
      One value a leaf.

    Raises:
      ValueError: the tree is no prefix of the params.
    """
    try:
        return jax.tree.leaves(
            jax.tree.map(lambda x, subtree: jax.tree.map(lambda _: x, subtree), tree, params)
        )
    except ValueError as error:
        raise ValueError(
            f"{name}: expected a tree like the params, or a prefix of it; "
            f"{difference(tree, params, is_prefix=True)}."
        ) from error


def _stacked_axes_of_leaves(params: Any, stacked_axes: StackedAxes) -> list[int]:
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    if not paths_and_leaves:  # also the placeholder that optax.tree.map_params initialises with
        return []
    if stacked_axes is None:
        axes = [0] * len(paths_and_leaves)
    elif callable(stacked_axes):
        axes = [stacked_axes(path, leaf) for path, leaf in paths_and_leaves]
    else:
        axes = prefix_of_params("stacked_axes", stacked_axes, params)
    for (path, leaf), n in zip(paths_and_leaves, axes, strict=True):
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 0 <= n <= leaf.ndim:
            raise ValueError(
                f"stacked_axes: expected an integer from 0 to {leaf.ndim}, the rank of the leaf "
                f"{jax.tree_util.keystr(path)} of shape {tuple(leaf.shape)}; found {n!r}."
                + (IN_STATIC_ARGS if isinstance(n, jax.Array) else "")
            )
    return [int(n) for n in axes]


def tensors_of(
    params: Any,
    stacked_axes: StackedAxes = None,
    shards: Shards | None = None,
    may_split_stacks: bool = False,
) -> list[Tensors]:
    """Sees every leaf of params as tensors.

    Args:
      params: pytree of arrays (or of anything with a shape).
      stacked_axes: how many leading axes of a leaf hold tensors: an int, a tree of ints, or a
        function of a leaf's path and the leaf; None means that every leaf is one tensor.
      shards: of what the leaves are shards, as in `lopt_jax.context.Tracing`.
      may_split_stacks: whether stacked axes may be split over devices.

    Returns:
      One entry a leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: a number of stacked axes is not in [0, rank], or these axes are split and may not.
    """
    out, first = [], 0
    leaves = jax.tree.leaves(params)
    partitions = [None] * len(leaves) if shards is None else partitions_of_leaves(params, shards)
    stacks = _stacked_axes_of_leaves(params, stacked_axes)
    for leaf, n, partition in zip(leaves, stacks, partitions, strict=True):
        whole = tuple(leaf.shape) if partition is None else partition.shape
        stack, shape = whole[:n], tuple(leaf.shape[n:]) or (1,)
        of_stack = of_tensor = None
        if partition is not None:
            axes = partition.axes
            of_stack = Partition(stack, axes[:n]) if any(axes[:n]) else None
            of_tensor = Partition(whole[n:] or (1,), axes[n:] or ((),)) if any(axes[n:]) else None
        if of_stack is not None and not may_split_stacks:
            raise ValueError(
                "distributed: stacked axes cannot be split over devices; give distributed the same "
                "stacked_axes as the optimizer."
            )
        count, dims = math.prod(stack), factored_dims(whole[n:] or (1,))
        out.append(Tensors(stack, shape, first, count, dims, of_tensor, of_stack))
        first += count
    return out


def count_tensors(params: Any, stacked_axes: StackedAxes = None) -> int:
    """Number of tensors that a tree of parameters holds."""
    return number_of(tensors_of(params, stacked_axes))


def number_of(tensors: Sequence[Tensors]) -> int:
    """Number of tensors of leaves that are seen as such."""
    return sum(entry.count for entry in tensors)


def ranks_of_tensors(params: Any, stacked_axes: StackedAxes = None) -> np.ndarray:
    """The rank of every tensor of a tree, in the tree's order; that of a scalar is zero."""
    tensors = tensors_of(params, stacked_axes)
    ranks = [
        leaf.ndim - len(entry.stack)
        for leaf, entry in zip(jax.tree.leaves(params), tensors, strict=True)
        for _ in range(entry.count)
    ]
    return np.asarray(ranks, np.int32)


def tensor_shapes(tensors: Sequence[Tensors]) -> list[tuple[int, ...]]:
    """The shape of every tensor of a tree, in the tree's order."""
    return [entry.whole_shape for entry in tensors for _ in range(entry.count)]


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


def paths(params: Any) -> list[str]:
    """The name of every leaf: where it is in the tree."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def partitions_of_leaves(params: Any, shards: Shards | None) -> list[Partition | None]:
    """How the leaves of a tree like the params are spread; None where they are whole."""
    return partitions_of(paths(params), shards)


def check_params(params: Any) -> Any:
    """The params, Python numbers as arrays.

    Args:
      params: pytree of arrays.

    Returns:
      The tree.

    Raises:
      TypeError: a leaf is no array of real numbers; the message names it.
    """

    def checked(path: Any, leaf: Any) -> Any:
        leaf = leaf if hasattr(leaf, "shape") else _as_array(path, leaf)
        if not _is_known(leaf.dtype):
            raise TypeError(
                f"params: expected an array of numbers as jax has them, found {leaf.dtype} in the "
                f"leaf {name_of(path)}."
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"params: expected real numbers, found {leaf.dtype} in the leaf "
                f"{name_of(path)}. Wrap the optimizer in "
                "optax.contrib.split_real_and_imaginary."
            )
        return leaf

    return jax.tree_util.tree_map_with_path(checked, params)


def _as_array(path: Any, leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"params: expected an array, found {type(leaf).__name__} in the leaf {name_of(path)}. "
            "Of a model that is no tree of arrays give its parameters, such as "
            "nnx.state(model, nnx.Param) or equinox.filter(model, equinox.is_array)."
        ) from error


def name_of(path: Any) -> str:
    """A leaf's place in the params, for messages."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def _is_known(dtype: Any) -> bool:
    """Whether jax has arrays of the dtype: numpy has others, of texts, dates and objects."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return True
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_))
    is_longer = jnp.issubdtype(dtype, np.floating) and dtype.itemsize > 8  # numpy's longdouble
    return is_number and not is_longer and np.dtype(dtype).isnative


def check_numpy(**trees: Any) -> None:
    """Raises TypeError for numpy arrays that compiled functions of jax mistake for others.

    Of a compiled function they go by the type's name alone, and would read bytes in another order
    as if it were the processor's.

    Args:
      **trees: by the name of the argument.
    """
    for name, tree in trees.items():
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, np.ndarray) and not leaf.dtype.isnative:
                path = next(
                    path for path, x in jax.tree_util.tree_leaves_with_path(tree) if x is leaf
                )
                raise TypeError(
                    f"{name}: expected numbers in the byte order of this processor, found "
                    f"{leaf.dtype.str} in {name_of(path)}. Give "
                    "x.astype(x.dtype.newbyteorder('='))."
                )


def _is_wide_float(dtype: Any) -> bool:
    """Whether it is a float of 16 bits or more: those of fewer promote to no other."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def difference(tree: Any, params: Any, is_prefix: bool = False) -> str:
    """How a tree that should be like the params differs from them: the end of a message.

    Args:
      tree: the tree; None may be in place of a leaf.
      params: the parameters.
      is_prefix: whether the tree may end where the params go on.

    Returns:
      A few leaves that one of the two lacks; where both have the same, the kinds of containers.
    """
    found, expected = (
        [
            path
            for path, _ in jax.tree_util.tree_leaves_with_path(
                x, is_leaf=lambda y: y is None or is_box(y)
            )
        ]
        for x in (tree, params)
    )
    of = lambda path: [path[:n] for n in range(len(path) + 1)] if is_prefix else [path]  # noqa: E731
    there, wanted = set(found), {part for path in expected for part in of(path)}
    missing = [name_of(path) for path in expected if there.isdisjoint(of(path))]
    surplus = [name_of(path) for path in found if path not in wanted]
    if missing or surplus:
        parts = (("it lacks", missing), ("it has, and the params have not,", surplus))
        return "; ".join(f"{what} {_some(names)}" for what, names in parts if names)
    kinds = (brief(jax.tree.structure(x, is_leaf=is_box)) for x in (params, tree))
    return "its containers are others: expected {}, found {}".format(*kinds)


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def leaves_like(name: str, tree: Any, params: Any) -> list[Any]:
    """The leaves of a tree like the params; None where it has None, or float0, in place of a leaf.

    So this is where all optimizers learn which leaves have no gradient.

    Args:
      name: what the tree is, for the message.
      tree: the tree.
      params: the parameters.

    Returns:
      The leaves, in the order of `jax.tree.leaves(params)`.

    Raises:
      ValueError: the tree has another structure than the params.
    """
    # boxes of the state say less of their axes where these are gone
    treedef = jax.tree.structure(params, is_leaf=is_box)
    try:
        leaves = [content(x) if is_box(x) else x for x in treedef.flatten_up_to(tree)]
    except ValueError:
        leaves = [()]
    if not jax.tree_util.all_leaves([x for x in leaves if x is not None]):
        raise ValueError(f"{name}: expected a tree like the params; {difference(tree, params)}.")
    return [x if has_values(x) else None for x in leaves]


def has_values(x: Any) -> bool:
    """Whether it holds numbers: no None, and no float0, jax's gradient of integers and keys."""
    return x is not None and getattr(x, "dtype", None) != jax.dtypes.float0


def numbers_of(params: Any) -> list[jax.Array]:
    """The leaves of the params, zeros in place of PRNG keys, which may be there without gradients.

    Args:
      params: the parameters.

    Returns:
      The leaves.
    """
    is_number = lambda x: not jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)  # noqa: E731
    leaves = jax.tree.leaves(params)
    return [x if is_number(x) else jnp.zeros(x.shape, jnp.float32) for x in leaves]


def check_shapes(name: str, leaves: Sequence[Any], params: Any) -> None:
    """Raises ValueError, naming the leaf, unless all leaves but None have the params' shapes."""
    like = jax.tree_util.tree_leaves_with_path(params)
    for (path, param), leaf in zip(like, leaves, strict=True):
        if leaf is not None and jnp.shape(leaf) != jnp.shape(param):
            raise ValueError(
                f"{name}: expected the shape of the param {jax.tree_util.keystr(path)}, "
                f"{jnp.shape(param)}; found {jnp.shape(leaf)}."
            )


def arrays_like(name: str, tree: Any, params: Any) -> list[jax.Array]:
    """As `leaves_like`, of a tree whose leaves have the params' shapes, or a ValueError."""
    leaves = leaves_like(name, tree, params)
    check_shapes(name, leaves, params)
    return leaves


def gradients_like(updates: Any, params: Any) -> list[Any]:
    """The gradients of the leaves of the params, None where there is none.

    Args:
      updates: a tree like the params.
      params: the parameters.

    Returns:
      The gradients, floats of 16 bits or more, in the order of `jax.tree.leaves(params)`.

    Raises:
      TypeError: a gradient is not of real numbers, or a param that has one is none that small steps
        change: a key, an integer, a float of 8 bits; the message names the leaf.
      ValueError: the trees or the shapes differ.
    """

    def checked(path: Any, param: Any, gradient: Any) -> Any:
        if gradient is None:
            return None
        own, dtype = jnp.result_type(param), jnp.result_type(gradient)
        if not _is_wide_float(own):
            raise TypeError(
                f"updates: expected None for {name_of(path)}, as the param is {own.name}, which "
                "small steps do not change; found a gradient. Optimize a param of float32, "
                "bfloat16 or float16, or freeze this one: optax.partition with "
                "optax.set_to_zero."
            )
        if any(jnp.issubdtype(dtype, kind) for kind in (np.complexfloating, jax.dtypes.extended)):
            raise TypeError(
                f"updates: expected real numbers, found {dtype.name} for {name_of(path)}. Give "
                "real gradients, or wrap the optimizer in optax.contrib.split_real_and_imaginary."
            )
        return gradient if _is_wide_float(dtype) else jnp.asarray(gradient).astype(jnp.float32)

    gradients = arrays_like("updates", updates, params)
    with_paths = jax.tree_util.tree_leaves_with_path(params)
    return [
        checked(path, param, gradient)
        for (path, param), gradient in zip(with_paths, gradients, strict=True)
    ]


def zeros_like(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A tree of zeros like the params, sharded as they are."""
    return jax.tree.map(
        lambda x: zeros(x, [Layout(tuple(range(len(x.shape))), 0, dtype)])[0], params
    )


def init_accumulators(
    params: Any,
    dtypes: Accumulators,
    factored: int,
    stacked_axes: StackedAxes = None,
) -> Accumulators:
    """Zero accumulators of a tree of parameters.

    Args:
      params: pytree of arrays.
      dtypes: the dtype of each accumulator; momentum has one a decay.
      factored: number of factored decays.
      stacked_axes: as in `tensors_of`.

    Returns:
      Trees with the structure of params: momentum (one tree a decay) and second moment shaped like
      the parameters; row and column as `factored_shapes` says, stacked axes after the axis of
      decays; both empty without factored decays. Flax's boxes are kept, their names following the
      axes.
    """
    tensors = tensors_of(params, stacked_axes)  # refuses axes that are not there
    boxed, treedef = jax.tree.flatten(params, is_leaf=is_box)
    of_leaves = [
        _zero_accumulators(leaf, None if x is leaf else x, entry, dtypes, factored)
        for leaf, x, entry in zip(jax.tree.leaves(params), boxed, tensors, strict=True)
    ]
    tree_of = lambda _, *arrays: treedef.unflatten(arrays)  # noqa: E731
    kinds = dtypes if factored else dtypes._replace(row=(), column=())
    return jax.tree.map(tree_of, kinds, *of_leaves)


def accumulator_dims(
    rank: int, entry: Tensors
) -> tuple[tuple[int | None, ...], tuple[int | None, ...], tuple[int | None, ...]]:
    """Which of a leaf's dimensions each dimension of its accumulators is; None: none of them.

    Args:
      rank: of the leaf.
      entry: how it is seen as tensors.

    Returns:
      Those of a momentum or second moment, of the row, and of the column.
    """
    axes, n = tuple(range(rank)), len(entry.stack)
    without = lambda d: (None, *(i for i in axes if i != d))  # noqa: E731
    if entry.dims is None:
        return axes, without(None), (None,)
    return axes, without(n + entry.dims.d0), without(n + entry.dims.d1)


def _zero_accumulators(
    leaf: Any, box: Any, entry: Tensors, dtypes: Accumulators, factored: int
) -> Accumulators:
    """Zero accumulators of one leaf; in boxes where it is in one, else the box is None."""
    averages, structure = jax.tree.flatten((dtypes.momentum, dtypes.second_moment))
    axes, of_row, of_column = accumulator_dims(len(leaf.shape), entry)
    layouts = [Layout(axes, 0, dtype) for dtype in averages]
    if factored:
        layouts.append(Layout(of_row, factored, dtypes.row))
        if entry.dims:
            layouts.append(Layout(of_column, factored, dtypes.column))
    arrays = zeros(leaf, layouts)
    if factored and not entry.dims:
        layouts.append(Layout(of_column, 1, dtypes.column))
        arrays.append(jnp.zeros((1,), dtypes.column))  # nothing reads it: it lies anywhere
    if box is not None:
        pairs = zip(arrays, layouts, strict=True)
        like = jax.tree.structure(box)
        arrays = [
            like.unflatten([x]) if layout.dims == axes else reboxed(box, x, layout.dims)
            for x, layout in pairs
        ]
    momentum, second_moment = structure.unflatten(arrays[: len(averages)])
    return Accumulators(momentum, second_moment, *(arrays[len(averages) :] or ((), ())))


def init_statistics(tensors: int, momenta: int) -> AccumulatorStatistics:
    """Statistics of zero accumulators: zeros, with a leading axis of tensors."""
    return AccumulatorStatistics(
        momentum_mean=jnp.zeros((tensors, momenta), jnp.float32),
        momentum_variance=jnp.zeros((tensors, momenta), jnp.float32),
        second_moment_mean=jnp.zeros((tensors,), jnp.float32),
        second_moment_variance=jnp.zeros((tensors,), jnp.float32),
    )
