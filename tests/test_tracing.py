"""What steers a trace is an argument, and part of the key under which the trace is kept."""

import ast
import functools
import gc
import re
import types
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest

import lopt_jax
from lopt_jax import batches
from lopt_jax.applying import in_batch, steering
from lopt_jax.compiler import products
from lopt_jax.compiler.quirks import QUIRKS
from lopt_jax.context import Tracing, platform_of_mesh
from lopt_jax.rules.rule import Rule
from lopt_jax.xla import passes

ROOT = Path(lopt_jax.__file__).parents[1]
AMBIENT = ("threading.local", "contextvars.ContextVar")
# Public names; warnings that were given once, and kernels that early compilation has seen. They
# change no trace.
MUTABLE = {
    ("lopt_jax/__init__.py", "__all__"),
    ("lopt_jax/rule.py", "__all__"),
    ("lopt_jax/partition.py", "_said"),
    ("pallas_kernels/early.py", "_seen"),
}

PARAMS = {
    **{f"bias_{i}": jnp.linspace(-1.0, 1.0, 6) for i in range(3)},
    "kernel": jnp.linspace(-1.0, 1.0, 40).reshape(5, 8),
}


def own_modules():
    """Names and syntax trees of all modules that an update may run."""
    for package in ("lopt_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(("lopt_jax/meta/", "lopt_jax/weights/")):
                yield name, ast.parse(path.read_text())


def test_nothing_ambient_steers_a_trace():
    """No variable of a context or a thread, and no global one that is set or filled anew."""
    found = set()
    for name, tree in own_modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names}
                assert not imported & {"ContextVar", "contextvars", "local"}, name
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in AMBIENT, f"{name}:{node.lineno}"
            assert not isinstance(node, ast.Global), f"{name}:{node.lineno}: global"
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            is_constant = getattr(target, "id", "").strip("_").isupper()
            if is_constant or isinstance(target, ast.Attribute):
                continue
            kinds = ast.Set | ast.List | ast.Dict | ast.ListComp | ast.SetComp | ast.DictComp
            made = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "")
            if isinstance(node.value, kinds) or made in ("set", "list", "dict"):
                found.add((name, target.id))
    assert found == MUTABLE


def small_fc_lopt():
    return optimizers.make("small_fc_lopt", backend="xla")


def program(tx, **options):
    """The program of an update, without the names of its variables."""
    update = lambda *trees: tx.update(*trees, **options)  # noqa: E731
    text = str(jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS), PARAMS))
    return sorted(re.findall(r"= (\w+)", text))


def as_it_is(tx):
    return program(tx)


def packed(tx):
    return program(lopt_jax.packed(tx))


def in_a_batch(tx):
    return program(in_batch(tx, 8))


def on_another_device(tx):
    return program(steering(tx, device="cpu"))


@pytest.mark.parametrize("ways", [(as_it_is, packed), (packed, as_it_is), (as_it_is, in_a_batch)])
def test_one_transformation_is_traced_anew_for_each_way(ways, monkeypatch):
    """As if each had a transformation of its own: which was traced first makes no difference."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # whose programs differ by batch
    alone = [way(small_fc_lopt()) for way in ways]
    assert alone[0] != alone[1]
    tx = small_fc_lopt()
    assert [way(tx) for way in ways] == alone


def test_a_default_device_is_part_of_the_key(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    alone = as_it_is(small_fc_lopt()), on_another_device(small_fc_lopt())
    tx = small_fc_lopt()
    assert (as_it_is(tx), on_another_device(tx)) == alone


def test_every_quirk_has_a_switch(monkeypatch):
    """Without what is done about it, an update is another program."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(batches, "LARGE_GROUPS", 2)
    monkeypatch.setattr(batches, "STACKED_LEAF_ELEMENTS", 1 << 12)
    monkeypatch.setattr(passes, "JOINED_BY_READERS", 2)
    monkeypatch.setattr(passes, "UNROLLED_ELEMENTS", 1 << 14)
    monkeypatch.setattr(products, "WORTH_IT", 1)
    monkeypatch.setattr(products, "WORKSPACE_BYTES", 1)
    shapes = {**{f"b{i}": (6,) for i in range(3)}, **{f"k{i}": (96, 100) for i in range(3)}}
    shapes["wide"] = (128, 128)
    params = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
    wide = lopt_jax.small_fc_lopt("small_fc_lopt", backend="xla")
    velo = optimizers.make("velo", backend="xla")
    answering = optimizers.make("rnn_mlp_lopt")
    of_others = {"unrolled_weights": (wide, "cpu"), "known_decays": (answering, "tpu")}
    cases = [(*case, {quirk}) for quirk, case in of_others.items()]
    for tx, platform, quirks in (*cases, (velo, "tpu", set(QUIRKS) - set(of_others))):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        state = jax.eval_shape(tx.init, params)

        def program(*without, tx=tx, state=state):
            update = functools.partial(steering(tx, without=without).update, value=jnp.float32(1))
            return str(jax.make_jaxpr(update)(params, state, params))

        whole = program()
        assert {quirk for quirk in quirks if program(quirk) != whole} == quirks


