"""ELO: small_fc_lopt's rule, meta-trained with an expert's help (PyLO, arXiv 2506.10315)."""

from typing import Any

import jax
import optax

from lopt_jax.features import small_fc_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import fixed_decays, per_parameter, timed_network
from lopt_jax.rules.rule import Rule
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve


@common.described
def elo(
    learning_rate: common.ScalarOrSchedule = 0.001,
    weights: WeightsLike = "elo",
    *,
    max_gradient_norm: float | None = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "high",
) -> optax.GradientTransformationExtraArgs:
    """ELO: the rule of small_fc_lopt with fixed decays and a learning rate.

    The expert of its name exists in meta-training alone. Gradients that are not finite count as
    zero (NaN) or as the largest number (infinity).

    Args:
      learning_rate: multiplies the step; a number or an optax schedule.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `small_fc_lopt`'s.
      backend: "auto", "xla" or "pallas".
      precision: of the products of hidden layers of 16 or more, as `small_fc_lopt`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Belilovsky-Lab/pylo, `pylo/optim/ELO_naive.py`.
    """
    options = common.Options.of(locals())
    weights = resolve(weights, ("elo",))
    config = weights.config
    rule = Rule(
        features=small_fc_features(len(config["initial_momentum_decays"])),
        exp_mult=config["exp_mult"],
        zero_non_finite=True,
        precision=options.precision,
        hidden_size=config["hidden_size"],
    )
    functions = per_parameter(
        weights,
        rule,
        options,
        network=lambda meta, count: timed_network(meta["mlp"], len(rule.features), count),
        decays=lambda _: fixed_decays(config),
        scales=lambda rate, decay, _: (rate, decay),
    )
    transformation = functions.bound(weights, options)
    if max_gradient_norm is None:
        return transformation
    common.check_number("max_gradient_norm", max_gradient_norm)
    return optax.chain(common.clip_by_global_norm(max_gradient_norm), transformation)
