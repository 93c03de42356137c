"""The fused kernels against the reference trajectories and the XLA path.

Compiled on a GPU that they run on, in the interpreter elsewhere.
"""

import functools
import itertools
import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.extend
import jax.numpy as jnp
import kernels
import numpy as np
import optimizers
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import compilation_cache
from jax.experimental.mosaic.gpu import fragmented_array, launch_context, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernels import gpu, one_device  # noqa: F401 (fixtures)

import lopt_jax
from lopt_jax.accumulators import Decays, init_accumulators
from lopt_jax.applying import in_batch
from lopt_jax.context import Tracing
from lopt_jax.features import small_fc_features, velo_features
from lopt_jax.partition import Partition
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import MLP, AccumulatorStatistics, Rule, TensorArrays
from lopt_jax.settings import TensorSettings
from lopt_jax.xla.network import XlaNetwork
from pallas_kernels import choice, early, launches, lines, mosaic, step, supports, table, units
from pallas_kernels.view import view_of

DECAYS = Decays(jnp.array([0.9, 0.99, 0.999]), jnp.float32(0.999), jnp.array([0.9, 0.99, 0.999]))
VELO = Rule(velo_features(), gradient_clip=1e3, parameter_scale=True, accumulator_statistics=True)
SMALL_FC = Rule(small_fc_features())
SPLIT = replace(SMALL_FC, precision=jax.lax.Precision.HIGH)  # wide layers on the matrix units
APPLIED = replace(VELO, applies=True)  # new parameters in place of updates


def random_part(shape, tensors, seed, parameter=jnp.float32, gradient=jnp.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    accumulators = jax.tree.map(
        lambda x: 1e-2 * jnp.abs(normal(tensors, *x.shape)), init_accumulators(shape, 3, 3)
    )
    return TensorArrays(
        gradient=(0.3 * normal(tensors, *shape)).astype(gradient),
        parameter=normal(tensors, *shape).astype(parameter),
        accumulators=accumulators._replace(
            momentum=tuple(0.1 * normal(tensors, *shape) for _ in range(3))
        ),
    )


def random_mlp(rule, tensors, hidden, seed):
    rng = np.random.default_rng(seed)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    sizes = (len(rule.features), hidden, hidden, 3)
    pairs = list(itertools.pairwise(sizes))
    return MLP(
        tuple(normal(tensors, *pair) for pair in pairs),
        tuple(normal(tensors, n) for n in sizes[1:]),
    )


def on_kernels(rule, parts, mlp, scale, weight_decay, statistics=None):
    units = [step.Unit(parts)]
    moments = step.first_pass(rule, Tracing(), units)
    settings = TensorSettings(mlp, scale, weight_decay, statistics, True)
    out = step.second_pass(rule, Tracing(), units, moments, settings, DECAYS)
    join = lambda *xs: jnp.concatenate(xs)  # noqa: E731
    return moments[0], jax.tree.map(join, *out.parts[0])._replace(statistics=out.statistics)


def on_xla(rule, parts, mlp, scale, weight_decay):
    part = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    first = functools.partial(rules.gradient_statistics, rule)
    moments = jax.vmap(first)(part.gradient, part.parameter)
    second = functools.partial(rules.update, rule, network=XlaNetwork(Tracing().platform))
    out = jax.vmap(second, in_axes=(0, 0, 0, 0, 0, None, 0, 0))(
        mlp, moments, *part, DECAYS, scale, weight_decay
    )
    return moments, out


def random_arguments(rule, shape, tensors=1, parts=1, hidden=4, seed=0, **dtypes):
    inputs = [random_part(shape, tensors, seed + i, **dtypes) for i in range(parts)]
    scale = jnp.linspace(0.5, 1.5, tensors * parts)
    return inputs, random_mlp(rule, tensors * parts, hidden, seed), scale, 0.1 * scale


def sizes_of(results):
    """What errors are measured by: an array's largest value.

    Of means it is the root mean square, of variances the mean square: one element has none.
    """
    moments, update = jax.tree.map(lambda x: np.max(np.abs(np.asarray(x, np.float64))), results)
    if (given := results[1].statistics) is not None:
        square = np.max(np.square(given.momentum_mean) + given.momentum_variance)
        second = np.max(np.square(given.second_moment_mean) + given.second_moment_variance)
        sizes = update.statistics._replace(
            momentum_mean=np.sqrt(square), momentum_variance=square, second_moment_variance=second
        )
        update = update._replace(statistics=sizes)
    return moments, update


def check(rule, shape, tolerance=1e-5, **options):
    arguments = random_arguments(rule, shape, **options)
    with kernels.running():
        got = jax.block_until_ready(jax.jit(functools.partial(on_kernels, rule))(*arguments))
    expected = jax.jit(functools.partial(on_xla, rule))(*arguments)
    for (path, b), a, size in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(got),
        jax.tree.leaves(sizes_of(expected)),
        strict=True,
    ):
        assert a.shape == b.shape, path
        error = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        error /= max(size, 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


# Its kind is covered by default, or a step of it takes the interpreter long.
nightly = functools.partial(pytest.param, marks=pytest.mark.nightly)

MIXED = [(10, 70), (17, 72), (34, 65), (9, 1, 80)]  # that tiles of one shape cover


def on_mixed_shapes(rule, arguments):
    """Gradient statistics and updates of each shape, from launches that take all shapes."""
    units = [step.Unit(parts) for parts, *_ in arguments]
    _, *others = zip(*arguments, strict=True)
    of_all = [jax.tree.map(lambda *xs: jnp.concatenate(xs), *x) for x in others]
    moments = step.first_pass(rule, Tracing(), units)
    out = step.second_pass(
        rule, Tracing(), units, moments, TensorSettings(*of_all, None, True), DECAYS
    )
    join = lambda *xs: jnp.concatenate(xs)  # noqa: E731
    return moments, [jax.tree.map(join, *parts) for parts in out.parts], out.statistics


def random_mixed(rule, hidden):
    return [
        random_arguments(rule, shape, parts=1 + (i == 1), hidden=hidden, seed=10 * i)
        for i, shape in enumerate(MIXED)
    ]


@pytest.fixture
def short_launches(monkeypatch):
    """One launch takes all parts of mixed shapes but one."""
    monkeypatch.setattr(launches, "LAUNCH_PARTS", 4)


@pytest.mark.parametrize(
    ("rule", "hidden", "limit"), [(VELO, 4, 0), nightly(SPLIT, 32, 0), nightly(SPLIT, 32, 1e9)]
)
@pytest.mark.usefixtures("one_device", "short_launches")
def test_launches_of_several_shapes(monkeypatch, rule, hidden, limit):
    arguments = random_mixed(rule, hidden)
    viewed = [units.Viewed.of(step.Unit(parts)) for parts, *_ in arguments]
    made = launches.launches_of(viewed, 132)
    assert len(made) == 3
    monkeypatch.setattr(launches, "BIASES", limit)
    assert len(launches.sharing_biases(made, hidden)) == (1 if limit else 3)
    with kernels.running():
        got = jax.block_until_ready(jax.jit(functools.partial(on_mixed_shapes, rule))(arguments))
    expected = [jax.jit(functools.partial(on_xla, rule))(*x) for x in arguments]
    moments, updates = zip(*expected, strict=True)
    statistics = None
    if rule.accumulator_statistics:
        statistics = jax.tree.map(
            lambda *xs: jnp.concatenate(xs), *(update.statistics for update in updates)
        )
    want = list(moments), [update._replace(statistics=None) for update in updates], statistics
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-5 * float(jnp.max(jnp.abs(b)))),
        got,
        want,
    )


