"""The two backends: which of them updates which groups, and how each updates its batches.

The fused kernels update what they can and where it is worth it, XLA the rest.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from lopt_jax.accumulators import Accumulators, Decays, SecondMoments
from lopt_jax.batches import Batch, Group
from lopt_jax.context import Tracing
from lopt_jax.features import NormalizerAxes
from lopt_jax.padded_vectors import alike_vectors, pad_vectors
from lopt_jax.rows import join_trees
from lopt_jax.rules.rule import (
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


def assign_backends(
    rule: Rule,
    backend: str,
    tracing: Tracing,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> tuple[list[Group], list[TensorArrays]]:
    """Decides which groups the fused kernels update.

    Args:
      rule: the rule.
      backend: "auto", "xla" or "pallas".
      tracing: what steers the trace.
      groups: the groups.
      inputs: their arrays.

    Returns:
      Groups and arrays as each backend takes them: for the kernels, vectors of different lengths
      are one padded group.

    Raises:
      NotImplementedError: the backend is "pallas" and the kernels cannot update them.
    """
    groups, inputs = list(groups), list(inputs)
    if backend != "xla" and inputs:
        vectors = alike_vectors(groups, inputs)
        on_kernels = _choices(rule, backend == "pallas", tracing, inputs, vectors)
        groups = [replace(g, on_kernels=on) for g, on in zip(groups, on_kernels, strict=True)]
        groups, inputs = pad_vectors(groups, inputs, vectors)
    return groups, [
        x if group.on_kernels else passes.joined_once(tracing, x, len(group.leaves))
        for group, x in zip(groups, inputs, strict=True)
    ]


def _choices(
    rule: Rule,
    must: bool,
    tracing: Tracing,
    inputs: Sequence[TensorArrays],
    vectors: Sequence[Sequence[int]],
) -> list[bool]:
    """For each group, whether the kernels update it, which they must where they are asked for.

    Of the vectors that may be padded to one length they take all or none.
    """
    kernels = supports.kernels_of(rule.precision, rule.hidden_size)
    reason = supports.unsupported_reason(tracing, kernels, must)
    reason = reason or unknown_decays(inputs[0].accumulators)
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
    is_asked_for = backend == "pallas"
    reason = supports.unsupported_reason(Tracing(), is_asked_for=is_asked_for)
    if backend == "xla" or reason is not None:
        return "xla", ""
    from pallas_kernels import choice

    reason = choice.unsupported_leaf_reason(normalizer_axes, shape, [dtype], is_asked_for)
    return ("kernels", "") if reason is None else ("xla", reason)


def _reasons(choices: Sequence[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, choices)))


# How a backend updates batches


def gradient_statistics(
    rule: Rule,
    tracing: Tracing,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> list[GradientStatistics]:
    """Pass A.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      batches: those of the kernels come first.
      groups: of which the batches are made.
      inputs: the arrays of each group.

    Returns:
      Gradient statistics of each batch, with a leading axis of tensors.
    """
    statistics = []
    if fused := [batch for batch in batches if batch.on_kernels]:
        from pallas_kernels import step

        statistics = step.first_pass(rule, tracing, _units(fused, groups, inputs))
    for batch in batches[len(statistics) :]:
        of_groups = [passes.moments_of(rule, batch.partition, inputs[k]) for k in batch.members]
        statistics.append(of_groups[0] if len(of_groups) == 1 else join_trees(of_groups))
    return statistics


def update(
    rule: Rule,
    tracing: Tracing,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    statistics: Sequence[GradientStatistics],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
    zero: jax.Array | None,
) -> tuple[list[TensorUpdate], list[tuple[Sequence[int], Any]]]:
    """Passes B and C.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      batches: as in `gradient_statistics`.
      groups: of which the batches are made.
      inputs: the arrays of each group.
      statistics: of `gradient_statistics`.
      decays: decay rates.
      settings: of all tensors.
      networks: for each group how XLA runs the network.
      zero: that parts are taken by, see `lopt_jax.compiler.slices`; None: as the kernels like.

    Returns:
      The updates of each group; and by the positions of tensors the statistics of their new
      accumulators, None where the rule keeps none.
    """
    tensors = [group.tensors for group in groups]
    updates: dict[int, TensorUpdate] = {}
    kept: list[tuple[Sequence[int], Any]] = []

    def positions(some: Sequence[Batch]) -> list[int]:
        return [i for batch in some for k in batch.members for i in tensors[k]]

    if fused := [batch for batch in batches if batch.on_kernels]:
        from pallas_kernels import step

        units, own = _units(fused, groups, inputs), positions(fused)
        of_units, of_tensors = step.second_pass(
            rule, tracing, units, statistics[: len(fused)], settings.rows(own), decays, zero
        )
        for batch, made in zip(fused, of_units, strict=True):
            updates |= dict(zip(batch.members, made, strict=True))
        kept.append((own, of_tensors))
    if together := passes.joined_batches(rule, tracing, batches, groups, networks, settings):
        alone = replace(settings, statistics=None)  # small tensors need none of the last step
        members = [batches[i].members[0] for i in together]
        made = passes.small_updates(
            rule,
            tracing.platform,
            [inputs[k] for k in members],
            [statistics[i] for i in together],
            decays,
            [alone.rows(tensors[k]) for k in members],
        )
        updates |= dict(zip(members, made, strict=True))
    for i, batch in enumerate(batches):
        if batch.on_kernels or i in together:
            continue
        own = positions([batch])
        made, of_tensors = passes.updates(
            rule,
            tracing,
            networks[batch.members[0]],
            batch.partition,
            [inputs[k] for k in batch.members],
            statistics[i],
            decays,
            settings.rows(own),
        )
        updates |= dict(zip(batch.members, made, strict=True))
        kept.append((own, of_tensors))
    return [updates[k] for k in range(len(inputs))], kept


def _units(
    batches: Sequence[Batch], groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[Any]:
    """Batches as the kernels take them."""
    from pallas_kernels import step

    return [
        step.Unit(
            [inputs[k] for k in batch.members], batch.partition, groups[batch.members[0]].lengths
        )
        for batch in batches
    ]
