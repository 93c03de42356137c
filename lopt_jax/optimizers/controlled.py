"""A rule that a learned controller steers, one LSTM row a tensor: what VeLO and Celo share."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller, engine
from lopt_jax.accumulators import Accumulators
from lopt_jax.compiler.products import may_work
from lopt_jax.context import Tracing
from lopt_jax.lstm import LSTMState, init_lstm
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import fixed_decays
from lopt_jax.partitioned import on_shards
from lopt_jax.rules.rule import AccumulatorStatistics, Rule
from lopt_jax.tensors import count_tensors, init_accumulators, init_statistics
from lopt_jax.weights import Weights


class ControlledState(NamedTuple):
    """State of VeLO and Celo."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # trees like the params
    statistics: AccumulatorStatistics | None  # of the accumulators, a row a tensor; None: not read
    lstm: LSTMState
    loss: controller.LossBuffer
    step_size: jax.Array  # (tensors,), the controller's last: read by diagnostics alone


def observe_loss(
    name: str,
    buffer: controller.LossBuffer,
    value: Any,
    count: jax.Array,
    num_steps: Any,
    alike: Any,
    loss_horizon: Any = None,
) -> tuple[controller.LossBuffer, list[jax.Array]]:
    """Takes in this step's loss.

    Args:
      name: the optimizer's, for the message where the loss is missing.
      buffer: before this step.
      value: the loss, a scalar.
      count: () int32, updates made so far.
      num_steps: updates of the whole training.
      alike: gradients and params: where they are equal on all devices, the loss must be.
      loss_horizon: the longest time scale of the averages; None: num_steps.

    Returns:
      The new buffer; the features that every tensor shares, of the fraction of training done (9,)
      and of the loss (9,).
    """
    decays = controller.loss_decays(num_steps if loss_horizon is None else loss_horizon)
    loss = common.require_value(name, value)
    common.check_alike_on_devices(loss, alike)
    buffer = controller.update_loss_buffer(buffer, loss, decays)
    return buffer, [
        controller.fraction_features(count, num_steps),
        controller.loss_features(buffer, decays),
    ]


def controlled(
    name: str,
    num_steps: Any,
    weights: Weights,
    rule: Rule,
    options: common.Options,
    *,
    inputs: Callable[[engine.Prepared, Any, Sequence[jax.Array]], jax.Array],
    banks: Callable[[Any], jax.Array],
    step_size: Callable[[jax.Array], jax.Array],
    loss_horizon: Any = None,
    keeps_lstm_state: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Runs an LSTM over tensors, which mixes every tensor's network and sets its step size.

    Args:
      name: the optimizer's, for the message where the loss is missing.
      num_steps: updates of the whole training.
      weights: the weights.
      rule: what is fixed of the rule.
      options: the arguments that all optimizers share.
      inputs: from the prepared step, the statistics, and the features that every tensor shares
        to the LSTM's inputs (tensors, features).
      banks: from the LSTM's controls to the weights of the banks, each (tensors, K).
      step_size: from the LSTM's output to what multiplies the step, each (tensors,).
      loss_horizon: as in `observe_loss`.
      keeps_lstm_state: whether the LSTM's state is carried from step to step.

    Returns:
      An optax transformation with state `ControlledState`. It reads the loss.
    """
    config = weights.config
    momenta = len(config["initial_momentum_decays"])
    factored = len(config["initial_adafactor_decays"])
    dtypes, decays = options.accumulator_dtypes(config), fixed_decays(config)
    step_mult = config["step_mult"]
    stacked_axes = options.stacked_axes

    def init(params: Any) -> ControlledState:
        tensors = count_tensors(params, stacked_axes)
        statistics = init_statistics(tensors, momenta)
        return ControlledState(
            count=jnp.zeros((), jnp.int32),
            accumulators=init_accumulators(params, dtypes, factored, stacked_axes),
            statistics=statistics if rule.accumulator_statistics else None,
            lstm=init_lstm(weights.params["lstm"], tensors),
            loss=controller.init_loss_buffer(),
            step_size=jnp.zeros((tensors,), jnp.float32),
        )

    def update(
        rule: Rule,
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: ControlledState,
        params: Any,
        value: Any,
    ) -> tuple[Any, ControlledState]:
        loss, shared = observe_loss(
            name, state.loss, value, state.count, num_steps, (gradients, params), loss_horizon
        )
        largest = max((x.size * x.dtype.itemsize for x in jax.tree.leaves(params)), default=0)
        quickly = "complex_products" not in tracing.without and may_work(largest)
        results, accumulators, (statistics, lstm, sizes) = on_shards(
            functools.partial(of_shards, rule, quickly),
            tracing,
            gradients,
            params,
            state.accumulators,
            (
                meta_parameters,
                state.statistics,
                state.lstm,
                shared,
                options.rates(state.count, params),
            ),
            stacked_axes,
            (rule, options.backend, quickly),
        )
        return results, ControlledState(
            count=optax.safe_increment(state.count),
            accumulators=accumulators,
            statistics=statistics,
            lstm=lstm if keeps_lstm_state else state.lstm,
            loss=loss,
            step_size=sizes,
        )

    def of_shards(
        rule: Rule,
        quickly: bool,
        tracing: Tracing,
        gradients: Any,
        params: Any,
        accumulators: Accumulators,
        whole: Any,
    ) -> tuple[Any, Accumulators, tuple[AccumulatorStatistics | None, LSTMState, jax.Array]]:
        meta_parameters, statistics, lstm, shared, (rate, decay) = whole
        grouped = engine.group_tensors(
            rule, tracing, gradients, params, accumulators, stacked_axes, options.backend
        )
        prepared = engine.first_pass(rule, grouped)
        controls = controller.run_lstm(
            meta_parameters, inputs(prepared, statistics, shared), lstm, quickly
        )
        sizes = step_size(controls.step_size)
        updates, new, statistics = engine.second_pass(
            rule,
            prepared,
            controller.mix_banks(meta_parameters["mlp"], banks(controls.banks), quickly),
            mlp_per_tensor=True,
            decays=decays,
            scale=rate * step_mult * sizes,
            weight_decay=decay,
            statistics=statistics,
        )
        return updates, new, (statistics, controls.state, sizes)

    of = lambda applies: functools.partial(update, replace(rule, applies=applies))  # noqa: E731
    return common.transformation(
        options, init, of(False), weights.params, ControlledState, of(True)
    )