def test_equal_optimizers_share_traces():
    program(small_fc_lopt())
    caches = passes._of_whole_tensors, passes._first_pass
    before = [cache.cache_info() for cache in caches]
    program(small_fc_lopt())
    for old, new in zip(before, [cache.cache_info() for cache in caches], strict=True):
        assert new.misses == old.misses
        assert new.hits > old.hits
    program(optimizers.make("small_fc_lopt", backend="xla", precision="default"))
    assert passes._of_whole_tensors.cache_info().misses == before[0].misses + 1


def test_no_cache_keeps_an_optimizer():
    class Array(np.ndarray):
        """One that can be watched."""

    weights = optimizers.weights("small_fc_lopt")
    params = jax.tree.map(lambda x: np.array(x).view(Array), weights.params)
    own = lopt_jax.Weights(weights.architecture, weights.config, params)
    tx = lopt_jax.small_fc_lopt(own, backend="xla")
    jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)
    watched = [weakref.ref(tx.update), *map(weakref.ref, jax.tree.leaves(own.params))]
    del own, tx, params
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_no_cache_grows_with_equal_optimizers():
    """Features are functions: made anew for each optimizer, their rules would all be kept."""

    def kept():
        gc.collect()
        return sum(isinstance(x, Rule) for x in gc.get_objects())

    program(small_fc_lopt())
    before = kept()
    for _ in range(3):
        program(small_fc_lopt())
    assert kept() == before


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
def test_kernels_are_cut_for_the_device(multiprocessors):
    """Whole waves of programs on GPUs of any size."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels import tuning

    gpu = types.SimpleNamespace(platform="gpu", core_count=multiprocessors)
    held = tuning.multiprocessors(gpu)
    assert held == multiprocessors
    for chosen in (tuning.FIRST, tuning.SUMS, tuning.UPDATE):
        view = tuning.view_for((4096, 4096), chosen)
        programs = tuning.plan_for(held, (view,), 1, chosen).programs
        waves = programs / (multiprocessors * chosen.programs)
        assert 0.9 < waves / np.ceil(waves) <= 1


def test_a_platform_that_this_host_lacks_can_be_named():
    """By the optimizer, or by jax's default device."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def equations(tx):
        state = jax.eval_shape(tx.init, params)
        return re.findall(r"= (\w+)", str(jax.jit(tx.update).trace(params, state, params).jaxpr))

    tx = lopt_jax.small_fc_lopt("small_fc_lopt", backend="auto")
    here, named = equations(tx), equations(steering(tx, device="tpu"))
    assert here != named
    with jax.default_device("tpu"):
        assert equations(tx) == named


def test_the_mesh_of_arguments_names_the_platform():
    found = []
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for like in (None, sharding):
        x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=like)
        jax.jit(lambda x: found.append(platform_of_mesh({"of no mesh": 1, "x": x}))).trace(x)
    assert found == [None, "tpu"]


@pytest.mark.parametrize(("name", "platform"), [("cuda", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")])
def test_names_of_platforms(name, platform):
    tracing = Tracing(device=name)
    assert tracing.platform == platform
    assert tracing.runs_on.platform == platform
