"""The fused kernels on shards, interpreted on CPU devices, against the unsharded XLA path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from jax.custom_batching import sequential_vmap
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lopt_jax import rule as rules
from lopt_jax import sharding
from lopt_jax.accumulators import Accumulators, Decays, factored_dims, factored_shapes
from lopt_jax.controller import mix_banks
from lopt_jax.features import velo_features
from lopt_jax.partition import Partition
from lopt_jax.rule import Rule

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "force_gpu_interpret_mode"):
    pytest.skip("this jax cannot interpret the kernels", allow_module_level=True)

SHAPES = {"rows": (16, 24), "square": (16, 16), "vector": (32,)}
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


def one_after_the_other(function, statics):
    """Lets `jax.vmap` call a kernel for each shard: the interpreter knows one device."""

    def call(*arguments):
        fixed, arrays = arguments[:statics], arguments[statics:]
        return sequential_vmap(lambda *xs: function(*fixed, *xs))(*arrays)

    return call


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((16, 24), 1),
        pytest.param((16, 24), 0, marks=SLOW),
        pytest.param((16, 16), 0, marks=SLOW),
    ],
)
def test_passes_on_shards(shape, dim, monkeypatch):
    """The two calls on halves of a tensor against the XLA rule on the whole."""
    from pallas_kernels import step

    for name, statics in (("_first_sums", 3), ("_square_sums", 4), ("_update", 4)):
        monkeypatch.setattr(step, name, one_after_the_other(getattr(step, name), statics))
    tx_weights = optimizers.weights("velo")
    rule = Rule(
        features=velo_features(3),
        gradient_clip=1000.0,
        parameter_scale=True,
        accumulator_statistics=True,
    )
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    positive = lambda *s: jnp.square(draw(*s))  # noqa: E731
    row, column = factored_shapes(shape, 3, factored_dims(shape))
    accumulators = Accumulators(
        momentum=tuple(draw(*shape) for _ in range(3)),
        second_moment=positive(*shape),
        row=positive(*row),
        column=positive(*column),
    )
    gradient, parameter = draw(*shape), draw(*shape)
    mlp = mix_banks(tx_weights.params["mlp"], jnp.ones((1, 2)))
    mlp_of_one = jax.tree.map(lambda x: x[0], mlp)
    decays = Decays(np.float32([0.9, 0.99, 0.999]), np.float32(0.999), np.float32([0.9] * 3))
    moments = rules.first_pass(rule, gradient, parameter)
    arguments = (gradient, parameter, accumulators, decays, jnp.float32(0.1), jnp.float32(0.01))
    want = rules.second_pass(rule, mlp_of_one, moments, *arguments)

    dims = factored_dims(shape)
    partition = Partition(shape, tuple(("data",) if d == dim else () for d in range(len(shape))))

    def halves(x, dropped=None, leading=0):
        if dropped == dim:
            return jnp.stack([x, x])[:, None]
        axis = dim - (dropped is not None and dropped < dim) + leading
        return jnp.stack(jnp.split(x, 2, axis=axis))[:, None]

    parts = step.Part(
        halves(gradient),
        halves(parameter),
        Accumulators(
            tuple(map(halves, accumulators.momentum)),
            halves(accumulators.second_moment),
            halves(accumulators.row, dims.d0, 1),
            halves(accumulators.column, dims.d1, 1),
        ),
    )

    def run(x):
        first = step.first_pass(rule, [x], partition)
        scale, weight_decay = jnp.full((1,), 0.1), jnp.full((1,), 0.01)
        arguments = (mlp, True, decays, scale, weight_decay, None, partition)
        return step.second_pass(rule, [x], first, *arguments)

    with plgpu.force_gpu_interpret_mode():
        (got,), statistics = jax.jit(jax.vmap(run, axis_name="data"))(parts)
    joined = jnp.concatenate([got.update[0, 0], got.update[1, 0]], axis=dim)
    np.testing.assert_allclose(joined, want.update, rtol=2e-5, atol=2e-6)
    for a, b in zip(*map(jax.tree.leaves, (statistics, want.statistics)), strict=True):
        np.testing.assert_allclose(a[0, 0], b, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(a[0], a[1])
    if dims.d0 == dim:
        row = got.accumulators.row
        np.testing.assert_allclose(row[0, 0], want.accumulators.row, rtol=1e-5)
        np.testing.assert_array_equal(row[0], row[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_fc_lopt", "velo"])
def test_distributed(name, monkeypatch):
    """On a mesh of one device, as the interpreter knows no more."""
    devices = 1
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
