"""The fused kernels on shards, interpreted on CPU devices, against the unsharded XLA path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lopt_jax import sharding

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "force_gpu_interpret_mode"):
    pytest.skip("this jax cannot interpret the kernels", allow_module_level=True)

SHAPES = {"rows": (16, 24), "square": (16, 16), "vector": (32,)}
SPECS = {"rows": P(None, "data"), "square": P("data"), "vector": P("data")}
STEPS = 2


def params_and_gradients():
    rng = np.random.default_rng(0)
    draw = lambda: {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}  # noqa: E731
    return draw(), [draw() for _ in range(STEPS)]


@functools.cache
def expected(name):
    params, gradients = params_and_gradients()
    tx = optimizers.make(name, backend="xla")
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def check(params, name):
    for key, want in expected(name).items():
        np.testing.assert_allclose(params[key], want, atol=5e-6 * np.max(np.abs(want)), rtol=0)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["small_fc_lopt", pytest.param("velo", marks=pytest.mark.slow)])
def test_distributed(name, devices, monkeypatch):
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 8)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    inner = optimizers.make(name, backend="pallas")
    tx = sharding.distributed(inner, "data")
    params, gradients = params_and_gradients()
    specs = sharding.distributed_specs(inner, params, "data", devices)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    with plgpu.force_gpu_interpret_mode():
        state = jax.jit(wrap(tx.init, in_specs=P(), out_specs=specs))(params)

        @jax.jit
        @functools.partial(wrap, in_specs=(P(), specs, P()), out_specs=(P(), specs))
        def step(gradients, state, params):
            updates, state = tx.update(gradients, state, params, value=jnp.float32(1.0))
            return optax.apply_updates(params, updates), state

        for g in gradients:
            params, state = step(g, state, params)
    check(params, name)


@pytest.mark.slow
def test_explicit():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    tx = optimizers.make("small_fc_lopt", backend="pallas")
    params, gradients = params_and_gradients()
    shardings = {k: NamedSharding(mesh, s) for k, s in SPECS.items()}
    with jax.set_mesh(mesh), plgpu.force_gpu_interpret_mode():
        params = jax.device_put(params, shardings)
        state = jax.jit(tx.init)(params)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p))
        for g in gradients:
            updates, state = step(jax.device_put(g, shardings), state, params)
            params = optax.apply_updates(params, updates)
    check(params, "small_fc_lopt")
