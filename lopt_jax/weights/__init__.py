"""Weights of learned optimizers: the pytree, its Orbax store, converters, registry and hub."""

from lopt_jax.weights.base import Weights, WeightsError, WeightsLike
from lopt_jax.weights.convert import convert_weights
from lopt_jax.weights.export import export_weights
from lopt_jax.weights.hub import push_to_hub
from lopt_jax.weights.registry import list_weights, load_weights, resolve
from lopt_jax.weights.store import save_weights

__all__ = [
    "Weights",
    "WeightsError",
    "WeightsLike",
    "convert_weights",
    "export_weights",
    "list_weights",
    "load_weights",
    "push_to_hub",
    "resolve",
    "save_weights",
]