@pytest.mark.usefixtures("short_launches")
@pytest.mark.parametrize(("rule", "hidden"), [(VELO, 4), (SPLIT, 32)])
def test_launches_of_several_shapes_lower_for_cuda(rule, hidden):
    traced = jax.jit(functools.partial(on_mixed_shapes, rule)).trace(random_mixed(rule, hidden))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 6  # of most parts, and of the one that is left over


@pytest.mark.parametrize(
    ("rule", "shapes", "options", "per_tensor", "tolerance"),
    [
        (SMALL_FC, [(6, 16)], {}, False, 1e-6),
        nightly(SMALL_FC, [(10,)], {"tensors": 2}, False, 1e-6),
        nightly(VELO, [(9,), (8, 12), (140, 6)], {"parts": 2}, True, 1e-6),
        # a last bit of a number moves where it is split in two, and so the update by 5e-6
        nightly(SPLIT, [(64, 10)], {"hidden": 32}, False, 1e-5),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_a_batch_is_its_members_one_by_one(rule, shapes, options, per_tensor, tolerance):
    """Under vmap, with networks and decays of each member's own."""
    join = lambda *xs: jnp.concatenate(xs)  # noqa: E731
    members = []
    for i in range(3):
        of_shapes = [random_arguments(rule, shape, seed=10 * i, **options) for shape in shapes]
        parts, *others = zip(*of_shapes, strict=True)
        members.append((parts, *(jax.tree.map(join, *x) for x in others)))
    decays = [jax.tree.map(lambda d, i=i: d * (1 - 0.02 * i), DECAYS) for i in range(3)]

    def run(arguments, decays):
        parts, mlp, *scales = arguments
        if not per_tensor:
            mlp = jax.tree.map(lambda x: x[0], mlp)
        units = [step.Unit(x) for x in parts]
        moments = step.first_pass(rule, Tracing(), units)
        of_all = TensorSettings(mlp, *scales, None, per_tensor)
        out = step.second_pass(rule, Tracing(), units, moments, of_all, decays)
        return moments, out

    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)  # noqa: E731
    with kernels.running():
        got = jax.jit(jax.vmap(run))(stack(members), stack(decays))
        expected = stack([jax.jit(run)(*pair) for pair in zip(members, decays, strict=True)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, tolerance * float(jnp.max(jnp.abs(b)))),
        got,
        expected,
    )


@pytest.mark.usefixtures("one_device")
def test_auto_takes_the_kernels_for_a_batch_of_trainings(monkeypatch):
    """Weights of each training's own, nested vmap; alone the tensor would be too small."""
    second_pass, shapes = step.second_pass, []

    def spy(rule, tracing, units, *arguments):
        shapes.extend(unit.parts[0].gradient.shape for unit in units)
        return second_pass(rule, tracing, units, *arguments)

    monkeypatch.setattr(step, "second_pass", spy)
    weights = lopt_jax.load_weights("small_fc_lopt_h4")
    factors = jnp.array([[0.9, 1.0], [1.1, 1.2]])
    params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(16, 16), "b": jnp.ones(3)}

    def update(backend, batch, factor):
        theta = jax.tree.map(lambda x: factor * x, weights.params)
        tx = lopt_jax.small_fc_lopt(replace(weights, params=theta), backend=backend)
        tx = in_batch(tx, batch)
        own = jax.tree.map(lambda x: factor * x, params)  # every training has parameters of its own
        return tx.update(jax.tree.map(jnp.sin, own), tx.init(own), own)

    def updates(backend, batch=1):
        return jax.vmap(jax.vmap(functools.partial(update, backend, batch)))(factors)

    with kernels.running():
        got = jax.jit(functools.partial(updates, "auto", 64))()
        assert shapes == [(1, 16, 16)]
        jax.jit(functools.partial(updates, "auto"))()  # nobody said how many there are
        assert len(shapes) == 1
    expected = updates("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-7), got, expected)


@pytest.mark.parametrize(
    ("rule", "shape", "options"),
    [
        (VELO, (24, 160), {"parts": 2}),  # partial tiles down and across
        nightly(VELO, (6, 3, 16), {"tensors": 2}),  # a middle axis
        (SMALL_FC, (3, 3, 5, 12), {}),  # batch axes; sizes that copies cannot address
        nightly(SMALL_FC, (8, 6, 2), {}),  # the last axis is a batch axis
        (VELO, (130,), {"tensors": 2}),  # not factored
        nightly(SMALL_FC, (8, 24), {"hidden": 16}),  # a wide layer
        nightly(APPLIED, (24, 160), {"parts": 2}),
        nightly(APPLIED, (6, 3, 16), {"tensors": 2, "parameter": jnp.bfloat16, "tolerance": 1e-2}),
        (APPLIED, (8, 6, 2), {}),  # of a copy
        nightly(APPLIED, (130,), {"tensors": 2}),
        (SPLIT, (12, 70), {"hidden": 32, "parts": 2, "tensors": 2, "tolerance": 1e-4}),
        nightly(
            replace(VELO, precision=SPLIT.precision), (3, 5, 8), {"hidden": 20, "tolerance": 1e-4}
        ),
    ],
)
def test_equals_xla(rule, shape, options):
    check(rule, shape, **options)


@pytest.mark.parametrize("precision", [nightly(jax.lax.Precision.HIGHEST), SPLIT.precision])
def test_statistics_leave_out_what_pads_a_vector(precision):
    """Tiles of wide layers are half a line; about far centres every element counts."""
    rule = replace(VELO, precision=precision)
    arguments = random_arguments(rule, (130,), hidden=16)
    centres = AccumulatorStatistics(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.ones(1), jnp.ones(1))
    with kernels.running():
        _, got = jax.jit(functools.partial(on_kernels, rule, statistics=centres))(*arguments)
    _, expected = jax.jit(functools.partial(on_xla, rule))(*arguments)
    for a, b in zip(got.statistics, expected.statistics, strict=True):
        np.testing.assert_allclose(a, b, 1e-3, 1e-6)


CUDA_CORES, MATRIX_UNITS = {"precision": "highest"}, {"precision": "high"}
ODD_SHAPES = [
    (1,),
    (7, 13),
    (1000,),
    (50_257, 8),
    (3, 3, 64, 64),
    (1005, 1024),
    (96, 12, 64),
    (5, 3, 1),
    (131_075,),
    (8, 50_257),
    (1024, 1001),
]
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


@pytest.mark.slow
@settings(max_examples=30 if kernels.are_compiled() else 6, deadline=None)
@given(
    rule=st.sampled_from([VELO, SMALL_FC, SPLIT, APPLIED]),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    parameter=DTYPES,
    gradient=DTYPES,
    hidden=st.sampled_from([4, 8, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_random_shapes(rule, shape, parameter, gradient, hidden, seed):
    narrow = parameter != jnp.float32  # the kernels return updates in the parameter's dtype
    check(
        rule,
        shape,
        hidden=hidden,
        seed=seed,
        tolerance=1e-2 if narrow else 1e-4,
        parameter=parameter,
        gradient=gradient,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (VELO, {}),
        (VELO, {"parameter": jnp.bfloat16, "gradient": jnp.float16, "tolerance": 1e-2}),
        (SMALL_FC, {}),
        (SMALL_FC, {"hidden": 32}),
        (SPLIT, {"hidden": 32}),
        (APPLIED, {}),
    ],
)
def test_odd_shapes(rule, shape, options):
    check(rule, shape, **{"tolerance": 1e-4, **options})


@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small_fc_lopt_h4", {}),
        ("small_fc_lopt_h32", CUDA_CORES),
        ("small_fc_lopt_h32", MATRIX_UNITS),
        ("velo", {}),
    ],
)
def test_same_bits(name, options):
    shapes = {"odd": (1005, 1024), "same": (1005, 1024), "conv": (3, 3, 64, 64), "bias": (1000,)}
    rng = np.random.default_rng(0)
    draw = lambda: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}  # noqa: E731
    params, gradients = draw(), draw()
    tx = reference.optimizer(name, backend="pallas", **options)
    update = jax.jit(tx.update)
    _, state = update(gradients, tx.init(params), params, value=1.0)
    first, *others = (update(gradients, state, params, value=1.0) for _ in range(10))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


