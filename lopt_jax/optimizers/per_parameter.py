"""A rule whose network is the same for every tensor, as an optax transformation."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax import engine
from lopt_jax.accumulators import Accumulators, Decays, SecondMoments
from lopt_jax.backends import unknown_decays
from lopt_jax.context import Tracing
from lopt_jax.features import time_features
from lopt_jax.optimizers import common
from lopt_jax.partitioned import on_shards
from lopt_jax.rules.rule import MLP, Rule
from lopt_jax.tensors import init_accumulators
from lopt_jax.weights import Weights


class PerParameterState(NamedTuple):
    """State of small_fc_lopt, mulo, elo, and of the rule of celo2."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # trees like the params


class Functions(NamedTuple):
    """What `common.transformation` binds weights to."""

    init: Callable[[Any], PerParameterState]  # from the params
    update: Callable[..., tuple[Any, PerParameterState]]
    # from (tracing, meta_parameters, gradients, state, params, value) to (updates, state)
    apply: Callable[..., tuple[Any, PerParameterState]]  # the same to (new params, state)
    without_kernels: str  # as in `common.transformation`

    def bound(
        self, weights: Weights, options: common.Options
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        return common.transformation(
            options,
            self.init,
            self.update,
            weights.params,
            PerParameterState,
            self.apply,
            self.without_kernels,
        )


def per_parameter(
    weights: Weights,
    rule: Rule,
    options: common.Options,
    *,
    network: Callable[[Any, jax.Array], MLP],
    decays: Callable[[Any], Decays],
    scales: Callable[[jax.Array, jax.Array, Any], tuple[Any, Any]],
) -> Functions:
    """Runs one network on every element of every tensor.

    Args:
      weights: the weights.
      rule: what is fixed of the rule.
      options: the arguments that all optimizers share.
      network: from the meta-parameters and the step count to the network.
      decays: from the meta-parameters to the decay rates.
      scales: from the learning rate, weight decay times learning rate, and the params to what
        multiplies the step and what multiplies the parameter, each () or (tensors,).

    Returns:
      Its functions; they do not read the loss.
    """
    factored = len(weights.config.get("initial_adafactor_decays", ()))
    dtypes = options.accumulator_dtypes(weights.config)
    stacked_axes = options.stacked_axes

    def init(params: Any) -> PerParameterState:
        accumulators = init_accumulators(params, dtypes, factored, stacked_axes)
        return PerParameterState(jnp.zeros((), jnp.int32), accumulators)

    def update(
        rule: Rule,
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: PerParameterState,
        params: Any,
        value: Any,
    ) -> tuple[Any, PerParameterState]:
        del value
        results, accumulators, _ = on_shards(
            functools.partial(of_shards, rule),
            tracing,
            gradients,
            params,
            state.accumulators,
            (
                network(meta_parameters, state.count),
                decays(meta_parameters),
                *scales(*options.rates(state.count, params), params),
            ),
            stacked_axes,
            (rule, options.backend),
        )
        return results, PerParameterState(optax.safe_increment(state.count), accumulators)

    def of_shards(
        rule: Rule,
        tracing: Tracing,
        gradients: Any,
        params: Any,
        accumulators: Accumulators,
        whole: tuple[MLP, Decays, Any, Any],
    ) -> tuple[Any, Accumulators, None]:
        mlp, decays, scale, weight_decay = whole
        grouped = engine.group_tensors(
            rule, tracing, gradients, params, accumulators, stacked_axes, options.backend
        )
        updates, new, _ = engine.second_pass(
            rule,
            engine.first_pass(rule, grouped),
            mlp,
            mlp_per_tensor=False,
            decays=decays,
            scale=scale,
            weight_decay=weight_decay,
        )
        return updates, new, None

    of = lambda applies: functools.partial(update, replace(rule, applies=applies))  # noqa: E731
    return Functions(init, of(False), of(True), unknown_decays(dtypes) or "")


def fixed_decays(config: Any) -> Decays:
    """Decay rates that are not learned, from a config's initial decays."""
    momentum, rms, factored = (
        np.asarray(config.get(f"initial_{kind}_decays", ()), np.float32)
        for kind in ("momentum", "rms", "adafactor")
    )
    return Decays(
        momentum=momentum,
        second_moment=rms[0] if rms.shape == (1,) else SecondMoments(tuple(rms)),
        factored=factored,
    )


def network(mlp: Any) -> MLP:
    """The network of meta-parameters {"w0": (features, H), "b0": (H,), ...}."""
    layers = range(len(mlp) // 2)
    return MLP(
        weights=tuple(mlp[f"w{i}"] for i in layers),
        biases=tuple(mlp[f"b{i}"] for i in layers),
    )


def timed_network(mlp: Any, tensor_features: int, count: jax.Array) -> MLP:
    """The network at a step: the time features become part of the first bias.

    Args:
      mlp: {"w0": (features + 11, H), "b0": (H,), ...}.
      tensor_features: number of features that vary with the tensor; the time features follow.
      count: () int32, updates made so far.

    Returns:
      The network; its first layer has `tensor_features` rows.
    """
    weights, biases = network(mlp)
    first = weights[0]
    time = jnp.dot(time_features(count), first[tensor_features:], precision="highest")
    return MLP(
        weights=(first[:tensor_features], *weights[1:]), biases=(biases[0] + time, *biases[1:])
    )
