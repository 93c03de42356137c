"""Whole tensors dealt out over devices: each is one device's work, not that of all.

Some functions need whole tensors, such as the orthogonalisation of a matrix. Where devices hold
parts of tensors, each device gets the parts of some tensors, computes these whole, and sends the
parts back. Where devices hold copies, each computes some and all get the results.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lopt_jax.context import Tracing
from lopt_jax.partition import Partition, pad_to


def devices_of(tracing: Tracing) -> tuple[str, ...]:
    """The mesh axes of the devices that run the code of a shard; none where there is one device."""
    return tracing.axes or tuple(jax.sharding.get_abstract_mesh().manual_axes)


def dealt(
    function: Callable[[jax.Array], jax.Array],
    tensors: jax.Array,
    partition: Partition,
    axes: tuple[str, ...],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """A function of whole tensors, each computed by one device.

    Args:
      function: from (n, *whole shape) to the same; every tensor by itself.
      tensors: (count, *shape): this device's part of each tensor.
      partition: how each tensor is split.
      axes: the mesh axes of all devices. Along those that do not split the tensors, devices hold
        copies.
      dtype: in which tensors travel.

    Returns:
      (count, *shape), dtype of the tensors: this device's part of each result.
    """
    split = {dim: names for dim, names in enumerate(partition.axes, 1) if names}
    holders = tuple(name for names in split.values() for name in names)
    rest = tuple(name for name in axes if name not in holders)
    shares = math.prod(map(jax.lax.axis_size, holders))
    copies = math.prod(map(jax.lax.axis_size, rest))
    count = len(tensors)
    if -(-count // (shares * copies)) == -(-count // shares):
        rest, copies = (), 1  # nothing is gained by sharing further
    if shares * copies == 1:
        return function(tensors)

    parts = {dim: math.prod(map(jax.lax.axis_size, names)) for dim, names in split.items()}
    own = pad_to(tensors, 0, count + -count % (shares * copies)).astype(dtype)
    if holders:
        own = jax.lax.all_to_all(own, holders, split_axis=0, concat_axis=0, tiled=True)
        own = _joined(own, parts)
    if rest:
        own = jax.lax.dynamic_index_in_dim(
            own.reshape((copies, -1, *own.shape[1:])), jax.lax.axis_index(rest), keepdims=False
        )
    padded_shape = own.shape
    own = own[(slice(None), *map(slice, partition.shape))]
    own = function(own.astype(tensors.dtype)).astype(dtype)
    for dim, size in enumerate(padded_shape):
        own = pad_to(own, dim, size)
    if rest:
        own = jax.lax.all_gather(own, rest, axis=0, tiled=True, to="invarying")
    if holders:
        own = _parted(own, parts)
        own = jax.lax.all_to_all(own, holders, split_axis=0, concat_axis=0, tiled=True)
    return own[:count].astype(tensors.dtype)


def _joined(x: jax.Array, parts: Mapping[int, int]) -> jax.Array:
    """Whole tensors from parts: (devices * n, *part) to (n, *whole).

    Args:
      x: the parts of n tensors that every device sent, the first dimension's devices major.
      parts: into how many parts a dimension is split.
    """
    split = sorted(parts)
    x = x.reshape((*(parts[dim] for dim in split), -1, *x.shape[1:]))
    order = []  # the axis of a dimension's devices stands before the dimension
    for dim in range(x.ndim - len(split)):
        order += [split.index(dim)] if dim in parts else []
        order.append(len(split) + dim)
    sizes = [parts.get(dim, 1) * size for dim, size in enumerate(x.shape[len(split) :])]
    return jnp.transpose(x, order).reshape(sizes)


def _parted(x: jax.Array, parts: Mapping[int, int]) -> jax.Array:
    """The inverse of `_joined`."""
    split = sorted(parts)
    shape: list[int] = []
    places: list[int] = []
    for dim, size in enumerate(x.shape):
        if dim in parts:
            places.append(len(shape))
            shape += [parts[dim], size // parts[dim]]
        else:
            shape.append(size)
    others = [d for d in range(len(shape)) if d not in places]
    x = jnp.transpose(x.reshape(shape), (*places, *others))
    return x.reshape((-1, *x.shape[len(split) + 1 :]))
