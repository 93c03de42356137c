"""The fused kernels on shards against the unsharded XLA path.

Compiled on as many GPUs as there are, interpreted on CPUs. The interpreter runs under explicit
sharding, `shard_map` and `pmap`, where the kernels are part of the program. It cannot run inside
`custom_partitioning`, by which `jit` with automatic sharding asks for the code of a shard: jax
lowers that code as a module of its own, which has no tokens for the interpreter's ordered
callbacks, and whose callbacks the executable does not know. Compiled kernels have no callbacks.
"""

import functools
import math

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import optax
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import gpu  # noqa: F401 (a fixture)

from lopt_jax import batches, sharding
from pallas_kernels import mosaic, supports

SHAPES = {"rows": (16, 24), "square": (16, 16), "tall": (24, 8), "vector": (32,)}
STEPS = 2
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def several_devices(monkeypatch):
    """Lets the interpreter run on several devices.

    Where it ends on one it asserts that none has barriers left, also those that still compute.
    """
    memory = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.shared_memory")
    monkeypatch.setattr(
        memory.GPUSharedMemory, "assert_no_barriers_allocated", lambda _: None, raising=False
    )
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 8)


def params_and_gradients(leaves=tuple(SHAPES), steps=STEPS):
    rng = np.random.default_rng(0)
    draw = lambda: {k: rng.standard_normal(SHAPES[k]).astype(np.float32) for k in leaves}  # noqa: E731
    return draw(), [draw() for _ in range(steps)]


def mesh_of(sizes, kind=AxisType.Auto):
    if jax.device_count() < math.prod(sizes):
        pytest.skip(f"needs {math.prod(sizes)} devices")
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def steps_of(tx):
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def unsharded(name, *of):
    """Parameters and state after the last step, on one device."""
    params, gradients = params_and_gradients(*of)
    tx = optimizers.make(name, backend="xla")
    state, step = tx.init(params), jax.jit(steps_of(tx))
    for g in gradients:
        params, state = step(g, state, params)
    return jax.tree.map(np.asarray, (params, state))


def check(got, expected, tolerance=5e-6):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), x in zip(leaves, jax.tree.leaves(got), strict=True):
        error, largest = np.max(np.abs(np.asarray(x) - want)), np.max(np.abs(want))
        assert error <= tolerance * largest, f"{jax.tree_util.keystr(path)}: {error} of {largest}"


FSDP = {"rows": P(None, "data"), "square": P("data"), "tall": P("data"), "vector": P("data")}
GRID = {"rows": P("data", "model"), "square": P("model", "data"), "tall": P("model")}
LAYOUTS = {
    "halves": ((2,), FSDP),
    "fsdp": ((8,), FSDP),
    "grid": ((2, 2), FSDP | GRID),
}


def run_jit(name, layout, kind, *of):
    """Parameters and state after the last step under jit, sharded."""
    sizes, specs = LAYOUTS[layout]
    return run_on(mesh_of(sizes, kind), specs, name, *params_and_gradients(*of))


def run_on(mesh, specs, name, params, gradients):
    shardings = {k: NamedSharding(mesh, specs[k]) for k in params}
    put = functools.partial(jax.device_put, device=shardings)
    tx = optimizers.make(name, backend="pallas")
    with jax.set_mesh(mesh), kernels.running():
        params = put(params)
        state, step = jax.jit(tx.init)(params), jax.jit(steps_of(tx))
        for g in gradients:
            params, state = step(put(g), state, params)
        return jax.block_until_ready((params, state))


def check_equal_shapes_split_differently(kind):
    rng = np.random.default_rng(1)
    draw = lambda: {k: rng.standard_normal((16, 24)).astype(np.float32) for k in "abc"}  # noqa: E731
    specs = {"a": P("data"), "b": P(None, "data"), "c": P("data")}
    check_against_xla("small_fc_lopt", kind, specs, draw(), [draw()])


def check_against_xla(name, kind, specs, params, gradients):
    got = run_on(mesh_of((2,), kind), specs, name, params, gradients)
    tx = optimizers.make(name, backend="xla")
    state, step = tx.init(params), jax.jit(steps_of(tx))
    for g in gradients:
        params, state = step(g, state, params)
    check(got, (params, state))


def test_explicit_equal_shapes(monkeypatch):
    """Parts of one operation, each split in its own way: those split alike run together."""
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 0)
    check_equal_shapes_split_differently(AxisType.Explicit)


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
def test_automatic_equal_shapes(monkeypatch):
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 0)
    check_equal_shapes_split_differently(AxisType.Auto)


def test_explicit_halves():
    of = (("rows",), 1)
    check(run_jit("velo", "halves", AxisType.Explicit, *of), unsharded("velo", *of))


