"""Learned optimizers for JAX, as optax transformations."""

from lopt_jax.optimizers.small_fc_lopt import small_fc_lopt
from lopt_jax.optimizers.velo import velo
from lopt_jax.weights import (
    Weights,
    WeightsError,
    convert_weights,
    load_weights,
    save_weights,
)

__version__ = "0.1.0"

__all__ = [
    "Weights",
    "WeightsError",
    "__version__",
    "convert_weights",
    "load_weights",
    "save_weights",
    "small_fc_lopt",
    "velo",
]
