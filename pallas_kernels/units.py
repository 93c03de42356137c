"""Tensors as the kernels take them.

Tensors come in units of equal shape. (Tensors with one axis may have different lengths, padded with
zeros to that of the longest.) A unit comes in parts: arrays with a leading axis of tensors, that
were never joined because that would copy them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.accumulators import FactoredDims, factored_dims
from lopt_jax.partition import Partition
from lopt_jax.rules.rule import TensorArrays
from pallas_kernels import mosaic
from pallas_kernels.lines import Block, totals
from pallas_kernels.operands import Elements
from pallas_kernels.tuning import FIRST, SUMS, Tuning, view_for
from pallas_kernels.view import View


class Unit(NamedTuple):
    """Equally shaped tensors."""

    parts: Sequence[TensorArrays]
    partition: Partition | None = None  # where they are shards, without padding, of what
    lengths: Sequence[int] | None = None  # of all tensors, where they are padded vectors


@dataclass(frozen=True)
class Viewed:
    """A unit and how the kernels see it."""

    parts: Sequence[TensorArrays]
    shape: tuple[int, ...]
    whole: Partition
    lengths: Sequence[int] | None

    @classmethod
    def of(cls, unit: Unit) -> "Viewed":
        """Looks at a unit."""
        shape = unit.parts[0].gradient.shape[1:]
        whole = unit.partition or Partition(shape, ((),) * len(shape))
        return cls(unit.parts, shape, whole, unit.lengths)

    @property
    def dims(self) -> FactoredDims | None:
        """The factored dimensions of a tensor."""
        return factored_dims(self.whole.shape)

    @property
    def tensors(self) -> int:
        """Their number."""
        return sum(self.counts)

    @property
    def elements(self) -> np.ndarray:
        """Elements of every tensor, float32."""
        if self.lengths is None:
            return np.full((self.tensors,), math.prod(self.whole.shape), np.float32)
        # a batch of those that have the lengths
        return np.tile(np.asarray(self.lengths, np.float32), self.tensors // len(self.lengths))

    def view(self, tuning: Tuning) -> View:
        """A tensor, as a pass sees it."""
        return view_for(self.shape, tuning, self.whole.shape)

    @property
    def counts(self) -> list[int]:
        """Tensors of each part."""
        return [part.gradient.shape[0] for part in self.parts]

    @property
    def vector_axes(self) -> tuple[int, int]:
        """The dimensions that lie down and across."""
        view = self.view(FIRST)
        assert view.down_axis is not None
        return view.order[view.down_axis], view.order[-1]

    def block(self, is_row: bool) -> Block:
        """Its lines, of the row or the column."""
        assert self.dims is not None
        view, (d1, d0) = self.view(SUMS), self.dims
        length = view.down if view.down_is_row == is_row else view.across
        reduced, axis = (d0, d1) if is_row else (d1, d0)
        lines = view.batch * view.middle
        return Block(self.tensors, lines, length, self.whole.reduced(reduced), axis)


def elements_of(view: View, part: TensorArrays, are_joined: bool = False) -> Elements:
    """The arrays of a part for B and C, which share what copies these take.

    Joined parameters are whole; behind a barrier, those of pass A would be kept until then.
    """
    old, whole = part.accumulators, functools.partial(arranged, view)
    averages = () if view.is_factored else tuple(jnp.moveaxis(old.row, 1, 0))
    return Elements(
        gradient=view.arrange(as_laid_out(part.gradient)),
        parameter=(view.arrange if are_joined else whole)(part.parameter),
        momentum=tuple(map(whole, old.momentum)),
        second_moment=whole(old.second_moment),
        average=tuple(map(whole, averages)),
    )


def arranged(view: View, x: jax.Array) -> jax.Array:
    """A whole array, as a pass takes it."""
    return view.arrange(mosaic.materialized(x))


def as_laid_out(x: jax.Array) -> jax.Array:
    """The array, in whatever layout its producer has it.

    The kernels take row-major arrays. XLA carries such a demand backwards, and of a gradient that
    is a sum over a batch it lays out the terms so that they lie side by side: with them a model's
    activations (docs/kernels.md). An array with one axis has no layout, so it carries no demand.
    """
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def take_tensors(tree: Any, positions: np.ndarray, count: int) -> Any:
    """What belongs to some of the tensors, from arrays for all of them."""
    if np.array_equal(positions, np.arange(count)):
        return tree
    first, last = int(positions[0]), int(positions[-1]) + 1
    if np.array_equal(positions, np.arange(first, last)):
        return jax.tree.map(lambda x: x[first:last], tree)
    return jax.tree.map(lambda x: x[positions], tree)


def whole_means(sums: jax.Array, units: Sequence[Viewed]) -> jax.Array:
    """Means over the whole tensors of some units from sums over shards, (tensors, sums)."""
    counts = [unit.tensors for unit in units]
    names = [unit.whole.names(range(len(unit.shape))) for unit in units]
    elements = np.concatenate([unit.elements for unit in units])
    return totals(sums.T, counts, names).T / elements[:, None]