WITHOUT_KERNELS = {
    "adafac_mlp_lopt_decays",
    "celo_adam",
    "celo_adam_random",
    "learnable_adam",
    "learnable_sgd",
    "learnable_sgdm",
    "mlp_lopt",
    "nn_adam",
    "nn_adam_decay",
    "rnn_mlp_lopt",
    "rnn_mlp_lopt_validation",
}
# Their normalisers are over matrices: of tensors that hold several XLA updates each.
OF_MATRICES = ("celo2", "celo2_base", "celo2_adamw", "elo_celo2")


@pytest.fixture
def wherever_possible(monkeypatch):
    """`backend="auto"` with kernels for every tensor that they can update, however small."""
    reason = choice.unsupported_group_reason

    def only_the_impossible(rule, shape, dtypes, is_asked_for):
        return reason(rule, shape, dtypes, is_asked_for=True)

    monkeypatch.setattr(choice, "unsupported_group_reason", only_the_impossible)


def check_steps(record_property, name, options, steps=None, leaves=None, **limit):
    run = reference.trajectory(name)
    only = lambda tree: tree if leaves is None else {k: tree[k] for k in leaves}  # noqa: E731
    run = run._replace(
        init=only(run.init),
        gradients=[only(tree) for tree in run.gradients[:steps]],
        losses=run.losses[:steps],
        params=[only(tree) for tree in run.params[:steps]],
    )
    backend = "auto" if name in OF_MATRICES else "pallas"
    tx = reference.optimizer(name, backend=backend, **options)
    with kernels.running():
        reference.check(tx, run, record_property, **limit, compiled={})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((n, {}) for n in reference.NAMES if n not in WITHOUT_KERNELS | {"small_fc_lopt_h32"}),
        ("small_fc_lopt_h32", CUDA_CORES),
        ("small_fc_lopt_h32", MATRIX_UNITS),
    ],
)
@pytest.mark.usefixtures("one_device", "wherever_possible")
def test_trajectory(name, options, record_property):
    """Parity with the reference; every step takes the interpreter seconds."""
    check_steps(record_property, name, options)


