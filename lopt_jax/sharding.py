"""Sharded optimizer state, and the distributed step for data parallelism.

Under `jit` nothing of this is needed for a right or an efficient update: `update` splits itself as
its arguments are split (see `lopt_jax.partition`). What is needed there is a state that is born
sharded: `state_shardings`. `distributed` is for `shard_map` and `pmap`, where every device runs the
same program on whole parameters and a part of the batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopt_jax import partition
from lopt_jax.accumulators import Accumulators, factored_dims
from lopt_jax.applying import steering, with_extra_args
from lopt_jax.context import Tracing
from lopt_jax.elementwise import Kind, NotElementwiseError, kinds_of_outputs
from lopt_jax.optimizers import common
from lopt_jax.packing import PackedState
from lopt_jax.partition import (
    Partition,
    checked_axes,
    say_once,
    spec_of_dims,
    split_names,
    varying_axes,
)
from lopt_jax.tensors import StackedAxes, arrays_like, tensors_of

AxisName = str | tuple[str, ...]

# `distributed` keeps leaves up to this size whole: their shards would be too small to be worth it.
REPLICATED_ELEMENTS = partition.REPLICATED_ELEMENTS
# A leaf that no device count divides is padded by at most this share, or else kept whole.
LARGEST_PADDING = 1 / 8


# Sharding of the state


@dataclass(frozen=True)
class _OfParam:
    """A leaf of a state that belongs to a parameter."""

    leaf: Any


@dataclass(frozen=True)
class _Factor:
    """A row or column accumulator, where a state's leaf was."""

    kind: str
    leaf: Any


def state_specs(tx: optax.GradientTransformation, params: Any, param_specs: Any) -> Any:
    """Partition specs of an optimizer's state.

    Args:
      tx: an optimizer of ours, or any optax transformation that contains one.
      params: the parameters, or their shapes.
      param_specs: tree of `PartitionSpec`, a prefix of params; None stands for `PartitionSpec()`.

    Returns:
      A tree like the state: momentum and second moment have the spec of their parameter, row and
      column that of the dimensions that they keep (their leading dimension, of decays, is not
      split), whatever belongs to no parameter is replicated. States of optax's own are treated as
      `optax.tree.map_params` sees them: leaves shaped like their parameter have its spec.

    Raises:
      TypeError: something in param_specs is not a spec.
      ValueError: param_specs is not a prefix of params, a spec is longer than its leaf's rank, or
        the state is packed.
    """
    shapes = jax.eval_shape(lambda x: x, params)
    specs = _broadcast_specs(shapes, param_specs)
    state = jax.eval_shape(tx.init, shapes)
    is_packed = lambda x: isinstance(x, PackedState)  # noqa: E731
    if any(map(is_packed, jax.tree.leaves(state, is_leaf=is_packed))):
        raise ValueError(
            "tx: a packed state holds arrays of many parameters in one and cannot be split as they "
            "are; use the optimizer without lopt_jax.packed."
        )
    is_accumulators = lambda x: isinstance(x, Accumulators)  # noqa: E731

    def mark(x: Any) -> Any:
        if not is_accumulators(x):
            return x
        factor = lambda kind, tree: jax.tree.map(lambda leaf: _Factor(kind, leaf), tree)  # noqa: E731
        return x._replace(row=factor("row", x.row), column=factor("column", x.column))

    # Parameters are found by the end of the path: masks leave some out, boxes carry other metadata.
    by_path = {
        tuple(map(str, path)): (spec, tuple(shape.shape))
        for (path, shape), spec in zip(
            jax.tree_util.tree_leaves_with_path(shapes),
            jax.tree.leaves(specs, is_leaf=_is_spec),
            strict=True,
        )
    }
    lengths = sorted({len(path) for path in by_path}, reverse=True)

    def of_leaf(path: Any, x: Any) -> PartitionSpec:
        if not isinstance(x, _OfParam):
            return PartitionSpec()
        keys = tuple(map(str, path))
        ends = (keys[len(keys) - n :] for n in lengths)
        spec, shape = next((by_path[end] for end in ends if end in by_path), (None, ()))
        if spec is None:
            return PartitionSpec()
        if isinstance(x.leaf, _Factor):
            return _factor_spec(x.leaf, spec, shape)
        return spec if x.leaf.shape == shape else PartitionSpec()

    marked = jax.tree.map(mark, state, is_leaf=is_accumulators)
    return jax.tree_util.tree_map_with_path(of_leaf, optax.tree.map_params(tx, _OfParam, marked))


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_specs: Any, mesh: Mesh
) -> Any:
    """Shardings of an optimizer's state on a mesh.

    `jax.jit(tx.init, out_shardings=state_shardings(...))` makes a state that is never whole on one
    device; as the sharding of arrays to restore, it is what Orbax needs.

    Args:
      tx: as in `state_specs`.
      params: as in `state_specs`.
      param_specs: as in `state_specs`.
      mesh: the mesh.

    Returns:
      A tree like the state, of `NamedSharding`.
    """
    specs = state_specs(tx, params, param_specs)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _broadcast_specs(params: Any, param_specs: Any) -> Any:
    """One spec a leaf of params."""

    def of_subtree(spec: Any, subtree: Any) -> Any:
        if spec is not None and not _is_spec(spec):
            raise TypeError(
                "param_specs: expected a tree of jax.sharding.PartitionSpec like the params; found "
                f"{spec!r} of type {type(spec).__name__}."
            )
        return jax.tree.map(lambda _: PartitionSpec() if spec is None else spec, subtree)

    try:
        specs = jax.tree.map(
            of_subtree, param_specs, params, is_leaf=lambda x: x is None or _is_spec(x)
        )
    except ValueError as error:
        raise ValueError(
            "param_specs: expected a tree like the params, or a prefix of it; found "
            f"{jax.tree.structure(param_specs, is_leaf=_is_spec)} for {jax.tree.structure(params)}."
        ) from error
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(specs, is_leaf=_is_spec),
        strict=True,
    ):
        if len(spec) > len(leaf.shape):
            raise ValueError(
                f"param_specs: expected at most {len(leaf.shape)} entries for the leaf "
                f"{jax.tree_util.keystr(path)} of shape {tuple(leaf.shape)}; found {spec}."
            )
    return specs


