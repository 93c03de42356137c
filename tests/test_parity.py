"""Every step and leaf of the reference trajectories, within the reference module's bound."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
import reference

import lopt_jax
from lopt_jax.applying import in_batch
from lopt_jax.features import small_fc_features
from lopt_jax.rules import messages, rule
from lopt_jax.xla import network, passes
from lopt_jax.xla.network import XlaNetwork

# The programs of velo, small_fc_lopt_h4 and celo_random with other weights, settings or losses:
# they take seconds to compile.
OF_OTHERS = (
    "velo_s",
    "velo_weight_decay",
    "adafac_mlp_lopt",
    "adafac_mlp_lopt_separate_weights",
    "celo",
)
# As users compile them are by default one of each kind; all are in the nightly run.
COMPILED_AS_USERS = ("velo", "small_fc_lopt_h4", "celo2")

nightly = functools.partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    "name", [nightly(name) if name in OF_OTHERS else name for name in reference.NAMES]
)
def test_trajectory(name, record_property):
    compiled = reference.AS_USERS if name in COMPILED_AS_USERS else {}
    tx, run = reference.optimizer(name), reference.trajectory(name)
    reference.check(tx, run, record_property, compiled=compiled)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [n for n in reference.NAMES if n not in COMPILED_AS_USERS])
def test_trajectory_as_users_compile(name, record_property):
    reference.check(reference.optimizer(name), reference.trajectory(name), record_property)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("small_fc_lopt_h4", {"block_elements": 100}),
        nightly("small_fc_lopt_h32", {}),
        nightly("small_fc_lopt_h32", {"block_elements": 100}),
        nightly("small_fc_lopt_h32", {"unrolled": True}),
        ("velo", {"platform": "tpu"}),
        ("small_fc_lopt_h32", {"platform": "tpu", "block_elements": 100}),
        nightly("small_fc_lopt_h4", {"platform": "gpu"}),
        nightly("celo2_base", {"platform": "tpu"}),
        nightly("velo", {}),
        nightly("celo2_base", {}),
    ],
)
def test_trajectory_of_large_tensors(name, form, monkeypatch, record_property):
    """The same through the passes of large tensors: the fixtures' own are small.

    Those of other devices run here too.
    """
    chosen = XlaNetwork(**{"platform": "cpu", "small_elements": 0, **form})
    calls = every_network(chosen, monkeypatch)
    reference.check(
        reference.optimizer(name), reference.trajectory(name), record_property, compiled={}
    )
    assert calls


def every_network(chosen, monkeypatch):
    """Has every group's network run so; returns a list with an entry for each update traced."""
    calls = []

    def networks_of(tracing, groups):
        calls.append(tracing)
        return [chosen] * len(groups)

    monkeypatch.setattr(passes, "networks_of", networks_of)
    return calls


@pytest.mark.parametrize("name", ["small_fc_lopt_h4", "velo"])
def test_trajectory_of_the_specification(name, monkeypatch, record_property):
    """The rule as it is written, without anything that is done for XLA."""
    calls = every_network(rule.PLAIN, monkeypatch)
    reference.check(
        reference.optimizer(name), reference.trajectory(name), record_property, compiled={}
    )
    assert calls


@pytest.mark.parametrize("elements", [20, 7])
def test_trajectory_of_messages_by_blocks(elements, monkeypatch, record_property):
    """Blocks of equal sizes and blocks with a rest: means over tensors are sums over blocks."""
    monkeypatch.setattr(messages, "elements_for", lambda platform: elements)
    name = "rnn_mlp_lopt"
    reference.check(
        reference.optimizer(name), reference.trajectory(name), record_property, compiled={}
    )


