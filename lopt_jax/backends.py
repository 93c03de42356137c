"""The two backends: which of them updates which groups, and how each updates those of a run.

The fused kernels update what they can and where it is worth it, XLA the rest.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax.accumulators import Accumulators, Decays, SecondMoments
from lopt_jax.batches import TURNS, Group, Run, equal
from lopt_jax.context import Tracing
from lopt_jax.device_statistics import of_shards
from lopt_jax.features import NormalizerAxes
from lopt_jax.partition import Partition, Partitions, say_once
from lopt_jax.rows import in_order, join_trees
from lopt_jax.rules.rule import (
    AccumulatorStatistics,
    GradientStatistics,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.settings import TensorSettings
from lopt_jax.xla import passes
from lopt_jax.xla.network import XlaNetwork
from pallas_kernels import supports

BACKENDS = ("auto", "xla", "pallas")
DECAYS_OF_KERNELS = 3

_logger = logging.getLogger("lopt_jax.engine")  # the name that users know


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)


def choose_backend(
    rule: Rule,
    backend: str,
    tracing: Tracing,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    vectors: Sequence[Sequence[int]] = (),
) -> list[bool]:
    """For each group, whether the fused kernels update it.

    Args:
      rule: the rule.
      backend: "auto", "xla" or "pallas".
      tracing: what steers the trace.
      groups: the groups.
      inputs: of the groups.
      vectors: of `alike_vectors`: where the kernels take one of them, they take all.

    Raises:
      NotImplementedError: the backend is "pallas" and they cannot.
    """
    if backend == "xla" or not inputs:
        return [False] * len(inputs)
    must = backend == "pallas"
    reason = supports.unsupported_reason(tracing) or unknown_decays(inputs[0].accumulators)
    choices: list[str | None] = [reason] * len(inputs)
    if reason is None:
        from pallas_kernels import choice

        choices = [
            choice.unsupported_group_reason(
                rule,
                (tracing.batch * x.gradient.shape[0], *x.gradient.shape[1:]),
                [leaf.dtype for leaf in jax.tree.leaves(x)],
                must,
            )
            for x in inputs
        ]
        if tracing.is_local:
            choices = choice.with_company(choices, inputs)
    for members in vectors:
        if any(choices[i] is None for i in members):
            for i in members:
                choices[i] = None
    if must and any(choices):
        reason = next(filter(None, choices))
        raise NotImplementedError(
            f"backend='pallas' cannot run here: {reason}. backend='auto' uses XLA then."
        )
    if reason is not None:
        _log_once(f"Updates run as XLA operations, not as fused kernels: {reason}.")
    else:
        elements = sum(x.gradient.size for x in inputs)
        fused = sum(x.gradient.size for x, why in zip(inputs, choices, strict=True) if why is None)
        _log_once(
            f"Fused kernels update {fused:,} of {elements:,} parameters"
            + ("." if fused == elements else f"; XLA the others, for {_reasons(choices)}.")
        )
    return [why is None for why in choices]


def unknown_decays(accumulators: Accumulators) -> str | None:
    """Why the kernels do not know a rule with such accumulators, part of a sentence, or None."""
    several = isinstance(accumulators.second_moment, SecondMoments)
    if several or len(accumulators.momentum) != DECAYS_OF_KERNELS:
        return f"they know rules of {DECAYS_OF_KERNELS} momenta and one second moment alone"
    return None


def leaf_backend(
    backend: str, shape: Sequence[int], dtype: Any, normalizer_axes: NormalizerAxes
) -> tuple[str, str]:
    """Which backend would update a leaf by itself: for people, who ask before they train.

    Args:
      backend: "auto", "xla" or "pallas".
      shape: (tensors, *shape of each).
      dtype: of the leaf.
      normalizer_axes: of the rule's features.

    Returns:
      "kernels" or "xla", and what of this leaf is a reason for XLA where the kernels run, or "".
    """
    if backend == "xla" or supports.unsupported_reason(Tracing()) is not None:
        return "xla", ""
    from pallas_kernels import choice

    is_asked_for = backend == "pallas"
    reason = choice.unsupported_leaf_reason(normalizer_axes, shape, [dtype], is_asked_for)
    return ("kernels", "") if reason is None else ("xla", reason)


def _reasons(choices: Sequence[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, choices)))


def kernels_split(group: Group, partition: Partition | None, x: TensorArrays) -> bool:
    """Whether the kernels can update shards: they know of no padding."""
    if partition is None or not partition.is_padded(x.gradient.shape[1:]):
        return True
    say_once(
        f"{group.name}: its shape {partition.shape} does not divide evenly over the devices; XLA "
        "updates its shards, as the fused kernels know of no padding."
    )
    return False


# How a backend updates the groups of a run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of the gradients of the tensors of some groups, joined.

    Attributes:
      members: positions of the groups.
      moments: with a leading axis of tensors.
    """

    members: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    moments: GradientStatistics


