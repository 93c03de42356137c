"""VeLO: an LSTM over tensors generates every tensor's MLP (arXiv 2211.09760)."""

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller, engine
from lopt_jax.features import velo_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.accumulation import accumulate_gradients
from lopt_jax.optimizers.controlled import controlled
from lopt_jax.rules.rule import AccumulatorStatistics, Rule
from lopt_jax.tensors import StackedAxes, tensor_shapes
from lopt_jax.weights import WeightsLike, resolve
from lopt_jax.weights.advice import mention_recommended

HORIZON = 150_000  # the longest training that VeLO was meta-trained for
_BUGGED_LOSS_HORIZON = 10  # the oldest checkpoints were trained with loss decays for ten steps


@common.described
def velo(
    num_steps: int | jax.Array,
    weights: WeightsLike = "velo",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    gradient_accumulation: int | None = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """VeLO, the versatile learned optimizer: no learning rate, no schedule, no tuning.

    It must know how long training will be: the step shrinks as the end comes near.

    Args:
      num_steps: calls of update in the whole training. With `gradient_accumulation=k` every k-th
        of them moves the parameters. Inside `optax.MultiSteps(velo(n), k)` update is called every
        k-th time alone, so n is a k-th of the calls of MultiSteps.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      gradient_accumulation: gradients and losses are averaged over this many calls before each
        update (`optax.MultiSteps` hands on the last loss alone). Default: 1, or beyond the 150,000
        steps that VeLO was meta-trained for ceil(num_steps / 150,000), as the original does; 1
        where num_steps is an array, since it decides which program there is.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto", "xla" or "pallas".
      precision: of the products of hidden layers of 16 or more, as `small_fc_lopt`'s.

    Returns:
      An optax transformation. Its update needs the loss:
      `update(grads, state, params, value=loss)`, the same on all devices that share the parameters.
      A loss that is not finite is left out of what it remembers of the losses.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Metz et al., arXiv 2211.09760; google/learned_optimization,
      `research/general_lopt/hyper_v2.py`, and `prefab.py` for the gradient accumulation.
    """
    common.check_num_steps(num_steps)
    options = common.Options.of(locals())
    every = _accumulation(gradient_accumulation, num_steps)
    if every > 1:
        largest = jnp.maximum if isinstance(num_steps, jax.Array) else max
        num_steps = largest(num_steps // every, 1)
    weights = resolve(weights, ("velo",))
    mention_recommended("velo", weights, {"weight_decay": (options.weight_decay, 0.0)})
    config = weights.config
    rule = Rule(
        features=velo_features(len(config["initial_momentum_decays"])),
        exp_mult=config["exp_mult"],
        gradient_clip=common.GRADIENT_CLIP,
        parameter_scale=True,
        accumulator_statistics=True,
        precision=options.precision,
        hidden_size=config["hidden_size"],
    )

    def inputs(
        prepared: engine.Prepared, statistics: AccumulatorStatistics, shared: Sequence[jax.Array]
    ) -> jax.Array:
        return controller.tensor_features(
            tensor_shapes(prepared.grouped.tensors),
            statistics,
            engine.parameter_mean_squares(prepared),
            shared,
        )

    out = controlled(
        "velo",
        num_steps,
        weights,
        rule,
        options,
        inputs=inputs,
        banks=lambda controls: config["ff_mult"] * controls,
        step_size=lambda output: output,
        loss_horizon=_BUGGED_LOSS_HORIZON if config["use_bugged_loss_features"] else None,
        keeps_lstm_state=not config["use_bugged_next_lstm_state"],
    )
    return accumulate_gradients(out, every) if every > 1 else out


def _accumulation(gradient_accumulation: int | None, num_steps: Any) -> int:
    if gradient_accumulation is not None:
        common.check_count("gradient_accumulation", gradient_accumulation, "an integer or None")
        return operator.index(gradient_accumulation)
    if isinstance(num_steps, jax.Array) or num_steps <= HORIZON:
        return 1
    every = math.ceil(num_steps / HORIZON)
    warnings.warn(
        f"VeLO was meta-trained for up to {HORIZON:,} steps; for {num_steps:,} it averages "
        f"gradients and losses over {every} steps before each update, as the original does. "
        "gradient_accumulation=1 turns this off.",
        stacklevel=4,
    )
    return every