# One tensor of each rule; Celo's controller reads nothing of the others, nor do these rules.
@pytest.mark.parametrize(
    ("name", "leaves", "steps", "options", "limit"),
    [
        ("small_fc_lopt_h4", ["w", "bias"], 2, {}, 1),
        ("small_fc_lopt_h32", ["square", "w"], 1, MATRIX_UNITS, 0.3),
        ("celo_random", ["wide"], 1, {}, 1),
        nightly("celo2_base", ["wide"], 2, {}, 1),
        nightly("elo", ["wide"], 2, {}, 1),
    ],
)
@pytest.mark.usefixtures("one_device", "wherever_possible")
def test_first_steps_of_a_trajectory(name, leaves, steps, options, limit, record_property):
    check_steps(record_property, name, options, steps, leaves, limit=limit)


@pytest.mark.usefixtures("one_device", "wherever_possible")
def test_vectors_of_different_lengths(monkeypatch):
    """Vectors of similar lengths share launches, padded; nothing of the padding is seen."""
    rng = np.random.default_rng(0)
    params = {
        str(i): jnp.asarray(rng.normal(size=n), jnp.float32)
        for i, n in enumerate([130, 300, 300, 512, 100])
    }
    gradients = jax.tree.map(lambda x: 0.1 * x[::-1], params)
    on_xla = reference.optimizer("velo", backend="xla")
    tx = reference.optimizer("velo", backend="pallas")
    _, state = on_xla.update(gradients, on_xla.init(params), params, value=jnp.float32(1))
    arguments = (gradients, state, params)
    expected = jax.jit(on_xla.update)(*arguments, value=jnp.float32(0.9))
    with kernels.running():
        got = jax.jit(tx.update)(*arguments, value=jnp.float32(0.9))
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        scale = np.max(np.abs(b), initial=1e-9)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale, err_msg=str(path))
    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    traced = jax.jit(tx.update).trace(*arguments, value=jnp.float32(0.9))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4  # two passes, and 100 is too short for 512


def test_parts_of_a_factor():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)
    with kernels.running():
        high, low = mosaic.split(x)
    assert high.dtype == low.dtype == jnp.bfloat16
    rest = np.asarray(x, np.float64) - np.asarray(high, np.float64) - np.asarray(low, np.float64)
    assert np.max(np.abs(rest / np.asarray(x))) <= 2**-17
    assert np.max(np.abs(np.asarray(low, np.float64))) > 0


def lowered_for_cuda(rule, shape, hidden, tensors=1):
    arguments = random_arguments(rule, shape, tensors=tensors, parts=2, hidden=hidden)
    traced = jax.jit(functools.partial(on_kernels, rule)).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


# Of several shapes, which share launches, the other two are lowered above.
@pytest.mark.parametrize(
    ("rule", "hidden"), [nightly(VELO, 4), (VELO, 16), nightly(SPLIT, 32), (SPLIT, 24)]
)
def test_lowers_for_cuda(rule, hidden):
    """Finds layouts and operations that the compiler refuses, without a GPU."""
    text = lowered_for_cuda(rule, (40, 256), hidden)
    assert text.count("@mosaic_gpu") == 3  # one launch takes both arrays
    assert "output_operand_alias" in text  # the accumulators are updated in place


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize(
    ("rule", "hidden"), [(VELO, 4), (SMALL_FC, 4), (SMALL_FC, 32), (SPLIT, 32)]
)
def test_odd_shapes_lower_for_cuda(rule, shape, hidden):
    assert "@mosaic_gpu" in lowered_for_cuda(rule, shape, hidden)


