"""Diagnostics of a step, and their plot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from optimizers import OPTIMIZERS

import lopt_jax
from lopt_jax.diagnostics import diagnose, to_scalars
from lopt_jax.plot import plot_run

LOSS = 1.5
CONTROLLED = ["velo", "celo", "celo_adam"]


@pytest.fixture
def params():
    return {
        "w": optimizers.random_like(jnp.zeros((3, 4)), 0),
        "b": optimizers.random_like(jnp.zeros((4,)), 1),
    }


def one_step(tx, params):
    gradients = optimizers.random_like(params, 2)
    return tx.update(gradients, tx.init(params), params, value=LOSS)


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2", "velo"])
def test_norms(name, params):
    updates, state = one_step(optimizers.plain(name), params)
    measured = jax.jit(diagnose)(updates, state, params)
    for leaf in params:
        step = np.linalg.norm(np.asarray(updates[leaf], np.float64))
        parameter = np.linalg.norm(np.asarray(params[leaf], np.float64))
        np.testing.assert_allclose(measured.step_norm[leaf], step, rtol=1e-6)
        np.testing.assert_allclose(measured.parameter_norm[leaf], parameter, rtol=1e-6)
        np.testing.assert_allclose(measured.update_to_parameter[leaf], step / parameter, rtol=1e-6)
    total = np.sqrt(sum(np.sum(np.square(np.float64(u))) for u in updates.values()))
    np.testing.assert_allclose(measured.total_step_norm, total, rtol=1e-6)
    assert (measured.multiplier is None) == (name not in CONTROLLED)
    assert (measured.scheduler is None) == (name not in CONTROLLED)


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_the_step_is_proportional_to_the_multiplier(name, params):
    """Raising the scheduler's last bias by log 3 triples multiplier and step, and nothing else."""
    weights = optimizers.weights(name)
    bias = weights.params["step_size"]
    higher = {**bias, "b": bias["b"] + np.log(3).astype(np.float32)}
    louder = lopt_jax.Weights(
        weights.architecture, weights.config, {**weights.params, "step_size": higher}
    )
    measured = []
    for w in (weights, louder):
        updates, state = one_step(OPTIMIZERS[name].make(weights=w), params)
        measured.append(diagnose(updates, state, params))
    plain, loud = measured
    for leaf in params:
        np.testing.assert_allclose(loud.multiplier[leaf], 3 * plain.multiplier[leaf], rtol=1e-5)
        np.testing.assert_allclose(loud.step_norm[leaf], 3 * plain.step_norm[leaf], rtol=1e-5)
    np.testing.assert_allclose(plain.scheduler, plain.multiplier["w"], rtol=1e-6)


@pytest.mark.parametrize("name", CONTROLLED)
def test_inside_other_transformations(name, params):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optimizers.plain(name), {"w": True, "b": False}),
    )
    measured = diagnose(*one_step(tx, params), params)
    assert measured.multiplier["b"] == 1.0
    alone = {"w": params["w"]}
    gradients = {"w": optimizers.random_like(params, 2)["w"]}
    norm = optax.tree.norm(optimizers.random_like(params, 2))
    clipped = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), gradients)
    inner = optimizers.plain(name)
    updates, state = inner.update(clipped, inner.init(alone), alone, value=LOSS)
    expected = diagnose(updates, state, alone)
    np.testing.assert_allclose(measured.multiplier["w"], expected.multiplier["w"], rtol=1e-5)


def test_stacked_axes_measure_every_tensor():
    params = {"layers": optimizers.random_like(jnp.zeros((3, 2, 4)), 0), "head": jnp.ones((4,))}
    stacked_axes = {"layers": 1, "head": 0}
    tx = optimizers.make("celo", stacked_axes=stacked_axes)
    updates, state = one_step(tx, params)
    measured = diagnose(updates, state, params, stacked_axes)
    assert measured.multiplier["layers"].shape == (3,)
    assert measured.multiplier["head"].shape == ()
    expected = [np.linalg.norm(np.asarray(u)) for u in updates["layers"]]
    np.testing.assert_allclose(measured.step_norm["layers"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="stacked_axes"):
        diagnose(updates, state, params)


def test_missing_gradients_and_zero_parameters(params):
    tx = optimizers.plain("celo")
    params = {**params, "frozen": jnp.ones((2,)), "zero": jnp.zeros((2,)), "none": None}
    gradients = {**optimizers.random_like(params, 2), "frozen": None}
    updates, state = tx.update(gradients, tx.init(params), params, value=LOSS)
    updates["zero"] = jnp.zeros((2,))
    measured = diagnose(updates, state, params)
    assert measured.step_norm["frozen"] is None
    assert measured.update_to_parameter["frozen"] is None
    assert measured.update_to_parameter["zero"] == 0
    assert np.isfinite(measured.total_step_norm)


def test_promotion_as_the_caller_has_it_changes_nothing(params):
    params["b"] = params["b"].astype(jnp.bfloat16)
    updates, state = one_step(optimizers.plain("velo"), params)
    expected = diagnose(updates, state, params)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        got = diagnose(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_scalars_have_flat_names(params):
    scalars = to_scalars(diagnose(*one_step(optimizers.plain("celo"), params), params))
    assert "step_norm['w']" in scalars
    assert "scheduler" in scalars
    assert all(np.ndim(x) == 0 for x in scalars.values())


@pytest.mark.parametrize("name", ["celo", "small_fc_lopt"])
def test_plot_of_a_run(name, params, tmp_path):
    tx = optimizers.plain(name)
    state = tx.init(params)
    history = []
    for step in range(4):
        updates, state = tx.update(optimizers.random_like(params, step), state, params, value=LOSS)
        history.append(diagnose(updates, state, params))
    path = tmp_path / "run.png"
    figure = plot_run(history, losses=[4.0, 3.0, 2.0, 1.0], path=path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    titles = [axis.get_title() for axis in figure.axes]
    expected = ["loss", "norm of the step", "update to parameter", "learned multiplier"]
    assert titles == (expected if name == "celo" else expected[:3])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    drawn = [float(d.step_norm["w"]) for d in history]
    np.testing.assert_array_equal(lines["['w']"], drawn)


def test_wrong_histories_are_named(params):
    with pytest.raises(ValueError, match="history"):
        plot_run([])
    measured = diagnose(*one_step(optimizers.plain("small_fc_lopt"), params), params)
    with pytest.raises(ValueError, match="losses"):
        plot_run([measured], losses=[1.0, 2.0])
