"""What an optimizer did at a step, from its updates and state: small enough to log every step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.optimizers.celo_adam import CeloAdamState
from lopt_jax.optimizers.common import surrounded, to_float32
from lopt_jax.optimizers.controlled import ControlledState
from lopt_jax.tensors import StackedAxes, Tensors, arrays_like, check_params, tensors_of


class Diagnostics(NamedTuple):
    """Measures of one step.

    Trees are like the params; their leaves are float32 scalars, or have one value for each tensor
    of a leaf with stacked axes. Leaves without a gradient have None as norm of the step.
    """

    step_norm: Any  # tree: L2 norm of the update
    parameter_norm: Any  # tree: L2 norm of the parameter that the update is for
    update_to_parameter: Any  # tree: the first over the second; zero where both are
    multiplier: Any  # tree: what the learned controller multiplied the step by; None: no controller
    scheduler: jax.Array | None  # (), mean of the multipliers over tensors; None: no controller
    total_step_norm: jax.Array  # (), L2 norm of all updates


@surrounded
def diagnose(
    updates: Any, state: Any, params: Any, stacked_axes: StackedAxes = None
) -> Diagnostics:
    """Measures a step; can be part of a jitted training step.

    Args:
      updates: what `tx.update` returned.
      state: the state that it returned, of any optax transformation that contains one of ours.
      params: the parameters before the updates are applied.
      stacked_axes: as given to the optimizer.

    Returns:
      The measures. Multipliers are those of VeLO, Celo and Celo-Adam; a leaf that these do not
      update (under `optax.masked` or `optax.partition`) has multiplier one.

    Raises:
      TypeError: params are no arrays.
      ValueError: stacked_axes are not those of the optimizer, or updates are no tree like the
        params.
    """
    params = check_params(params)
    leaves, treedef = jax.tree.flatten(params)
    tensors = tensors_of(params, stacked_axes)
    steps = [
        None if u is None else _norm(u, entry)
        for u, entry in zip(arrays_like("updates", updates, params), tensors, strict=True)
    ]
    norms = [_norm(p, entry) for p, entry in zip(leaves, tensors, strict=True)]
    ratios = [
        None if step is None else jnp.where(step == 0, 0.0, step / norm)
        for step, norm in zip(steps, norms, strict=True)
    ]
    squares = [jnp.sum(jnp.square(step)) for step in steps if step is not None]
    learned = _learned_multipliers(state, stacked_axes)
    multiplier = scheduler = None
    if learned:
        multiplier = treedef.unflatten(
            [
                learned.get(jax.tree_util.keystr(path), jnp.ones(entry.stack, jnp.float32))
                for (path, _), entry in zip(
                    jax.tree_util.tree_leaves_with_path(params), tensors, strict=True
                )
            ]
        )
        scheduler = jnp.mean(jnp.concatenate([x.reshape(-1) for x in learned.values()]))
    return Diagnostics(
        step_norm=treedef.unflatten(steps),
        parameter_norm=treedef.unflatten(norms),
        update_to_parameter=treedef.unflatten(ratios),
        multiplier=multiplier,
        scheduler=scheduler,
        total_step_norm=jnp.sqrt(sum(squares, jnp.zeros(()))),
    )


def to_scalars(diagnostics: Diagnostics) -> dict[str, Any]:
    """Flat names for a logger, such as `step_norm['dense']['kernel']`.

    Args:
      diagnostics: of `diagnose`.

    Returns:
      Name to array, in the order of the fields; what is None is left out.
    """
    return {
        name + jax.tree_util.keystr(path): leaf
        for name, tree in diagnostics._asdict().items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _norm(x: Any, entry: Tensors) -> jax.Array:
    """L2 norm of every tensor of a leaf: its stacked axes."""
    x = to_float32(jnp.asarray(x))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(len(entry.stack), x.ndim))))


def _learned_multipliers(state: Any, stacked_axes: StackedAxes) -> dict[str, jax.Array]:
    """Multipliers of the leaves that a controller updates, by their path."""
    found = {}
    is_controlled = lambda x: isinstance(x, ControlledState | CeloAdamState)  # noqa: E731
    for part in filter(is_controlled, jax.tree.leaves(state, is_leaf=is_controlled)):
        tree = part.accumulators.second_moment
        tensors = tensors_of(tree, stacked_axes)
        count = sum(entry.count for entry in tensors)
        if part.step_size.shape != (count,):
            raise ValueError(
                f"stacked_axes: expected the optimizer's, with {part.step_size.shape[0]} tensors; "
                f"found {stacked_axes!r}, with {count}."
            )
        for (path, _), entry in zip(
            jax.tree_util.tree_leaves_with_path(tree), tensors, strict=True
        ):
            values = part.step_size[entry.first : entry.first + entry.count]
            found[jax.tree_util.keystr(path)] = values.reshape(entry.stack).astype(jnp.float32)
    return found