class TestCompileAhead:
    """`early`: threads that compile kernels ahead, where that is asked for."""

    @pytest.fixture
    def started(self, monkeypatch):
        """What is handed to threads, as if there were a GPU; no thread is started."""
        started = []
        monkeypatch.setattr(early, "can_start", lambda: True)
        monkeypatch.setattr(early, "_seen", set())
        monkeypatch.setattr(early, "start", lambda _, *kernel: started.append(kernel))
        return started

    @staticmethod
    def lower(platforms=("cuda",)):
        """Lowers a program with one kernel's call in it, without the kernel."""
        call = jax.jit(lambda x: early.call(lambda: None, [x], name="lopt_update")[0])
        return call.trace(jnp.ones(())).lower(lowering_platforms=platforms)

    @pytest.fixture
    def found(self, monkeypatch):
        """The kernels that the process has lowered."""
        found = [(b"1", b"\0lopt_first_pass\0"), (b"2", b"somebody's"), (b"3", b"lopt_update")]
        monkeypatch.setattr(mosaic, "lowered_kernels", lambda: dict(found))
        monkeypatch.setattr(mosaic, "call", lambda body, arguments, **_: arguments)
        return found

    def test_is_off_unless_asked_for(self, monkeypatch, started, found):
        monkeypatch.setattr(early, "_mark", lambda: pytest.fail("a mark was made"))
        for setting in ("", "0"):
            monkeypatch.setenv(early.SETTING, setting)
            self.lower()
        assert not started

    def test_each_kernel_once(self, monkeypatch, started, found):
        """As soon as it is lowered; not those of other libraries, nor for another machine."""
        monkeypatch.setenv(early.SETTING, "2")
        self.lower(("cuda", "cpu"))
        jax.export.export(jax.jit(lambda x: early._mark().bind(x)), platforms=["cuda"])(1.0)
        assert not started
        self.lower()
        assert started == [found[0], found[2]]
        found.append((b"4", b"lopt_square_sums"))
        self.lower()
        assert started[2:] == found[3:]

    def test_wrong_settings_name_themselves(self, monkeypatch):
        monkeypatch.setenv(early.SETTING, "yes")
        with pytest.raises(ValueError, match=early.SETTING):
            early.threads()

    def test_the_compilation_cache_has_no_copy(self, monkeypatch):
        """Of what is compiled ahead; other compilations of the same thread are written."""
        written = []
        monkeypatch.setattr(
            mosaic, "call_lowered", lambda key, code: jnp.full((), len(key) + 0.125)
        )
        monkeypatch.setattr(
            compilation_cache, "put_executable_and_time", lambda *a: written.append(a)
        )
        early.compile_kernel(b"1234567", b"")
        assert not written
        jax.jit(lambda: jnp.full((), 7.625)).lower().compile()
        assert len(written) == 1

    def test_a_failure_is_said_once(self, monkeypatch, caplog):
        monkeypatch.setattr(mosaic, "call_lowered", lambda key, code: 1 / 0)
        for _ in range(2):
            early.compile_kernel(b"1", b"")
        (record,) = caplog.records
        assert early.SETTING in record.getMessage()

    def test_the_process_does_not_wait_for_them(self):
        code = (
            "import threading\n"
            "from pallas_kernels import early\n"
            "begun = threading.Event()\n"
            "early.start(lambda: begun.set() or threading.Event().wait())\n"
            "early.start(print, 'a task that waits')\n"
            "assert begun.wait(300)\n"
        )
        environment = {**os.environ, early.SETTING: "1", "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=environment, timeout=600
        )
        assert (run.returncode, run.stdout) == (0, b"")


def test_lowered_kernels_are_found():
    """`early` finds a kernel by its name in the code that jax hands over."""
    text = lowered_for_cuda(VELO, (40, 272), 4)
    new = {k: x for k, x in mosaic.lowered_kernels().items() if b"lopt_update" in x}
    assert text.count("@mosaic_gpu") == 3
    assert new
    call = jax.jit(functools.partial(mosaic.call_lowered, *new.popitem()))
    text = call.trace().lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu_v2" in text
    assert "kernel_hash" in text


@pytest.mark.parametrize("name", [nightly("small_fc_lopt"), "velo"])
def test_settings_of_the_caller_change_no_kernel(monkeypatch, name):
    """64 bit, and promotion at its strictest."""
    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    tx = optimizers.make(name, backend="pallas")
    shapes = ((40, 256), (40, 256), (7, 13), (130,), (96,), ())
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def lowered():
        state = jax.eval_shape(tx.init, params)
        update = jax.jit(functools.partial(tx.update, value=jnp.float32(1.5)))
        traced = update.trace(params, state, params)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")

    launches, known = lowered(), set(mosaic.lowered_kernels())
    assert launches > 0
    promotion = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(True), promotion[0], promotion[1]:
        assert lowered() == launches
    new = {key: mosaic.lowered_kernels()[key] for key in set(mosaic.lowered_kernels()) - known}
    # before jax 0.12 a kernel's code has its number among all
    assert all(re.search(rb"lopt_[a-z_]+_\d", code) for code in new.values())
    assert jax.__version_info__ < (0, 12) or not new


