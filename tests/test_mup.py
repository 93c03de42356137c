"""μP: width multipliers from shapes, and the optimizer that divides by them."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax
from lopt_jax import mup


def shapes(width, depth=2):
    """A network whose input and output layers, biases and scales are vector-like."""
    return {
        "embedding": np.zeros((50, width)),
        "layers": [{"w": np.zeros((width, 4 * width)), "b": np.zeros((4 * width,))}] * depth,
        "conv": np.zeros((3, 3, width, 2 * width)),
        "scale": np.zeros((width,)),
        "head": np.zeros((width, 10)),
        "fixed": np.zeros((7, 7)),
        "temperature": np.zeros(()),
    }


def test_width_multipliers():
    expected = {
        "embedding": 1.0,
        "layers": [{"w": 4.0, "b": 1.0}] * 2,
        "conv": 4.0,
        "scale": 1.0,
        "head": 1.0,
        "fixed": 1.0,
        "temperature": 1.0,
    }
    assert mup.width_multipliers(shapes(64), shapes(16)) == expected


def test_width_multipliers_take_the_ratio_of_the_inputs():
    params, base = {"w": np.zeros((64, 96))}, {"w": np.zeros((32, 12))}
    assert mup.width_multipliers(params, base) == {"w": 2.0}
    assert mup.width_multipliers(base, params) == {"w": 0.5}
    assert mup.width_multipliers(params, params) == {"w": 1.0}


def test_width_multipliers_of_shapes_alone():
    wide = jax.eval_shape(lambda: {"w": jnp.zeros((8, 8))})
    assert mup.width_multipliers(wide, jax.eval_shape(lambda: {"w": jnp.zeros((2, 2))})) == {
        "w": 4.0
    }


def test_wrong_base_models_are_named():
    with pytest.raises(ValueError, match=r"at most two.*\['qkv'\]"):
        mup.width_multipliers({"qkv": np.zeros((8, 4, 8))}, {"qkv": np.zeros((4, 2, 4))})
    with pytest.raises(ValueError, match=r"base_params.*rank.*\['w'\]"):
        mup.width_multipliers({"w": np.zeros((8, 8))}, {"w": np.zeros((4,))})
    with pytest.raises(ValueError, match="base_params"):
        mup.width_multipliers({"w": np.zeros((8, 8))}, {"v": np.zeros((4, 4))})


@pytest.fixture
def params():
    return {
        "w": optimizers.random_like(jnp.zeros((3, 4)), 0),
        "b": optimizers.random_like(jnp.zeros((4,)), 1),
    }


def first_update(tx, params):
    gradients = optimizers.random_like(params, 2)
    return tx.update(gradients, tx.init(params), params)[0]


def test_mulo_divides_the_step_of_small_fc_lopt(params):
    weights = optimizers.weights("mulo")
    actual = first_update(lopt_jax.mulo({"w": 8.0, "b": 1.0}, weights), params)
    expected = first_update(lopt_jax.small_fc_lopt(weights), params)
    np.testing.assert_allclose(actual["w"], expected["w"] / 8, rtol=1e-6)
    np.testing.assert_array_equal(actual["b"], expected["b"])


def test_mulo_takes_a_prefix_of_the_params(params):
    weights = optimizers.weights("mulo")
    nested = {"hidden": params, "head": params["w"]}
    prefix = first_update(lopt_jax.mulo({"hidden": 4.0, "head": 1.0}, weights), nested)
    full = {"hidden": {"w": 4.0, "b": 4.0}, "head": 1.0}
    expected = first_update(lopt_jax.mulo(full, weights), nested)
    jax.tree.map(np.testing.assert_array_equal, prefix, expected)


def test_mulo_decays_the_updated_parameter(params):
    """p - rate * step, then times (1 - rate * decay): rate is the learning rate over the width."""
    weights = optimizers.weights("mulo")
    widths, rate, decay = {"w": 4.0, "b": 1.0}, 0.5, 0.2
    plain = first_update(lopt_jax.mulo(widths, weights, learning_rate=rate), params)
    decayed = first_update(
        lopt_jax.mulo(widths, weights, learning_rate=rate, weight_decay=decay), params
    )
    for leaf, width in widths.items():
        kept = 1 - rate / width * decay
        expected = kept * (params[leaf] + plain[leaf]) - params[leaf]
        np.testing.assert_allclose(decayed[leaf], expected, atol=1e-6)


def test_mulo_under_inject_hyperparams(params):
    tx = optax.inject_hyperparams(lopt_jax.mulo)(
        {"w": 4.0, "b": 1.0}, optimizers.weights("mulo"), learning_rate=1.0
    )
    state = tx.init(params)
    gradients = optimizers.random_like(params, 2)
    whole, _ = tx.update(gradients, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    half, _ = tx.update(gradients, state, params)
    jax.tree.map(lambda h, w: np.testing.assert_allclose(h, w / 2, rtol=1e-6), half, whole)


def test_wrong_width_multipliers_are_named(params):
    weights = optimizers.weights("mulo")
    for wrong, error in ((0.0, ValueError), (-1.0, ValueError), ("wide", TypeError)):
        with pytest.raises(error, match=r"width_multipliers\['w'\]"):
            lopt_jax.mulo({"w": wrong, "b": 1.0}, weights)
    with pytest.raises(ValueError, match="width_multipliers"):
        first_update(lopt_jax.mulo({"w": 1.0, "other": 1.0}, weights), params)


def adam_like(rate):
    """Weights whose network hands on one of its inputs: momentum over the root second moment."""
    sizes = {"w0": (39, 2), "b0": (2,), "w1": (2, 2), "b1": (2,)}
    mlp = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}
    mlp["w0"][6] = 1, -1  # relu(x) - relu(-x) = x
    mlp["w1"][:, 0] = 1, -1
    offsets = {
        "momentum_decays": np.zeros(3, np.float32),
        "rms_decays": np.zeros(1, np.float32),
        "adafactor_decays": np.zeros(3, np.float32),
    }
    config = {"hidden_size": 2, "hidden_layers": 1, "step_mult": rate}
    return lopt_jax.Weights("small_fc_lopt", config, {"mlp": mlp, **offsets})


@pytest.mark.slow
def test_learning_curves_of_two_widths_agree_under_mup():
    """The example's model and task; without μP this step size is too large for the wide model."""
    path = Path(__file__).parents[1] / "examples" / "mup_widths.py"
    spec = importlib.util.spec_from_file_location("mup_widths", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    gaps = {}
    for under_mup in (True, False):
        narrow, wide = (
            example.train(width, under_mup, adam_like(0.01), 100) for width in (64, 512)
        )
        # of the whole curve: training amplifies rounding, single steps differ from run to run
        gaps[under_mup] = np.mean(np.abs(np.log(wide / narrow)))
    assert gaps[True] < np.log(1.25), gaps
    assert gaps[False] > np.log(2.5), gaps


def test_describe_has_the_width_multipliers():
    params = {"hidden": {"kernel": jnp.ones((8, 8))}, "out": jnp.ones((8, 2))}
    tx = lopt_jax.mulo({"hidden": 4.0, "out": 1.0}, lopt_jax.load_weights("small_fc_lopt"))
    leaves = lopt_jax.describe(tx, params).leaves
    assert [leaf.scale for leaf in leaves] == [0.25, 1.0]
    assert leaves[0].reason == "width multiplier 4"
    with pytest.raises(TypeError, match="found a transformation of optax, as chain"):
        lopt_jax.describe(optax.chain(tx), params)
