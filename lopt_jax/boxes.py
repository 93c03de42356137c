"""Flax's boxes around arrays, which name their axes: of linen, such as `Partitioned`, and of NNX.

A state's arrays come in the boxes of the parameters that they belong to. They are known by their
methods: flax takes as long to import as all of this library.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# where NNX's variables name the axes of their arrays, and of the optimizer's; older names last
_SHARDINGS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def is_box(x: Any) -> bool:
    """Whether it is a box: of linen, as `flax.linen.Partitioned`, or a `flax.nnx.Variable`."""
    kind = type(x)
    is_of_linen = hasattr(kind, "replace_boxed") and hasattr(kind, "unbox")
    return is_of_linen or (hasattr(kind, "from_metadata") and hasattr(kind, "get_metadata"))


def content(box: Any) -> Any:
    """The array in a box; None where there is none."""
    return next(iter(jax.tree.leaves(box)), None)


def reboxed(box: Any, array: Any, dims: Sequence[int | None]) -> Any:
    """The box around an array that belongs to its own.

    Args:
      box: the box.
      array: the array.
      dims: for every dimension of the array, the dimension of the boxed one that it is, or None.

    Returns:
      A box of the same type, whose names of axes, mesh axes or logical ones, follow the dimensions.
    """
    if hasattr(box, "from_metadata"):
        metadata = {
            key: _of_dims(value, dims) if key in _SHARDINGS else value
            for key, value in box.get_metadata().items()
        }
        return box.from_metadata(array, metadata)
    new = box.replace_boxed(array)
    return new.replace(names=_of_dims(box.names, dims)) if hasattr(box, "names") else new


def _of_dims(axes: Any, dims: Sequence[int | None]) -> Any:
    """The names of some of the axes, in the form that all of them come in."""
    if axes is None:
        return None
    if isinstance(axes, NamedSharding):
        return NamedSharding(axes.mesh, _of_dims(axes.spec, dims), memory_kind=axes.memory_kind)
    if hasattr(axes, "layout") and hasattr(axes, "sharding"):  # a jax.experimental.layout.Format
        return _of_dims(axes.sharding, dims)
    entries = dict(enumerate(axes))  # there may be fewer than axes
    chosen = (None if dim is None else entries.get(dim) for dim in dims)
    return PartitionSpec(*chosen) if isinstance(axes, PartitionSpec) else tuple(chosen)