def test_few_small_tensors_take_the_passes_of_large_ones_on_a_gpu(monkeypatch):
    """The same update as by `small_tensor_step`; programs of many shapes keep that."""
    small_tensor_step, calls = network.small_tensor_step, []

    def spy(*arguments):
        calls.append(arguments)
        return small_tensor_step(*arguments)

    monkeypatch.setattr(network, "small_tensor_step", spy)
    params = {"w": jnp.linspace(-1.0, 1.0, 60).reshape(5, 12), "b": jnp.linspace(0.1, 1.0, 12)}

    def update(batch=1):
        passes._of_whole_tensors.cache_clear()
        tx = lopt_jax.small_fc_lopt("small_fc_lopt_h4", backend="xla")
        tx = in_batch(tx, batch)
        # compiled here: arrays with values would tell where they lie
        return jax.jit(lambda: tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params))()

    expected, of_cpu = update(), len(calls)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    update()
    assert len(calls) == 2 * of_cpu == 4  # alone, it would take long to compile
    calls.clear()
    got = update(batch=2)
    assert not calls
    monkeypatch.setattr(passes, "FUSED_SMALL_GROUPS", 1)
    update(batch=2)
    assert len(calls) == of_cpu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-8), got, expected)


@pytest.mark.parametrize(("elements", "is_summed"), [(1, False), (2, True)])
def test_products_with_a_vector_are_float32(elements, is_summed):
    """A GPU takes six bfloat16 products for a matrix, but for a vector one of them (seen: 3e-3)."""
    of = rule.Rule(small_fc_features(), precision=jax.lax.Precision.HIGH)
    sizes = (4, 16, 16, 2)
    mlp = rule.MLP(
        tuple(jnp.ones(pair) for pair in itertools.pairwise(sizes)),
        tuple(jnp.zeros(n) for n in sizes[1:]),
    )
    step = functools.partial(network.small_tensor_step, "gpu", of)
    traced = str(jax.make_jaxpr(step)(mlp, jnp.ones((5, elements))))
    assert ("X6" in traced) == is_summed, traced
    assert ("HIGHEST" in traced) != is_summed, traced


def test_small_tensors_share_a_wide_network_on_a_gpu(monkeypatch):
    """One pass of it for all shapes; the same update as by one each."""
    small_tensor_step, inputs = network.small_tensor_step, []

    def spy(platform, of, mlp, x):
        inputs.append(x.shape)
        return small_tensor_step(platform, of, mlp, x)

    monkeypatch.setattr(passes, "small_tensor_step", spy)
    shapes = {"w": (5, 12), "stack": (2, 12), "more": (2, 12), "b": (7,), "none": (3,), "s": ()}
    params = optimizers.random_like({k: jnp.zeros(shape) for k, shape in shapes.items()}, 0)

    def update(stacked):
        tx = lopt_jax.small_fc_lopt(
            reference.weights("small_fc_lopt_h32"),
            weight_decay=0.1,
            stacked_axes={k: int(k == stacked) for k in shapes},
            backend="xla",
            precision="highest",
        )
        state, out = tx.init(params), []
        compiled = jax.jit(tx.update)  # arrays with values would tell where they lie
        for step in range(2):
            gradients = optimizers.random_like(params, step + 1) | {"none": None}
            updates, state = compiled(gradients, state, params)
            out.append(updates)
        return out, state

    expected = update(None), update("stack")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    inputs.clear()
    got = update(None), update("stack")
    assert inputs == 2 * [(29, 128)]  # 116 elements, and zeros up to a multiple of 16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-8), got, expected)


def test_original_checkpoint(record_property):
    """The layout of the released VeLO: what the tree cannot say comes from config.gin."""
    tx = reference.optimizer("velo", given=reference.weights("original_checkpoint"))
    reference.check(tx, reference.trajectory("velo"), record_property)


def test_original_checkpoint_without_config(record_property):
    """The oldest layout: both historical bugs are on; only step_mult must be given."""
    weights = reference.weights("original_checkpoint_no_config", step_mult=0.002)
    assert weights.config["use_bugged_next_lstm_state"]
    assert weights.config["use_bugged_loss_features"]
    tx = reference.optimizer("velo_bugged_flags", given=weights)
    run = reference.trajectory("velo_bugged_flags")
    reference.check(tx, run, record_property, compiled={})
