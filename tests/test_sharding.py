"""Sharded updates against the update on one device."""

import contextlib
import functools

import jax
import numpy as np
import optax
import optimizers
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import batches, sharding

STEPS = 20
TOLERANCE = 2e-6

# Leaves above and below the (lowered) limits for stacking and replication; ties, rank 3 and 4,
# dimensions that 8 does not divide, both orders of the factored dimensions.
SHAPES = {
    "wide": (16, 40),
    "square": (16, 16),
    "conv": (3, 3, 8, 16),
    "fused": (24, 3, 8),
    "odd": (23, 13),
    "bias_1": (16,),
    "bias_2": (16,),
    "scalar": (),
}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 64)
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 32)


def small_fc_wide(**kwargs):
    """Hidden layers of 32: matrix products, a block of the tensor at a time."""
    weights = reference.weights("small_fc_lopt_h32", step_mult=0.01)
    return lopt_jax.small_fc_lopt(weights, **kwargs)


NAMES = [*optimizers.OPTIMIZERS, "small_fc_lopt_h32"]


def names(always):
    """Every optimizer; all but some are nightly: each takes seconds to compile."""
    return [pytest.param(n, marks=() if n in always else pytest.mark.nightly) for n in NAMES]


# So that each moves the parameters by some percent: else any update would be near enough.
LEARNING_RATES = {
    "small_fc_lopt": {"learning_rate": 30.0},
    "mulo": {"learning_rate": 60.0},
    "celo_adam": {"learning_rate": 60.0},
    "mlp_lopt": {"learning_rate": 50.0},
    "rnn_mlp_lopt": {"learning_rate": 10.0},
}


def make(name):
    if name == "small_fc_lopt_h32":
        return small_fc_wide()
    return optimizers.make(name, **LEARNING_RATES.get(name, {}))


def make_params(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def gradients_at(params, step):
    rng = np.random.default_rng(100 + step)
    return {k: rng.standard_normal(params[k].shape).astype(np.float32) for k in sorted(params)}


def loss_at(step):
    return np.float32(2.0 - 0.05 * step)


@functools.cache
def unsharded(name):
    """Parameters after the last step on one device."""
    tx = make(name)
    params = make_params()
    state = tx.init(params)
    step = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    for i in range(STEPS):
        updates, state = step(gradients_at(params, i), state, params, loss_at(i))
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def check(params, expected):
    for key, want in expected.items():
        error = np.max(np.abs(np.asarray(params[key], np.float64) - want))
        bound = TOLERANCE * np.max(np.abs(want))
        assert error <= bound, f"{key}: {error / bound:.2f} times the bound"


def mesh_of(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


FSDP = {
    "wide": P(None, "data"),
    "square": P("data"),
    "conv": P(None, None, None, "data"),
    "fused": P("data"),
    "odd": P(),
    "bias_1": P("data"),
    "bias_2": P("data"),
    "scalar": P(),
}
GRID = {
    "wide": P("data", "model"),
    "square": P("model", "data"),
    "conv": P(None, None, "model", "data"),
    "fused": P("data", None, "model"),
    "odd": P(),
    "bias_1": P("model"),
    "bias_2": P(),
    "scalar": P(),
}
BOTH = {key: P(("data", "model")) if key in ("square", "fused", "wide") else P() for key in SHAPES}
LAYOUTS = {
    "replicated": ((8,), ("data",), {key: P() for key in SHAPES}),
    "fsdp": ((8,), ("data",), FSDP),
    "grid": ((4, 2), ("data", "model"), GRID),
    "both_axes": ((4, 2), ("data", "model"), BOTH),
}


def run_sharded(tx, mesh, specs, constrain=None):
    params = make_params()
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    with jax.set_mesh(mesh):
        state_shardings = sharding.state_shardings(tx, params, specs, mesh)
        params = jax.device_put(params, shardings)
        state = jax.jit(tx.init, out_shardings=state_shardings)(params)

        @functools.partial(jax.jit, out_shardings=(shardings, state_shardings))
        def step(gradients, state, params, value):
            if constrain is not None:
                gradients, params = constrain(gradients), constrain(params)
            updates, state = tx.update(gradients, state, params, value=value)
            return optax.apply_updates(params, updates), state

        for i in range(STEPS):
            gradients = jax.device_put(gradients_at(params, i), shardings)
            params, state = step(gradients, state, params, loss_at(i))
    return params, state, state_shardings


def cases(always):
    """Every optimizer in every layout; all but some are nightly."""
    return [
        pytest.param(n, k, marks=() if (n, k) in always else pytest.mark.nightly)
        for n in NAMES
        for k in LAYOUTS
    ]


ALWAYS = {("small_fc_lopt", "fsdp"), ("velo", "both_axes")}


@pytest.mark.parametrize(("name", "layout"), cases(ALWAYS))
def test_jit(name, layout):
    shape, names, specs = LAYOUTS[layout]
    params, state, shardings = run_sharded(make(name), mesh_of(shape, names), specs)
    check(params, unsharded(name))
    for x, sharding_ in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding_, x.ndim)


@pytest.mark.parametrize("name", names(["small_fc_lopt"]))
def test_jit_uneven(name):
    """Dimensions that the mesh does not divide: only a constraint inside jit can ask for those."""
    mesh = mesh_of((8,), ("data",))
    uneven = {"wide": P(None, "data"), "odd": P("data"), "conv": P(None, "data"), "fused": P()}

    def constrain(tree):
        put = lambda k, x: jax.lax.with_sharding_constraint(  # noqa: E731
            x, NamedSharding(mesh, uneven.get(k, P()))
        )
        return {k: put(k, x) for k, x in tree.items()}

    replicated = {key: P() for key in SHAPES}
    params, *_ = run_sharded(make(name), mesh, replicated, constrain)
    check(params, unsharded(name))


@pytest.mark.parametrize(("name", "layout"), cases({("small_fc_lopt", "fsdp")}))
def test_explicit(name, layout):
    check_explicit(name, layout, jax.set_mesh)


@pytest.mark.parametrize("name", names(["small_fc_lopt"]))
def test_explicit_where_no_mesh_is_set(name):
    check_explicit(name, "grid", contextlib.nullcontext)


def check_explicit(name, layout, mesh_set):
    """Types say the shardings; the state's are those of the parameters, from init on."""
    shape, names, specs = LAYOUTS[layout]
    mesh = mesh_of(shape, names, AxisType.Explicit)
    tx = make(name)
    params = make_params()
    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    with mesh_set(mesh):
        params = jax.device_put(params, shardings)
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(gradients, state, params, value):
            updates, state = tx.update(gradients, state, params, value=value)
            return optax.apply_updates(params, updates), state

        for i in range(STEPS):
            gradients = jax.device_put(gradients_at(params, i), shardings)
            params, state = step(gradients, state, params, loss_at(i))
        expected = sharding.state_shardings(tx, params, specs, mesh)
    check(params, unsharded(name))
    for x, sharding_ in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding_, x.ndim)


