"""Gradient descent and Adam whose few numbers are the weights: baselines that were meta-trained."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax.accumulators import Accumulators, each_second_moment, second_moments
from lopt_jax.context import Tracing
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.optimizers.leafwise import step_leaves
from lopt_jax.tensors import StackedAxes, init_accumulators
from lopt_jax.weights import WeightsLike, resolve

_ROOT_EPSILON = 1e-8  # the original adds it inside the root, beside the learned epsilon


class LearnableState(NamedTuple):
    """State of learnable_sgd, learnable_sgdm and learnable_adam."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # momentum and second moment where the rule has them


@common.described
def learnable_sgd(
    weights: WeightsLike,
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with a learned learning rate.

    Args:
      weights: a path to a checkpoint, or `Weights`: {"log_lr": ()}. None are published.
      learning_rate: multiplies the learned one; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by `learning_rate` as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: of momentum and second moment in the state, where the rule has them.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `small_fc_lopt`'s.
      backend: "auto" or "xla"; XLA fuses the rule, and "pallas" is refused.
      precision: as `small_fc_lopt`'s; there are no products, so it changes nothing.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/base.py`, `LearnableSGD`.
    """
    options = common.Options.of(locals())
    return _learnable(weights, "learnable_sgd", options, lambda theta, count: _descend)


@common.described
def learnable_sgdm(
    weights: WeightsLike,
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent with momentum, both numbers learned; neither damped nor Nesterov's.

    Args:
      weights: as `learnable_sgd`'s: {"log_lr": (), "one_minus_momentum": ()}, both logarithms.
      learning_rate: multiplies the learned one; a number or an optax schedule.
      weight_decay: as `learnable_sgd`'s.
      weight_decay_mask: as `learnable_sgd`'s.
      accumulator_dtype: as `learnable_sgd`'s.
      stacked_axes: as `learnable_sgd`'s.
      backend: as `learnable_sgd`'s.
      precision: as `learnable_sgd`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/base.py`, `LearnableSGDM`.
    """
    options = common.Options.of(locals())

    def step_of(theta: Any, count: jax.Array) -> Callable[..., Sequence[jax.Array]]:
        del count
        return functools.partial(_descend_with_momentum, _decay(theta["one_minus_momentum"]))

    return _learnable(weights, "learnable_sgdm", options, step_of)


@common.described
def learnable_adam(
    weights: WeightsLike,
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Adam whose learning rate, decays and epsilon are learned.

    Args:
      weights: as `learnable_sgd`'s: {"log_lr": (), "one_minus_beta1": (), "one_minus_beta2": (),
        "log_epsilon": ()}, all four logarithms.
      learning_rate: multiplies the learned one; a number or an optax schedule.
      weight_decay: as `learnable_sgd`'s.
      weight_decay_mask: as `learnable_sgd`'s.
      accumulator_dtype: as `learnable_sgd`'s; averages that it cannot hold stay float32.
      stacked_axes: as `learnable_sgd`'s.
      backend: as `learnable_sgd`'s.
      precision: as `learnable_sgd`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/base.py`, `LearnableAdam`.
    """
    options = common.Options.of(locals())

    def step_of(theta: Any, count: jax.Array) -> Callable[..., Sequence[jax.Array]]:
        settings = AdamSettings(
            betas=(_decay(theta["one_minus_beta1"]), _decay(theta["one_minus_beta2"])),
            epsilon=jnp.exp(theta["log_epsilon"]),
            root_epsilon=_ROOT_EPSILON,
            gradient_clip=None,
        )
        return lambda g, m, v: adam_step(settings, g, m, v, count)

    return _learnable(weights, "learnable_adam", options, step_of)


def _learnable(
    weights: WeightsLike,
    architecture: str,
    options: common.Options,
    step_of: Callable[[Any, jax.Array], Callable[..., Sequence[jax.Array]]],
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule.

    Args:
      weights: its weights.
      architecture: of the weights.
      options: the arguments that all optimizers share.
      step_of: from the meta-parameters and the number of updates, this one included, to what
        `step_leaves` takes.

    Returns:
      The transformation.
    """
    resolved = resolve(weights, (architecture,))
    dtypes = options.accumulator_dtypes(resolved.config)

    def init(params: Any) -> LearnableState:
        accumulators = init_accumulators(params, dtypes, 0, options.stacked_axes)
        return LearnableState(jnp.zeros((), jnp.int32), accumulators)

    def update(
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: LearnableState,
        params: Any,
        value: Any,
    ) -> tuple[Any, LearnableState]:
        del tracing, value
        rate, decay = options.rates(state.count, params)
        count = optax.safe_increment(state.count)
        old = state.accumulators
        updates, averages = step_leaves(
            step_of(meta_parameters, count),
            gradients,
            (*old.momentum, *second_moments(old.second_moment)),
            params,
            options.stacked_axes,
            rate * jnp.exp(meta_parameters["log_lr"]),
            decay,
        )
        in_order = iter(averages)
        new = old._replace(
            momentum=tuple(next(in_order) for _ in old.momentum),
            second_moment=each_second_moment(lambda _: next(in_order), old.second_moment),
        )
        return updates, LearnableState(count, new)

    return common.transformation(
        options,
        init,
        update,
        resolved.params,
        LearnableState,
        without_kernels="its rule is a few operations, which XLA fuses",
    )


def _decay(log_gap: jax.Array) -> jax.Array:
    return 1 - jnp.exp(log_gap)


def _descend(gradient: jax.Array) -> tuple[jax.Array]:
    return (common.to_float32(gradient),)


def _descend_with_momentum(
    decay: jax.Array, gradient: jax.Array, momentum: jax.Array
) -> tuple[jax.Array, jax.Array]:
    total = common.to_float32(gradient) + decay * common.to_float32(momentum)
    return total, total.astype(momentum.dtype)
