"""The optimizers beyond small_fc_lopt and VeLO: training, options, optax's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
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


@pytest.fixture
def params():
    return {
        "bias": optimizers.random_like(jnp.zeros((6,)), 1),
        "embedding": optimizers.random_like(jnp.zeros((7, 4)), 2),
        "wide": optimizers.random_like(jnp.zeros((2, 3, 6)), 3),
        "tall": optimizers.random_like(jnp.zeros((8, 5)), 4),
    }


def gradients_of(params, step=0):
    return optimizers.random_like(params, 100 + step, scale=0.1)


def trajectory(tx, params, steps=3):
    """Parameters after each step."""
    state, out = tx.init(params), []
    for step in range(steps):
        updates, state = tx.update(gradients_of(params, step), state, params, value=1.0)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def assert_close(actual, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-7), actual, expected
    )


# -- Celo2 and ELO-CELO2 ------------------------------------------------------------------------


def embeddings_to_adamw(path, leaf):
    return "adamw" if path[0].key == "embedding" else "learned"


@pytest.mark.parametrize("name", ["celo2", "celo2_base"])
def test_steps_of_matrices_have_unit_root_mean_square(name, params):
    tx = optimizers.make(name, learning_rate=0.5)
    updates, _ = tx.update(gradients_of(params), tx.init(params), params)
    for leaf in ("embedding", "wide", "tall"):
        rms = np.sqrt(np.mean(np.square(updates[leaf]), axis=(-2, -1)))
        np.testing.assert_allclose(rms, 0.5, rtol=1e-5)


def test_celo2_orthogonalises_what_celo2_base_proposes(params):
    """Same singular vectors, and singular values that the iteration brings near one another."""
    base, orthogonal = (
        optimizers.make(name, learning_rate=0.5) for name in ("celo2_base", "celo2")
    )
    gradients = gradients_of(params)
    before, _ = base.update(gradients, base.init(params), params)
    after, _ = orthogonal.update(gradients, orthogonal.init(params), params)
    for leaf in ("embedding", "tall", "wide"):
        for a, b in zip(
            np.reshape(before[leaf], (-1, *before[leaf].shape[-2:])),
            np.reshape(after[leaf], (-1, *after[leaf].shape[-2:])),
            strict=True,
        ):
            u, old, v = np.linalg.svd(np.float64(a), full_matrices=False)
            inner = u.T @ np.float64(b) @ v.T
            new = np.diag(inner)
            np.testing.assert_allclose(inner, np.diag(new), atol=1e-4 * new.max())
            assert new.max() / new.min() < old.max() / old.min()


@pytest.mark.parametrize("shape", [(12, 12), (3, 20, 7), (7, 20), (1, 5), (100, 110)])
def test_orthogonalisation_is_that_of_muon(shape):
    """Also of singular values far apart."""
    from optax.contrib import MuonDimensionNumbers
    from optax.contrib._muon import orthogonalize_via_newton_schulz

    from lopt_jax.rules.newton_schulz import QUINTIC, newton_schulz

    x = jax.random.normal(jax.random.key(0), shape) * jnp.logspace(0, -6, shape[-1])
    dimensions = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    with jax.default_matmul_precision("highest"):
        expected = orthogonalize_via_newton_schulz(
            x, jnp.asarray(QUINTIC[0]), 5, eps=1e-8, dimension_numbers=dimensions
        )
    np.testing.assert_allclose(newton_schulz(x), expected, rtol=0, atol=2e-5)


def test_leaves_that_are_no_matrices_are_adamw(params):
    rate, mult, decay = 0.01, 20.0, 0.1
    tx = optimizers.make(
        "celo2",
        learning_rate=rate,
        weight_decay=0.3,
        adam_weight_decay=decay,
        adam_learning_rate_mult=mult,
        label_fn=embeddings_to_adamw,
    )
    adamw = optax.adamw(mult * rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay)
    learned = optimizers.make("celo2", learning_rate=rate, weight_decay=0.3)
    for actual, expected, other in zip(
        trajectory(tx, params), trajectory(adamw, params), trajectory(learned, params), strict=True
    ):
        for leaf in ("bias", "embedding"):
            assert_close(actual[leaf], expected[leaf])
        for leaf in ("wide", "tall"):
            assert_close(actual[leaf], other[leaf])
        assert np.abs(actual["embedding"] - other["embedding"]).max() > 0


def test_betas_of_adamw(params):
    tx = optimizers.make("celo2", learning_rate=0.01, adam_betas=(0.5, 0.8), adam_epsilon=1e-3)
    adam = optax.adam(0.01, b1=0.5, b2=0.8, eps=1e-3)
    for actual, expected in zip(trajectory(tx, params), trajectory(adam, params), strict=True):
        assert_close(actual["bias"], expected["bias"])


def test_elo_celo2_reads_the_betas_of_its_weights(params):
    """0.9 and 0.95 in the released config: the rule's first momentum and its second moment."""
    weights = optimizers.weights("elo_celo2")
    config = {"initial_momentum_decays": (0.8, 0.99, 0.999), "initial_rms_decays": (0.7,)}
    weights = lopt_jax.Weights("elo_celo2", {**weights.config, **config}, weights.params)
    tx = lopt_jax.elo_celo2(0.01, weights, weight_decay=0.0, max_gradient_norm=None)
    adam = optax.adam(0.01, b1=0.8, b2=0.7)
    for actual, expected in zip(trajectory(tx, params), trajectory(adam, params), strict=True):
        assert_close(actual["bias"], expected["bias"])


