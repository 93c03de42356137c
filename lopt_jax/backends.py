"""Which backend updates which groups: the fused kernels where they can and where it is worth it."""

import functools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from lopt_jax.accumulators import Accumulators, SecondMoments
from lopt_jax.context import steering, tracing
from lopt_jax.features import NormalizerAxes
from lopt_jax.groups import Group, GroupInputs
from lopt_jax.partition import Partition, is_local, say_once
from lopt_jax.rule import Rule
from pallas_kernels import supports

BACKENDS = ("auto", "xla", "pallas")
DECAYS_OF_KERNELS = 3

_logger = logging.getLogger("lopt_jax.engine")  # the name that users know


def batch(size: int) -> AbstractContextManager[None]:
    """Says, while it is traced, that `jax.vmap` makes this many trainings of one.

    Whether the kernels are worth it, "auto" decides by the tensors of all trainings.
    """
    return steering(batch=size)


def batch_size() -> int:
    """Trainings of one, as `batch` says."""
    return tracing().batch


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)


def choose_backend(
    rule: Rule,
    backend: str,
    groups: Sequence[Group],
    inputs: Sequence[GroupInputs],
    vectors: Sequence[Sequence[int]] = (),
) -> list[bool]:
    """For each group, whether the fused kernels update it.

    Args:
      rule: the rule.
      backend: "auto", "xla" or "pallas".
      groups: the groups.
      inputs: of the groups.
      vectors: of `alike_vectors`: where the kernels take one of them, they take all.

    Raises:
      NotImplementedError: the backend is "pallas" and they cannot.
    """
    if backend == "xla" or not inputs:
        return [False] * len(inputs)
    must = backend == "pallas"
    reason = supports.unsupported_reason() or unknown_decays(inputs[0].accumulators)
    choices: list[str | None] = [reason] * len(inputs)
    if reason is None:
        from pallas_kernels import choice

        choices = [
            choice.unsupported_group_reason(
                rule,
                (batch_size() * x.gradient.shape[0], *x.gradient.shape[1:]),
                [leaf.dtype for leaf in jax.tree.leaves(x)],
                must,
            )
            for x in inputs
        ]
        if is_local():
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
    return [
        why is None and kernels_split(group, group.partition, x)
        for why, group, x in zip(choices, groups, inputs, strict=True)
    ]


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
    if backend == "xla" or supports.unsupported_reason() is not None:
        return "xla", ""
    from pallas_kernels import choice

    is_asked_for = backend == "pallas"
    reason = choice.unsupported_leaf_reason(normalizer_axes, shape, [dtype], is_asked_for)
    return ("kernels", "") if reason is None else ("xla", reason)


def _reasons(choices: Sequence[str | None]) -> str:
    return "; ".join(dict.fromkeys(filter(None, choices)))


def kernels_split(group: Group, partition: Partition | None, x: GroupInputs) -> bool:
    """Whether the kernels can update shards: they know of no padding."""
    if partition is None or not partition.is_padded(x.gradient.shape[1:]):
        return True
    say_once(
        f"{group.name}: its shape {partition.shape} does not divide evenly over the devices; XLA "
        "updates its shards, as the fused kernels know of no padding."
    )
    return False
