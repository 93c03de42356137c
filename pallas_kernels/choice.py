"""Where the kernels can run, and where they are worth it."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lopt_jax.context import LARGEST_INDEX
from lopt_jax.partition import checked_axes
from lopt_jax.rule import Rule
from pallas_kernels import mosaic
from pallas_kernels.lines import PIECE, pieces
from pallas_kernels.view import view_of

SMALL = "tensors are small"
WORTHWHILE_ELEMENTS = 1 << 14  # of the tensors of a group; smaller ones XLA updates as fast


def unsupported_reason() -> str | None:
    """Why no kernel runs here, part of a sentence, or None."""
    reason = mosaic.unsupported_reason()
    if reason is None and checked_axes():
        return "jax.shard_map checks types here, which kernels do not pass: give it check_vma=False"
    return reason


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
    if rule.features.normalizer_axes != "tensor" and len(shape) > 3:
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
    from pallas_kernels.launches import launch_kind  # not before they are known to run here

    shapes = [part.gradient.shape[1:] for part in parts]
    kinds = [launch_kind(*pair) for pair in zip(parts, shapes, strict=True)]
    taken = {kind for kind, reason in zip(kinds, choices, strict=True) if reason is None} - {None}
    return [
        None if reason == SMALL and kind in taken and not view_of(shape).is_copied else reason
        for reason, kind, shape in zip(choices, kinds, shapes, strict=True)
    ]
