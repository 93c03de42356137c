"""Matrices of several axes, split over devices, against the update on one device."""

import functools

import jax
import numpy as np
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import sharding

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
