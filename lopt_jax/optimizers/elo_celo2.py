"""ELO-CELO2: Celo2's rule, meta-trained with an expert's help (PyLO, arXiv 2506.10315)."""

from typing import Any

import jax
import optax

from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings
from lopt_jax.optimizers.matrices import ARCHITECTURES, AdamW, matrix_optimizer, rule_precision
from lopt_jax.optimizers.plans import LabelFn, MatrixAxes, celo2_plans
from lopt_jax.rules.newton_schulz import check_precision
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve


@common.described
def elo_celo2(
    learning_rate: common.ScalarOrSchedule = 0.001,
    weights: WeightsLike = "elo_celo2",
    *,
    label_fn: LabelFn | None = None,
    matrix_axes: MatrixAxes = None,
    adam_learning_rate_mult: float | jax.Array = 1.0,
    adam_weight_decay: float | jax.Array | None = None,
    max_gradient_norm: float | None = 1.0,
    weight_decay: float | jax.Array = 0.1,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """ELO-CELO2: `celo2` with other weights, weight decay, and clipped gradients.

    AdamW has the decays of the learned rule's first momentum and of its second moment: the original
    reads these accumulators.

    Args:
      learning_rate: multiplies the step; a number or an optax schedule.
      weights: a registered name, a path to a checkpoint, or `Weights`.
      label_fn: as `celo2`'s.
      matrix_axes: as `celo2`'s.
      adam_learning_rate_mult: AdamW's learning rate is this times `learning_rate`.
      adam_weight_decay: AdamW's weight decay; None: `weight_decay`.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `celo2`'s.
      backend: "auto", "xla" or "pallas".
      precision: as `celo2`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Belilovsky-Lab/pylo, `pylo/optim/ELO_CELO2_naive.py`.
    """
    options = common.Options.of(locals(), precision=rule_precision(check_precision(precision)))
    weights = resolve(weights, ARCHITECTURES[::-1])
    config = weights.config
    adamw = AdamW(
        adam_learning_rate_mult,
        weight_decay if adam_weight_decay is None else adam_weight_decay,
        AdamSettings(
            (config["initial_momentum_decays"][0], config["initial_rms_decays"][-1]), epsilon=1e-8
        ),
    )
    return matrix_optimizer(
        weights,
        options,
        adamw,
        plans=celo2_plans(label_fn, matrix_axes),
        max_gradient_norm=max_gradient_norm,
        orthogonal=True,
        precision=precision,
    )