def split_gradients(params, step, devices=8):
    """A gradient a device whose mean is `gradients_at`, and losses likewise."""
    mean = gradients_at(params, step)
    rng = np.random.default_rng(step)
    parts = {}
    for key, g in mean.items():
        noise = rng.integers(-4, 5, (devices // 2, *g.shape)).astype(np.float32) / 4
        parts[key] = np.concatenate([g + noise, g - noise])
    losses = loss_at(step) + np.linspace(-0.5, 0.5, devices, dtype=np.float32)
    return parts, losses


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", names(["small_fc_lopt"]))
def test_distributed_shard_map(name, check_vma):
    mesh = mesh_of((8,), ("data",))
    inner = make(name)
    tx = sharding.distributed(inner, "data")
    params = make_params()
    specs = sharding.distributed_specs(inner, params, "data", 8)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    state = jax.jit(wrap(tx.init, in_specs=P(), out_specs=specs))(params)

    @jax.jit
    @functools.partial(wrap, in_specs=(P("data"), specs, P(), P("data")), out_specs=(P(), specs))
    def step(gradients, state, params, values):
        gradients = jax.tree.map(lambda g: g[0], gradients)
        updates, state = tx.update(gradients, state, params, value=values[0])
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        gradients, losses = split_gradients(params, i)
        params, state = step(gradients, state, params, losses)
    check(params, unsharded(name))
    for momentum in state.accumulators.momentum[:1]:
        assert momentum["square"].sharding.spec == P("data")
        assert momentum["odd"].shape == (24, 13)  # padded
        assert momentum["wide"].addressable_shards[0].data.size == momentum["wide"].size // 8


@pytest.mark.parametrize("name", names(["small_fc_lopt"]))
def test_distributed_pmap(name):
    tx = sharding.distributed(make(name), "data")
    params = make_params()
    everywhere = lambda tree: jax.tree.map(lambda x: np.stack([x] * 8), tree)  # noqa: E731
    replicated = everywhere(params)
    state = jax.pmap(tx.init, axis_name="data")(replicated)

    @functools.partial(jax.pmap, axis_name="data")
    def step(gradients, state, params, value):
        updates, state = tx.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        gradients, losses = split_gradients(params, i)
        replicated, state = step(gradients, state, replicated, losses)
    for device in (0, 7):
        check(jax.tree.map(lambda x, d=device: x[d], replicated), unsharded(name))
    for momentum in state.accumulators.momentum[:1]:
        assert momentum["wide"].shape == (8, 2, 40)
