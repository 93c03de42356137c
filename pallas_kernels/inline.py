"""Code that Pallas's Mosaic GPU backend takes as it is: what its own operations cannot say.

Depends on the version of Mosaic GPU as `pallas_kernels.mosaic` does, its only user.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

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
        numbers = [_numbers(x[position]) for x in registers]
        for k, of_element in enumerate(zip(*numbers, strict=True)):
            store(row, arith.addi(column, constant(k)), list(of_element))


def split(x: Any) -> tuple[Any, Any]:
    """The high and the low parts of an array whose registers hold two neighbours each.

    Args:
      x: fragmented array, float32.

    Returns:
      Two fragmented arrays, bfloat16, in the layout of `x`.
    """
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    parts = tuple(np.empty_like(x.registers) for _ in range(2))
    for position, register in np.ndenumerate(x.registers):
        for part, word in zip(parts, _split(*_numbers(register)), strict=True):
            part[position] = utils.bitcast(word, pair)
    high, low = (
        mgpu.FragmentedArray(_registers=part, _layout=x.layout, _is_signed=None) for part in parts
    )
    return high, low


def store_outputs(
    results: Any, row: int, hidden: Any, direction: Sequence[Any], magnitude: Sequence[Any]
) -> None:
    """Stores the sums over the rows of a matrix, weighted in two ways.

    Four neighbouring threads hold a row, and each of them two of the 64 rows. They exchange their
    sums so that at the end each holds one: of its first or second row, in one of the two ways.

    Args:
      results: memref (2, rows, 64) float32 in shared memory.
      row: where to store.
      hidden: fragmented array (64, H) float32 in the layout of the matrix units; negative numbers
        count as zero.
      direction: fragmented array (H,), the weights of the first sums.
      magnitude: the same of the second sums.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    weights = [[_numbers(x) for x in w.registers.flat] for w in (direction, magnitude)]
    registers = hidden.registers.reshape((hidden.shape[1] // 8, 2))
    sums = [[zero, zero], [zero, zero]]  # of each of the two rows, in each way
    for tile in range(registers.shape[0]):
        for half in range(2):
            for k, x in enumerate(_numbers(registers[tile, half])):
                x = arith.maximumf(x, zero)
                for way in range(2):
                    sums[half][way] = llvm.intr_fma(x, weights[way][tile][k], sums[half][way])
    thread = arith.index_castui(i32, gpu.thread_id(gpu.Dimension.x))

    def bit(k: int) -> Any:
        is_set = arith.andi(thread, constant(1 << k))
        return arith.cmpi(arith.CmpIPredicate.ne, is_set, constant(0))

    def exchange(k: int, if_not_set: Any, if_set: Any) -> Any:
        kept = arith.select(bit(k), if_set, if_not_set)
        given = arith.select(bit(k), if_not_set, if_set)
        return arith.addf(kept, utils.shfl_bfly(given, 1 << k))

    by_way = [exchange(0, first, second) for first, second in zip(*sums, strict=True)]
    out = exchange(1, *by_way)
    # of 64 rows a warp has 16, a thread's two are 8 apart
    shift = lambda x, k: arith.shli(x, constant(k))  # noqa: E731
    warp = arith.andi(arith.shrui(thread, constant(5)), constant(3))
    line = arith.andi(arith.shrui(thread, constant(2)), constant(7))
    first_bit = arith.andi(thread, constant(1))
    second_bit = arith.andi(arith.shrui(thread, constant(1)), constant(1))
    place = arith.addi(arith.addi(shift(warp, 4), line), shift(first_bit, 3))
    rows, width = ir.MemRefType(results.type).shape[1:]
    place = arith.addi(place, arith.muli(second_bit, constant(rows * width)))
    place = arith.addi(place, constant(row * width))
    llvm.store(out, utils.getelementptr(utils.memref_ptr(results), [place], f32))


def _numbers(register: Any) -> list[Any]:
    (length,) = ir.VectorType(register.type).shape
    return [
        vector.extract(register, dynamic_position=[], static_position=[k]) for k in range(length)
    ]


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