def test_leaves_of_adamw_keep_no_other_accumulators(params):
    tx = optimizers.make("celo2", label_fn=embeddings_to_adamw)
    accumulators = tx.init(params).accumulators
    for leaf in ("bias", "embedding"):
        assert accumulators.momentum[0][leaf].shape == params[leaf].shape
        assert accumulators.second_moment[leaf].shape == params[leaf].shape
        for tree in (*accumulators.momentum[1:], accumulators.row, accumulators.column):
            assert tree[leaf].shape == (1,)


@pytest.mark.parametrize(
    "name",
    [
        "elo",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("celo2", "celo2_base", "elo_celo2")),
    ],
)
def test_gradients_are_clipped_to_a_global_norm(name, params):
    gradients = jax.tree.map(lambda g: 30 * g, gradients_of(params))
    norm = optax.tree.norm(gradients)
    tx = optimizers.make(name, max_gradient_norm=0.5)
    plain = optimizers.make(name, max_gradient_norm=None)
    state = tx.init(params)
    actual, _ = tx.update(gradients, state, params)
    shrunk = jax.tree.map(lambda g: g * 0.5 / norm, gradients)
    assert_close(actual, plain.update(shrunk, plain.init(params), params)[0], rtol=1e-4)
    small = jax.tree.map(lambda g: 1e-3 * g, gradients)
    actual, _ = tx.update(small, state, params)
    assert_close(actual, plain.update(small, plain.init(params), params)[0])


def test_elo_celo2_clips_to_one_by_default(params):
    gradients = jax.tree.map(lambda g: 30 * g, gradients_of(params))
    default, one = optimizers.make("elo_celo2"), optimizers.make("elo_celo2", max_gradient_norm=1.0)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(tx.update(gradients, tx.init(params), params)[0] for tx in (default, one)),
    )


def test_wrong_arguments_of_celo2_are_named(params):
    for argument, value, error in (
        ("adam_learning_rate_mult", -1.0, ValueError),
        ("adam_weight_decay", "much", TypeError),
        ("max_gradient_norm", -2.0, ValueError),
    ):
        with pytest.raises(error, match=argument):
            optimizers.make("celo2", **{argument: value})
    with pytest.raises(ValueError, match=r"label_fn.*'sgd'.*\['embedding'\]"):
        optimizers.make("celo2", label_fn=lambda path, leaf: "sgd").init(
            {"embedding": params["embedding"]}
        )


# -- ELO ----------------------------------------------------------------------------------------


def test_elo_replaces_gradients_that_are_not_finite(params):
    tx = optimizers.plain("elo")
    gradients = gradients_of(params)
    bad = {**gradients, "bias": gradients["bias"].at[2].set(jnp.nan)}
    good = {**gradients, "bias": gradients["bias"].at[2].set(0.0)}
    actual, expected = (tx.update(g, tx.init(params), params)[0] for g in (bad, good))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# -- Celo ---------------------------------------------------------------------------------------


def test_celo_schedules_all_tensors_alike(params):
    """Its scheduler reads nothing of the tensors, so their step sizes are one."""
    tx = optimizers.plain("celo")
    state = tx.init(params)
    for step in range(3):
        _, state = tx.update(gradients_of(params, step), state, params, value=1.0 / (1 + step))
        np.testing.assert_array_equal(state.step_size, state.step_size[0])


def test_celo_adam_is_adam_times_its_scheduler(params):
    """Along Adam's trajectory: the step is Adam's, times step_mult and what the state says."""
    weights = optimizers.weights("celo_adam")
    tx, adam = optimizers.plain("celo_adam"), optax.adam(1.0, eps_root=1e-10)
    state, adam_state = tx.init(params), adam.init(params)
    for step in range(3):
        gradients = gradients_of(params, step)
        actual, state = tx.update(gradients, state, params, value=1.0)
        expected, adam_state = adam.update(gradients, adam_state, params)
        scale = weights.config.get("step_mult", 0.001) * state.step_size[0]
        assert_close(actual, jax.tree.map(lambda u, s=scale: s * u, expected), rtol=1e-4)
