"""Flax's TrainState for optimizers that read the loss."""

from collections.abc import Mapping
from typing import Any, Self

import jax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from lopt_jax.applying import update_params


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes the loss.

    Works with any optax transformation: those that do not read the loss ignore it, and those that
    can write the new parameters themselves (`lopt_jax.update_params`).

    Examples:
      >>> state = lopt_jax.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> loss, grads = jax.value_and_grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=loss)
    """

    def apply_gradients(
        self, *, grads: Any, value: jax.Array | float | None = None, **kwargs: Any
    ) -> Self:
        """Updates parameters and optimizer state, and counts the step.

        Args:
          grads: gradients, a tree like `params`; None where a parameter has none.
          value: the loss that they are the gradient of, a scalar; optimizers such as
            `lopt_jax.velo` need it. Where gradients are averaged over devices, so must it be.
          **kwargs: fields of the state to replace, as in the parent class.

        Returns:
          The state after the step.

        Raises:
          ValueError: the optimizer reads the loss and `value` is missing or no scalar.
        """
        # what Flax's fp8 layers give as gradients of their scales are the new scales
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        params, opt_state = update_params(
            self.tx,
            grads["params"] if overwrites else grads,
            self.opt_state,
            self.params["params"] if overwrites else self.params,
            value=value,
        )
        if overwrites:
            scales = grads[OVERWRITE_WITH_GRADIENT]
            params = {"params": params, OVERWRITE_WITH_GRADIENT: scales}
        new = {"step": self.step + 1, "params": params, "opt_state": opt_state}
        return self.replace(**new | kwargs)