def _factor_spec(factor: _Factor, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    if factor.leaf.ndim == len(shape) + 1:
        return spec_of_dims(spec, (None, *range(len(shape))))
    if factor.leaf.ndim != len(shape):
        return PartitionSpec()
    kept = factor.leaf.shape[1:]
    without = lambda d: (*shape[:d], *shape[d + 1 :])  # noqa: E731
    for stacked in range(max(len(shape) - 1, 0)):  # how many leading axes hold separate tensors
        dims = factored_dims(shape[stacked:])
        if dims is None:
            continue
        dropped = stacked + (dims.d0 if factor.kind == "row" else dims.d1)
        if without(dropped) == kept:
            return spec_of_dims(spec, (None, *(d for d in range(len(shape)) if d != dropped)))
    return PartitionSpec()


# The distributed step


def _plan(
    params: Any, names: tuple[str, ...], devices: int, stacked_axes: StackedAxes
) -> list[Partition]:
    """How each leaf is spread over this many devices."""
    tensors = tensors_of(params, stacked_axes)
    return [
        _plan_leaf(tuple(leaf.shape), len(entry.stack), names, devices, path)
        for leaf, entry, path in zip(jax.tree.leaves(params), tensors, _paths(params), strict=True)
    ]


def _plan_leaf(
    shape: tuple[int, ...], stacked: int, names: tuple[str, ...], devices: int, path: str
) -> Partition:
    whole = Partition(shape, ((),) * len(shape))
    if devices == 1 or math.prod(shape) <= REPLICATED_ELEMENTS:
        return whole
    padding = lambda d: -shape[d] % devices / shape[d]  # noqa: E731
    # the least padding; of equals the first dimension, whose parts are contiguous
    best = min(range(stacked, len(shape)), key=padding, default=None)
    if best is None or padding(best) > LARGEST_PADDING:
        say_once(
            f"{path}: no dimension of its shape {shape} splits into {devices} parts without more "
            f"than {LARGEST_PADDING:.0%} of padding; every device keeps and updates the whole leaf."
        )
        return whole
    return Partition(shape, tuple(names if d == best else () for d in range(len(shape))))


def distributed_specs(
    tx: optax.GradientTransformation,
    params: Any,
    axis_name: AxisName,
    devices: int,
    stacked_axes: StackedAxes = None,
) -> Any:
    """Partition specs of the state of `distributed(tx, axis_name)`, for `shard_map`.

    Args:
      tx: the transformation given to `distributed`.
      params: the parameters, or their shapes.
      axis_name: as `distributed`'s.
      devices: number of devices along the axis.
      stacked_axes: as `distributed`'s.

    Returns:
      A tree like the state, of `PartitionSpec`.
    """
    specs = list(map(_spec_of, _plan(params, _names(axis_name), devices, stacked_axes)))
    return state_specs(tx, params, jax.tree.structure(params).unflatten(specs))


def distributed(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    stacked_axes: StackedAxes = None,
) -> optax.GradientTransformationExtraArgs:
    """Spreads an optimizer over the devices of a data-parallel program.

    For `shard_map` and `pmap`. Every device calls `update` with the whole parameters, the gradients
    of its part of the batch (not yet averaged) and its loss. Gradients are averaged by a
    reduce-scatter, every device updates its shard with statistics summed over all, and the updates
    are gathered. State memory a device is that of one device over their number; the result is the
    one of a single device with the averaged gradients.

    A leaf is split along the dimension that needs the least padding; leaves of up to
    `REPLICATED_ELEMENTS`, and those that would need more than `LARGEST_PADDING`, are kept whole on
    every device. Under `shard_map`, `distributed_specs` gives the state's specs.

    Args:
      tx: an optimizer of ours, alone or in `optax.chain` with transformations that treat every
        element alike (scaling, weight decay, momenta, schedules, masks, `optax.MultiSteps`).
        One that looks at whole tensors sees only shards and is refused, but for those of this
        library: in place of `optax.clip_by_global_norm` and `optax.apply_if_finite` use the
        functions of these names in this module.
      axis_name: the axis, or axes, over which devices hold different parts of the batch.
      stacked_axes: those given to the optimizer; these axes are never split.

    Returns:
      A transformation whose `init` and `update` are called inside `shard_map` or `pmap`. `value`,
      where given, is averaged over the devices.

    Raises:
      NotImplementedError: at the first update, where a transformation in tx computes something of
        a leaf that is not elementwise; the message names it.
    """
    tx = with_extra_args(tx)
    names = _names(axis_name)

    def plan_of(params: Any) -> dict[str, Partition]:
        plan = _plan(params, names, jax.lax.axis_size(names), stacked_axes)
        return dict(zip(_paths(params), plan, strict=True))

    def init(params: Any) -> Any:
        return _own_state(tx, params, plan_of(params))

    def update(
        updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        common.require_params(params)
        leaves = arrays_like("updates", updates, params)
        updates = jax.tree.structure(params).unflatten(leaves)
        plan = plan_of(params)
        scatter = functools.partial(_scatter, names=names)
        gradients = _map(scatter, plan, updates, params)
        own = _map(Partition.shard, plan, params, params)
        if value is not None:
            extra_args["value"] = _mean(jnp.asarray(value), names)
        whole = tuple(plan.items())
        extra_args["lopt_tracing"] = Tracing(shards=whole)  # for what has no state
        told = steering(tx, shards=whole)
        new, state = _checked(told.update, gradients, state, own, extra_args)
        return _map(Partition.gather, plan, new, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _own_state(tx: optax.GradientTransformation, params: Any, plan: dict[str, Partition]) -> Any:
    """This device's part of the state of whole params."""
    treedef = jax.tree.structure(params)
    specs = [_spec_of(partition) for partition in plan.values()]

    def part(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        axes = tuple(map(split_names, (*spec, *[None] * (jnp.ndim(x) - len(spec)))))
        return Partition(jnp.shape(x), axes).shard(x)

    return jax.tree.map(part, tx.init(params), state_specs(tx, params, treedef.unflatten(specs)))


def _spec_of(partition: Partition) -> PartitionSpec:
    """The spec of an array that is spread so."""
    entries = (names if len(names) > 1 else (names or (None,))[0] for names in partition.axes)
    return PartitionSpec(*entries)


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, right also inside `distributed`.

    Args:
      max_norm: the largest norm of all updates together.

    Returns:
      A transformation without state.
    """
    clip = common.clip_by_global_norm(max_norm)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        clipped, state = clip.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), clipped, updates), state

    return optax.GradientTransformationExtraArgs(clip.init, update)


def apply_if_finite(
    inner: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformationExtraArgs:
    """`optax.apply_if_finite`, right also inside `distributed`: all devices decide alike.

    Put it inside: `distributed(apply_if_finite(tx, 3), axis_name)`. A gradient that is not finite
    on one device makes the mean so, and the others are told. Around `distributed` either function
    would decide by the gradients of one device; where devices decide differently, they wait for
    each other for ever.

    Args:
      inner: an optimizer, or any optax transformation.
      max_consecutive_errors: after so many updates in a row that were left out, the next is made
        whatever its gradients are.

    Returns:
      A transformation with optax's state, `optax.ApplyIfFiniteState`. Where a gradient is not
      finite its updates are zero, and the state of inner stays as it is.
    """
    inner = with_extra_args(inner)

    def init(params: Any) -> optax.ApplyIfFiniteState:
        return optax.ApplyIfFiniteState(
            notfinite_count=jnp.zeros((), jnp.int32),
            last_finite=jnp.array(True),
            total_notfinite=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
        )

    def update(
        updates: Any, state: optax.ApplyIfFiniteState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.ApplyIfFiniteState]:
        common.check_state_type(state, optax.ApplyIfFiniteState)
        is_finite = common.all_finite(extra_args.get("lopt_tracing") or Tracing(), updates)
        count = optax.safe_increment(state.notfinite_count)
        count = jnp.where(is_finite, jnp.zeros_like(count), count)
        new, inner_state = jax.lax.cond(
            is_finite | (count > max_consecutive_errors),
            lambda: inner.update(updates, state.inner_state, params, **extra_args),
            lambda: (optax.tree.zeros_like(updates), state.inner_state),
        )
        total = optax.safe_increment(state.total_notfinite)
        return new, optax.ApplyIfFiniteState(
            notfinite_count=count,
            last_finite=is_finite,
            total_notfinite=jnp.where(is_finite, state.total_notfinite, total),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _paths(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _map(
    function: Callable[[Partition, jax.Array], jax.Array],
    plan: dict[str, Partition],
    tree: Any,
    params: Any,
) -> Any:
    """Maps over the leaves of a tree like the params; None where there is none stays."""
    treedef = jax.tree.structure(params)
    return treedef.unflatten(
        [
            None if x is None else function(partition, x)
            for partition, x in zip(plan.values(), treedef.flatten_up_to(tree), strict=True)
        ]
    )


def _varies(x: jax.Array, names: tuple[str, ...]) -> bool:
    """Whether an array may differ between devices, as far as is known."""
    return not checked_axes() & set(names) or set(names) <= varying_axes(x)


def _mean(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.pmean(x, names) if _varies(x, names) else x


def _scatter(partition: Partition, gradient: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """This device's shard of the mean gradient."""
    if _varies(gradient, names):
        return partition.scatter_mean(gradient, names)
    say_once(
        "distributed: the gradients are summed over devices already, because shard_map "
        "differentiated parameters that it knows to be equal on every device; they are taken as "
        "they are. jax.lax.pcast(params, axis_name, to='varying') before jax.grad, or "
        "check_vma=False, leaves the sum to distributed, at half the communication."
    )
    return partition.shard(gradient)


# Transformations that would be wrong on shards


def _checked(
    update: Callable, gradients: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """Runs a transformation on shards, unless it treats the elements of a leaf differently."""
    arguments = (gradients, state, params)
    flat, treedef = jax.tree.flatten(arguments)

    def run(*leaves: Any) -> tuple[Any, Any]:
        return update(*treedef.unflatten(leaves), **extra_args)

    closed, shape = jax.make_jaxpr(run, return_shape=True)(*flat)
    kinds = [Kind.SHARD if jnp.ndim(x) else Kind.UNIFORM for x in flat]
    try:
        kinds_of_outputs(closed, kinds)
    except NotElementwiseError as error:
        raise NotImplementedError(
            f"distributed: a transformation beside the optimizer computes {error.primitive} of a "
            "leaf. Inside distributed it would see the shard of one device in place of the tensor. "
            "Use lopt_jax.sharding.clip_by_global_norm for optax.clip_by_global_norm, and "
            "lopt_jax.sharding.apply_if_finite for optax.apply_if_finite; apply others to averaged "
            "gradients, without distributed. (If it is a function of lopt_jax, a wrapper around it "
            "loses extra arguments, as optax.MultiSteps inside of a chain does, or changes states.)"
        ) from None
    return jax.tree.structure(shape).unflatten(jax.extend.core.jaxpr_as_fun(closed)(*flat))
