"""The loss reaches the optimizer through Flax's own ways of training, linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from flax import nnx

from lopt_jax.flax import TrainState

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Y = np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2)


def squared_error(prediction):
    return jnp.mean(jnp.square(prediction - Y))


@pytest.fixture(scope="module")
def linen():
    model = nn.Dense(2)
    return model, model.init(jax.random.key(0), X)["params"]


@pytest.mark.parametrize("name", optimizers.in_kind())
def test_train_state_hands_on_the_loss(name, linen):
    model, params = linen
    tx = optimizers.plain(name)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        loss, grads = jax.value_and_grad(lambda p: squared_error(state.apply_fn({"params": p}, X)))(
            state.params
        )
        return state.apply_gradients(grads=grads, value=loss), (loss, grads)

    expected, expected_state = params, tx.init(params)
    for _ in range(2):
        state, (loss, grads) = train_step(state)
        updates, expected_state = tx.update(grads, expected_state, expected, value=loss)
        expected = optax.apply_updates(expected, updates)
    assert int(state.step) == 2
    assert state.tx is tx
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, expected
    )


def test_train_state_hands_the_loss_to_multi_steps(linen):
    model, params = linen
    tx = optax.MultiSteps(optimizers.plain("velo"), 2)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        state = state.apply_gradients(grads=grads, value=1.0)
    expected = params
    opt_state = tx.init(params)
    for _ in range(2):
        updates, opt_state = tx.update(grads, opt_state, expected, value=1.0)
        expected = optax.apply_updates(expected, updates)
    assert not np.array_equal(expected["kernel"], params["kernel"])
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)


def test_train_state_takes_any_optax_transformation_and_fields(linen):
    model, params = linen

    class Counted(TrainState):
        epoch: int = 0

    state = Counted.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    grads = jax.tree.map(jnp.ones_like, params)
    for value in (None, 1.0):
        after = state.apply_gradients(grads=grads, value=value, epoch=3)
        assert after.epoch == 3
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b - 0.1, rtol=1e-6), after.params, params
        )


def test_train_state_without_the_loss_names_it(linen):
    model, params = linen
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizers.plain("velo"))
    with pytest.raises(ValueError, match="value="):
        state.apply_gradients(grads=params)


@pytest.mark.parametrize("name", optimizers.in_kind())
def test_nnx_optimizer(name):
    """nnx.Optimizer as it is: update(model, grads, value=loss)."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optimizers.plain(name)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected_state = tx.init(expected)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: squared_error(m(X)))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    for _ in range(2):
        train_step(model, optimizer)
        loss, grads = jax.value_and_grad(lambda p: squared_error(X @ p["kernel"] + p["bias"]))(
            expected
        )
        updates, expected_state = tx.update(grads, expected_state, expected, value=loss)
        expected = optax.apply_updates(expected, updates)
    actual = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert int(optimizer.step[...]) == 2
    for leaf, value in expected.items():
        np.testing.assert_allclose(actual[leaf], value, rtol=1e-4, atol=1e-6)


def test_variables_are_boxes():
    """A state of NNX's variables is updated to the same numbers, and keeps their names of axes."""
    tx = optimizers.plain("small_fc_lopt")
    kernel = nnx.Param(X[:, :2], out_sharding=("in", "out"), eager_sharding=False)
    boxed = nnx.State({"w": kernel})
    params = nnx.to_pure_dict(boxed)
    updates, state = tx.update(boxed, tx.init(boxed), boxed)
    expected, expected_state = tx.update(params, tx.init(params), params)
    assert updates["w"].out_sharding == ("in", "out")
    assert state.accumulators.row["w"].out_sharding == (None, "out")
    assert state.accumulators.column["w"].out_sharding == (None, "in")
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (updates, expected)))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (state, expected_state)))
