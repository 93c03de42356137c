"""The linear rule on the matrices of a tree: it keeps momenta alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax.accumulators import update_momentum
from lopt_jax.context import Tracing
from lopt_jax.features import NormalizerAxes
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import Functions, PerParameterState
from lopt_jax.rules.linear import linear_direction, normalized
from lopt_jax.tensors import (
    Tensors,
    check_shapes,
    init_accumulators,
    leaves_like,
    tensors_of,
)
from lopt_jax.weights import Weights


def linear_rule(
    weights: Weights, options: common.Options, normalizer_axes: NormalizerAxes
) -> Functions:
    """Proposes a step for every leaf that has a gradient.

    Args:
      weights: {"weights": (1 + momenta,)}, of the architecture "linear".
      options: the arguments that all optimizers share.
      normalizer_axes: over which axes of a tensor features have one size, as `FeatureSet`'s.

    Returns:
      Its functions. The steps are not yet subtracted; leaves without a gradient have None.
    """
    decays = weights.config["initial_momentum_decays"]
    dtypes = options.accumulator_dtypes(weights.config)
    dtypes = dtypes._replace(second_moment=jnp.dtype(jnp.float32))  # Adam's leaves have one

    def init(params: Any) -> PerParameterState:
        accumulators = init_accumulators(params, dtypes, 0, options.stacked_axes)
        return PerParameterState(jnp.zeros((), jnp.int32), accumulators)

    def update(
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: PerParameterState,
        params: Any,
        value: Any,
    ) -> tuple[Any, PerParameterState]:
        del value
        treedef = jax.tree.structure(params)
        momenta = [
            leaves_like("state: momentum", tree, params) for tree in state.accumulators.momentum
        ]
        given = treedef.flatten_up_to(gradients)
        for of_decay in momenta:  # of a leaf without a gradient it may be one number
            read = [None if g is None else m for g, m in zip(given, of_decay, strict=True)]
            check_shapes("state: momentum", read, params)
        tensors = tensors_of(params, options.stacked_axes, tracing.shards)
        steps: list[Any] = [None] * len(tensors)
        for i, gradient in enumerate(given):
            if gradient is None:
                continue
            bound = jnp.float32(common.GRADIENT_CLIP)
            clipped = jnp.clip(gradient, -bound, bound)
            new = [
                update_momentum(of_decay[i].astype(gradient.dtype), clipped, jnp.float32(decay))
                for decay, of_decay in zip(decays, momenta, strict=True)
            ]
            of_matrices = functools.partial(
                normalized,
                axes=_axes(normalizer_axes, tensors[i]),
                partition=tensors[i].leaf_partition,
            )
            steps[i] = linear_direction(meta_parameters["weights"], clipped, new, of_matrices)
            for of_decay, momentum in zip(momenta, new, strict=True):
                of_decay[i] = momentum.astype(of_decay[i].dtype)
        accumulators = state.accumulators._replace(momentum=tuple(map(treedef.unflatten, momenta)))
        state = PerParameterState(optax.safe_increment(state.count), accumulators)
        return treedef.unflatten(steps), state

    return Functions(init, update, update, "its rule is a few operations, which XLA fuses")


def _axes(normalizer_axes: NormalizerAxes, entry: Tensors) -> tuple[int, ...]:
    """The axes of a leaf, from its first."""
    rank = len(entry.stack) + len(entry.shape)
    if normalizer_axes == "matrix":
        return (rank - 2, rank - 1)
    if normalizer_axes == "tensor":
        return tuple(range(len(entry.stack), rank))
    return tuple(axis % rank for axis in normalizer_axes)