@pytest.mark.nightly
def test_explicit_whole_vectors():
    """Vectors of different lengths that no device splits are one unit, beside split matrices."""
    rng = np.random.default_rng(2)
    shapes = {"rows": (16, 24), "tall": (24, 8), "long": (20,), "short": (12,)}
    draw = lambda: {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}  # noqa: E731
    specs = {"rows": P(None, "data"), "tall": P("data"), "long": P(), "short": P()}
    check_against_xla("velo", AxisType.Explicit, specs, draw(), [draw()])


NAMES = ["small_fc_lopt", "velo", "celo", "mulo", "elo", "celo2_base", "elo_celo2"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_explicit(name, layout):
    check(run_jit(name, layout, AxisType.Explicit), unsharded(name))


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_automatic(name, layout):
    """One operation of the partitioner a pass: the interpreter cannot run in it, see above."""
    check(run_jit(name, layout, AxisType.Auto), unsharded(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mesh_of_one(name):
    """In `shard_map` on one device: the very numbers of the kernels outside it."""
    params, gradients = params_and_gradients()
    tx = optimizers.make(name, backend="pallas")
    step = steps_of(tx)
    in_mesh = jax.shard_map(step, mesh=mesh_of((1,)), in_specs=P(), out_specs=P(), check_vma=False)
    with kernels.running():
        got = jax.block_until_ready(jax.jit(in_mesh)(gradients[0], tx.init(params), params))
        if jax.device_count() == 1:
            want = jax.block_until_ready(jax.jit(step)(gradients[0], tx.init(params), params))
            jax.tree.map(np.testing.assert_array_equal, got, want)
    check(got, unsharded(name, tuple(SHAPES), 1))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", ["small_fc_lopt", "velo"])
def test_distributed_shard_map(name, devices):
    mesh = mesh_of((devices,))
    inner = optimizers.make(name, backend="pallas")
    tx = sharding.distributed(inner, "data")
    params, gradients = params_and_gradients()
    specs = sharding.distributed_specs(inner, params, "data", devices)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    with kernels.running():
        state = jax.jit(wrap(tx.init, in_specs=P(), out_specs=specs))(params)
        step = jax.jit(wrap(steps_of(tx), in_specs=(P(), specs, P()), out_specs=(P(), specs)))
        for g in gradients:
            params, state = step(g, state, params)
        jax.block_until_ready(params)
    check((params, state), unsharded(name))


def test_shard_map_that_checks_types():
    """Kernels do not pass its checks: "auto" is XLA there, and "pallas" says what to do."""
    params, gradients = params_and_gradients(("rows",), 1)

    def run(backend):
        tx = optimizers.make("small_fc_lopt", backend=backend)
        step = jax.shard_map(steps_of(tx), mesh=mesh_of((1,)), in_specs=P(), out_specs=P())
        with kernels.running():
            return jax.jit(step)(gradients[0], tx.init(params), params)

    check(run("auto"), unsharded("small_fc_lopt", ("rows",), 1))
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        run("pallas")


@pytest.mark.slow
def test_distributed_pmap():
    tx = sharding.distributed(optimizers.make("small_fc_lopt", backend="pallas"), "data")
    everywhere = lambda tree: jax.tree.map(lambda x: np.stack([x] * jax.device_count()), tree)  # noqa: E731
    params, gradients = params_and_gradients()
    params = everywhere(params)
    with kernels.running():
        state = jax.pmap(tx.init, axis_name="data")(params)
        step = jax.pmap(steps_of(tx), axis_name="data")
        for g in gradients:
            params, state = step(everywhere(g), state, params)
        jax.block_until_ready(params)
    check(jax.tree.map(lambda x: x[-1], params), unsharded("small_fc_lopt")[0])


@pytest.mark.parametrize("name", ["small_fc_lopt", "velo"])
def test_automatic_without_its_kernels(name, monkeypatch):
    """What is around the kernels compiles in a partitioner's hands, on devices without them."""

    def not_run(body, arguments, *, outputs, **options):
        del body, options
        some = sum(jnp.sum(x[...].astype(jnp.float32)) for x in arguments)
        return tuple(jnp.full(x.shape, some, x.dtype) for x in outputs)

    monkeypatch.setattr(mosaic, "call", not_run)
    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    sizes, specs = LAYOUTS["halves"]
    mesh = mesh_of(sizes)
    shardings = {k: NamedSharding(mesh, specs[k]) for k in SHAPES}
    params, (gradients, _) = params_and_gradients()
    params, gradients = (jax.device_put(x, shardings) for x in (params, gradients))
    tx = optimizers.make(name, backend="pallas")
    new, _ = jax.jit(steps_of(tx))(gradients, jax.jit(tx.init)(params), params)
    assert jax.tree.map(jnp.shape, new) == SHAPES
    for key, x in new.items():
        assert x.sharding.is_equivalent_to(shardings[key], x.ndim), key
