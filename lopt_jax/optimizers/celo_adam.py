"""Celo-Adam: Celo's learned scheduler over Adam (arXiv 2501.12670)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller
from lopt_jax.accumulators import Accumulators
from lopt_jax.context import Tracing
from lopt_jax.lstm import LSTMState, init_lstm
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.optimizers.celo import celo_step_size
from lopt_jax.optimizers.controlled import observe_loss
from lopt_jax.optimizers.leafwise import step_leaves
from lopt_jax.tensors import StackedAxes, count_tensors, init_accumulators
from lopt_jax.weights import WeightsLike, resolve


class CeloAdamState(NamedTuple):
    """State of Celo-Adam."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # momentum and second moment alone: trees like the params
    lstm: LSTMState
    loss: controller.LossBuffer
    step_size: jax.Array  # (tensors,), the scheduler's last: read by diagnostics alone


@common.described
def celo_adam(
    num_steps: int | jax.Array,
    weights: WeightsLike = "celo_adam",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Celo-Adam: Adam, whose learning rate a small LSTM schedules.

    Args:
      num_steps: calls of update in the whole training; inside `optax.MultiSteps(tx, k)` that is a
        k-th of the calls of MultiSteps.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moment in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `celo`'s.
      backend: "auto" or "xla"; its rule is Adam, which XLA fuses, and "pallas" is refused.
      precision: as `celo`'s; Adam has no products, so it changes nothing.

    Returns:
      An optax transformation. Its update needs the loss, as `velo`'s does:
      `update(grads, state, params, value=loss)`.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Moudgil et al., arXiv 2501.12670; amoudgl/celo, `celo/optimizers/celo_adam.py`.
    """
    common.check_num_steps(num_steps)
    options = common.Options.of(locals())
    weights = resolve(weights, ("celo_adam",))
    config = weights.config
    settings = AdamSettings(
        betas=(config["initial_momentum_decays"][0], config["initial_rms_decays"][0]),
        epsilon=config["initial_epsilon"],
        root_epsilon=1e-10,
    )
    dtypes = options.accumulator_dtypes(config)

    def init(params: Any) -> CeloAdamState:
        tensors = count_tensors(params, stacked_axes)
        return CeloAdamState(
            count=jnp.zeros((), jnp.int32),
            accumulators=init_accumulators(params, dtypes, 0, stacked_axes),
            lstm=init_lstm(weights.params["lstm"], tensors),
            loss=controller.init_loss_buffer(),
            step_size=jnp.zeros((tensors,), jnp.float32),
        )

    def update(
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: CeloAdamState,
        params: Any,
        value: Any,
    ) -> tuple[Any, CeloAdamState]:
        del tracing
        loss, shared = observe_loss(
            "celo_adam", state.loss, value, state.count, num_steps, (gradients, params)
        )
        inputs = controller.shared_features(state.step_size.shape[0], shared)
        controls = controller.run_lstm(meta_parameters, inputs, state.lstm)
        sizes = celo_step_size(controls.step_size)
        rate, decay = options.rates(state.count, params)
        count = optax.safe_increment(state.count)
        updates, (momentum, second_moment) = step_leaves(
            lambda g, m, v: adam_step(settings, g, m, v, count),
            gradients,
            (state.accumulators.momentum[0], state.accumulators.second_moment),
            params,
            stacked_axes,
            rate * config["step_mult"] * sizes,
            decay,
        )
        accumulators = state.accumulators._replace(
            momentum=(momentum,), second_moment=second_moment
        )
        return updates, CeloAdamState(count, accumulators, controls.state, loss, sizes)

    return common.transformation(
        options,
        init,
        update,
        weights.params,
        CeloAdamState,
        without_kernels="its rule is Adam, which XLA fuses",
    )
