"""Derivatives of updates that the kernels make: those of the XLA path.

What is differentiated runs no kernel, so the interpreter has nothing to do here.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import optimizers
import pytest

import lopt_jax
from pallas_kernels import step

SHAPES = {
    "first": (24, 160),
    "second": (24, 160),  # a part of the same unit
    "vectors": [(40,), (33,), (40,)],  # padded to the longest, one unit
}
STEPS = 2


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([jnp.asarray(0.3 * rng.normal(size=s), dtype) for s in leaves])


def trained(name, backend, theta, params, rate, one_step):
    """A number that depends on all parameters after some steps on gradients of their own."""
    weights = replace(optimizers.weights(name), params=theta)
    case = optimizers.OPTIMIZERS[name]
    tx = case.make(weights=weights, backend=backend, learning_rate=rate, weight_decay=0.1)

    def body(carry, _):
        params, state = carry
        return one_step(tx, jax.tree.map(jnp.sin, params), state, params), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=STEPS)
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(params))


def added(tx, gradients, state, params):
    updates, state = tx.update(gradients, state, params, value=1.5)
    return jax.tree.map(jnp.add, params, updates), state


def applied(tx, gradients, state, params):
    return lopt_jax.update_params(tx, gradients, state, params, value=1.5)


def assert_close(got, expected, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        error = np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize(
    ("name", "one_step", "dtype", "tolerance"),
    [
        ("small_fc_lopt", added, jnp.float32, 1e-4),
        pytest.param("velo", applied, jnp.float32, 1e-4, marks=pytest.mark.slow),
        pytest.param("small_fc_lopt", applied, jnp.bfloat16, 3e-2, marks=pytest.mark.slow),
    ],
)
def test_gradients(monkeypatch, name, one_step, dtype, tolerance):
    """Along weights, parameters and learning rate, through several steps."""
    second_pass, lengths = step.second_pass, []

    def spy(rule, tracing, units, *arguments):
        lengths.extend(unit.lengths for unit in units)
        return second_pass(rule, tracing, units, *arguments)

    monkeypatch.setattr(step, "second_pass", spy)
    arguments = (optimizers.weights(name).params, draw(dtype), jnp.float32(1.0))

    def gradients(backend):
        function = functools.partial(trained, name, backend, one_step=one_step)
        return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(*arguments)

    with kernels.running():
        got = gradients("pallas")
    assert (40, 40, 33) in lengths
    assert_close(got, gradients("xla"), tolerance)


@pytest.mark.slow
def test_of_second_order_in_a_batch():
    """`jax.vmap` over Hessian-vector products along the parameters."""
    theta = optimizers.weights("small_fc_lopt").params
    batch = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), draw())

    def products(backend):
        function = functools.partial(trained, "small_fc_lopt", backend, theta, one_step=added)
        gradient = jax.grad(lambda params: function(params, 1.0))
        product = lambda params: jax.jvp(gradient, (params,), (params,))[1]  # noqa: E731
        return jax.jit(jax.vmap(product))(batch)

    with kernels.running():
        got = products("pallas")
    assert_close(got, products("xla"), 1e-3)
