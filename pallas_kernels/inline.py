"""Code that Pallas's Mosaic GPU backend takes as it is: what its own operations cannot say.

Depends on the version of Mosaic GPU as `pallas_kernels.mosaic` does, its only user.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
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
    for position, (row, column) in zip(np.ndindex(registers[0].shape), indices, strict=True):
        row, column = (arith.index_castui(i32, x) for x in (row, column))
        numbers = [_numbers(x[position]) for x in registers]
        for k, of_element in enumerate(zip(*numbers, strict=True)):
            store(row, arith.addi(column, constant(k)), list(of_element))


@dataclass(frozen=True)
class Layers:
    """Refs of a network on the matrix units: `inputs` of a layer go along rows, 16 a step.

    Attributes:
      high, low: parts of the features, operands (rows * 64, inputs).
      weights: one operand a hidden layer: of the first (outputs, 2 * inputs), high and low parts;
        of others (outputs, 3 * inputs), high, high and low parts, which the high, the low and
        again the high parts of a factor meet.
      vectors: fragmented arrays (outputs,): biases of the hidden layers but the first, then the
        weights of the two outputs.
      down: (rows, outputs) float32, a bias of the first layer for every row of the block, or None.
      across: fragmented array (64, outputs): the rest of that bias.
      results: (2, rows, 64) float32, where the outputs go.
    """

    high: Any
    low: Any
    weights: Sequence[Any]
    vectors: Sequence[Any]
    down: Any
    across: Any
    results: Any


def network(layers: Layers, rows: int, together: int, in_flight: int) -> None:
    """Runs the network on a block of rows, 64 elements each.

    Groups of rows take turns: while the matrix units multiply for some, the threads add biases,
    split hidden layers or sum outputs for another.

    Args:
      layers: the refs.
      rows: of the block.
      together: rows of a group.
      in_flight: groups at once.
    """
    waiting = [range(first, first + together) for first in range(0, rows, together)]

    def load() -> list[Any]:
        rows = waiting[0] if waiting else ()
        return [None if layers.down is None else _vector(layers.down, row) for row in rows]

    ahead = load()
    active: list[Iterator[None]] = []
    while waiting or active:
        if waiting and len(active) < in_flight:
            group = _group(layers, waiting.pop(0), ahead)
        else:
            group = active.pop(0)
            _wait(len(active))  # the products of this group are older than those of the others
        if next(group, True) is None:
            active.append(group)
            ahead = load()
    utils.warpgroup_barrier()


def _group(layers: Layers, rows: Sequence[int], down: Sequence[Any]) -> Iterator[None]:
    """The network on some rows; yields where products are under way."""
    biases = [layers.across if x is None else _add(layers.across, x) for x in down]
    sums = [mgpu.WGMMAAccumulator.from_registers(x) for x in biases]
    tiles = ir.MemRefType(layers.weights[0].type).shape[1] // 2
    high, low = (
        utils.memref_slice(layers.weights[0], (slice(None), slice(k, k + tiles)))
        for k in (0, tiles)
    )
    for i, row in enumerate(rows):
        for part, weight in ((layers.high, high), (layers.low, high), (layers.high, low)):
            factor = utils.memref_slice(part, slice(8 * row, 8 * row + 8))
            sums[i] = _product(sums[i], factor, weight)
    _commit()
    yield
    vectors = [[_numbers(x) for x in v.registers.flat] for v in layers.vectors]
    for bias, weight in zip(vectors, layers.weights[1:], strict=False):
        factors = [_relu_split(_finished(x)) for x in sums]
        start = _columns(bias, layers.across)
        sums = [mgpu.WGMMAAccumulator.from_registers(start) for _ in factors]
        for i, factor in enumerate(factors):
            sums[i] = _product(sums[i], factor, weight)
        _commit()
        yield
    for row, x in zip(rows, sums, strict=True):
        _store_outputs(layers.results, row, _finished(x), vectors[-2:])


def _product(start: Any, factor: Any, weight: Any) -> Any:
    weight = utils.memref_transpose(weight, (1, 0, 3, 2))
    return mgpu.wgmma(start, factor, weight, swizzle=2 * _COLUMNS)


def _commit() -> None:
    _effect("wgmma.commit_group.sync.aligned;")


def _wait(pending: int) -> None:
    """Waits until at most this many committed groups of products are under way."""
    _effect(f"wgmma.wait_group.sync.aligned {pending};")


def _effect(instruction: str) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, [], instruction, "", has_side_effects=True)


def _finished(sums: Any) -> Any:
    """The registers of finished products; no use of them moves before this."""
    return mgpu.WGMMAAccumulator(
        _value=fragmented_array.optimization_barrier(sums._value),
        _original_layout=sums._original_layout,
        _sync=False,
    ).value


def _add(x: Any, vector: Sequence[Sequence[Any]]) -> Any:
    """A matrix plus a vector, added to each of its rows."""
    return _with_registers(
        x,
        lambda tile, register: [
            arith.addf(*pair) for pair in zip(_numbers(register), vector[tile], strict=True)
        ],
    )


def _columns(vector: Sequence[Sequence[Any]], like: Any) -> Any:
    """A matrix whose rows are a vector."""
    return _with_registers(like, lambda tile, register: list(vector[tile]))


def _with_registers(like: Any, function: Callable[[int, Any], list[Any]]) -> Any:
    """A matrix in the layout of the matrix units, from (tile of eight columns, register)."""
    registers = np.empty_like(like.registers)
    flat = like.registers.reshape((like.shape[1] // 8, 2))
    out = registers.reshape(flat.shape)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for (tile, half), register in np.ndenumerate(flat):
        out[tile, half] = vector.from_elements(pair, function(tile, register))
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def _vector(ref: Any, row: int) -> list[list[Any]]:
    """What a thread needs of a row of (rows, outputs): two neighbours of every eight."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    start = utils.memref_ptr(utils.memref_slice(ref, row))
    thread = arith.index_castui(i32, gpu.thread_id(gpu.Dimension.x))
    column = arith.shli(arith.andi(thread, constant(3)), constant(1))
    out = []
    for tile in range(ir.MemRefType(ref.type).shape[1] // 8):
        place = arith.addi(column, constant(8 * tile))
        pair = llvm.load(
            ir.VectorType.get((2,), f32), utils.getelementptr(start, [place], f32), alignment=8
        )
        out.append(_numbers(pair))
    return out


def _relu_split(x: Any) -> Any:
    """A factor (64, 3 * columns) of an array's positive numbers: their high, low and high parts.

    High parts are rounded toward zero, so that what remains of a positive number is not negative:
    one instruction each rounds and clips two numbers.

    Args:
      x: fragmented array, float32, in the layout of the matrix units.

    Returns:
      Fragmented array, bfloat16, in the same layout.
    """
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    high, low = np.empty_like(x.registers), np.empty_like(x.registers)
    for position, register in np.ndenumerate(x.registers):
        first, second = _numbers(register)
        words = _split(first, second, roundings=("rz.relu", "rn.relu"))
        high[position], low[position] = (utils.bitcast(word, pair) for word in words)
    registers = np.concatenate([high, low, high], axis=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)


def _store_outputs(results: Any, row: int, hidden: Any, weights: Sequence[Any]) -> None:
    """Stores the sums over the rows of a matrix, weighted in two ways.

    Four neighbouring threads hold a row, and each of them two of the 64 rows. They exchange their
    sums so that at the end each holds one: of its first or second row, in one of the two ways.

    Args:
      results: memref (2, rows, 64) float32 in shared memory.
      row: where to store.
      hidden: fragmented array (64, outputs) float32 in the layout of the matrix units; negative
        numbers count as zero.
      weights: of `_vector`, the weights of the first and of the second sums.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
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


def _split(first: Any, second: Any, roundings: tuple[str, str] = ("rn", "rn")) -> tuple[Any, Any]:
    """High and low parts of two numbers, packed: the first in the lower half."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    constant = lambda x: arith.constant(i32, ir.IntegerAttr.get(i32, x))  # noqa: E731
    high = _pack(first, second, roundings[0])
    back = (
        arith.bitcast(f32, arith.shli(high, constant(16))),
        arith.bitcast(f32, arith.andi(high, constant(-(1 << 16)))),
    )
    rest = [arith.subf(x, h) for x, h in zip((first, second), back, strict=True)]
    return high, _pack(rest[0], rest[1], roundings[1])


def _pack(first: Any, second: Any, rounding: str) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    instruction = f"cvt.{rounding}.bf16x2.f32 $0, $1, $2;"
    return llvm.inline_asm(i32, [second, first], instruction, "=r,f,f")
