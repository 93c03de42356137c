"""Updates that are applied where they are made: a step writes the parameters, not their changes.

`optax.apply_updates` reads every parameter and update once more and writes the parameter: 12 bytes
a parameter in float32, beside the 76 of VeLO's three passes. The last of these has the parameter at
hand, so it can write the new one in the update's place.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


class LearnedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that can apply its updates itself, for `update_params`.

    As it is handed about it is a pair of functions like any other.
    """

    apply: Callable[..., tuple[Any, Any]]  # (gradients, state, params, **extra) -> (params, state)

    @classmethod
    def of(
        cls, init: Callable[..., Any], update: Callable[..., Any], apply: Callable[..., Any]
    ) -> "LearnedTransformation":
        """From its three functions."""
        out = cls(init, update)
        out.apply = apply
        return out


def update_params(
    tx: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    *,
    value: jax.Array | float | None = None,
    **extra_args: Any,
) -> tuple[Any, Any]:
    """New parameters and state: `tx.update` and `optax.apply_updates` in one.

    For `lopt_jax.small_fc_lopt`, `mulo`, `elo` (unless it clips), `velo` and `celo`, as they come
    or in `lopt_jax.packed`, the updates are never written to memory. Other transformations, chains
    among them, take the two steps one after the other. Donate params and state to the compiled
    function that calls this.

    Args:
      tx: any optax transformation.
      grads: gradients, a tree like params.
      state: of tx.
      params: the parameters.
      value: the loss, for the optimizers that read it.
      **extra_args: others that tx takes.

    Returns:
      The parameters after the step, in their dtypes, and the state.
    """
    if isinstance(tx, LearnedTransformation):
        return tx.apply(grads, state, params, value=value, **extra_args)
    update = optax.with_extra_args_support(tx).update
    updates, state = update(grads, state, params, value=value, **extra_args)
    return optax.apply_updates(params, updates), state