@pytest.mark.parametrize("names", [nightly("parameters"), "state"])
@pytest.mark.usefixtures("one_device")
def test_parts_of_arrays(names):
    """XLA hands a kernel parts of arrays where they lie; what it changes must stay in place.

    Parts that begin where no whole array does (at no multiple of 256 bytes) no kernel can take.
    """
    shapes = {"a": (33, 68), "b": (64, 256), "c": (40, 64)}
    sizes = np.cumsum([0] + [math.prod(shape) for shape in shapes.values()])
    rng = np.random.default_rng(0)
    flat = lambda: jnp.asarray(rng.normal(size=sizes[-1]), jnp.float32)  # noqa: E731

    def parts(x):
        places = zip(shapes, itertools.pairwise(sizes), strict=True)
        return {k: x[i:j].reshape(shapes[k]) for k, (i, j) in places}

    def step(tx, params, gradients, state):
        if names == "parameters":
            return tx.update(gradients, state, parts(params))
        accumulators = state.accumulators
        momentum = tuple(map(parts, accumulators.momentum))
        state = state._replace(accumulators=accumulators._replace(momentum=momentum))
        return tx.update(gradients, state, params)

    got = []
    params, gradients, momenta = flat(), flat(), [flat() for _ in range(3)]
    for backend in ("xla", "pallas"):
        tx = lopt_jax.small_fc_lopt(backend=backend)
        state, of_step = tx.init(parts(params)), params
        if names == "state":
            of_step, accumulators = parts(params), state.accumulators
            state = state._replace(accumulators=accumulators._replace(momentum=tuple(momenta)))
        with kernels.running():
            step_of = jax.jit(functools.partial(step, tx))
            got.append(jax.block_until_ready(step_of(of_step, parts(gradients), state)))
    for expected, actual in zip(*map(jax.tree.leaves, got), strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)


def test_passes_have_no_effects():
    """jax refuses effects in what it lowers on its own, as for `custom_partitioning`."""
    arguments = random_arguments(VELO, (16, 24))
    assert not jax.make_jaxpr(functools.partial(on_kernels, VELO))(*arguments).effects


# What gives a part of an array, and what gives its numbers as they lie: XLA need not copy any.
PARTS = ("slice", "dynamic_slice", "split", "unstack")
AS_IT_LIES = ("reshape", "transpose", "squeeze", "copy")
KERNELS = ("mpmd_map", "core_map", "pallas_call", "run_state")
PROGRAMS = ("jaxpr", "call", "call_jaxpr")  # parameters of what runs another program
# What an array is: computed, and nothing else; a part of that; or what may itself be, or become, a
# part of a larger one, as arguments and kernels' results may.
COMPUTED, PART, OPEN = range(3)


def lie_of_arrays(jaxpr, arguments):
    """What the results are, given what the arguments are, and for every kernel what it takes."""
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    taken = []

    def lies(values):
        literal = lambda x: isinstance(x, jax.extend.core.Literal)  # noqa: E731
        return [COMPUTED if literal(x) else known.get(x, COMPUTED) for x in values]

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        given = lies(eqn.invars)
        lie = max(given, default=COMPUTED) if name in PARTS + AS_IT_LIES else COMPUTED
        made = [max(lie, PART) if name in PARTS else lie] * len(eqn.outvars)
        if name in KERNELS:
            taken.append(given)
            made = [OPEN] * len(eqn.outvars)
        elif (inner := next(filter(None, map(eqn.params.get, PROGRAMS)), None)) is not None:
            made, of_inner = lie_of_arrays(getattr(inner, "jaxpr", inner), given)
            taken += of_inner
        known |= zip(eqn.outvars, made, strict=True)
    return lies(jaxpr.outvars), taken


@pytest.mark.parametrize("shape", [(16, 24), (500,)])
@pytest.mark.parametrize("rule", [VELO, SMALL_FC, APPLIED])
def test_kernels_have_whole_arrays(rule, shape):
    """Where parts of arrays lie kernels refuse or spoil them, which only a GPU would show."""

    def passes(*arguments):
        moments, update = on_kernels(rule, *arguments)
        accumulators = update.accumulators
        if len(shape) == 1:  # no kernel has the column, which is handed on
            accumulators = accumulators._replace(column=None)
        return moments, update.update, accumulators

    with kernels.running():
        closed = jax.make_jaxpr(passes)(*random_arguments(rule, shape))
    results, taken = lie_of_arrays(closed.jaxpr, [OPEN] * len(closed.jaxpr.invars))
    assert len(taken) == (3 if len(shape) > 1 else 2)
    assert OPEN not in results
    assert set(itertools.chain(*taken)) == {COMPUTED}


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", ["velo", "small_fc_lopt"])
def test_kernels_have_whole_arrays_of_joined_vectors(name):
    """Vectors of different lengths are padded and joined; their averages are parts of a stack."""
    params = {k: jnp.zeros(n) for k, n in {"a": 768, "b": 640, "c": 512}.items()}
    tx = optimizers.make(name, backend="pallas")
    with kernels.running():
        update = jax.make_jaxpr(lambda *xs: tx.update(*xs, value=jnp.float32(1)))
        closed = update(params, tx.init(params), params)
    _, taken = lie_of_arrays(closed.jaxpr, [OPEN] * len(closed.jaxpr.invars))
    assert len(taken) == 2
    assert set(itertools.chain(*taken)) == {COMPUTED}


