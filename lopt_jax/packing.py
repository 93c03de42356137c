"""Keeps the small arrays of an optimizer's state together, so that a step has few arguments.

Handing an array to a compiled step, and taking one back, costs the host about two microseconds,
however small the array is; most arrays of a transformer's state are vectors.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax.applying import LearnedTransformation, steering, update_params, with_extra_args

PACKED_ELEMENTS = 1 << 16  # larger arrays stay as they are


class PackedState(NamedTuple):
    """State of `packed`, of which `unpack_state` makes one of the optimizer itself."""

    apart: tuple  # arrays of the state that stay as they are
    together: tuple  # one array a shape and dtype of the others: (arrays, *shape)


class _Layout(NamedTuple):
    """Where the leaves of a state are in a `PackedState`."""

    treedef: Any
    apart: tuple[int, ...]  # positions among the leaves
    together: tuple[tuple[int, ...], ...]


def packed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with a state of few arrays, for steps that wait for the host.

    Such are steps of small models, and updates that are compiled apart from the gradients. What
    looks for the params' tree in the state (`optax.tree.map_params`, rules that shard by path,
    `lopt_jax.sharding`) does not find it; `unpack_state` restores it. So it is for states that one
    device holds whole, or every device. Call its update inside `jit`: outside, every call finds out
    the state's structure anew.

    Args:
      tx: any optax transformation whose state keeps its structure, shapes and dtypes.

    Returns:
      An optax transformation with state `PackedState`.
    """
    tx = with_extra_args(tx)
    joined = steering(tx, joined_state=True)

    def init(params: Any) -> PackedState:
        return pack_state(tx.init(params))

    def update(
        updates: Any, state: PackedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PackedState]:
        inner = unpack_state(tx, state, updates if params is None else params)
        updates, inner = joined.update(updates, inner, params, **extra_args)
        return updates, pack_state(inner)

    def apply(
        updates: Any, state: PackedState, params: Any, **extra_args: Any
    ) -> tuple[Any, PackedState]:
        inner = unpack_state(tx, state, params)
        params, inner = update_params(joined, updates, inner, params, **extra_args)
        return params, pack_state(inner)

    return LearnedTransformation.of(init, update, apply, ("packed", {"tx": tx}))


def pack_state(state: Any) -> PackedState:
    """Packs the state of an optimizer, for example one that was saved unpacked.

    Args:
      state: any tree of arrays.

    Returns:
      Arrays of more than `PACKED_ELEMENTS` elements, and those that are alone of their shape, as
      they are; the others in one array a shape and dtype, with a leading axis.
    """
    return _pack(_layout_of(state), state)


def unpack_state(tx: optax.GradientTransformation, state: PackedState, params: Any) -> Any:
    """The state of the optimizer that was packed.

    Args:
      tx: the optimizer, not packed.
      state: state of `packed(tx)`.
      params: the parameters, or their shapes.

    Returns:
      A state of tx.

    Raises:
      TypeError: the state is not packed.
      ValueError: it is not one of tx for such params.
    """
    if not isinstance(state, PackedState):
        raise TypeError(
            f"state: expected a PackedState, found {type(state).__name__}; pack_state makes one of "
            "the optimizer's own state."
        )
    expected = jax.eval_shape(tx.init, params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    if shapes(state) != shapes(jax.eval_shape(pack_state, expected)):
        raise ValueError(
            "state: it was not packed from a state of this optimizer for these params; shapes, "
            "dtypes or their number differ."
        )
    return _unpack(_layout_of(expected), state)


def _layout_of(state: Any) -> _Layout:
    leaves, treedef = jax.tree.flatten(state)
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        small = math.prod(leaf.shape) <= PACKED_ELEMENTS
        kinds.setdefault((leaf.shape, leaf.dtype) if small else i, []).append(i)
    apart = sorted(members[0] for members in kinds.values() if len(members) == 1)
    together = (tuple(members) for members in kinds.values() if len(members) > 1)
    return _Layout(treedef, tuple(apart), tuple(together))


@functools.partial(jax.jit, static_argnums=0)
def _pack(layout: _Layout, state: Any) -> PackedState:
    leaves = jax.tree.leaves(state)
    return PackedState(
        tuple(leaves[i] for i in layout.apart),
        tuple(_stack([leaves[i] for i in members]) for members in layout.together),
    )


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    # along the axis that they have: XLA sees through parts of an array that are joined again
    shape = arrays[0].shape
    if not shape:
        return jnp.stack(arrays)
    return jnp.concatenate(arrays).reshape((len(arrays), *shape))


def _unstack(x: jax.Array) -> list[jax.Array]:
    if x.ndim == 1:
        return list(x)
    # the barrier keeps XLA from taking the parts before the reshape, where it does not see through
    count, size, *rest = x.shape
    joined = jax.lax.optimization_barrier(x.reshape((count * size, *rest)))
    return [joined[i * size : (i + 1) * size] for i in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def _unpack(layout: _Layout, state: PackedState) -> Any:
    leaves: list[Any] = [None] * layout.treedef.num_leaves
    for i, x in zip(layout.apart, state.apart, strict=True):
        leaves[i] = x
    for members, rows in zip(layout.together, state.together, strict=True):
        for i, x in zip(members, _unstack(rows), strict=True):
            leaves[i] = x
    return layout.treedef.unflatten(leaves)
