"""Everything that depends on the version of Pallas's Mosaic GPU backend.

The backend's API changes between releases of jax; the kernels use it through these names alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import core, fragmented_array, launch_context
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import inline
from pallas_kernels.supports import is_interpreting

WARPS = 4
OPERAND_COLUMNS = 16  # of one step of a matrix product; columns of operands are a multiple
_OPERAND_TRANSFORMS: Any = (
    plgpu.TilingTransform((8, OPERAND_COLUMNS)),  # type: ignore[abstract]
    plgpu.SwizzleTransform(2 * OPERAND_COLUMNS),  # type: ignore[abstract]
)

barrier_wait = plgpu.barrier_wait


def shared(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> Any:
    """A buffer in shared memory."""
    return plgpu.SMEM(tuple(shape), dtype)


def barrier(arrivals: int, count: int = 1) -> Any:
    """Barriers in shared memory that copies arrive at."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def tile_layout(width: int, vector: int = 4) -> tuple[Any, int]:
    """The layout of a tile in the registers of a warpgroup.

    Args:
      width: columns of the tile, a power of two from 16, at most 128 of which go to one warp.
      vector: neighbouring columns that one thread holds.

    Returns:
      The layout of tiles (rows, width), and the number that rows must be a multiple of.
    """
    across = min(width // vector, 32)
    down = 32 // across
    tiles = ((WARPS * down, across * vector), (down, across * vector), (1, vector))
    tiled = fragmented_array.TiledLayout(
        fragmented_array.Tiling(tiles), (-6,), (-4, -3), -1, _check_canonical=False
    ).canonicalize()
    layout = plgpu.Layout.TILED(tiled.tiling, tiled.warp_dims, tiled.lane_dims, tiled.vector_dim)
    return layout, WARPS * down


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    """Loads a tile into registers."""
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store(ref: Any, value: jax.Array, optimized: bool = True) -> None:
    """Stores a tile or a vector from registers."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)
    else:  # before jax 0.12
        ref[...] = value


def scalars(ref: Any) -> Any:
    """A buffer to read numbers from; in the interpreter, where reads are slow, an array."""
    return ref[...] if is_interpreting() else ref


def spread(vector: jax.Array, shape: tuple[int, int], axis: int, layout: Any) -> jax.Array:
    """Repeats a vector along the other axis of a tile, without taking more registers."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(vector, shape, (axis,)), layout)


def constant(value: float, shape: tuple[int, int], layout: Any) -> jax.Array:
    """A tile of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def positions(shape: tuple[int, int], axis: int, layout: Any) -> jax.Array:
    """The index of every element of a tile along an axis."""
    return plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout), layout)


def synchronize() -> None:
    """Waits for every thread; makes its writes to shared memory visible to the copy engine."""
    plgpu.commit_smem()


def copy_in(source: Any, target: Any, arrived: Any) -> None:
    """Starts a copy from global to shared memory, which arrives at a barrier."""
    plgpu.copy_gmem_to_smem(source, target, arrived)


def copy_out(sources: Sequence[Any], targets: Sequence[Any]) -> None:
    """Starts copies from shared to global memory, awaited together."""
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        plgpu.copy_smem_to_gmem(source, target, commit_group=i == len(sources) - 1)


def await_reads(pending: int) -> None:
    """Waits until at most this many groups of `copy_out` still read shared memory."""
    plgpu.wait_smem_to_gmem(pending, wait_read_only=True)


def await_writes() -> None:
    """Waits until every `copy_out` is complete."""
    plgpu.wait_smem_to_gmem(0)


def any_of(parts: Sequence[Any], index: Any) -> Callable[[Callable[[Any], None]], None]:
    """Copies to and from one of several sets of arrays, which one known at run time.

    A branch for each set would do, but the compiler makes a loop of each branch: minutes for eight.
    What a copy needs of an array is its descriptor, and those of the sets lie one behind another.

    Args:
      parts: trees of refs of arrays in global memory, equal in structure, shapes and dtypes.
      index: which of them, the same for all copies.

    Returns:
      A function that calls a function of one of the trees, which may only start copies.
    """
    if len(parts) == 1:
        return lambda do: do(parts[0])
    if is_interpreting():
        return lambda do: jax.lax.switch(index, [functools.partial(do, part) for part in parts])
    sets = tuple(tuple(jax.tree.leaves(part)) for part in parts)
    types = jax.tree.map(lambda _: plgpu.RefType(), sets)

    @plgpu.inline_mgpu(arg_types=(types, plgpu.Layout.WG_SPLAT(())))
    def choose(context: Any, sets: Any, index: Any) -> None:
        _choose_descriptors(context, list(zip(*sets, strict=True)), index.registers.item())

    choose(sets, index)
    return lambda do: do(parts[0])


def _choose_descriptors(context: Any, alternatives: Sequence[Sequence[Any]], index: Any) -> None:
    """Makes the descriptor of the first of some arrays that of the one with an index.

    Args:
      context: of the launch; from here on.
      alternatives: values of arrays, those that stand for each other together.
      index: int32 value.
    """
    argument = launch_context._find_kernel_argument_for_gmem_ref
    known = [[argument(x) for x in arrays] for arrays in alternatives]
    size = launch_context.TMA_DESCRIPTOR_BYTES
    descriptor_of = context._get_tma_desc

    def descriptor(array: Any, *arguments: Any, **options: Any) -> Any:
        array = argument(array)
        for arrays in known:
            if arrays[0] == array:
                start = context.scratch.next_offset
                first, *_ = [descriptor_of(x, *arguments, **options) for x in arrays]
                if context.scratch.next_offset - start not in (0, size * len(arrays)):
                    raise NotImplementedError("descriptors of copies do not lie side by side")
                number = ir.IntegerType.get_signless(64)
                offset = arith.muli(arith.extsi(number, index), arith.constant(number, size))
                byte, flags = ir.IntegerType.get_signless(8), llvm.GEPNoWrapFlags.none
                is_dynamic = -(1 << 31)
                return llvm.getelementptr(first.type, first, [offset], [is_dynamic], byte, flags)
        return descriptor_of(array, *arguments, **options)

    context._get_tma_desc = descriptor


@plgpu.inline_mgpu()
def _adjust(context: Any) -> None:
    """Changes, for the kernel that is being built, what its copies become."""
    _copy_by_descriptor(context)
    _load_words(context.scratch)
    _simplify(context)
    # asked for with every descriptor, and searched for in the whole kernel
    pointer = context.scratch.device_ptr()
    context.scratch.device_ptr = lambda: pointer


def _copy_by_descriptor(context: Any) -> None:
    """Has every copy clip at the ends of its array's axes.

    A copy out of whole rows is not else: it is taken for one of neighbouring bytes, and what lies
    beyond the last row of a matrix overwrites the next matrix.
    """
    copy = context.async_copy

    def async_copy(**options: Any) -> None:
        copy(**options | {"oob_mode": launch_context.OOBFillMode.ZEROS})

    context.async_copy = async_copy


def _load_words(scratch: Any) -> None:
    """Has descriptors loaded by the word.

    They are loaded at once, to be a kernel's argument. By the byte, as they come, LLVM takes tens
    of seconds for those of eight sets of arrays; by the word less than one.
    """
    finalize = scratch.finalize_size

    def finalize_size() -> None:
        allocation, load, _ = scratch._find_alloc_load_and_device_ptr()
        finalize()
        words = ir.Type.parse(f"!llvm.array<{scratch.next_offset // 16} x vector<2xi64>>")
        allocation.elem_type = ir.TypeAttr.get(words)
        load.result.set_type(words)

    scratch.finalize_size = finalize_size


def _simplify(context: Any) -> None:
    """Has constants and other common code joined before the kernel is handed on.

    It leaves a third of the operations. The kernel is written, read and verified several times, and
    XLA searches its text for every operand of every launch.
    """
    finalize = context.scratch.finalize_size

    def finalize_size() -> None:
        finalize()
        module = context.module
        passes = passmanager.PassManager.parse("builtin.module(canonicalize,cse)", module.context)
        passes.run(module.operation)

    context.scratch.finalize_size = finalize_size


def compiled_apart(static_argnums: tuple[int, ...]) -> Callable[[Callable], Callable]:
    """Decorates a function that is compiled apart, so that equally shaped arrays share its code.

    Kernels differ in interpreted and compiled form, so that is part of the key.

    Args:
      static_argnums: positions of arguments that are not arrays, as in `jax.jit`.

    Returns:
      The decorator.
    """

    def decorated(function: Callable) -> Callable:
        def keyed(interpreted: bool, *arguments: Any) -> Any:
            del interpreted
            return function(*arguments)

        keyed.__name__ = function.__name__
        compiled = jax.jit(keyed, static_argnums=(0, *(i + 1 for i in static_argnums)))

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return compiled(is_interpreting(), *arguments)

        return call

    return decorated


def call(
    body: Callable[..., None],
    arguments: Sequence[Any],
    *,
    programs: int,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    name: str,
    reduction_bytes: int = 6144,
) -> tuple[jax.Array, ...]:
    """Runs a kernel of one warpgroup a block.

    Args:
      body: takes the program's index, then refs of arguments, outputs and scratch.
      arguments: arrays, or refs that the kernel updates in place.
      programs: number of blocks.
      outputs: shapes and dtypes.
      scratch: of `shared` and `barrier`.
      name: of the kernel, for profiles.
      reduction_bytes: shared memory for sums across warps.

    Returns:
      The outputs.
    """

    def kernel(*refs: Any) -> None:
        if not is_interpreting():
            _adjust()
        body(jax.lax.axis_index("program"), *refs)

    kernel.__name__ = name
    run = plgpu.kernel(
        kernel,
        out_type=tuple(outputs),
        scratch_types=tuple(scratch),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=reduction_bytes,
        ),
    )
    with jax.enable_x64(False):  # Mosaic counts in 32 bits
        return run(*arguments)


def lowered_kernels() -> dict[bytes, bytes]:
    """The code of the kernels that this process has lowered, by hash."""
    return getattr(core, "KNOWN_KERNELS", {})


def call_lowered(key: bytes, module: bytes) -> jax.Array:
    """The call of a kernel of `lowered_kernels` without its arrays: to compile, not to run."""
    call = jax.ffi.ffi_call("mosaic_gpu_v2", jax.ShapeDtypeStruct((), jnp.float32))
    return call(
        kernel_hash=key,
        module=module,
        use_custom_barrier=False,
        skip_device_barrier=False,
        uses_xla_collective_metadata=False,
    )


def materialized(arrays: Any) -> Any:
    """Arrays that are not parts of others, of what a kernel takes or makes.

    What is a part of another array, as a layer's parameters are of those of all layers or a loop's
    result is of those of all turns, XLA has a kernel read or write where it lies. Mosaic refuses it
    there if its first byte is no multiple of 256. And of a kernel that changes arrays XLA forgets
    then which outputs are inputs: it would read what was never written.
    """
    # one by one: together they would all have to be there before the first is used
    return jax.tree.map(jax.lax.optimization_barrier, arrays)


def in_place(
    run: Callable[[Any], Sequence[jax.Array]], arrays: Any, outputs: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Any, tuple[jax.Array, ...]]:
    """Runs a kernel that changes some of its arguments.

    As one operation without effects: where jax lowers a function on its own, as it does for
    `custom_partitioning`, it refuses refs that were made with `jax.new_ref`.

    Args:
      run: from refs of the arrays to what the kernel returns.
      arrays: pytree of what it changes.
      outputs: shapes and dtypes of what it returns.

    Returns:
      The changed arrays, and what it returned; all of them whole, as `materialized` says.
    """

    def body(refs: Any) -> None:
        changed, results = refs
        for ref, value in zip(results, run(changed), strict=True):
            ref[...] = value

    empty = tuple(jnp.zeros(x.shape, x.dtype) for x in outputs)  # never read, so never made
    return materialized(pl.run_state(body)((arrays, empty)))


# ------------------------------------------------------------------------------------------------
# Matrix units. A factor is a pair of bfloat16 arrays, high and low part, whose sum has 16 bits of
# the float32's 24; products leave out the product of the low parts. The interpreter knows no
# inlined code: there the same sums are taken in jnp.

MATRIX_ROWS = 64  # of the first factor, a multiple
matrix_layout = plgpu.Layout.WGMMA


def operand(shape: Sequence[int]) -> Any:
    """A matrix in shared memory that the matrix units read."""
    return plgpu.SMEM(tuple(shape), jnp.bfloat16, transforms=_OPERAND_TRANSFORMS)


def network(
    high: Any,
    low: Any,
    weights: Sequence[Any],
    vectors: Sequence[jax.Array],
    down: Any,
    across: jax.Array,
    results: Any,
    *,
    together: int,
    in_flight: int,
) -> None:
    """A network on the rows of a block of elements, from their features to its two outputs.

    At its end threads have waited for each other: they may read all results.

    Args:
      high: high parts of the features, an operand (rows * 64, inputs).
      low: the low parts.
      weights: one operand a hidden layer: of the first (outputs, 2 * inputs), high and low parts;
        of others (outputs, 3 * inputs), high, high and low parts.
      vectors: (outputs,) each, in `matrix_layout` without its rows: biases of the hidden layers but
        the first, then the weights of the two outputs.
      down: (rows, outputs) float32, a bias of the first layer for every row of the block, or None.
      across: (64, outputs) in `matrix_layout`, the rest of that bias.
      results: (2, rows, 64) float32, where the outputs go, without their bias.
      together: rows whose products start at once.
      in_flight: how many such groups are under way.
    """
    rows = results.shape[1]
    if is_interpreting():
        _emulated_network(high, low, weights, vectors, down, across, results)
        return
    operands = plgpu.RefType(_OPERAND_TRANSFORMS)
    plain = plgpu.RefType()
    vector = matrix_layout.reduce(0)

    @plgpu.inline_mgpu(
        arg_types=(
            [vector] * len(vectors),
            None if down is None else plain,
            plain,
            matrix_layout,
            operands,
            operands,
            [operands] * len(weights),
        )
    )
    def run(
        _: Any,
        vectors: Any,
        down: Any,
        results: Any,
        across: Any,
        high: Any,
        low: Any,
        weights: Any,
    ) -> None:
        layers = inline.Layers(high, low, weights, vectors, down, across, results)
        inline.network(layers, rows, together, in_flight)

    run(list(vectors), down, results, across, high, low, list(weights))


def split(x: jax.Array, toward_zero: bool = False) -> tuple[jax.Array, jax.Array]:
    """High and low parts, bfloat16, of an array of any layout outside of kernels."""
    if toward_zero:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    else:  # XLA takes a conversion to bfloat16 and back for the identity
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _emulated_network(
    high: Any,
    low: Any,
    weights: Any,
    vectors: Sequence[jax.Array],
    down: Any,
    across: Any,
    results: Any,
) -> None:
    """The same sums as `inline.network`, for the interpreter."""
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731

    def product(parts: tuple[Any, Any], weight: Any) -> jax.Array:
        first, second = map(wide, parts)
        inputs = first.shape[1]
        big, small = wide(weight[...])[:, :inputs].T, wide(weight[...])[:, -inputs:].T
        return first @ big + second @ big + first @ small

    start = across[None] if down is None else down[...][:, None] + across
    start = jnp.broadcast_to(start, (results.shape[1], *across.shape))
    hidden = product((high[...], low[...]), weights[0]) + start.reshape(-1, start.shape[-1])
    for bias, weight in zip(vectors, weights[1:], strict=False):
        parts = split(jnp.maximum(hidden, 0), toward_zero=True)
        hidden = product(parts, weight) + bias
    last = jnp.stack(vectors[-2:])
    results[...] = jnp.dot(last, jnp.maximum(hidden, 0).T).reshape(results.shape)


def store_factors(
    high: Any, low: Any, values: Sequence[jax.Array], shape: tuple[int, int], layout: Any
) -> None:
    """Stores the columns of a factor, from registers to two operands.

    Args:
      high: operand (elements, columns) for the high parts.
      low: the same for the low parts.
      values: one array (rows, width) a column, float32; further columns are set to zero. Elements
        of `high` are in the order of their rows, then of their columns.
      shape: (rows, width).
      layout: of `values`.
    """
    if is_interpreting():
        columns = [jnp.broadcast_to(x, shape).reshape(-1) for x in values]
        columns += [jnp.zeros_like(columns[0])] * (high.shape[1] - len(columns))
        high[...], low[...] = split(jnp.stack(columns, axis=1))
        return
    reference = plgpu.RefType(_OPERAND_TRANSFORMS)

    @plgpu.inline_mgpu(arg_types=(reference, reference, *([layout] * len(values))))
    def store(_: Any, high: Any, low: Any, *values: Any) -> None:
        inline.store_factors(high, low, values, shape)

    store(high, low, *(plgpu.layout_cast(x, layout) for x in values))
