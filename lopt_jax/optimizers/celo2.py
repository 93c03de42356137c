"""Celo2: a learned direction for every matrix, normalised or orthogonalised (arXiv 2602.19142)."""

from typing import Any

import jax
import optax

from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings
from lopt_jax.optimizers.matrices import ARCHITECTURES, AdamW, matrix_optimizer, rule_precision
from lopt_jax.optimizers.plans import LabelFn, MatrixAxes, Plans, celo2_plans
from lopt_jax.rules.newton_schulz import check_precision
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve
from lopt_jax.weights.advice import mention_recommended


@common.described
def celo2(
    learning_rate: common.ScalarOrSchedule = 0.001,
    weights: WeightsLike = "celo2",
    *,
    label_fn: LabelFn | None = None,
    matrix_axes: MatrixAxes = None,
    adam_learning_rate_mult: float | jax.Array = 1.0,
    adam_weight_decay: float | jax.Array | None = None,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_epsilon: float = 1e-8,
    max_gradient_norm: float | None = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Celo2: a learned rule for matrices, AdamW for the rest.

    A small MLP proposes the direction of every matrix; Newton-Schulz iterations make it nearly
    orthogonal; it is scaled to root mean square one. So the learning rate is the size of the step,
    as with other optimizers that normalise. A matrix whose gradient is zero moves by that size,
    too, as in the reference; without gradient (None) it stays.

    Args:
      learning_rate: multiplies the step; a number or an optax schedule. The best one falls like one
        over the root of the width; `lopt` does that by itself.
      weights: a registered name, a path to a checkpoint, or `Weights`. What they
        recommend is in their metadata, and is logged where rate and decay are left at the defaults.
      label_fn: from the path and the leaf to "learned", "adamw", or None, which is "learned":
        leaves of rank two and more that AdamW should update, such as embeddings. Tensors of rank
        below two always are AdamW's.
      matrix_axes: where the matrices of leaves of rank three and more are. None: kernels of Flax's
        attention, of its convolutions and of layers like them are recognised by their names and
        shapes (`lopt_jax.optimizers.plans.flax_matrix`); of all others they are the last two axes.
        "last_two": of all leaves, as in the original. Or a function of path and leaf that returns
        the axes of rows and those of columns, such as `((0,), (1, 2))` or
        `optax.contrib.MuonDimensionNumbers`, or None. Other axes are those of separate matrices.
      adam_learning_rate_mult: AdamW's learning rate is this times `learning_rate`.
      adam_weight_decay: AdamW's weight decay; None: `weight_decay`.
      adam_betas: AdamW's decays.
      adam_epsilon: added to AdamW's denominator.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto", "xla" or "pallas".
      precision: of the products of Newton-Schulz. "highest", "high" and "default" as
        `small_fc_lopt`'s, also of hidden layers of 16 or more. "bfloat16": of bfloat16 numbers,
        with sums in float32, as Muon's usually are. "auto": that on TPUs and on GPUs whose matrix
        units take it, else "highest". With these two, hidden layers are as exact as float32 is.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Moudgil et al., arXiv 2602.19142; amoudgl/celo, `celo/optimizers/celo2_optax.py`;
      Belilovsky-Lab/pylo, `pylo/optim/CELO2_naive.py`, for AdamW and the clipping.
    """
    options = common.Options.of(locals(), precision=rule_precision(check_precision(precision)))
    return _celo2(
        weights,
        options,
        AdamSettings(adam_betas, adam_epsilon),
        adam_learning_rate_mult,
        adam_weight_decay,
        celo2_plans(label_fn, matrix_axes),
        max_gradient_norm,
        orthogonal=True,
        precision=precision,
    )


@common.described
def celo2_base(
    learning_rate: common.ScalarOrSchedule = 0.001,
    weights: WeightsLike = "celo2",
    *,
    label_fn: LabelFn | None = None,
    matrix_axes: MatrixAxes = None,
    adam_learning_rate_mult: float | jax.Array = 1.0,
    adam_weight_decay: float | jax.Array | None = None,
    adam_betas: tuple[float, float] = (0.9, 0.95),
    adam_epsilon: float = 1e-8,
    max_gradient_norm: float | None = None,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Celo2 without orthogonalisation: directions of matrices are normalised alone.

    Arguments, result and references are those of `celo2`.
    """
    options = common.Options.of(locals(), precision=rule_precision(check_precision(precision)))
    return _celo2(
        weights,
        options,
        AdamSettings(adam_betas, adam_epsilon),
        adam_learning_rate_mult,
        adam_weight_decay,
        celo2_plans(label_fn, matrix_axes),
        max_gradient_norm,
        orthogonal=False,
        precision=precision,
    )


def _celo2(
    weights: WeightsLike,
    options: common.Options,
    adam: AdamSettings,
    adam_learning_rate_mult: Any,
    adam_weight_decay: Any,
    plans: Plans,
    max_gradient_norm: float | None,
    orthogonal: bool,
    precision: str,
) -> optax.GradientTransformationExtraArgs:
    decay = options.weight_decay if adam_weight_decay is None else adam_weight_decay
    weights = resolve(weights, ARCHITECTURES)
    mention_recommended(
        "celo2" if orthogonal else "celo2_base",
        weights,
        {
            "learning_rate": (options.learning_rate, 0.001),
            "weight_decay": (options.weight_decay, 0.0),
        },
    )
    return matrix_optimizer(
        weights,
        options,
        AdamW(adam_learning_rate_mult, decay, adam),
        plans=plans,
        max_gradient_norm=max_gradient_norm,
        orthogonal=orthogonal,
        precision=precision,
    )