def test_copies_clip():
    """A copy of whole rows must not go on into the next matrix: on a GPU, by its descriptor."""
    text = lowered_for_cuda(SMALL_FC, (7, 13), 4, tensors=2)
    assert "cp.async.bulk.global.shared::cta.bulk_group" not in text


@pytest.mark.parametrize(
    "shape", [(5,), (300,), (7, 13), (16, 8, 64), (8, 16, 64), (3, 3, 8, 16), (9, 8, 2), (2, 9, 1)]
)
def test_view_restores(shape):
    view = view_of(shape)
    x = jnp.arange(2.0 * np.prod(shape)).reshape((2, *shape))
    arranged = view.arrange(x)
    assert arranged.shape == (2 * view.batch, view.down, view.middle, view.stored)
    np.testing.assert_array_equal(view.restore(arranged), x)


def test_view_of_vectors():
    """A tile sees the vectors of its rows and columns: their product rebuilds a tensor."""
    rng = np.random.default_rng(0)
    for shape in [(6, 8), (8, 6), (8, 3, 4), (3, 8, 4), (4, 8, 3)]:
        view = view_of(shape)
        axis = view.order[-1]
        other = view.order[view.down_axis]
        flat = lambda a, shape=shape: [1 if i == a else n for i, n in enumerate(shape)]  # noqa: E731
        down = jnp.asarray(rng.normal(size=(2, *flat(axis))), jnp.float32)
        across = jnp.asarray(rng.normal(size=(2, *flat(other))), jnp.float32)
        arranged = view.arrange(down * across)[..., : view.across]
        rows = view.down_lines(down.squeeze(axis + 1))
        columns = view.across_lines(across.squeeze(other + 1))
        of_middle = lambda x, view=view: x.reshape((-1, view.middle, x.shape[-1]))  # noqa: E731
        product = jnp.einsum("gmd,gma->gdma", of_middle(rows), of_middle(columns))
        np.testing.assert_allclose(arranged, product, rtol=1e-6)
        np.testing.assert_array_equal(view.restore_down(rows), down.squeeze(axis + 1))
        np.testing.assert_array_equal(view.restore_across(columns), across.squeeze(other + 1))


def test_lines():
    """Means of lines of any lengths, beside numpy's; what is a tensor's comes to its pieces."""
    rng = np.random.default_rng(0)
    sizes = [(2, 3, 5), (1, 1, 300), (3, 1, 128), (2, 2, 129)]  # tensors, lines of each, length
    arrays = [rng.normal(size=(2, n * m, length)).astype(np.float32) for n, m, length in sizes]
    of = lines.Lines(
        tuple(
            lines.Block(n, m, length, Partition((m, length), ((), ())), 1) for n, m, length in sizes
        )
    )
    x = of.join(arrays)
    flat = np.asarray(x).reshape((2, -1))
    by_line, by_tensor, number = [], [], 0
    for i, ((n, m, length), array) in enumerate(zip(sizes, arrays, strict=True)):
        for tensor in range(n):
            start = of.start(i, tensor)
            line = array[:, tensor * m]
            np.testing.assert_array_equal(flat[:, start : start + length], line)
            by_tensor.append(array[:, tensor * m : (tensor + 1) * m].mean((1, 2)))
            piece = start // lines.PIECE
            assert of.of_tensors(jnp.arange(8))[piece] == number
            by_line.append((piece, line.mean(1)))
            number += 1
    np.testing.assert_allclose(of.tensor_means(1 + x), 1 + np.stack(by_tensor, 1), 1e-5)
    means = np.asarray(of.line_means(1 + x))[..., 0]
    for piece, mean in by_line:
        np.testing.assert_allclose(means[:, piece], 1 + mean, 1e-5)


def test_table_reads_what_it_packs():
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=(2, 20, 15)), rng.normal(size=(2,)), rng.normal(size=(2, 3)))
    packed, entries = table.pack(jax.tree.map(jnp.float32, arrays), 2)
    matrix, number, vector = table.read(entries, packed[1])
    assert matrix[19, 14] == np.float32(arrays[0][1, 19, 14])
    assert number[()] == np.float32(arrays[1][1])
    assert [float(x) for x in table.sequence(vector)] == list(np.float32(arrays[2][1]))


RENAMED = """
import logging
import jax, jax.numpy as jnp, lopt_jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from pallas_kernels import supports

del plgpu.TilingTransform
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("jax").setLevel(logging.ERROR)
params = {"w": jnp.ones((3, 4))}

def update(backend):
    tx = lopt_jax.small_fc_lopt(backend=backend)
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(tx.update, params, state, params)

update("auto")
supports.device_reason = lambda _: None  # as on a Hopper GPU
update("auto")
update("auto")
try:
    update("pallas")
except NotImplementedError as error:
    print(error)
"""


