"""The network of a block on the matrix units, for hidden layers of 16 and more.

Elements are the rows of a matrix of features, written to shared memory as a high and a low part of
16 bits each; hidden layers stay in registers. Each product is three products of 16-bit numbers,
summed in float32: high by high, low by high, high by low. What is left out is 2^-18 of a product.
The last layer, two outputs, is a sum on the ordinary units.

Biases of the first layer that do not vary down are held in registers for a whole strip; those that
do not vary across are added a row at a time: both are where a product's sum starts. Of a tensor
that is not factored the bias is one of the vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic

WIDTH = mosaic.MATRIX_ROWS  # of a tile: a row of it is what one instruction takes
UNITS = 16  # hidden layers are padded to a multiple


class Matrices(NamedTuple):
    """A folded network as the matrix units read it, H its hidden units rounded up.

    The first layer's biases are those of a launch alone: of all launches they are the largest
    arrays of a step. Of tensors that are not factored they are the first of the vectors.
    """

    weights: Any  # one (tensors, H, columns) bfloat16 a hidden layer, as `mosaic.network` has them
    vectors: Any  # (tensors, hidden layers + 1, H): the biases but the first; the last weights
    biases: Any = None  # (size, H): lines, one behind another; None: not factored
    down: Any = None  # (parts,) int32: where the lines down each part's tensors begin
    across: Any = None  # the same for those across


class Held(NamedTuple):
    """What the threads of a program keep in registers."""

    across: jax.Array  # (WIDTH, H): the bias that all rows of a strip share
    vectors: Sequence[jax.Array]  # (H,) each, as in `Matrices`


class Layers(NamedTuple):
    """The weights of a network as the matrix units read them, without those that vary."""

    weights: Any
    vectors: Any


def pack(
    first: jax.Array,
    layers: Sequence[tuple[jax.Array, jax.Array]],
    bias: jax.Array | None = None,
) -> Layers:
    """A network's matrices.

    Args:
      first: (tensors, outputs, inputs), folded first layers.
      layers: (tensors, outputs, inputs) and (tensors, outputs) of each layer but the first.
      bias: (tensors, outputs), of the first layer, where that is not in lines.

    Returns:
      The matrices.
    """
    tensors, hidden, inputs = first.shape
    units = _units(hidden)
    columns = -(-inputs // mosaic.OPERAND_COLUMNS) * mosaic.OPERAND_COLUMNS
    last_weight, _ = layers[-1]

    def parts(weight: jax.Array, columns: int, is_first: bool) -> jax.Array:
        high, low = mosaic.split(_padded(weight, (tensors, units, columns)))
        return jnp.concatenate([high, low] if is_first else [high, high, low], axis=2)

    biases = [] if bias is None else [bias]
    biases += [bias for _, bias in layers[:-1]]
    vectors = jnp.concatenate([*(x[:, None] for x in biases), last_weight], axis=1)
    hidden_layers = [parts(weight, units, is_first=False) for weight, _ in layers[:-1]]
    return Layers(
        weights=(parts(first, columns, is_first=True), *hidden_layers),
        vectors=_padded(vectors, (tensors, vectors.shape[1], units)),
    )


def pack_biases(biases: jax.Array) -> jax.Array:
    """(hidden, size) -> (size, hidden rounded up)."""
    hidden, size = biases.shape
    return _padded(biases.T, (size, _units(hidden)))


def _units(hidden: int) -> int:
    return -(-hidden // UNITS) * UNITS


def _padded(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


@dataclass(frozen=True)
class Blocks:
    """How blocks of a tile meet the matrix units.

    Attributes:
      shape: of a block, (rows, `WIDTH`).
      layout: of a block in registers.
      together: rows of a block whose products start at once.
      in_flight: how many such groups take turns.
    """

    shape: tuple[int, int]
    layout: Any
    together: int
    in_flight: int

    def scratch(self, matrices: Matrices) -> list:
        """Buffers for the factors and for the outputs."""
        columns = matrices.weights[0].shape[2] // 2
        factor = mosaic.operand((self.shape[0] * self.shape[1], columns))
        return [factor, factor, mosaic.shared((2, *self.shape), jnp.float32)]

    def held(self, across: Any, vectors: Any) -> Held:
        """What stays in registers, from global memory.

        Args:
          across: (WIDTH, H), the part of `Matrices.biases` that is a strip's; None: there is none.
          vectors: (rows, H), a tensor's.

        Returns:
          The bias and the vectors.
        """
        layout = mosaic.matrix_layout
        rows = range(vectors.shape[0])
        load = lambda ref, layout: mosaic.load(ref, layout, optimized=False)  # noqa: E731
        loaded = [load(vectors.at[k], layout.reduce(0)) for k in rows]
        if across is not None:
            return Held(load(across, layout), loaded)
        shape = (WIDTH, vectors.shape[1])
        return Held(mosaic.spread(loaded[0], shape, 1, layout), loaded[1:])

    def outputs(
        self,
        values: Sequence[jax.Array],
        weights: Sequence[Any],
        down: Any,
        held: Held,
        scratch: Sequence[Any],
    ) -> tuple[jax.Array, jax.Array]:
        """The network on a block.

        Args:
          values: the element features, blocks in registers.
          weights: operands, one a hidden layer.
          down: ref (rows of the block, H); None: there is no such bias.
          held: of `held`.
          scratch: refs of `scratch`.

        Returns:
          Direction and magnitude without their bias, blocks in registers.
        """
        high, low, results = scratch
        mosaic.store_factors(high, low, values, self.shape, self.layout)
        mosaic.synchronize()
        mosaic.network(
            high,
            low,
            weights,
            held.vectors,
            down,
            held.across,
            results,
            together=self.together,
            in_flight=self.in_flight,
        )
        direction, magnitude = (mosaic.load(results.at[i], self.layout) for i in range(2))
        return direction, magnitude
