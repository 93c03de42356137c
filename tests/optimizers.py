"""Every optimizer with tiny random weights: the table that the tests of shared behaviour run over.

A new optimizer is one more entry of `OPTIMIZERS`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import pytest

import lopt_jax
from lopt_jax.accumulators import second_moments
from lopt_jax.optimizers.plans import names_of
from lopt_jax.weights.schema import expected_shapes

NUM_STEPS = 20

MLP = {"hidden_size": 2, "hidden_layers": 1}
LSTM = {"lstm_hidden_size": 4, "param_inits": 2}
EXACT = {"precision": "highest"}  # what "auto" is on a CPU, wherever the tests run


@dataclass(frozen=True)
class Case:
    """One optimizer.

    Attributes:
      constructor: the public function.
      architecture: of its weights.
      config: what of its weights' config is not the default; small sizes, so that tests are fast.
      arguments: those that the constructor requires.
      reads_loss: whether its update needs `value`.
      decays_after: weight decay is taken off the updated parameter.
      has_recipe: its rate multiplies a schedule of its own, which decay follows as well.
    """

    constructor: Callable[..., optax.GradientTransformationExtraArgs]
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    reads_loss: bool = False
    decays_after: bool = False
    has_recipe: bool = False

    def make(self, **arguments: Any) -> optax.GradientTransformationExtraArgs:
        """Builds the optimizer."""
        return self.constructor(**{**self.arguments, **arguments})


def kernels_are_learned(path: Any, leaf: Any) -> str | None:
    """For `lopt`: no matrix of the tests is a head, though few layers read one another."""
    is_bias = any(name.startswith("b") for name in names_of(path)[-1:])
    return None if is_bias or leaf.ndim < 2 else "learned"


OPTIMIZERS = {
    "small_fc_lopt": Case(lopt_jax.small_fc_lopt, "small_fc_lopt", MLP),
    "velo": Case(lopt_jax.velo, "velo", {**MLP, **LSTM}, {"num_steps": NUM_STEPS}, reads_loss=True),
    "celo": Case(
        lopt_jax.celo,
        "celo",
        {**MLP, **LSTM, "step_mult": 1.0},  # or float16 could not hold its updates
        {"num_steps": NUM_STEPS},
        reads_loss=True,
    ),
    "celo_adam": Case(
        lopt_jax.celo_adam,
        "celo_adam",
        {"lstm_hidden_size": 4},
        {"num_steps": NUM_STEPS},
        reads_loss=True,
    ),
    "celo2": Case(lopt_jax.celo2, "celo2", MLP, EXACT),
    "celo2_base": Case(lopt_jax.celo2_base, "celo2", MLP, EXACT),
    "elo": Case(lopt_jax.elo, "elo", MLP),
    "elo_celo2": Case(lopt_jax.elo_celo2, "elo_celo2", MLP, EXACT),
    "lopt": Case(
        lopt_jax.lopt,
        "linear",
        {},
        {"num_steps": NUM_STEPS, "label_fn": kernels_are_learned, **EXACT},
        has_recipe=True,
    ),
    "mulo": Case(lopt_jax.mulo, "mulo", MLP, {"width_multipliers": 2.0}, decays_after=True),
    "mlp_lopt": Case(lopt_jax.mlp_lopt, "mlp_lopt", MLP),
    "nn_adam": Case(lopt_jax.nn_adam, "nn_adam", {"lstm_hidden_size": 4}),
    "rnn_mlp_lopt": Case(
        lopt_jax.rnn_mlp_lopt,
        "rnn_mlp_lopt",
        {
            **MLP,
            "lstm_hidden_size": 4,
            "from_mlp_size": 2,
            "from_lstm_size": 3,
            "lstm_to_mlp_size": 4,
        },
        reads_loss=True,
    ),
    "learnable_sgd": Case(lopt_jax.learnable_sgd, "learnable_sgd"),
    "learnable_sgdm": Case(lopt_jax.learnable_sgdm, "learnable_sgdm"),
    "learnable_adam": Case(lopt_jax.learnable_adam, "learnable_adam"),
}


# One for each way through the library: a controller above banks of networks, one network, matrices,
# a recipe of its own, and formulas without a network. What is tested of all optimizers alike is
# tested of these by `make test`, and of the others by `make test-all`.
REPRESENTATIVES = ("velo", "small_fc_lopt", "celo2", "lopt", "learnable_adam")


def in_kind(*names: str) -> list[Any]:
    """Values of a parametrisation: of optimizers, all but the representatives are nightly.

    Args:
      *names: of optimizers; none: all.
    """
    return [
        pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.nightly)
        for name in names or OPTIMIZERS
    ]


@functools.cache
def weights(name: str) -> lopt_jax.Weights:
    """Random weights of an optimizer, the same in every process."""
    case = OPTIMIZERS[name]
    shapes, treedef = jax.tree.flatten(
        expected_shapes(case.architecture, case.config), is_leaf=lambda x: isinstance(x, tuple)
    )
    generator = np.random.default_rng(0)
    arrays = [0.3 * generator.standard_normal(shape, np.float32) for shape in shapes]
    params = treedef.unflatten(arrays)
    for key in params:
        if key.endswith("_decays"):  # offsets of the logarithm: small, or nothing is averaged
            params[key] = 0.03 * params[key]
        if key.startswith(("log_", "one_minus_")):  # logarithms of small numbers
            params[key] = np.asarray(params[key] - 3, np.float32)
        if key == "initial":  # tenths of such logarithms
            params[key] = {k: np.float32(0.1 * x - 0.4) for k, x in params[key].items()}
    return lopt_jax.Weights(case.architecture, case.config, params)


def make(name: str, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """Builds an optimizer with its random weights."""
    return OPTIMIZERS[name].make(weights=weights(name), **arguments)


@functools.cache
def plain(name: str) -> optax.GradientTransformationExtraArgs:
    """An optimizer with default arguments, one object for all tests: it is compiled once."""
    return make(name)


def averages(state: Any) -> list[Any]:
    """The momenta and the second moment of a state: trees like the params, maybe none."""
    moments = state.accumulators
    return [*moments.momentum, *second_moments(moments.second_moment)]


def random_like(params: Any, seed: int, scale: float = 1.0) -> Any:
    """A tree of normal random arrays of the shapes and dtypes of params."""
    generator = np.random.default_rng(seed)

    def one(x: Any) -> jax.Array:
        values = scale * generator.standard_normal(x.shape)
        return jax.numpy.asarray(values, x.dtype)

    return jax.tree.map(one, params)
