"""Large equal tensors that take turns in a loop, against the same computation without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from kernels import one_device  # noqa: F401 (fixture)

from lopt_jax import batches
from lopt_jax.xla import passes, turns
from lopt_jax.xla.turns import in_turn


@pytest.mark.parametrize("stored_at_once", [1, 3, 9])
def test_in_turn_is_a_python_loop(stored_at_once, monkeypatch):
    """What is read, replaced, written over and joined, each by its own formula."""
    monkeypatch.setattr(turns, "STORED_AT_ONCE", stored_at_once)
    # whole numbers: sums and products of them are exact, in whatever order
    draw = lambda i, *shape: jnp.round(9 * jax.random.normal(jax.random.key(i), shape))  # noqa: E731
    read = [{"a": draw(i, 5, 7), "b": draw(10 + i, 3)} for i in range(4)]
    state = [(draw(20 + i, 5, 7), draw(30 + i, 2)) for i in range(4)]
    out = [jnp.full((7, 5), np.nan) for _ in range(4)]  # a value that shows if it was left
    small = draw(40, 4, 2)

    def function(read, state, small):
        new = (state[0] + read["a"] * small[0], state[1] * small)
        return new, (read["a"] * jnp.sum(state[1])).T, jnp.sum(read["b"]) + small

    got = jax.jit(functools.partial(in_turn, function))(read, state, out, small)
    for k in range(4):
        new, made, results = function(read[k], state[k], small[k])
        np.testing.assert_array_equal(got[0][k][0], new[0])
        np.testing.assert_array_equal(got[0][k][1], new[1])
        np.testing.assert_array_equal(got[1][k], made)
        np.testing.assert_array_equal(got[2][k], results)


def test_in_turn_compiles_the_computation_once_and_joins_nothing():
    """One loop body, and no more memory than a few of the arrays."""
    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    function = lambda read, state, _: (state + read, jnp.sin(state), jnp.sum(read))  # noqa: E731

    def run(read, state):
        return in_turn(function, read, state, read, jnp.zeros(20))

    compiled = jax.jit(run, donate_argnums=1).lower([shape] * 20, [shape] * 20).compile()
    assert compiled.as_text().count(" sine(") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 64 * 128 * 4


@pytest.mark.usefixtures("one_device")  # a partitioner gets every leaf apart
@pytest.mark.parametrize(
    ("name", "stacked_axes"),
    [
        pytest.param("velo", 0, marks=pytest.mark.nightly),
        ("velo", 1),
        ("small_fc_lopt", 0),
        pytest.param("celo2", 1, marks=pytest.mark.nightly),
    ],
)
def test_turns_change_nothing(name, stacked_axes, monkeypatch):
    """Updates and state of a step with turns and without, some leaves alike and some not."""
    shapes = {"x": (4, 16, 24), "y": (4, 24, 16), "z": (2, 16, 24)}
    params = {
        f"{key}{i}": jax.random.normal(jax.random.key(i), shape)
        for key, shape in shapes.items()
        for i in range(3)
    }
    params["b"] = jnp.ones((16,))
    gradients = jax.tree.map(lambda x: jnp.sin(3 * x) * 0.1, params)
    tx = optimizers.make(name, stacked_axes=stacked_axes)

    def steps():
        # arrays with values would tell where they lie
        step = jax.jit(functools.partial(tx.update, value=jnp.float32(1.5)))
        _, state = step(gradients, tx.init(params), params)
        return step(gradients, state, params)

    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 8)
    expected = steps()
    jax.clear_caches()
    monkeypatch.setattr(batches, "LARGE_GROUPS", 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # where loops are worth it
    take_turns, calls = passes.in_turn, []
    monkeypatch.setattr(passes, "in_turn", lambda *xs: calls.append(len(xs[1])) or take_turns(*xs))
    got = steps()
    assert calls.count(3) == 3  # three kinds of leaves
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-7), got, expected)


def test_arrays_that_vary_in_different_ways_take_no_turns(monkeypatch):
    """In `shard_map`, gradients of each device's own beside parameters that all share."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(kind,))
    params = {str(i): jnp.linspace(-1.0, 1.0, 12).reshape(4, 3) for i in range(4)}
    tx = optimizers.make("small_fc_lopt")

    def step(gradients):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return jax.tree.map(lambda x: x[None], updates)

    gradients = jax.tree.map(jnp.sin, params)
    expected, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 8)
    monkeypatch.setattr(batches, "LARGE_GROUPS", 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    varying = jax.tree.map(lambda x: jnp.tile(x, (jax.device_count(), 1)), gradients)
    p = jax.sharding.PartitionSpec("d")
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=p, out_specs=p))(varying)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, 2e-5, 1e-7), got, expected)
