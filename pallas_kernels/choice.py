"""Which tensors the kernels can update, where they run at all, and where they are worth it."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lopt_jax.context import LARGEST_INDEX
from lopt_jax.features import NormalizerAxes
from lopt_jax.rules.rule import Rule
from pallas_kernels.launches import launch_kind
from pallas_kernels.lines import PIECE, pieces
from pallas_kernels.view import view_of

SMALL = "tensors are small"
WORTHWHILE_ELEMENTS = 1 << 14  # of the tensors of a group; smaller ones XLA updates as fast


def unsupported_group_reason(
    rule: Rule, shape: Sequence[int], dtypes: Sequence[Any], is_asked_for: bool
) -> str | None:
    """Why the kernels do not update tensors of a shape, or None.

    Args:
      rule: the rule.
      shape: (tensors, *shape of each).
      dtypes: of their arrays.
      is_asked_for: the user asked for the kernels by name: then only what is impossible counts.

    Returns:
      The reason, part of a sentence.
    """
    return unsupported_leaf_reason(rule.features.normalizer_axes, shape, dtypes, is_asked_for)


def unsupported_leaf_reason(
    normalizer_axes: NormalizerAxes, shape: Sequence[int], dtypes: Sequence[Any], is_asked_for: bool
) -> str | None:
    """The same, of a rule whose features are normalised over these axes."""
    if normalizer_axes != "tensor" and len(shape) > 3:
        return "normalisers are over matrices of tensors of higher rank"
    for dtype in map(jnp.dtype, dtypes):
        if dtype.itemsize not in (2, 4):
            return f"arrays are {dtype.name}"
    if largest_index(tuple(shape)) > LARGEST_INDEX:
        return "an axis, or the row and column vectors, are longer than 32 bits count"
    if is_asked_for:
        return None
    if math.prod(shape) < WORTHWHILE_ELEMENTS:
        return SMALL
    if view_of(tuple(shape[1:])).is_copied:
        return "sizes are not aligned to 16 bytes"
    return None


def largest_index(shape: tuple[int, ...]) -> int:
    """What the kernels count to: along an axis as they see it, or along all lines of vectors.

    Args:
      shape: (tensors, *shape of each).

    Returns:
      The largest number.
    """
    view = view_of(shape[1:])
    lines = shape[0] * view.batch * view.middle * (pieces(view.down) + pieces(view.across)) * PIECE
    return max(view.down, view.across, lines if view.is_factored else 0)


def with_company(choices: Sequence[str | None], parts: Sequence[Any]) -> list[str | None]:
    """Has the kernels take small tensors that a launch for others can take along.

    Args:
      choices: of each part, why the kernels do not update it, or None.
      parts: their arrays, as `step.Part` has them.

    Returns:
      The choices.
    """
    shapes = [part.gradient.shape[1:] for part in parts]
    kinds = [launch_kind(*pair) for pair in zip(parts, shapes, strict=True)]
    taken = {kind for kind, reason in zip(kinds, choices, strict=True) if reason is None} - {None}
    return [
        None if reason == SMALL and kind in taken and not view_of(shape).is_copied else reason
        for reason, kind, shape in zip(choices, kinds, shapes, strict=True)
    ]
