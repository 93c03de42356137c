"""Code that Pallas's Mosaic GPU backend takes as it is: what its own operations cannot say.

Depends on the version of Mosaic GPU as `pallas_kernels.mosaic` does, its only user.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_COLUMNS = 16  # of a tile of an operand: eight rows of 32 bytes
_ROWS = 8
_TILE_BYTES = 256


def store_factors(high: Any, low: Any, values: Sequence[Any], shape: tuple[int, int]) -> None:
    """Splits values in high and low parts and stores these as rows of two operands.

    A thread holds an element's values and so stores whole rows, 16 bytes at a time. Within a tile
    of 256 bytes the halves of the rows 4 to 7 are exchanged (the swizzle of 32 bytes), so that
    eight neighbouring threads meet eight different groups of banks.

    Args:
      high: memref of an operand, (elements / 8, columns / 16, 8, 16) bfloat16.
      low: the same.
      values: fragmented arrays of this shape, float32, in one tiled layout.
      shape: (rows, width): an element's row in the operand is row * width + column.
    """
    i32 = ir.IntegerType.get_signless(32)
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    column_tiles = ir.MemRefType(high.type).shape[1]
    layout = values[0].layout
    starts = [utils.memref_ptr(x) for x in (high, low)]
    zero = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))

    def store(row: Any, column: Any, numbers: list[Any]) -> None:
        element = arith.addi(arith.muli(row, constant(shape[1])), column)
        in_tile = arith.andi(element, constant(_ROWS - 1))
        tile = arith.muli(arith.shrui(element, constant(3)), constant(column_tiles * _TILE_BYTES))
        offset = arith.addi(tile, arith.shli(in_tile, constant(5)))
        exchanged = arith.shli(arith.shrui(in_tile, constant(2)), constant(4))
        numbers = numbers + [zero] * (column_tiles * _COLUMNS - len(numbers))
        pairs = [_split(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]
        for part, start in enumerate(starts):
            for chunk in range(2 * column_tiles):
                place = arith.xori(exchanged, constant(chunk % 2 * 16))
                place = arith.addi(arith.addi(offset, place), constant(chunk // 2 * _TILE_BYTES))
                words = [pair[part] for pair in pairs[4 * chunk : 4 * chunk + 4]]
                value = vector.from_elements(ir.VectorType.get((4,), i32), words)
                target = utils.getelementptr(start, [place], ir.IntegerType.get_signless(8))
                llvm.store(value, target, alignment=16)

    registers = [x.registers for x in values]
    indices = layout.thread_idxs(shape)
    for position, (row, column) in zip(
        np.ndindex(registers[0].shape), indices, strict=True
    ):
        row, column = (arith.index_castui(i32, x) for x in (row, column))
        (length,) = ir.VectorType(registers[0][position].type).shape
        for k in range(length):
            numbers = [
                vector.extract(x[position], dynamic_position=[], static_position=[k])
                for x in registers
            ]
            store(row, arith.addi(column, constant(k)), numbers)


def _split(first: Any, second: Any) -> tuple[Any, Any]:
    """High and low parts of two numbers, packed: the first in the lower half."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    high = _pack(first, second)
    back = (
        arith.bitcast(f32, arith.shli(high, constant(16))),
        arith.bitcast(f32, arith.andi(high, constant(-(1 << 16)))),
    )
    return high, _pack(*(arith.subf(x, h) for x, h in zip((first, second), back, strict=True)))


def _pack(first: Any, second: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [second, first], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")
