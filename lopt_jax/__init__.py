"""Learned optimizers for JAX, as optax transformations."""

import importlib
from typing import TYPE_CHECKING, Any

from lopt_jax import diagnostics, mup, plot, weights
from lopt_jax.applying import update_params
from lopt_jax.describe import describe
from lopt_jax.optimizers.adafac_mlp_lopt import adafac_mlp_lopt
from lopt_jax.optimizers.celo import celo
from lopt_jax.optimizers.celo2 import celo2, celo2_base
from lopt_jax.optimizers.celo_adam import celo_adam
from lopt_jax.optimizers.elo import elo
from lopt_jax.optimizers.elo_celo2 import elo_celo2
from lopt_jax.optimizers.learnable import learnable_adam, learnable_sgd, learnable_sgdm
from lopt_jax.optimizers.lopt import Recipe, lopt
from lopt_jax.optimizers.mlp_lopt import mlp_lopt
from lopt_jax.optimizers.mulo import mulo
from lopt_jax.optimizers.nn_adam import nn_adam
from lopt_jax.optimizers.rnn_mlp_lopt import observe_validation_loss, rnn_mlp_lopt
from lopt_jax.optimizers.small_fc_lopt import small_fc_lopt
from lopt_jax.optimizers.velo import velo
from lopt_jax.packing import pack_state, packed, unpack_state
from lopt_jax.weights import (
    Weights,
    WeightsError,
    convert_weights,
    export_weights,
    list_weights,
    load_weights,
    push_to_hub,
    save_weights,
)

if TYPE_CHECKING:
    from lopt_jax import flax as flax
    from lopt_jax import meta as meta
    from lopt_jax import sharding as sharding

__version__ = "0.2.0"

# Imported at their first use: flax alone takes as long to import as all the rest.
_LAZY = ("flax", "meta", "sharding")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Recipe",
    "Weights",
    "WeightsError",
    "__version__",
    "adafac_mlp_lopt",
    "celo",
    "celo2",
    "celo2_base",
    "celo_adam",
    "convert_weights",
    "describe",
    "diagnostics",
    "elo",
    "elo_celo2",
    "export_weights",
    "flax",
    "learnable_adam",
    "learnable_sgd",
    "learnable_sgdm",
    "list_weights",
    "load_weights",
    "lopt",
    "meta",
    "mlp_lopt",
    "mulo",
    "mup",
    "nn_adam",
    "observe_validation_loss",
    "pack_state",
    "packed",
    "plot",
    "push_to_hub",
    "rnn_mlp_lopt",
    "save_weights",
    "sharding",
    "small_fc_lopt",
    "unpack_state",
    "update_params",
    "velo",
    "weights",
]
