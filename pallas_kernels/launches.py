"""Which tensors one launch of a pass takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.rows import concatenate
from lopt_jax.rules.rule import TensorArrays
from pallas_kernels.plan import Plan
from pallas_kernels.tuning import (
    FIRST,
    SUMS,
    UPDATE,
    WIDE_UPDATE,
    Tuning,
    plan_for,
    view_for,
)
from pallas_kernels.units import Viewed, take_tensors
from pallas_kernels.view import View

LONG_SUM = 4096  # programs' numbers that are added up apart from those of other tensors
BIASES = 1 / 3  # of the largest array: what biases of wide layers may take at a time
LAUNCH_PARTS = 8  # arrays that one launch takes: each one more is code to compile


class InLaunch(NamedTuple):
    """A part, and how a pass sees its tensors."""

    view: View
    part: TensorArrays


@dataclass(frozen=True)
class Launch:
    """Parts that one launch of a pass takes."""

    units: Sequence[Viewed]  # of the batch
    members: Sequence[tuple[int, int]]  # positions: of the unit, of the part in it
    multiprocessors: int  # of the GPU

    def of(self, tuning: Tuning) -> list[InLaunch]:
        """The parts, as a pass sees them."""
        return [
            InLaunch(self.units[i].view(tuning), self.units[i].parts[k]) for i, k in self.members
        ]

    def plan(self, tuning: Tuning, backwards: bool = False) -> Plan:
        """How a pass goes over them."""
        views = tuple(x.view for x in self.of(tuning))
        tensors = self.of(tuning)[0].part.gradient.shape[0]
        return plan_for(self.multiprocessors, views, tensors, tuning, backwards)

    @property
    def tensors(self) -> list[np.ndarray]:
        """Positions of each part's tensors among those of the batch."""
        ends = np.cumsum([0, *(unit.tensors for unit in self.units)])
        out = []
        for i, k in self.members:
            counts = self.units[i].counts
            first = ends[i] + sum(counts[:k])
            out.append(np.arange(first, first + counts[k]))
        return out


def launch_kind(part: TensorArrays, whole: tuple[int, ...]) -> tuple | None:
    """What parts of different shapes have in common where one launch may take them all.

    Args:
      part: the part, or a group's inputs, which are the same arrays.
      whole: the shape of its tensors, where they are shards of the whole ones.

    Returns:
      The number of tensors, their dtypes and what tiles are; None for tensors that are vectors, or
      have a batch or a middle.
    """
    tensors, *shape = part.gradient.shape
    tunings = (FIRST, SUMS, UPDATE, WIDE_UPDATE)
    views = [view_for(tuple(shape), tuning, whole) for tuning in tunings]
    if not views[0].is_factored or views[0].batch * views[0].middle > 1:
        return None
    dtypes = tuple(x.dtype for x in jax.tree.leaves(part))
    return tensors, dtypes, tuple((view.rows, view.width) for view in views)


def launches_of(units: Sequence[Viewed], multiprocessors: int) -> list[Launch]:
    """Which parts one launch takes: of equal numbers of tensors, up to `LAUNCH_PARTS`.

    Launches of parts of the same shapes share a compiled kernel, so each takes as many of every
    shape, as far as possible. Tensors that have a batch or a middle are not mixed with others.

    Args:
      units: the tensors.
      multiprocessors: of the GPU.
    """
    alike: dict[Any, dict[int, list[tuple[int, int]]]] = {}
    for i, unit in enumerate(units):
        for k, part in enumerate(unit.parts):
            key = launch_kind(part, unit.whole.shape) or (i, part.gradient.shape[0])
            alike.setdefault(key, {}).setdefault(i, []).append((i, k))
    return [
        Launch(units, x, multiprocessors) for by_unit in alike.values() for x in _shares(by_unit)
    ]


def _shares(by_unit: dict[int, list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Deals parts out to few launches, most of which have as many parts of every unit."""
    total = sum(map(len, by_unit.values()))

    def cost(launches: int) -> tuple[int, int]:
        dealt = launches * sum(len(parts) // launches for parts in by_unit.values())
        rest = total - dealt
        return launches + -(-rest // LAUNCH_PARTS), rest

    def fits(launches: int) -> bool:
        return 0 < sum(len(parts) // launches for parts in by_unit.values()) <= LAUNCH_PARTS

    count = min(filter(fits, range(1, total + 1)), key=cost)
    out: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    rest = []
    for parts in by_unit.values():
        each = len(parts) // count
        for i, launch in enumerate(out):
            launch += parts[i * each : (i + 1) * each]
        rest += parts[count * each :]
    return out + [rest[i : i + LAUNCH_PARTS] for i in range(0, len(rest), LAUNCH_PARTS)]


def sharing_biases(launches: Sequence["Launch"], hidden: int) -> list[list["Launch"]]:
    """Launches whose biases are made at once: as many as take `BIASES` of the largest array."""
    units = launches[0].units
    limit = BIASES * max(part.gradient.size for unit in units for part in unit.parts)
    out: list[list[Launch]] = []
    size = 0.0
    for launch in launches:
        of_members = (
            units[i].counts[k] * units[i].block(is_row).size
            for i, k in launch.members
            for is_row in (True, False)
        )
        own = hidden * sum(of_members)
        size += own
        if not out or size > limit:
            out.append([])
            size = own
        out[-1].append(launch)
    return out


def added_up(launches: Sequence[Launch], tuning: Tuning, sums: Sequence[jax.Array]) -> jax.Array:
    """The sums of all programs added up, for the tensors in their order.

    Args:
      launches: of a pass.
      tuning: of the pass.
      sums: (tensors, sums, programs) of each launch.

    Returns:
      (tensors, sums).
    """
    short = []
    for launch, x in zip(launches, sums, strict=True):
        plan = launch.plan(tuning)
        each = plan.programs_of_tensor
        if len(set(each)) > 1:
            written = np.asarray(each, np.int32) * (x.shape[2] // max(each))
            written = np.repeat(written, plan.tensors)[:, None, None]
            position = jax.lax.broadcasted_iota(jnp.int32, (1, 1, x.shape[2]), 2)
            x = jnp.where(position < written, x, 0)
        # where others have a few, those of large tensors are added up first
        short.append(x if x.shape[2] <= LONG_SUM else jnp.sum(x, axis=2, keepdims=True))
    most = max(x.shape[2] for x in short)
    added = jnp.sum(concatenate([_padded_to(x, most) for x in short]), axis=2)
    order = np.argsort(np.concatenate([x for launch in launches for x in launch.tensors]))
    return take_tensors(added, order, len(order))


def _padded_to(x: jax.Array, size: int) -> jax.Array:
    short = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
