"""Matrices of several axes, split over devices, against the update on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import sharding
from lopt_jax.optimizers.fading import SquaredNorms
from lopt_jax.optimizers.lopt import schedule

SPECS = {"bias": P("data"), "query": {"kernel": P("data", "model", None)}}


def problem():
    shapes = {"bias": np.zeros(8), "query": {"kernel": np.zeros((8, 2, 6))}}
    params = optimizers.random_like(jax.tree.map(np.float32, shapes), 0)
    return jax.tree.map(np.asarray, (params, optimizers.random_like(params, 1)))


@functools.cache
def unsharded():
    params, gradients = problem()
    tx = optimizers.plain("celo2")
    return jax.tree.map(np.asarray, tx.update(gradients, tx.init(params), params)[0])


def check(updates):
    for got, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(unsharded()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_by_jit(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    tx = optimizers.plain("celo2")
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), SPECS)
    with jax.set_mesh(mesh):
        params, gradients = jax.device_put(problem(), (shardings, shardings))
        state = jax.jit(tx.init)(params)
        updates, _ = jax.jit(tx.update)(gradients, state, params)
    check(updates)


def test_distributed(monkeypatch):
    """Each device holds a part of a matrix, whose plan is that of the whole."""
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 32)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    inner = optimizers.plain("celo2")
    tx = sharding.distributed(inner, "data")
    params, gradients = problem()
    specs = sharding.distributed_specs(inner, params, "data", 4)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = jax.jit(wrap(tx.init, in_specs=P(), out_specs=specs))(params)
    step = jax.jit(wrap(tx.update, in_specs=(P(), specs, P()), out_specs=(P(), specs)))
    updates, state = step(gradients, state, params)
    check(updates)
    assert state.accumulators.momentum[0]["query"]["kernel"].sharding.spec[0] == "data"


def test_lopt_split_by_jit():
    """A leaf of every role; new parameters are those of one device."""
    specs = {
        "embed": {"embedding": P("data", "model")},
        "head": {"kernel": P("model", "data")},
        "mlp": {"bias": P("data"), "kernel": P("data", "model")},
        "norm": {"scale": P("data")},
    }
    shapes = {
        "embed": {"embedding": np.zeros((16, 8))},
        "head": {"kernel": np.zeros((8, 16))},
        "mlp": {"bias": np.zeros(8), "kernel": np.zeros((8, 12))},
        "norm": {"scale": np.zeros(8)},
    }
    start = optimizers.random_like(jax.tree.map(np.float32, shapes), 0)
    gradients = optimizers.random_like(start, 1)
    tx = lopt_jax.lopt(10)

    @jax.jit
    def first_step(params, gradients):
        return lopt_jax.update_params(tx, gradients, tx.init(params), params)[0]

    expected = first_step(start, gradients)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    with jax.set_mesh(mesh):
        got = first_step(*jax.device_put((start, gradients), (shardings, shardings)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_lopt_fades_alike_on_every_device(monkeypatch):
    """The norm is that of whole gradients, also where a device has a part of them."""
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 32)
    shapes = {"head": {"kernel": np.zeros((8, 16))}, "mlp": {"kernel": np.zeros((8, 12))}}
    params = optimizers.random_like(jax.tree.map(np.float32, shapes), 0)
    gradients = optimizers.random_like(params, 1, scale=1e-3)
    inner = lopt_jax.lopt(5000, weight_decay=0)

    def died(state):
        """After larger gradients: those of the last steps had a hundredth of the norm."""
        norms = SquaredNorms(jnp.float32(1e-4), jnp.float32(0.5))
        return state._replace(count=jnp.int32(500), norms=norms)

    def step(tx, params, gradients):
        updates, state = tx.update(gradients, died(tx.init(params)), params)
        return updates, state.norms

    squared = optax.tree.norm(gradients) ** 2
    expected, norms = jax.jit(functools.partial(step, inner))(params, gradients)
    np.testing.assert_allclose(norms.recent, 0.9e-4 + 0.1 * squared, rtol=1e-5)
    factor = norms.recent / (0.24**2 * norms.mean)
    assert factor < 0.01
    size = np.sqrt(np.mean(np.square(expected["mlp"]["kernel"])))
    whole = 0.038 / 8**0.5 * 5**-0.25
    np.testing.assert_allclose(
        size, whole * factor * schedule(500, 5000, lopt_jax.Recipe()), rtol=1e-3
    )

    def check(updates, new_norms):
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
        np.testing.assert_allclose(new_norms, norms, rtol=1e-6)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, P("data", "model"))
    with jax.set_mesh(mesh):
        check(*jax.jit(functools.partial(step, inner))(*jax.device_put((params, gradients), split)))
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    tx = sharding.distributed(inner, "data")
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    check(
        *jax.jit(on_mesh(functools.partial(step, tx), in_specs=P(), out_specs=P()))(
            params, gradients
        )
    )
