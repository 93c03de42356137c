"""A packed state: the same updates from fewer arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import sharding
from lopt_jax.packing import PACKED_ELEMENTS, PackedState

LOSS = 1.5


@pytest.fixture
def params():
    tree = {
        f"block_{i}": {"w": np.zeros((8, 6)), "b": np.zeros(6), "scale": np.zeros(8)}
        for i in range(3)
    }
    tree["embedding"] = np.zeros((PACKED_ELEMENTS // 8 + 1, 8))
    tree["half"] = np.zeros((5,), jnp.bfloat16)
    tree["scalar"] = np.zeros(())
    tree["empty"] = np.zeros((0, 3))
    like = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype.itemsize == 2 else "f4"), tree)
    return optimizers.random_like(like, seed=0)


def trajectory(tx, params, state, steps=4):
    """Parameters and state after some steps."""

    @jax.jit
    def step(gradients, state, params, loss):
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        gradients = optimizers.random_like(params, seed=1 + i, scale=0.1)
        params, state = step(gradients, state, params, LOSS / (1 + i))
    return params, state


def test_parts_are_joined_again(params):
    """Where the state is packed XLA may see that parts of an array are joined in the old order."""
    gradients = optimizers.random_like(params, seed=1)

    def parts_at_unknown_places(tx):
        update = jax.make_jaxpr(lambda *x: tx.update(*x, value=LOSS))
        return str(update(gradients, tx.init(params), params)).count("dynamic_slice[")

    counts = [
        parts_at_unknown_places(wrap(lopt_jax.small_fc_lopt(backend="xla")))
        for wrap in (lambda tx: tx, lopt_jax.packed)
    ]
    # nine updates; their five accumulators each, and three columns
    assert counts == [9 + 9 * 5 + 3, 9]


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.max(np.abs(a - e), initial=0) <= 2e-6 * np.max(np.abs(e), initial=0)


@pytest.mark.parametrize(
    "name",
    [
        "velo",
        "celo2",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in ("small_fc_lopt", "celo_adam")),
    ],
)
def test_updates_and_state_are_those_of_the_unpacked_optimizer(name, params):
    tx = optimizers.plain(name)
    plain_params, plain_state = trajectory(tx, params, tx.init(params))
    packed = lopt_jax.packed(tx)
    packed_params, state = trajectory(packed, params, packed.init(params))
    assert_close(packed_params, plain_params)
    assert_close(lopt_jax.unpack_state(tx, state, params), plain_state)


def test_small_arrays_of_a_shape_become_one(params):
    tx = optimizers.plain("velo")
    state = lopt_jax.packed(tx).init(params)
    assert len(jax.tree.leaves(state)) < 0.4 * len(jax.tree.leaves(tx.init(params)))
    large = [x for x in state.apart if x.size > PACKED_ELEMENTS]
    assert len(large) == 4  # three momenta and the second moment of the embedding


def test_unpacking_restores_every_bit(params):
    tx = optimizers.plain("velo")
    _, state = trajectory(tx, params, tx.init(params), steps=2)
    restored = lopt_jax.unpack_state(tx, lopt_jax.pack_state(state), params)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (restored, state))))


def test_inside_chain_under_scan_and_after_orbax(params, tmp_path):
    tx = optax.chain(optax.clip_by_global_norm(1.0), lopt_jax.packed(optimizers.plain("celo2")))
    del params["empty"]  # Orbax does not save what has no elements
    gradients = optimizers.random_like(params, seed=7, scale=0.1)

    @jax.jit
    def several(state, params):
        def body(carry, _):
            state, params = carry
            updates, state = tx.update(gradients, state, params)
            return (state, optax.apply_updates(params, updates)), None

        return jax.lax.scan(body, (state, params), None, length=2)[0]

    state, middle = several(tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    _, expected = several(state, middle)
    _, found = several(restored, middle)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (found, expected))))


def test_what_is_no_packed_state_of_the_optimizer_is_refused(params):
    tx = optimizers.plain("velo")
    with pytest.raises(TypeError, match="PackedState, found ControlledState"):
        lopt_jax.unpack_state(tx, tx.init(params), params)
    other = lopt_jax.packed(optimizers.plain("small_fc_lopt")).init(params)
    with pytest.raises(ValueError, match="not packed from a state of this optimizer"):
        lopt_jax.unpack_state(tx, other, params)
    with pytest.raises(ValueError, match="not packed from a state of this optimizer"):
        lopt_jax.unpack_state(tx, PackedState((), ()), params)


def test_specs_of_a_packed_state_are_refused(params):
    tx = optax.chain(lopt_jax.packed(optimizers.plain("velo")))
    with pytest.raises(ValueError, match="use the optimizer without"):
        sharding.state_specs(tx, params, P())
