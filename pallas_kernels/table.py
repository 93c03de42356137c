"""Numbers that a kernel reads one at a time: the network of a tensor, decays, scales."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_COLUMNS = 256  # at most
_UNIT = 32  # columns are a multiple: 128 bytes


@dataclass(frozen=True)
class Entry:
    """An array in a table; indexed like the array, it reads single numbers in a kernel."""

    shape: tuple[int, ...]
    offset: int

    def at(self, ref: Any) -> "Numbers":
        """The entry in a table that lies in shared memory."""
        return Numbers(self, ref)


@dataclass(frozen=True)
class Numbers:
    """An array of which a kernel reads single numbers."""

    entry: Entry
    ref: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.entry.shape

    def __getitem__(self, index: int | tuple[int, ...]) -> jax.Array:
        """One number; the index is static."""
        index = index if isinstance(index, tuple) else (index,)
        position = self.entry.offset
        stride = 1
        for i, n in zip(reversed(index), reversed(self.shape), strict=True):
            position += i * stride
            stride *= n
        columns = self.ref.shape[1]
        return self.ref[position // columns, position % columns]

    def __iter__(self) -> Any:
        """The numbers of a vector."""
        return (self[i] for i in range(self.shape[0]))


def pack(arrays: Any, tensors: int) -> tuple[jax.Array, Any]:
    """Packs arrays with a leading axis of tensors into a table a tensor.

    Args:
      arrays: pytree of arrays, each (tensors, ...).
      tensors: their number.

    Returns:
      The tables, (tensors, rows, columns) float32, and the tree of their entries.
    """
    leaves, treedef = jax.tree.flatten(arrays)
    entries: list[Entry] = []
    size = 0
    for x in leaves:
        entries.append(Entry(tuple(x.shape[1:]), size))
        size += math.prod(x.shape[1:])
    flat = jnp.concatenate([_flatten(x) for x in leaves], axis=1)
    columns = min(-(-size // _UNIT) * _UNIT, _COLUMNS)
    rows = -(-size // columns)
    flat = jnp.pad(flat, ((0, 0), (0, rows * columns - size)))
    return flat.reshape((tensors, rows, columns)), treedef.unflatten(entries)


def _flatten(x: jax.Array) -> jax.Array:
    return x.reshape((x.shape[0], -1)).astype(jnp.float32)


def read(entries: Any, ref: Any) -> Any:
    """The tree of entries as numbers of a table that lies in shared memory."""
    return jax.tree.map(lambda e: e.at(ref), entries, is_leaf=lambda e: isinstance(e, Entry))


def repeat(x: Any, tensors: int) -> jax.Array:
    """Gives a value that all tensors share a leading axis of tensors."""
    x = jnp.asarray(x, jnp.float32)
    return jnp.broadcast_to(x, (tensors, *x.shape))


def sequence(numbers: Numbers) -> Any:
    """The numbers of a vector, read at once; the formulas index them as they do an array."""
    return tuple(numbers)
