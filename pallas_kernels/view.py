"""How the kernels see a tensor: as (batch, down, middle, across), cut into tiles.

"across" is the tensor's last axis and one of its two factored axes, "down" the other one, and
"middle" and "batch" are the axes between and before them. So one of the tensor's two factored
vectors does not vary across (its values lie down a tile), and the other does not vary down. A tile
is (rows, width) of down x across at one index of batch and middle, whatever the tensor's rank.

A tensor without factored axes is seen as one batch of lines of 128 elements.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import factored_dims
from pallas_kernels import mosaic

LINE = 128
_ALIGNED_ELEMENTS = 8  # 16 bytes of the narrowest dtype


@dataclass(frozen=True)
class View:
    """How one shape is seen, and how it is cut.

    Attributes:
      shape: the tensor's.
      order: the tensor's axes, so ordered that its last one is factored.
      down_axis: position in `order` of the other factored axis; None: not factored.
      batch, down, middle, across: sizes.
      stored: `across`, rounded up where copies cannot address it.
      rows, width: of a tile.
      vector: neighbouring elements across that one thread holds.
      down_is_row: whether the row accumulator is the one that lies down (or else the column's
        does).
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    down_axis: int | None
    batch: int
    down: int
    middle: int
    across: int
    stored: int
    rows: int
    width: int
    vector: int
    down_is_row: bool

    @property
    def is_factored(self) -> bool:
        """Whether the tensor's second moment is factored."""
        return self.down_axis is not None

    @property
    def is_copied(self) -> bool:
        """Whether the tensor must be transposed or padded first."""
        return self.order != tuple(range(len(self.shape))) or self.padded_elements != math.prod(
            self.shape
        )

    @property
    def padded_elements(self) -> int:
        """Elements with those that pad."""
        return self.batch * self.down * self.middle * self.stored

    @property
    def strips(self) -> int:
        """Tiles across."""
        return -(-self.across // self.width)

    @property
    def tiles_down(self) -> int:
        """Tiles down."""
        return -(-self.down // self.rows)

    def arrange(self, x: jax.Array) -> jax.Array:
        """(B, *shape) -> (B * batch, down, middle, stored)."""
        if not self.is_factored:
            x = x.reshape((x.shape[0], -1))
            short = self.padded_elements - x.shape[1]
            x = jnp.pad(x, ((0, 0), (0, short))) if short else x
            return x.reshape((-1, self.down, 1, LINE))
        x = self._transpose(x).reshape((-1, self.down, self.middle, self.across))
        short = self.stored - self.across
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, short))) if short else x

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `arrange`."""
        if not self.is_factored:
            elements = math.prod(self.shape)
            return x.reshape((-1, self.padded_elements))[:, :elements].reshape((-1, *self.shape))
        ordered = tuple(self.shape[i] for i in self.order)
        x = x[..., : self.across].reshape((-1, *ordered))
        inverse = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return jnp.transpose(x, (0, *(i + 1 for i in inverse)))

    def down_lines(self, x: jax.Array) -> jax.Array:
        """(B, *shape without the across axis) -> (B * batch * middle, down)."""
        x = self._ordered(x, self.order[-1]).reshape((-1, self.down, self.middle))
        return jnp.moveaxis(x, 1, 2).reshape((-1, self.down))

    def across_lines(self, x: jax.Array) -> jax.Array:
        """(B, *shape without the down axis) -> (B * batch * middle, across)."""
        assert self.down_axis is not None
        return self._ordered(x, self.order[self.down_axis]).reshape((-1, self.across))

    def row_lines(self, x: jax.Array) -> jax.Array:
        """Those of the two that hold the row; (lines, length)."""
        return self.down_lines(x) if self.down_is_row else self.across_lines(x)

    def column_lines(self, x: jax.Array) -> jax.Array:
        """Those that hold the column."""
        return self.across_lines(x) if self.down_is_row else self.down_lines(x)

    @property
    def vector_unit(self) -> int:
        """What the number of vectors is rounded up to: copies move multiples of 128 bytes."""
        return max(32 // self.rows, 32 // self.width, 1)

    def restore_down(self, x: jax.Array) -> jax.Array:
        """The inverse of `down_lines`; batch and middle may be axes of their own."""
        ordered = [self.shape[i] for i in self.order]
        x = jnp.moveaxis(x.reshape((-1, self.middle, self.down)), 1, 2).reshape((-1, *ordered[:-1]))
        return self._without(x, self.order[-1])

    def restore_across(self, x: jax.Array) -> jax.Array:
        """The inverse of `across_lines`; batch and middle may be axes of their own."""
        assert self.down_axis is not None
        ordered = [self.shape[i] for i in self.order]
        del ordered[self.down_axis]
        return self._without(x.reshape((-1, *ordered)), self.order[self.down_axis])

    def _transpose(self, x: jax.Array) -> jax.Array:
        return jnp.transpose(x, (0, *(i + 1 for i in self.order)))

    def _ordered(self, x: jax.Array, axis: int) -> jax.Array:
        """Brings an array that lacks one of the tensor's axes into the order."""
        return jnp.transpose(x, (0, *(i - (i > axis) + 1 for i in self.order if i != axis)))

    def _without(self, x: jax.Array, axis: int) -> jax.Array:
        """Undoes that."""
        kept = [i for i in self.order if i != axis]
        inverse = sorted(range(len(kept)), key=lambda i: kept[i])
        return jnp.transpose(x, (0, *(i + 1 for i in inverse)))


@functools.lru_cache(maxsize=4096)
def view_of(
    shape: tuple[int, ...],
    tile_elements: int = 1024,
    vector: int = 4,
    widest: int = LINE,
    narrowest: int = 16,
    whole: tuple[int, ...] | None = None,
) -> View:
    """How the kernels see a shape.

    Args:
      shape: of one tensor, without zeros.
      whole: where the shape is that of a shard: of the whole tensor.
      tile_elements: elements of a tile, about.
      vector: as in `View`.
      widest: largest width of a tile, a power of two.
      narrowest: smallest width of a tile, a power of two.

    Returns:
      The view.
    """
    dims = factored_dims(shape if whole is None else whole)
    order = tuple(range(len(shape)))
    if dims is None:
        across = stored = LINE
        down_axis, batch, down, middle = None, 1, -(-math.prod(shape) // LINE), 1
    else:
        if order[-1] not in dims:
            order = (*(i for i in order if i != dims.d0), dims.d0)
        down_axis = order.index(dims.d1 if order[-1] == dims.d0 else dims.d0)
        ordered = [shape[i] for i in order]
        batch, down = math.prod(ordered[:down_axis]), ordered[down_axis]
        middle, across = math.prod(ordered[down_axis + 1 : -1]), ordered[-1]
        stored = -(-across // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    width = max(min(1 << (across - 1).bit_length(), widest), narrowest)
    step = mosaic.tile_layout(width, vector)[1]
    rows = max(tile_elements // width // step, 1) * step
    sizes = (batch, down, middle, across, stored, rows, width, vector)
    return View(shape, order, down_axis, *sizes, dims is not None and order[-1] == dims.d0)
