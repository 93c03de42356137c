"""Celo-Adam: Celo's learned scheduler over Adam (arXiv 2501.12670)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller
from lopt_jax.accumulators import Accumulators
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.optimizers.celo import celo_step_size
from lopt_jax.optimizers.controlled import observe_loss
from lopt_jax.tensors import (
    StackedAxes,
    arrays_like,
    count_tensors,
    per_leaf,
    tensors_of,
    zeros_like,
)
from lopt_jax.weights import WeightsLike, resolve


class CeloAdamState(NamedTuple):
    """State of Celo-Adam."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # momentum and second moment alone: trees like the params
    lstm: controller.LSTMState
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
      backend: "auto", "xla" or "pallas"; Adam is fused by XLA, all three run that.
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
    options = common.Options(
        learning_rate,
        weight_decay,
        weight_decay_mask,
        accumulator_dtype,
        stacked_axes,
        backend,
        precision,
    )
    weights = resolve(weights, ("celo_adam",))
    config = weights.config
    settings = AdamSettings(
        betas=(config["initial_momentum_decays"][0], config["initial_rms_decays"][0]),
        epsilon=config["initial_epsilon"],
        root_epsilon=1e-10,
    )

    def init(params: Any) -> CeloAdamState:
        options.say_stacks(params)
        tensors = count_tensors(params, stacked_axes)
        unused: Any = ()
        dtypes = options.accumulator_dtypes(config)
        return CeloAdamState(
            count=jnp.zeros((), jnp.int32),
            accumulators=Accumulators(
                momentum=tuple(zeros_like(params, dtype) for dtype in dtypes.momentum),
                second_moment=zeros_like(params, dtypes.second_moment),
                row=unused,
                column=unused,
            ),
            lstm=controller.init_lstm(weights.params, tensors),
            loss=controller.init_loss_buffer(),
            step_size=jnp.zeros((tensors,), jnp.float32),
        )

    def update(
        meta_parameters: Any, gradients: Any, state: CeloAdamState, params: Any, value: Any
    ) -> tuple[Any, CeloAdamState]:
        loss, shared = observe_loss(
            "celo_adam", state.loss, value, state.count, num_steps, (gradients, params)
        )
        tensors = tensors_of(params, stacked_axes)
        inputs = controller.shared_features(state.step_size.shape[0], shared)
        controls = controller.run_lstm(meta_parameters, inputs, state.lstm)
        sizes = celo_step_size(controls.step_size)
        rate, decay = options.rates(state.count, params)
        scale = rate * config["step_mult"] * sizes
        count = optax.safe_increment(state.count)

        leaves, treedef = jax.tree.flatten(params)
        given = treedef.flatten_up_to(gradients)
        momentum = arrays_like("state: momentum", state.accumulators.momentum[0], params)
        second_moment = arrays_like(
            "state: second_moment", state.accumulators.second_moment, params
        )
        updates: list = [None] * len(leaves)
        for i, (entry, p) in enumerate(zip(tensors, leaves, strict=True)):
            if given[i] is None:
                continue
            step, momentum[i], second_moment[i] = adam_step(
                settings, given[i], momentum[i], second_moment[i], count
            )
            total = per_leaf(scale, entry, p) * step + per_leaf(decay, entry, p) * p
            updates[i] = (-total).astype(p.dtype)
        accumulators = state.accumulators._replace(
            momentum=(treedef.unflatten(momentum),),
            second_moment=treedef.unflatten(second_moment),
        )
        return treedef.unflatten(updates), CeloAdamState(
            count, accumulators, controls.state, loss, sizes
        )

    return common.transformation(init, update, weights.params, CeloAdamState)
