"""A kernel that nobody runs, with all that the others use of Mosaic: can this jax lower it?"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic

_SHAPE = _ROWS, _WIDTH = 8, mosaic.MATRIX_ROWS  # of its only tile
_UNITS = mosaic.OPERAND_COLUMNS  # of the network's hidden layers
_OUT = jax.ShapeDtypeStruct((2, *_SHAPE), jnp.float32)


def lower() -> None:
    """Lowers the kernel for an NVIDIA GPU, on whatever machine; raises what stops it."""
    part = jax.ShapeDtypeStruct(_SHAPE, jnp.float32)
    weights = [jax.ShapeDtypeStruct((_UNITS, n * _UNITS), jnp.bfloat16) for n in (2, 3)]
    vectors = jax.ShapeDtypeStruct((3, _UNITS), jnp.float32)
    down = jax.ShapeDtypeStruct((_ROWS, _UNITS), jnp.float32)
    # a function of its own: nothing of it is cached, so a second probe asks again
    call = jax.jit(lambda *operands: _call(*operands))
    call.trace([part, part], weights, vectors, down).lower(lowering_platforms=("cuda",))


def _call(
    parts: Sequence[jax.Array], weights: Sequence[jax.Array], vectors: jax.Array, down: jax.Array
) -> Any:
    copied = (parts[0], *weights, down)
    buffers = [mosaic.shared(_SHAPE, jnp.float32), *(mosaic.operand(w.shape) for w in weights)]
    factor = mosaic.operand((_ROWS * _WIDTH, _UNITS))
    scratch = [
        *(*buffers, mosaic.shared(down.shape, jnp.float32)),
        *(factor, factor, mosaic.shared(_OUT.shape, jnp.float32)),
        mosaic.barrier(len(copied)),
    ]

    def run(parts: Sequence[Any]) -> Sequence[jax.Array]:
        return mosaic.call(
            _body,
            [*parts, *weights, vectors, down],
            programs=len(parts),
            outputs=[_OUT],
            scratch=scratch,
            name="lopt_probe",
        )

    return mosaic.in_place(run, parts, [_OUT])


def _body(program: Any, *refs: Any) -> None:
    """Copies a part, known at run time, runs a network on it, and changes it in place."""
    (*parts, first, second, vectors, down, out), scratch = refs[:7], refs[7:]
    tile, *weights, bias, high, low, results, arrived = scratch
    of_part = mosaic.any_of(parts, program)
    of_part(lambda part: mosaic.copy_in(part, tile, arrived))
    for source, target in zip((first, second, down), (*weights, bias), strict=True):
        mosaic.copy_in(source, target, arrived)
    mosaic.barrier_wait(arrived)
    layout, _ = mosaic.tile_layout(_WIDTH)
    values = mosaic.load(tile, layout) + mosaic.constant(1.0, _SHAPE, layout)
    mosaic.store_factors(high, low, [values], _SHAPE, layout)
    mosaic.synchronize()
    matrix = mosaic.matrix_layout
    rows = [mosaic.load(vectors.at[k], matrix.reduce(0), optimized=False) for k in range(3)]
    across = mosaic.spread(rows[0], (_WIDTH, _UNITS), 1, matrix)
    mosaic.network(high, low, weights, rows, bias, across, results, together=1, in_flight=2)
    mosaic.store(tile, values)
    mosaic.synchronize()
    of_part(lambda part: mosaic.copy_out([tile, results], [part, out]))
    mosaic.await_writes()
