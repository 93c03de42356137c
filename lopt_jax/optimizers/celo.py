"""Celo: a learned scheduler over a learned rule (arXiv 2501.12670)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller
from lopt_jax.features import velo_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.controlled import controlled
from lopt_jax.rules.rule import Rule
from lopt_jax.tensors import StackedAxes, tensor_shapes
from lopt_jax.weights import WeightsLike, resolve


@common.described
def celo(
    num_steps: int | jax.Array,
    weights: WeightsLike = "celo",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Celo: VeLO's per-parameter rule, whose step a small LSTM schedules.

    The LSTM reads the fraction of training done and how the loss moves, and needs no learning rate.
    It must know how long training will be.

    Args:
      num_steps: calls of update in the whole training; inside `optax.MultiSteps(tx, k)` that is a
        k-th of the calls of MultiSteps.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto", "xla" or "pallas".
      precision: of the products of hidden layers of 16 or more, as `small_fc_lopt`'s.

    Returns:
      An optax transformation. Its update needs the loss, as `velo`'s does:
      `update(grads, state, params, value=loss)`.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Moudgil et al., arXiv 2501.12670; amoudgl/celo, `celo/optimizers/celo.py`.
    """
    common.check_num_steps(num_steps)
    options = common.Options.of(locals())
    weights = resolve(weights, ("celo",))
    rule = Rule(
        features=velo_features(len(weights.config["initial_momentum_decays"])),
        exp_mult=weights.config["exp_mult"],
        gradient_clip=common.GRADIENT_CLIP,
        parameter_scale=True,
        precision=options.precision,
        hidden_size=weights.config["hidden_size"],
    )
    return controlled(
        "celo",
        num_steps,
        weights,
        rule,
        options,
        inputs=lambda prepared, _, shared: controller.shared_features(
            len(tensor_shapes(prepared.grouped.tensors)), shared
        ),
        banks=lambda controls: jax.nn.softmax(controls, axis=-1),
        step_size=celo_step_size,
    )


def celo_step_size(output: jax.Array) -> jax.Array:
    """What Celo's scheduler multiplies the step by: a tenth of the exponential of its output."""
    return 0.1 * jnp.exp(output)
