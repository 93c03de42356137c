"""How each pass is cut: tiles, stages, programs."""

import functools
from dataclasses import dataclass

import jax

from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import Rule
from pallas_kernels import matrix_units, mosaic
from pallas_kernels.plan import Plan
from pallas_kernels.supports import MATRIX_UNITS, kernels_of
from pallas_kernels.view import View, view_of

MULTIPROCESSORS = 132  # of an H200 and an H100 SXM: where the device does not say


@dataclass(frozen=True)
class Tuning:
    """How a pass is cut; chosen by measurement (docs/kernels.md).

    Attributes:
      tile_elements, widest, narrowest, vector: as in `view_of`.
      stages: tiles in shared memory at once.
      block_rows: rows of a tile in registers at once, if possible; 0: all of them.
      loops: as in `Plan`.
      programs: that a multiprocessor holds at once.
      program_elements: of a program at most, about.
      together, in_flight: as in `Plan`.
    """

    tile_elements: int
    stages: int
    programs: int
    widest: int = 128
    narrowest: int = 16
    vector: int = 4
    block_rows: int = 0
    loops: bool = False
    program_elements: int = 1 << 15
    together: int = 1
    in_flight: int = 1


FIRST = Tuning(tile_elements=2048, widest=256, stages=4, programs=3)
# blocks in a loop: one to five percent slower than straight code, and a quarter of it to compile
SUMS = Tuning(
    tile_elements=2048, stages=2, programs=2, block_rows=4, program_elements=1 << 16, loops=True
)
UPDATE = Tuning(tile_elements=512, stages=3, programs=3, program_elements=1 << 13)
# wide layers leave few registers, so a thread takes few elements
WIDE_UPDATE = Tuning(
    tile_elements=1024, stages=3, programs=2, widest=64, vector=2, block_rows=1, loops=True
)
# on the matrix units: a row of a tile is what one instruction takes; a thread stores whole rows of
# features, which meets no bank twice if neighbouring threads hold neighbouring elements
MATRIX_UPDATE = Tuning(
    tile_elements=512,
    stages=3,
    programs=3,
    widest=matrix_units.WIDTH,
    narrowest=matrix_units.WIDTH,
    vector=1,
    block_rows=2,
    program_elements=1 << 14,
    loops=True,
    in_flight=2,
)


def update_tuning(rule: Rule, hidden: int) -> Tuning:
    """How pass C is cut, given the size of the first hidden layer."""
    if hidden < rules.WIDE_HIDDEN_SIZE:
        return UPDATE
    return MATRIX_UPDATE if uses_matrix_units(rule, hidden) else WIDE_UPDATE


def uses_matrix_units(rule: Rule, hidden: int) -> bool:
    """Whether pass C takes the matrix units."""
    return kernels_of(rule.precision, hidden) == MATRIX_UNITS


def view_for(shape: tuple[int, ...], tuning: Tuning, whole: tuple[int, ...] | None = None) -> View:
    """How a pass sees a shape, of a tensor or of a shard of the whole one."""
    return view_of(
        shape,
        tuning.tile_elements,
        tuning.vector,
        tuning.widest,
        tuning.narrowest,
        whole=whole,
    )


def multiprocessors(device: jax.Device) -> int:
    """How many a device has (an H100 PCIe has 114, an H20 78); those of an H200 if it is no GPU."""
    count = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return count or MULTIPROCESSORS


@functools.lru_cache(maxsize=1024)
def plan_for(
    multiprocessors: int,
    views: tuple[View, ...],
    tensors: int,
    tuning: Tuning,
    backwards: bool = False,
) -> Plan:
    """A plan whose programs fill the GPU once, or for large tensors a few times.

    Never a bit more than that: a wave of few programs takes as long as a full one.

    Args:
      multiprocessors: of the GPU.
      views: how the pass sees the tensors of each part.
      tensors: number of tensors in a part.
      tuning: how the pass is cut.
      backwards: as in `Plan`.

    Returns:
      The plan.
    """
    view = views[0]
    matrices = tensors * view.batch * view.middle
    at_once = tuning.programs * multiprocessors
    tile = view.rows * view.width
    elements = matrices * tile * sum(v.strips * v.tiles_down for v in views)
    waves = -(-elements // (at_once * tuning.program_elements))

    def programs(tiles: int) -> int:
        return matrices * sum(v.strips * -(-v.tiles_down // tiles) for v in views)

    most = max(v.tiles_down for v in views)
    fits = (n for n in range(1, most) if programs(n) <= at_once * waves)
    tiles = next(fits, most)
    rows = min(tuning.block_rows or view.rows, view.rows)
    step = mosaic.tile_layout(view.width, view.vector)[1]
    return Plan(
        views,
        tensors,
        # as equal as they can be
        tuple(-(-v.tiles_down // -(-v.tiles_down // tiles)) for v in views),
        min(tuning.stages, tiles + 1),
        max(rows, step),
        tuning.loops,
        backwards,
        tuning.together,
        tuning.in_flight,
    )
