"""Rules that treat every element by itself, leaf by leaf: Adam's and its like."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lopt_jax.tensors import StackedAxes, arrays_like, per_leaf, tensors_of


def step_leaves(
    step: Callable[..., Sequence[jax.Array]],
    gradients: Any,
    averages: Sequence[Any],
    params: Any,
    stacked_axes: StackedAxes,
    scale: jax.Array,
    decay: jax.Array,
) -> tuple[Any, list[Any]]:
    """Takes one step of a rule on every leaf that has a gradient.

    Args:
      step: from a gradient and the averages of a leaf to the step to be subtracted, float32 at
        least, and the new averages in their dtypes.
      gradients: tree like the params, with None where there is none.
      averages: trees like the params.
      params: the parameters.
      stacked_axes: as in `tensors_of`.
      scale: () or (tensors,), multiplies the step.
      decay: () or (tensors,), multiplies the parameter.

    Returns:
      The updates in the parameters' dtypes, None where there is no gradient, and the averages.

    Raises:
      ValueError: an average has another structure than the params.
    """
    leaves, treedef = jax.tree.flatten(params)
    columns = [arrays_like("state: accumulators", tree, params) for tree in averages]
    updates: list[Any] = [None] * len(leaves)
    tensors = tensors_of(params, stacked_axes)
    given = treedef.flatten_up_to(gradients)
    for i, (entry, p, gradient) in enumerate(zip(tensors, leaves, given, strict=True)):
        if gradient is None:
            continue
        direction, *new = step(gradient, *(column[i] for column in columns))
        for column, average in zip(columns, new, strict=True):
            column[i] = average
        total = per_leaf(scale, entry, p) * direction + per_leaf(decay, entry, p) * p
        updates[i] = (-total).astype(p.dtype)
    return treedef.unflatten(updates), [treedef.unflatten(column) for column in columns]
