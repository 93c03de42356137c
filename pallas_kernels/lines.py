"""Row and column vectors of tensors of any shapes, in one array.

Between the passes the kernels' tensors are their vectors alone. All of them lie one behind another
along one axis, so that the few formulas there are are compiled and launched once, however many
shapes there are. Each line (a vector of a matrix; a tensor with a batch or a middle has several)
starts at a multiple of `PIECE`, so an array of lines is also (..., pieces, PIECE), and a kernel
copies what it needs of a line out of it.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.partition import Partition

PIECE = 128


def pieces(length: int) -> int:
    """Pieces that a line takes."""
    return -(-length // PIECE)


@dataclass(frozen=True)
class Block:
    """The lines of equally shaped tensors, or of the shards of them.

    Attributes:
      tensors: their number.
      count: lines of each.
      length: of a line.
      whole: of the vectors of a tensor: its own partition without the reduced dimension.
      axis: the dimension of it that a line lies along.
    """

    tensors: int
    count: int
    length: int
    whole: Partition
    axis: int

    @property
    def size(self) -> int:
        """What the lines of a tensor take."""
        return self.count * pieces(self.length) * PIECE


@dataclass(frozen=True)
class Lines:
    """Where the lines of some blocks lie."""

    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Where they end."""
        return sum(b.tensors * b.size for b in self.blocks)

    def start(self, block: int, tensor: int) -> int:
        """Where the lines of a tensor of a block start."""
        before = sum(b.tensors * b.size for b in self.blocks[:block])
        return before + tensor * self.blocks[block].size

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """(..., lines, length) each, one after another -> (..., pieces, PIECE), zeros between."""

        def padded(x: jax.Array) -> jax.Array:
            *leading, _, length = x.shape
            short = pieces(length) * PIECE - length
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
            return x.reshape((*leading, -1))

        flat = [padded(x) for x in arrays]
        joined = flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=-1)
        return joined.reshape((*joined.shape[:-1], -1, PIECE))

    def line_means(self, x: jax.Array) -> jax.Array:
        """The mean of every line, for each of its pieces: (..., pieces, 1)."""
        line = np.concatenate(
            [
                np.repeat(np.arange(b.tensors * b.count), pieces(b.length)) + first
                for b, first in self._numbered([b.tensors * b.count for b in self.blocks])
            ]
        )
        count = [b.tensors * b.count for b in self.blocks]
        sizes = [b.whole.shape[b.axis] for b in self.blocks]
        names = [b.whole.names([b.axis]) for b in self.blocks]
        return _take(self._means(x, line, count, sizes, names), line)[..., None]

    def tensor_means(self, x: jax.Array) -> jax.Array:
        """The mean of every tensor's vectors: (..., pieces, PIECE) -> (..., tensors)."""
        count = [b.tensors for b in self.blocks]
        sizes = [math.prod(b.whole.shape) for b in self.blocks]
        names = [b.whole.names(range(len(b.whole.shape))) for b in self.blocks]
        return self._means(x, self._tensor, count, sizes, names)

    def of_tensors(self, x: jax.Array) -> jax.Array:
        """From (..., tensors) to (..., pieces, 1): what is the tensor's of every piece."""
        return (_take(x, self._tensor) if x.shape[-1] > 1 else x)[..., None]

    def _numbered(self, counts: Sequence[int]) -> list[tuple[Block, int]]:
        return list(zip(self.blocks, np.cumsum([0, *counts[:-1]]), strict=True))

    @functools.cached_property
    def _tensor(self) -> np.ndarray:
        """The tensor of every piece."""
        return np.concatenate(
            [
                np.repeat(np.arange(b.tensors), b.count * pieces(b.length)) + first
                for b, first in self._numbered([b.tensors for b in self.blocks])
            ]
        )

    def _means(
        self,
        x: jax.Array,
        owners: np.ndarray,
        counts: Sequence[int],
        sizes: Sequence[int],
        names: Sequence[tuple[str, ...]],
    ) -> jax.Array:
        """Means over the pieces of each owner; of a block: how many, of what size, split how."""
        filled = np.concatenate(
            [
                np.tile(np.minimum(b.length - PIECE * np.arange(pieces(b.length)), PIECE), n)
                for b in self.blocks
                for n in [b.tensors * b.count]
            ]
        )
        if (filled < PIECE).any():
            position = jax.lax.broadcasted_iota(jnp.int32, (1, PIECE), 1)
            x = jnp.where(position < filled.astype(np.int32)[:, None], x, 0)
        sums = jnp.sum(x, axis=-1)
        each = np.bincount(owners)
        places = np.arange(each.max())
        firsts = np.cumsum([0, *each[:-1]])
        if (each == each[0]).all():
            sums = jnp.sum(sums.reshape((*sums.shape[:-1], -1, each[0])), axis=-1)
        else:
            of_owner = np.minimum(firsts[:, None] + places, len(owners) - 1)
            sums = jnp.sum(jnp.where(places < each[:, None], _take(sums, of_owner), 0), axis=-1)
        return totals(sums, counts, names) / jnp.asarray(
            np.repeat(np.asarray(sizes, np.float32), counts)
        )


def totals(x: jax.Array, counts: Sequence[int], names: Sequence[tuple[str, ...]]) -> jax.Array:
    """Sums over devices of what each has summed over its shards.

    Args:
      x: (..., entries): blocks of them, one after another.
      counts: entries of a block.
      names: the mesh axes that its sums go over.

    Returns:
      The sums.
    """
    for axes in dict.fromkeys(filter(None, names)):
        summed = jax.lax.psum(x, axes)
        is_split = np.repeat([n == axes for n in names], counts)
        x = summed if is_split.all() else jnp.where(is_split, summed, x)
    return x


def totals_of(arrays: Sequence[tuple[jax.Array, tuple[str, ...]]]) -> list[jax.Array]:
    """Sums over devices of arrays, each over its own mesh axes; one for all of the same axes."""
    out = [x for x, _ in arrays]
    for axes in dict.fromkeys(filter(None, (names for _, names in arrays))):
        members = [i for i, (_, names) in enumerate(arrays) if names == axes]
        joined = jax.lax.psum(jnp.concatenate([out[i].reshape(-1) for i in members]), axes)
        ends = list(itertools.accumulate(out[i].size for i in members))
        for i, part in zip(members, jnp.split(joined, ends[:-1]), strict=True):
            out[i] = part.reshape(out[i].shape)
    return out


def _take(x: jax.Array, positions: np.ndarray) -> jax.Array:
    return x.at[..., positions].get(mode="promise_in_bounds")
