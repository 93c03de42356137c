"""Updates that are applied where they are made: a step writes the parameters, not their changes.

`optax.apply_updates` reads every parameter and update once more and writes the parameter: 12 bytes
a parameter in float32, beside the 76 of VeLO's three passes. The last of these has the parameter at
hand, so it can write the new one in the update's place.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from lopt_jax.brief import brief
from lopt_jax.context import steer, steered_as
from lopt_jax.weights import Weights


class LearnedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation that may apply its updates itself, for `update_params`.

    As it is handed about it is a pair of functions like any other. A copy, as `_replace` makes one,
    is no more than that pair: its update may be another.
    """

    # (gradients, state, params, **extra) -> (params, state); None: it has no such form
    apply: Callable[..., tuple[Any, Any]] | None = None
    # the constructor's name and the arguments that tell it from others
    origin: tuple[str, Mapping[str, Any]] | None = None
    # from the params to a `lopt_jax.optimizers.plans.LeafPlan` for each leaf; None: no plans
    plans: Callable[[Any], list[Any]] | None = None
    # why the fused kernels do not know its rule, part of a sentence; "": they know it
    without_kernels: str = ""

    @classmethod
    def of(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        apply: Callable[..., Any] | None,
        origin: tuple[str, Mapping[str, Any]] | None = None,
        plans: Callable[[Any], list[Any]] | None = None,
        without_kernels: str = "",
    ) -> "LearnedTransformation":
        """From its functions, what its repr says, and what it does with each leaf."""
        out = cls(init, update)
        out.apply, out.origin, out.plans = apply, origin, plans
        out.without_kernels = without_kernels
        return out

    def __repr__(self) -> str:
        if self.origin is None:
            return super().__repr__()
        name, arguments = self.origin
        return f"{name}({', '.join(f'{key}={_text(x)}' for key, x in arguments.items())})"


def _text(x: Any) -> str:
    """One argument in a repr: short, whatever it is."""
    if isinstance(x, Weights):
        return f"Weights({x.architecture!r}, source={x.metadata.get('source')!r})"
    if isinstance(x, jax.Array | np.ndarray):
        is_known = not isinstance(x, jax.core.Tracer) and x.size == 1
        return str(x.item()) if is_known else f"{x.dtype.name}{list(x.shape)}"
    if isinstance(x, optax.GradientTransformation):
        return repr(x)
    return getattr(x, "__qualname__", None) or brief(x)


def apply_of(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]] | None:
    """The function of a transformation that can apply its updates itself, None of others."""
    return tx.apply if isinstance(tx, LearnedTransformation) else None


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation, taking extra arguments and dropping those that it does not know.

    `optax.with_extra_args_support` goes by the type alone, and would keep the loss from
    `optax.MultiSteps`, which hands on what it is given.

    Args:
      tx: any optax transformation, or what has its `init` and `update`.

    Returns:
      A transformation whose update takes any keyword argument.

    Raises:
      TypeError: tx is no transformation.
    """
    if not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        name = getattr(tx, "__name__", "")
        call = f"; call it: {name}(...)" if name and callable(tx) else ""
        raise TypeError(f"tx: expected an optax transformation, found {type(tx).__name__}{call}.")
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        parameters = inspect.signature(tx.update).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def steering(tx: optax.GradientTransformation, **changes: Any) -> LearnedTransformation:
    """The transformation, whose optimizers of this library are told what steers their traces.

    Args:
      tx: any optax transformation.
      **changes: attributes of `lopt_jax.context.Tracing`.

    Returns:
      The transformation; its state is the same.
    """

    def told(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        def run(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            result, new = function(updates, steer(state, **changes), params, **extra_args)
            return result, steered_as(new, state)

        return run

    apply = apply_of(tx)
    update = told(with_extra_args(tx).update)
    return LearnedTransformation.of(tx.init, update, None if apply is None else told(apply))


def in_batch(tx: optax.GradientTransformation, size: int) -> LearnedTransformation:
    """The transformation, told that `jax.vmap` makes this many trainings of one."""
    return steering(tx, batch=size)


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
      grads: gradients, a tree like params; None where a parameter has none: it stays as it is.
      state: of tx.
      params: the parameters.
      value: the loss, for the optimizers that read it; the same on all devices that share params.
      **extra_args: others that tx takes.

    Returns:
      The parameters after the step, in their dtypes, and the state.
    """
    apply = apply_of(tx)
    if apply is not None:
        return apply(grads, state, params, value=value, **extra_args)
    update = with_extra_args(tx).update
    updates, state = update(grads, state, params, value=value, **extra_args)
    return _add(params, updates), state


def _add(params: Any, updates: Any) -> Any:
    """As `optax.apply_updates`, but that parameters without an update stay as they are."""
    return jax.tree.map(
        lambda u, p: p if u is None else optax.apply_updates(p, u),
        updates,
        params,
        is_leaf=lambda u: u is None,
    )
