"""Flax's TrainState for optimizers that read the loss."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from lopt_jax.applying import apply_of, update_params, with_extra_args


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes the loss.

    Works with any optax transformation: those that do not read the loss ignore it, and those that
    can write the new parameters themselves (`lopt_jax.update_params`).

    Example:
      >>> state = lopt_jax.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> loss, grads = jax.value_and_grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=loss)
    """

    def apply_gradients(
        self, *, grads: Any, value: jax.Array | float | None = None, **kwargs: Any
    ) -> Self:
        """Updates parameters and optimizer state, and counts the step.

        Args:
          grads: gradients, a tree like `params`.
          value: the loss that they are the gradient of, a scalar; optimizers such as
            `lopt_jax.velo` need it. Where gradients are averaged over devices, so must it be.
          **kwargs: fields of the state to replace, as in the parent class.

        Returns:
          The state after the step.

        Raises:
          ValueError: the optimizer reads the loss and `value` is missing or no scalar.
        """
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        if apply_of(self.tx) is not None and not overwrites:
            params, opt_state = update_params(
                self.tx, grads, self.opt_state, self.params, value=value
            )
            new = {"step": self.step + 1, "params": params, "opt_state": opt_state}
            return self.replace(**new | kwargs)
        tx = with_extra_args(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            return tx.update(updates, state, params, value=value)

        # the parent's own update, with the loss bound: what else it does stays its business
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        return super(TrainState, bound).apply_gradients(grads=grads, **kwargs).replace(tx=self.tx)
