"""The optimizers beyond small_fc_lopt and VeLO: training, options, optax's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import lopt_jax


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images.reshape(-1, 64) / 16).astype(np.float32), data.target


def train_on_digits(tx, steps=500, batch=128):
    """Losses of a 64-128-10 ReLU MLP; each is the minibatch's before that step."""
    images, labels = digits()
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w0": jax.random.normal(keys[0], (64, 128)) * (2 / 64) ** 0.5,
        "b0": jnp.zeros((128,)),
        "w1": jax.random.normal(keys[1], (128, 10)) * (1 / 128) ** 0.5,
        "b1": jnp.zeros((10,)),
    }

    def loss(params, x, y):
        hidden = jax.nn.relu(x @ params["w0"] + params["b0"])
        logits = hidden @ params["w1"] + params["b1"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = tx.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state, loss(params, images, labels)

    state = tx.init(params)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        chosen = rng.integers(len(images), size=batch)
        params, state, value = step(params, state, images[chosen], labels[chosen])
        losses.append(value)
    return np.asarray(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_released_weights_train(name):
    tx = getattr(lopt_jax, name)(500, reference.released_weights(name))
    losses = train_on_digits(tx)
    assert losses[-1] * 5 <= losses[50], losses[[0, 50, -1]]
