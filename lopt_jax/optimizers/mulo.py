"""μLO: small_fc_lopt under the maximal update parametrisation (arXiv 2406.00153)."""

from typing import Any

import jax
import optax

from lopt_jax.optimizers import common
from lopt_jax.optimizers.small_fc_lopt import ARCHITECTURES, small_fc_rule
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve


@common.described
def mulo(
    width_multipliers: Any,
    weights: WeightsLike = "mulo",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "high",
) -> optax.GradientTransformationExtraArgs:
    """μLO: small_fc_lopt, whose step on a leaf is divided by the leaf's width multiplier.

    With a model in the maximal update parametrisation (docs/mup.md), what was meta-trained on
    narrow models carries over to wide ones.

    Args:
      width_multipliers: tree of positive numbers, like the params or a prefix of them, as
        `lopt_jax.mup.width_multipliers` computes it: how many times wider than in the base model
        the input of a matrix is; 1 for every other leaf.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: weight decay, scaled by the learning rate over the width multiplier. It is
        taken off the updated parameter, as μLO's own code does, not off the old one.
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
      Thérien et al., arXiv 2406.00153; Belilovsky-Lab/pylo, `pylo/optim/MuLO_naive.py` and
      `AdafacLO_naive.py`.
    """
    options = common.Options.of(locals())
    _check_multipliers(width_multipliers)

    def scales(rate: jax.Array, decay: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        multipliers = common.values_of_tensors(
            "width_multipliers", width_multipliers, params, stacked_axes
        )
        decay = decay / multipliers
        # p -> (1 - decay) * (p - step), as one update of p
        return rate / multipliers * (1 - decay), decay

    return small_fc_rule(resolve(weights, ARCHITECTURES[::-1]), options, scales)


def _check_multipliers(width_multipliers: Any) -> None:
    for path, value in jax.tree_util.tree_leaves_with_path(width_multipliers):
        name = f"width_multipliers{jax.tree_util.keystr(path)}"
        common.check_number(name, value)
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name}: expected a positive number, found {value!r}.")
