"""adafac_mlp_lopt: small_fc_lopt's rule under the name of its class, with that class's weights."""

from typing import Any

import jax
import optax

from lopt_jax.optimizers import common
from lopt_jax.optimizers.small_fc_lopt import small_fc_lopt
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike


@common.described
def adafac_mlp_lopt(
    weights: WeightsLike = "adafac_mlp_lopt",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "high",
) -> optax.GradientTransformationExtraArgs:
    """`small_fc_lopt` with the weights that the Celo paper compares with.

    Args:
      weights: as `small_fc_lopt`'s.
      learning_rate: as `small_fc_lopt`'s.
      weight_decay: as `small_fc_lopt`'s.
      weight_decay_mask: as `small_fc_lopt`'s.
      accumulator_dtype: as `small_fc_lopt`'s.
      stacked_axes: as `small_fc_lopt`'s.
      backend: as `small_fc_lopt`'s.
      precision: as `small_fc_lopt`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/adafac_mlp_lopt.py`, `AdafacMLPLOpt`;
      amoudgl/celo, `optimizers/adafac_mlp_lopt.py`, which computes the same bits.
    """
    return small_fc_lopt(
        weights,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
        stacked_axes=stacked_axes,
        backend=backend,
        precision=precision,
    )
