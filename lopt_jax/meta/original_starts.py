"""Where the original starts to meta-train its older rules: Haiku's defaults, and usual rates.

Layers are truncated normals over the root of their inputs, biases and the LSTM's state zeros.

Reference: `init` of the optimizers in google/learned_optimization, learned_optimizers/: base.py,
mlp_lopt.py, nn_adam.py, rnn_mlp_lopt.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.weights.schema import expected_shapes

_SGD_RATE, _ADAM_RATE, _NN_ADAM_RATE = 0.01, 1e-3, 1e-4
_EPSILON = 1e-8
Config = Mapping[str, Any]


def _network(architecture: str, key: jax.Array, config: Config) -> dict[str, Any]:
    """Random weights, zero biases and states, of the architecture's shapes."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    shapes = expected_shapes(architecture, config)
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_shape)
    keys = jax.random.split(key, len(paths))

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        # what the controller says before it has said anything is drawn, too
        if not name.startswith(("w", "initial_from")):
            return jnp.zeros(shape, jnp.float32)
        normal = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
        return normal / math.sqrt(shape[0])

    arrays = [draw(path[-1].key, shape, k) for (path, shape), k in zip(paths, keys, strict=True)]
    return treedef.unflatten(arrays)


def _nn_adam(key: jax.Array, config: Config) -> dict[str, Any]:
    """The usual Adam, which the LSTM leaves alone."""
    params = _network("nn_adam", key, config)
    params["controls"] = jax.tree.map(jnp.zeros_like, params["controls"])
    (beta1,), (beta2,) = config["initial_momentum_decays"], config["initial_rms_decays"]
    values = (_NN_ADAM_RATE, 1 - beta1, 1 - beta2, _EPSILON)
    names = ("learning_rate", "beta1", "beta2", "epsilon")
    tenths = (0.1 * jnp.log(jnp.float32(value)) for value in values)
    return {**params, "initial": dict(zip(names, tenths, strict=True))}


def _log(value: float) -> jax.Array:
    return jnp.log(jnp.float32(value))


def _learnable_sgdm(key: jax.Array, config: Config) -> dict[str, Any]:
    (momentum,) = config["initial_momentum_decays"]
    return {"log_lr": _log(_SGD_RATE), "one_minus_momentum": _log(1 - momentum)}


def _learnable_adam(key: jax.Array, config: Config) -> dict[str, Any]:
    (beta1,), (beta2,) = config["initial_momentum_decays"], config["initial_rms_decays"]
    return {
        "log_lr": _log(_ADAM_RATE),
        "one_minus_beta1": _log(1 - beta1),
        "one_minus_beta2": _log(1 - beta2),
        "log_epsilon": _log(_EPSILON),
    }


# from a key and the complete config to the meta-parameters
STARTS: Mapping[str, Callable[[jax.Array, Config], dict[str, Any]]] = {
    "mlp_lopt": lambda key, config: _network("mlp_lopt", key, config),
    "rnn_mlp_lopt": lambda key, config: _network("rnn_mlp_lopt", key, config),
    "nn_adam": _nn_adam,
    "learnable_sgd": lambda key, config: {"log_lr": _log(_SGD_RATE)},
    "learnable_sgdm": _learnable_sgdm,
    "learnable_adam": _learnable_adam,
}