def test_a_jax_that_renamed_a_name_of_mosaic():
    """XLA, and one line in the log; without a GPU the name is not even looked for."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", RENAMED]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    no_gpu, renamed = run.stderr.splitlines()
    assert "not an NVIDIA GPU" in no_gpu
    assert "XLA" in renamed
    assert "TilingTransform" in renamed
    assert "backend='pallas' cannot run here: jax" in run.stdout
    assert "TilingTransform" in run.stdout


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (launch_context, "_find_kernel_argument_for_gmem_ref"),
        (launch_context, "OOBFillMode"),
        (plgpu, "CompilerParams"),
        (fragmented_array, "TiledLayout"),
        (utils, "shfl_bfly"),
    ],
)
def test_a_name_that_only_lowering_needs(owner, name, monkeypatch):
    """It is missed before any kernel is chosen."""
    fresh = lambda: supports.lowering_reason.__wrapped__()  # noqa: E731
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        assert name in fresh()
    assert fresh() is None


@pytest.mark.parametrize("manual", [False, True])
def test_the_probe_knows_nothing_of_its_caller(manual):
    """It may be in a trace, in a `shard_map`, under settings that kernels are not built for."""
    reasons = []

    def body(x):
        reasons.append(supports.lowering_reason.__wrapped__())
        return x

    mesh = jax.make_mesh((1,), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    if manual:
        body = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.set_mesh(mesh):
        jax.eval_shape(body, jax.device_put(np.ones(2), jax.NamedSharding(mesh, spec)))
    assert reasons == [None]


class TestBackend:
    """Which backend runs, and what is said of it."""

    params = {"w": jnp.ones((3, 4))}  # noqa: RUF012

    def update(self, backend):
        tx = lopt_jax.small_fc_lopt(reference.weights("small_fc_lopt_h4"), backend=backend)
        return tx.update(self.params, tx.init(self.params), self.params)

    def test_unknown(self):
        with pytest.raises(ValueError, match="backend: expected one of auto, xla, pallas"):
            self.update("cuda")

    def test_pallas_without_gpu(self):
        if supports.unsupported_reason(Tracing()) is None:
            pytest.skip("the kernels run here")
        with pytest.raises(NotImplementedError, match=r"backend='pallas'.*not an NVIDIA GPU"):
            self.update("pallas")

    def test_device(self, monkeypatch):
        """The default one, unless a device is named or arrays lie elsewhere."""
        cpu, seen = jax.devices("cpu")[0], []
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert Tracing().platform == "gpu"
        for named in (cpu, "cpu"):
            with jax.default_device(named):
                assert Tracing().platform == "cpu"
                assert Tracing().runs_on == cpu
        monkeypatch.setattr(
            supports, "unsupported_reason", lambda how, *_: seen.append(how.platform) or "no reason"
        )
        tx, params = lopt_jax.small_fc_lopt(), jax.device_put({"w": jnp.ones((3, 4))}, cpu)
        state = tx.init(params)
        tx.update(params, state, params)
        jax.eval_shape(tx.update, params, state, params)
        assert seen == ["cpu", "gpu"]

    def test_auto_says_why(self, caplog):
        if supports.unsupported_reason(Tracing()) is None:
            pytest.skip("the kernels run here")
        lopt_jax.backends._log_once.cache_clear()
        with caplog.at_level(logging.INFO, "lopt_jax"):
            self.update("auto")
            self.update("auto")
        (record,) = (x for x in caplog.records if x.name == "lopt_jax.engine")
        assert "not an NVIDIA GPU" in record.getMessage()

    def test_groups(self):
        chosen = functools.partial(choice.unsupported_group_reason, VELO, is_asked_for=False)
        assert chosen((1, 1024, 1024), dtypes=[jnp.float32]) is None
        assert "small" in chosen((4, 64), dtypes=[jnp.float32])
        assert "aligned" in chosen((1, 1024, 1023), dtypes=[jnp.float32])
        assert "float64" in chosen((1, 1024, 1024), dtypes=[np.float64])
        celo2 = Rule(velo_features(normalizer_axes="matrix"))
        reason = choice.unsupported_group_reason(
            celo2, (1, 3, 64, 64), [jnp.float32], is_asked_for=True
        )
        assert "matrices" in reason

    @pytest.mark.parametrize(
        ("tensors", "shape", "options", "joins"),
        [
            (1, (1, 1, 768), {}, True),  # ViT's class token beside its matrices
            (1, (3, 256), {}, True),
            (2, (3, 256), {}, False),  # a stack of two
            (1, (3, 256), {"gradient": jnp.bfloat16}, False),
            (1, (3, 3, 256), {}, False),  # it has a batch
            (1, (3, 40), {}, False),  # of another width
            (1, (3, 253), {}, False),  # it must be copied
            (1, (700,), {}, False),
        ],
    )
    def test_small_tensors_go_along(self, tensors, shape, options, joins):
        """Only where a launch for large ones takes them, and not if they are not just small."""
        parts = [random_part((64, 256), 1, 0), random_part(shape, tensors, 1, **options)]
        assert choice.with_company([None, choice.SMALL], parts) == [
            None,
            None if joins else choice.SMALL,
        ]
        others = [choice.SMALL, choice.SMALL], ["arrays are int8", choice.SMALL], [None, "no"]
        for choices in others:
            assert choice.with_company(choices, parts) == choices