class _Batch(NamedTuple):
    """Groups of a run whose tensors are equal and split alike."""

    members: list[int]  # positions among the groups of the run
    partition: Partition | None
    on_kernels: bool


def _batches(
    run: Run, groups: Sequence[Group], inputs: Sequence[TensorArrays], partitions: Partitions
) -> list[_Batch]:
    """The batches of a run; what the kernels cannot take because of how it is split is XLA's."""
    batches = []
    for members in equal(range(len(groups)), groups, inputs, partitions):
        partition = partitions[members[0]]
        splits = [
            run.on_kernels and kernels_split(groups[k], partition, inputs[k]) for k in members
        ]
        able = all(splits)
        if able or (run.in_turn and len(members) >= TURNS):
            batches.append(_Batch(members, partition, able))
        else:
            batches += [_Batch([k], partition, False) for k in members]
    return batches


def gradient_statistics(
    rule: Rule,
    tracing: Tracing,
    run: Run,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    partitions: Partitions,
) -> list[GroupStatistics]:
    """Pass A over the groups of a run.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      run: the run.
      groups: its groups.
      inputs: their arrays.
      partitions: for each group how its tensors are split; None: they are whole.

    Returns:
      Gradient statistics, whose members are positions among the groups of the run.
    """
    batches = _batches(run, groups, inputs, partitions)
    on_kernels = [batch for batch in batches if batch.on_kernels]
    made = []
    if on_kernels:
        from pallas_kernels import step

        moments = step.first_pass(rule, tracing, _units(on_kernels, groups, inputs))
        pairs = zip(on_kernels, moments, strict=True)
        made += [GroupStatistics(tuple(batch.members), x) for batch, x in pairs]
    for batch in batches:
        for k in [] if batch.on_kernels else batch.members:
            made.append(GroupStatistics((k,), passes.moments_of(rule, batch.partition, inputs[k])))
    return made


def update(
    rule: Rule,
    tracing: Tracing,
    run: Run,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    partitions: Partitions,
    moments: Sequence[GroupStatistics],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
    zero: jax.Array | None,
    moments_are_whole: bool = False,
) -> tuple[list[TensorUpdate], AccumulatorStatistics | None]:
    """Passes B and C over the groups of a run.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      run: the run.
      groups: its groups.
      inputs: their arrays.
      partitions: for each group how its tensors are split; None: they are whole.
      moments: of `gradient_statistics`.
      decays: decay rates.
      settings: of the run's tensors.
      networks: for each group how XLA runs the network.
      zero: that parts are taken by, see `lopt_jax.compiler.slices`; None: as the kernels like.
      moments_are_whole: whether the moments are those of whole tensors where these are split.

    Returns:
      The updates of each group, and where the rule keeps statistics, these for all tensors.
    """
    ends = np.cumsum([0, *(x.gradient.shape[0] for x in inputs)])
    known = {x.members: x.moments for x in moments}

    def tensors(members: Sequence[int]) -> list[int]:
        return [i for k in members for i in range(ends[k], ends[k + 1])]

    def moments_of(batch: _Batch) -> GradientStatistics:
        whole = known.get(tuple(batch.members))
        if whole is None:
            whole = join_trees([known[(k,)] for k in batch.members])
        dims = groups[batch.members[0]].dims
        return of_shards(whole, batch.partition, dims) if moments_are_whole else whole

    updates: dict[int, TensorUpdate] = {}
    statistics: list[tuple[list[int], Any]] = []
    batches = _batches(run, groups, inputs, partitions)
    on_kernels = [batch for batch in batches if batch.on_kernels]
    if on_kernels:
        from pallas_kernels import step

        positions = tensors([k for batch in on_kernels for k in batch.members])
        of_batches, kept = step.second_pass(
            rule,
            tracing,
            _units(on_kernels, groups, inputs),
            list(map(moments_of, on_kernels)),
            settings.rows(positions),
            decays,
            zero,
        )
        for batch, of_batch in zip(on_kernels, of_batches, strict=True):
            updates |= dict(zip(batch.members, of_batch, strict=True))
        statistics.append((positions, kept))
    for batch in batches:
        if batch.on_kernels:
            continue
        positions = tensors(batch.members)
        results, kept = passes.updates(
            rule,
            tracing,
            networks[batch.members[0]],
            batch.partition,
            [inputs[k] for k in batch.members],
            moments_of(batch),
            decays,
            settings.rows(positions),
        )
        updates |= dict(zip(batch.members, results, strict=True))
        statistics.append((positions, kept))
    in_run = [updates[k] for k in range(len(inputs))]
    if any(kept is None for _, kept in statistics):
        return in_run, None
    return in_run, in_order(statistics)


def _units(
    batches: Sequence[_Batch], groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[Any]:
    """Batches as the kernels take them."""
    from pallas_kernels import step

    return [
        step.Unit(
            [inputs[k] for k in batch.members], batch.partition, groups[batch.members[0]].lengths
        )
        for batch in batches
    ]
