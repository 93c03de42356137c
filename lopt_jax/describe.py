"""What an optimizer does with each leaf of a model: a table to print."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax.applying import LearnedTransformation
from lopt_jax.backends import leaf_backend
from lopt_jax.context import Tracing
from lopt_jax.optimizers.common import tree_of_mask
from lopt_jax.optimizers.plans import LEARNED, LeafPlan, Matrix
from lopt_jax.optimizers.roles import matrix_sizes
from lopt_jax.tensors import StackedAxes, Tensors, check_params, prefix_of_params, tensors_of
from pallas_kernels import supports


@dataclass(frozen=True)
class LeafDescription:
    """What is done with one leaf.

    Attributes:
      path: where the leaf is in the tree.
      shape: of the leaf.
      tensors: how many tensors it holds: the product of its stacked axes.
      matrix: rows and columns of each of its matrices; None where the rule sees no matrices.
      rule: "adamw", "learned", or the optimizer's name where it has one rule for all.
      scale: what multiplies the step beside the learning rate: of `lopt`, the size of a full step.
      decay: what multiplies the optimizer's weight decay.
      backend: "kernels" or "xla".
      reason: why this rule, and why this backend where it is not the kernels; where that has one
        reason for all leaves, the description's note says it.
    """

    path: str
    shape: tuple[int, ...]
    tensors: int
    matrix: tuple[int, int] | None
    rule: str
    scale: float
    decay: float
    backend: str
    reason: str


_TITLES = ("leaf", "shape", "tensors", "matrix", "rule", "scale", "decay", "backend", "why")


@dataclass(frozen=True)
class Description:
    """A description of every leaf; it prints as a table.

    Attributes:
      optimizer: the optimizer, with its settings.
      note: why no leaf is updated by kernels, where that has one reason; else "".
      leaves: a description of each leaf, in the order of `jax.tree.leaves`.
    """

    optimizer: str
    note: str
    leaves: tuple[LeafDescription, ...]

    def __repr__(self) -> str:
        rows = [_TITLES, *(_cells(leaf) for leaf in self.leaves)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self.optimizer, *filter(None, [self.note]), "", *lines])


def _cells(leaf: LeafDescription) -> tuple[str, ...]:
    return (
        leaf.path,
        str(leaf.shape),
        str(leaf.tensors),
        "" if leaf.matrix is None else f"{leaf.matrix[0]} x {leaf.matrix[1]}",
        leaf.rule,
        f"{leaf.scale:.3g}",
        f"{leaf.decay:.3g}",
        leaf.backend,
        leaf.reason,
    )


def describe(tx: Any, params: Any) -> Description:
    """What an optimizer of this library does with each leaf, and why; it computes nothing.

    Args:
      tx: what one of the library's constructors returned, or `lopt_jax.packed` of it: not a chain
        around it.
      params: the parameters, or a tree of shapes, such as `jax.eval_shape` gives.

    Returns:
      A description that prints as a table: for every leaf its shape, its tensors, the rule that
      updates it, with which scale and decay, on which backend, and why.

    Raises:
      TypeError: tx is no optimizer of this library's, or params are no arrays.
    """
    while isinstance(tx, LearnedTransformation) and tx.origin and tx.origin[0] == "packed":
        tx = tx.origin[1]["tx"]  # it does with each leaf what the optimizer inside does
    params = check_params(params)
    if not isinstance(tx, LearnedTransformation) or tx.origin is None:
        raise TypeError(
            "describe: expected what a constructor of lopt_jax returns, as tx = "
            f"lopt_jax.lopt(1000); found {_kind(tx)}. Describe the optimizer inside: optax's "
            "wrappers do not say what they hold, so keep it in a name of its own."
        )
    name, arguments = tx.origin
    stacked_axes: StackedAxes = arguments.get("stacked_axes")
    tensors = tensors_of(params, stacked_axes)
    if tx.plans is None:
        widths = _width_multipliers(arguments.get("width_multipliers", 1.0), params)
        plans: Sequence[LeafPlan] = [
            LeafPlan(
                name,
                scale=1.0 / width,
                reason="the rule of all leaves" if width == 1.0 else f"width multiplier {width:g}",
            )
            for width in widths
        ]
    else:
        plans = tx.plans(params)
    mask = arguments.get("weight_decay_mask")
    if mask is not None:
        of_leaves = prefix_of_params("weight_decay_mask", tree_of_mask(mask, params), params)
        plans = [
            plan if decays else plan._replace(decay=0.0)
            for plan, decays in zip(plans, of_leaves, strict=True)
        ]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    backend = "xla" if tx.without_kernels else arguments.get("backend", "auto")
    descriptions = [
        _describe(jax.tree_util.keystr(path), leaf, entry, plan, backend, tx.plans is not None)
        for (path, leaf), entry, plan in zip(leaves, tensors, plans, strict=True)
    ]
    reason: str | None = tx.without_kernels
    if backend != "xla":
        reason = supports.unsupported_reason(Tracing())
    note = f"No fused kernels here: {reason}." if reason else ""
    return Description(repr(tx), note, tuple(descriptions))


def _width_multipliers(multipliers: Any, params: Any) -> list[float]:
    """A number a leaf, from a tree that is a prefix of the params; only mulo has others than 1."""
    return [float(x) for x in prefix_of_params("width_multipliers", multipliers, params)]


def _kind(tx: Any) -> str:
    """What describe was given, in words."""
    if isinstance(tx, optax.GradientTransformation):
        return "a transformation of optax, as chain, masked, partition and MultiSteps return"
    inside = getattr(tx, "tx", None)
    name = type(tx).__name__
    return f"{name}, which has the optimizer as its tx" if inside is not None else name


def _describe(
    path: str, leaf: Any, entry: Tensors, plan: LeafPlan, backend: str, has_plans: bool
) -> LeafDescription:
    is_matrix = has_plans and plan.rule == LEARNED
    rank = leaf.ndim - len(entry.stack)
    axes: Any = "matrix" if is_matrix and plan.matrix == Matrix() else "tensor"
    chosen, why = "xla", ""
    if is_matrix or not has_plans:
        chosen, why = leaf_backend(backend, (entry.count, *entry.shape), leaf.dtype, axes)
    return LeafDescription(
        path=path,
        shape=tuple(leaf.shape),
        tensors=entry.count,
        matrix=matrix_sizes(plan.matrix, leaf.shape[len(entry.stack) :])
        if is_matrix and rank >= 2
        else None,
        rule=plan.rule,
        scale=float(jnp.asarray(plan.scale)),
        decay=float(jnp.asarray(plan.decay)),
        backend=chosen,
        reason="; ".join(filter(None, (plan.reason, why and f"no kernels: {why}"))),
    )
