"""Programs for several devices: settings of the caller, size, the compilation cache, export."""

import collections
import contextlib
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import batches, sharding
from lopt_jax.applying import steering
from lopt_jax.xla import passes

SHAPES = {"wide": (6, 10), "square": (8, 8)}
SPECS = {"wide": P(None, "data"), "square": P("data")}


def draw(shapes, seed=0):
    like = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    return optimizers.random_like(like, seed)


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])


def arguments_of(tx, mesh, shapes=SHAPES, specs=SPECS):
    """Gradients, state and parameters, on their devices."""
    params = draw(shapes)
    put = lambda tree: jax.device_put(  # noqa: E731
        tree, {key: NamedSharding(mesh, specs[key]) for key in tree}
    )
    state = jax.device_put(tx.init(params), sharding.state_shardings(tx, params, specs, mesh))
    return put(draw(shapes, 1)), state, put(params)


def step_of(tx):
    """An update, compiled for nobody else."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    update = lambda *trees: tx.update(*trees, value=jnp.float32(1.5))  # noqa: E731
    return jax.jit(update, compiler_options=quickly)


def assert_close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * float(np.max(np.abs(b), initial=0)))


def settings():
    """What a caller may have asked of his own code."""
    return [
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.default_matmul_precision("bfloat16"),
        jax.transfer_guard("disallow"),
        jax.checking_leaks(),
    ]


@pytest.fixture(scope="module")
def expected():
    """An update on one device."""
    tx = optimizers.plain("small_fc_lopt")
    params = draw(SHAPES)
    return step_of(tx)(draw(SHAPES, 1), tx.init(params), params)


def test_settings_of_the_caller_change_nothing(expected):
    """Also where XLA asks for the code of a shard, long after the update was traced."""
    tx = optimizers.plain("small_fc_lopt")
    arguments = arguments_of(tx, make_mesh())
    step = step_of(tx)
    with contextlib.ExitStack() as stack:
        for setting in settings():
            stack.enter_context(setting)
        got = step(*arguments)
    assert_close(got, expected)


def test_settings_are_those_of_the_trace(expected):
    """A step that is lowered under settings which are gone when it is compiled."""
    tx = optimizers.plain("small_fc_lopt")
    arguments = arguments_of(tx, make_mesh())
    with jax.enable_x64(True):
        lowered = step_of(tx).lower(*arguments)
    assert_close(lowered.compile()(*arguments), expected)


def primitives(jaxpr):
    """How often a program has each primitive, those of programs inside of it too."""
    total = collections.Counter()
    for equation in jaxpr.eqns:
        total[equation.primitive.name] += 1
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
            total += primitives(getattr(part, "jaxpr", part)) if is_program(part) else {}
    return total


def is_program(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


# What `lopt_jax.partition.spread` wraps a program in: two for derivatives and `vmap`, and itself.
OPERATION = ("custom_jvp_call", "custom_vmap_call", "custom_partitioning")


@pytest.mark.parametrize(
    ("name", "platform", "stacked_axes"),
    [
        ("small_fc_lopt", "cpu", 0),
        ("velo", "gpu", 0),
        ("velo", "gpu", 1),
        ("rnn_mlp_lopt", "gpu", 0),
        ("nn_adam", "cpu", 1),
    ],
)
def test_devices_that_are_not_used_make_no_other_program(name, platform, stacked_axes, monkeypatch):
    """The program of one device is the content of one operation, also of many stacks."""
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 64)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)  # on GPUs leaves take turns
    shapes = {f"{i}": (8, 12) for i in range(18)} | {f"bias_{i}": (12,) for i in range(4)}
    params = draw({k: (*(3,) * stacked_axes, *shape) for k, shape in shapes.items()})

    def program(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        tx = optimizers.make(name, backend="xla", stacked_axes=stacked_axes)
        update = lambda *trees: tx.update(*trees, value=jnp.float32(1))  # noqa: E731
        return jax.make_jaxpr(update)(params, tx.init(params), params).jaxpr

    more = primitives(program(8)) - primitives(program(1))
    assert more == collections.Counter(OPERATION)


def test_shards_take_turns(monkeypatch):
    """Equal leaves that are split in different ways, some of them in turn."""
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 32)
    monkeypatch.setattr(batches, "LARGE_GROUPS", 2)
    shapes = {str(i): (8, 12) for i in range(5)}
    specs = {str(i): P("data") if i < 3 else P(None, "data") for i in range(5)}
    params = draw(shapes)
    tx = optimizers.make("small_fc_lopt", backend="xla")
    expected = step_of(tx)(draw(shapes, 1), tx.init(params), params)
    calls, in_turn = [], passes.in_turn
    monkeypatch.setattr(passes, "in_turn", lambda *xs: calls.append(len(xs[1])) or in_turn(*xs))
    on_tpus = steering(tx, device="tpu")  # where loops are worth it
    got = step_of(on_tpus)(*arguments_of(tx, make_mesh(), shapes, specs))
    assert set(calls) == {5, 3}  # whole, and the shards that are alike
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["small_fc_lopt", "velo"])
def test_equal_leaves_that_are_split_in_different_ways(name, monkeypatch):
    """One operation takes them; whole they are alike, and their shards are not."""
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 64)
    shapes = {"first": (8, 12), "other": (12, 12), "second": (8, 12)}
    specs = {"first": P("data"), "other": P(), "second": P(None, "data")}
    params = draw(shapes)
    tx = optimizers.make(name, backend="xla")
    expected = step_of(tx)(draw(shapes, 1), tx.init(params), params)
    assert_close(step_of(tx)(*arguments_of(tx, make_mesh(), shapes, specs)), expected)


@pytest.mark.parametrize(
    ("name", "axis"), [("small_fc_lopt", 0), ("small_fc_lopt", 1), ("velo", 0), ("nn_adam", 0)]
)
def test_stacks_that_are_split(name, axis, monkeypatch):
    """Along their axis of tensors, where each device has some of these, or along another."""
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 16)
    split = P("data") if axis == 0 else P(None, "data")
    shapes = {"matrix": (4, 6, 10), "other": (6, 8), "small": (2, 4), "vector": (4, 6)}
    specs = {"matrix": split, "other": P("data"), "small": split, "vector": split}
    stacked = {"matrix": 1, "other": 0, "small": 1, "vector": 1}
    params = draw(shapes)
    tx = optimizers.make(name, backend="xla", stacked_axes=stacked)
    expected = step_of(tx)(draw(shapes, 1), tx.init(params), params)
    arguments = arguments_of(tx, make_mesh(), shapes, specs)
    assert_close(step_of(tx)(*arguments), expected)
    placed = arguments_of(tx, make_mesh(AxisType.Explicit), shapes, specs)
    assert_close(step_of(tx)(*placed), expected)


def modules(*transformations, apply=False):
    """What the cache hashes of an update by each: its module, without addresses of callbacks."""
    arguments = arguments_of(transformations[0], make_mesh())
    out = []
    for tx in transformations:
        run = functools.partial(lopt_jax.update_params, tx) if apply else tx.update
        update = jax.jit(lambda *xs, run=run: run(*xs, value=jnp.float32(1)))
        text = update.lower(*arguments).as_text()
        assert "CustomSPMDPartitioning" in text
        out.append(re.sub(r'backend_config = "\d+"', "", text))
    return out


def test_different_programs_have_different_keys_and_equal_ones_the_same():
    """The operation of the partitioner is empty until XLA asks for its code."""

    of = optimizers.weights("small_fc_lopt")
    scaled = lopt_jax.Weights(of.architecture, {**of.config, "exp_mult": 0.01}, of.params)
    first, second, *others = modules(
        lopt_jax.small_fc_lopt(of),
        lopt_jax.small_fc_lopt(of),
        lopt_jax.small_fc_lopt(scaled),
        lopt_jax.small_fc_lopt(of, precision="default"),  # read by the code of a shard alone
    )
    others += modules(lopt_jax.small_fc_lopt(of), apply=True)
    assert first == second
    assert len({first, *others}) == 4


def test_export():
    """Of split arrays under explicit sharding; otherwise it is refused by name."""
    tx, mesh = optimizers.plain("small_fc_lopt"), make_mesh()
    arguments = arguments_of(tx, mesh)
    step = lambda *trees: tx.update(*trees)  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"jax\.sharding\.explicit_axes"):
        jax.export.export(jax.jit(step))(*arguments)
    trees = SPECS, sharding.state_specs(tx, draw(SHAPES), SPECS), SPECS
    with jax.set_mesh(mesh):
        explicit = jax.jit(jax.sharding.explicit_axes(step, in_sharding=trees))
        assert jax.export.export(explicit)(*arguments).nr_devices == 2
