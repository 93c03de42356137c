"""mlp_lopt: the first of the per-parameter MLPs, which reads momenta and no second moments."""

from typing import Any

import jax
import optax

from lopt_jax.features import mlp_lopt_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import fixed_decays, per_parameter, timed_network
from lopt_jax.rules.rule import Rule
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve


@common.described
def mlp_lopt(
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
    """An MLP of the gradient, the parameter, six momenta, and the step.

    Args:
      weights: a path to a checkpoint, or `Weights`. None are published.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of the momenta in the state; those that it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `small_fc_lopt`'s.
      backend: "auto" or "xla"; the kernels know rules of three momenta alone, "pallas" is refused.
      precision: of the products of hidden layers of 16 or more, as `small_fc_lopt`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/mlp_lopt.py`, `MLPLOpt`.
    """
    options = common.Options.of(locals())
    resolved = resolve(weights, ("mlp_lopt",))
    config = resolved.config
    rule = Rule(
        features=mlp_lopt_features(len(config["initial_momentum_decays"])),
        exp_mult=config["exp_mult"],
        precision=options.precision,
        hidden_size=config["hidden_size"],
    )
    functions = per_parameter(
        resolved,
        rule,
        options,
        network=lambda meta, count: timed_network(meta["mlp"], len(rule.features), count),
        decays=lambda _: fixed_decays(config),
        scales=lambda rate, decay, _: (rate * config["step_mult"], decay),
    )
    return functions.bound(resolved, options)
