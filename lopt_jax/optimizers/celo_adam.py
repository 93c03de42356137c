"""Celo-Adam: Celo's learned scheduler over Adam (arXiv 2501.12670)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller, engine
from lopt_jax.accumulators import update_momentum, update_second_moment
from lopt_jax.optimizers import common
from lopt_jax.optimizers.celo import celo_step_size
from lopt_jax.optimizers.controlled import observe_loss
from lopt_jax.weights import Weights, resolve

_GRADIENT_CLIP = 1000.0
_SECOND_MOMENT_EPSILON = 1e-10


class CeloAdamState(NamedTuple):
    """State of Celo-Adam."""

    count: jax.Array  # () int32, updates made so far
    momentum: Any  # tree like the params
    second_moment: Any  # tree like the params
    lstm: controller.LSTMState
    loss: controller.LossBuffer
    step_size: jax.Array  # (tensors,), the scheduler's last: read by diagnostics alone


def celo_adam(
    num_steps: int | jax.Array,
    weights: str | Weights = "celo_adam",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: engine.StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Celo-Adam: Adam, whose learning rate a small LSTM schedules.

    Args:
      num_steps: updates of the whole training.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moment in the state.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `celo`'s.
      backend: "auto", "xla" or "pallas"; Adam is fused by XLA, all three run that.
      precision: as `celo`'s; Adam has no products, so it changes nothing.

    Returns:
      An optax transformation. Its update needs the loss:
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
    (beta1,), (beta2,) = config["initial_momentum_decays"], config["initial_rms_decays"]

    def init(params: Any) -> CeloAdamState:
        tensors = engine.count_tensors(params, stacked_axes)
        return CeloAdamState(
            count=jnp.zeros((), jnp.int32),
            momentum=optax.tree.zeros_like(params, dtype=options.accumulator_dtype),
            second_moment=optax.tree.zeros_like(params, dtype=options.accumulator_dtype),
            lstm=controller.init_lstm(weights.params, tensors),
            loss=controller.init_loss_buffer(),
            step_size=jnp.zeros((tensors,), jnp.float32),
        )

    def update(
        meta_parameters: Any, gradients: Any, state: CeloAdamState, params: Any, value: Any
    ) -> tuple[Any, CeloAdamState]:
        loss, shared = observe_loss("celo_adam", state.loss, value, state.count, num_steps)
        tensors = engine.tensors_of(params, stacked_axes)
        count = state.step_size.shape[0]
        controls = controller.run_lstm(
            meta_parameters, controller.shared_features(count, shared), state.lstm
        )
        sizes = celo_step_size(controls.step_size)
        rate, decay = options.rates(state.count, params)
        step_count = optax.safe_increment(state.count)
        corrections = [1 - jnp.float32(beta) ** step_count for beta in (beta1, beta2)]

        def step_one(entry: engine.Tensors, p: Any, g: Any, m: Any, v: Any) -> tuple:
            """One leaf's update and new moments."""
            if g is None:
                return None, m, v
            dtype = jnp.promote_types(jnp.promote_types(g.dtype, m.dtype), jnp.float32)
            wide_g = jnp.clip(g.astype(dtype), -_GRADIENT_CLIP, _GRADIENT_CLIP)
            wide_m = update_momentum(m.astype(dtype), wide_g, beta1)
            wide_v = update_second_moment(v.astype(dtype), wide_g, beta2)
            scale = engine.per_leaf(rate * config["step_mult"] * sizes, entry, p)
            root = jnp.sqrt(wide_v / corrections[1] + _SECOND_MOMENT_EPSILON)
            step = wide_m / corrections[0] * (scale / (config["initial_epsilon"] + root))
            decayed = engine.per_leaf(decay, entry, p) * p.astype(dtype)
            return -(step + decayed).astype(p.dtype), wide_m.astype(m.dtype), wide_v.astype(v.dtype)

        leaves, treedef = jax.tree.flatten(params)
        trees = (gradients, state.momentum, state.second_moment)
        lists = [treedef.flatten_up_to(tree) for tree in trees]
        results = [step_one(*xs) for xs in zip(tensors, leaves, *lists, strict=True)]
        updates, momentum, second_moment = (
            treedef.unflatten([result[i] for result in results]) for i in range(3)
        )
        return updates, CeloAdamState(
            step_count,
            momentum,
            second_moment,
            controls.state,
            loss,
            sizes.astype(state.step_size.dtype),
        )

    return common.transformation(init, update, weights.params)
