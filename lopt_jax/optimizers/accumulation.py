"""Averages gradients and losses over several calls before each update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax.optimizers import common
from lopt_jax.tensors import arrays_like, gradients_like, zeros_like


class AccumulationState(NamedTuple):
    """State of an optimizer with `gradient_accumulation`."""

    micro_step: jax.Array  # () int32, calls since the last update
    gradient_sum: Any  # tree like the params, float32
    loss_sum: jax.Array  # () float32
    inner: Any  # state of the wrapped transformation


def accumulate_gradients(
    inner: optax.GradientTransformationExtraArgs, every: int
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation that reads the loss; unlike `optax.MultiSteps`, averages it too.

    A loss that is not finite makes the mean so, and the optimizer leaves that mean out.

    Args:
      inner: the transformation.
      every: calls for each of its updates.

    Returns:
      A transformation whose updates are zero but for every `every`-th call.

    Reference:
      google/learned_optimization, `optimizers/gradient_accumulator.py`.
    """

    @common.surrounded
    def init(params: Any) -> AccumulationState:
        return AccumulationState(
            micro_step=jnp.zeros((), jnp.int32),
            gradient_sum=zeros_like(params, jnp.float32),
            loss_sum=jnp.zeros((), jnp.float32),
            inner=inner.init(params),
        )

    @common.surrounded
    def update(
        updates: Any, state: AccumulationState, params: Any = None, *, value: Any = None, **_: Any
    ) -> tuple[Any, AccumulationState]:
        common.require_params(params)
        common.check_state_type(state, AccumulationState)
        loss_sum = state.loss_sum + common.require_value("velo", value)
        leaves, treedef = jax.tree.flatten(params)
        given = gradients_like(updates, params)
        old_sums = arrays_like("state: gradient_sum", state.gradient_sum, params)
        sums = [
            total if g is None else total + g.astype(total.dtype)
            for total, g in zip(old_sums, given, strict=True)
        ]

        def apply(inner_state: Any) -> tuple[Any, Any]:
            means = [None if g is None else s / every for s, g in zip(sums, given, strict=True)]
            return inner.update(
                treedef.unflatten(means), inner_state, params, value=loss_sum / every
            )

        def skip(inner_state: Any) -> tuple[Any, Any]:
            zeros = [
                None if g is None else jnp.zeros_like(x) for x, g in zip(leaves, given, strict=True)
            ]
            return treedef.unflatten(zeros), inner_state

        is_due = state.micro_step + 1 == every
        updates, inner_state = jax.lax.cond(is_due, apply, skip, state.inner)
        return updates, AccumulationState(
            micro_step=(state.micro_step + 1) % every,
            gradient_sum=treedef.unflatten([jnp.where(is_due, 0.0, s) for s in sums]),
            loss_sum=jnp.where(is_due, 0.0, loss_sum),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
