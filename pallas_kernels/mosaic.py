"""Everything that depends on the version of Pallas's Mosaic GPU backend.

The backend's API changes between releases of jax; the kernels use it through these names alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array, launch_context
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPS = 4

barrier_wait = plgpu.barrier_wait
copy_in = plgpu.copy_gmem_to_smem


def unsupported_reason() -> str | None:
    """Why the kernels cannot run here, or None: they run on Hopper GPUs and in the interpreter."""
    if is_interpreting():
        return None
    device = jax.local_devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"the default device is a {device.platform.upper()}, not an NVIDIA GPU"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return (
            f"{device.device_kind} has compute capability {capability}; the kernels are built for "
            "9.0 (Hopper)"
        )
    return None


def is_interpreting() -> bool:
    """Whether `force_gpu_interpret_mode` is on."""
    from jax._src import config

    value = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return value is not None and value.value is not None


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


def call(
    body: Callable[..., None],
    arguments: Sequence[Any],
    *,
    programs: int,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    name: str,
) -> tuple[jax.Array, ...]:
    """Runs a kernel of one warpgroup a block.

    Args:
      body: takes the program's index, then refs of arguments, outputs and scratch.
      arguments: arrays, or refs that the kernel updates in place.
      programs: number of blocks.
      outputs: shapes and dtypes.
      scratch: of `shared` and `barrier`.
      name: of the kernel, for profiles.

    Returns:
      The outputs.
    """

    def kernel(*refs: Any) -> None:
        if not is_interpreting():
            _adjust()
        body(jax.lax.axis_index("program"), *refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=tuple(outputs),
        scratch_types=tuple(scratch),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=6144,
        ),
    )(*arguments)
