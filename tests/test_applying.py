"""Steps that write the new parameters, against updates that are applied afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax
from lopt_jax.applying import apply_of

LOSS = jnp.float32(1.5)
CAN_APPLY = {"small_fc_lopt", "mlp_lopt", "mulo", "elo", "velo", "celo"}


@pytest.fixture
def params():
    tree = {
        "w": jnp.zeros((300, 40)),  # larger than small tensors
        "same": (jnp.zeros((6, 5)), jnp.zeros((6, 5))),
        "b": jnp.zeros((5,)),
        "half": jnp.zeros((4, 3), jnp.bfloat16),
        "scalar": jnp.zeros(()),
        "empty": jnp.zeros((0, 3)),
    }
    return optimizers.random_like(tree, seed=0)


@pytest.fixture
def small():
    """Params of wrappers: their updates are compiled often."""
    return optimizers.random_like({"w": jnp.zeros((6, 5)), "b": jnp.zeros((5,))}, seed=0)


def two_steps(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params, value=LOSS)
    return optax.apply_updates(params, updates), state


def one_step(tx, params, state, gradients):
    return lopt_jax.update_params(tx, gradients, state, params, value=LOSS)


def run(step, tx, params, gradients):
    compiled, state = jax.jit(lambda *xs: step(tx, *xs)), tx.init(params)
    for g in gradients:
        params, state = compiled(params, state, g)
    return params, state


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # bfloat16 parameters round once, where updates that are rounded first round twice
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 2e-6
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * np.max(np.abs(b), initial=0)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_which_optimizers_write_new_parameters(name):
    assert (apply_of(optimizers.plain(name)) is not None) == (name in CAN_APPLY)


@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=pytest.mark.nightly)])
# Those that write new parameters themselves, in both forms; the others take both steps, as a chain.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("velo", "small_fc_lopt") else pytest.mark.nightly)
        for n in optimizers.OPTIMIZERS
    ],
)
def test_new_parameters_are_old_ones_plus_updates(name, packs, params):
    tx = optimizers.make(name, weight_decay=0.1)
    tx = lopt_jax.packed(tx) if packs else tx
    gradients = [optimizers.random_like(params, seed=i, scale=0.1) for i in (1, 2, 3)]
    got = run(one_step, tx, params, gradients)
    assert_equal(got, run(two_steps, tx, params, gradients))


def test_what_has_no_gradient_stays(params):
    tx = optimizers.plain("velo")
    gradients = optimizers.random_like(params, seed=1, scale=0.1) | {"w": None, "scalar": None}
    new, _ = jax.jit(lambda *xs: one_step(tx, *xs))(params, tx.init(params), gradients)
    for key in ("w", "scalar"):
        np.testing.assert_array_equal(new[key], params[key])
    assert not np.array_equal(new["b"], params["b"])


def test_chains_take_both_steps(small):
    tx = optax.chain(optax.clip_by_global_norm(0.1), optimizers.plain("small_fc_lopt"))
    gradients = [optimizers.random_like(small, seed=i) for i in (1, 2)]
    assert_equal(run(one_step, tx, small, gradients), run(two_steps, tx, small, gradients))


def test_a_copy_takes_both_steps(small):
    """It may have another update: what applies the old one is not copied."""
    tx = optimizers.plain("small_fc_lopt")
    doubled = tx._replace(
        update=lambda *xs, **extra: (
            lambda updates, state: (jax.tree.map(lambda u: 2 * u, updates), state)
        )(*tx.update(*xs, **extra))
    )
    gradients = [optimizers.random_like(small, seed=i) for i in (1, 2)]
    for copy in (doubled, jax.tree.map(lambda x: x, tx)):
        assert_equal(run(one_step, copy, small, gradients), run(two_steps, copy, small, gradients))


# Of what reads the loss, the least to compile.
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.gradient_transformation()])
def test_multi_steps_are_handed_the_loss(make, small):
    """They take it, though they are of no type of optax's that does."""
    steps = make(optax.MultiSteps(optimizers.plain("celo_adam"), 2))
    gradients = [optimizers.random_like(small, seed=i) for i in (1, 2)]
    expected, _ = run(two_steps, steps, small, gradients)
    assert not np.array_equal(expected["w"], small["w"])
    assert_equal(run(one_step, steps, small, gradients)[0], expected)
    assert_equal(run(two_steps, lopt_jax.packed(steps), small, gradients)[0], expected)


def test_a_missing_loss_is_named(small):
    tx = optimizers.plain("velo")
    with pytest.raises(ValueError, match="value="):
        lopt_jax.update_params(tx, small, tx.init(small), small)
