"""Weights as a pytree: usable inside every JAX transformation, compared by value."""

import copy
import logging
import pickle
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt_jax
from lopt_jax import partition
from lopt_jax.brief import brief
from lopt_jax.weights import Weights, WeightsError, load_weights, resolve
from lopt_jax.weights.base import StaticMapping, weights_error
from lopt_jax.weights.schema import SCHEMAS, expected_shapes, inferred_sizes, validate


def make(architecture="small_fc_lopt", seed=0, **config):
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(architecture, config)
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return Weights(architecture, config, params, {"source": "made up"})


def test_shapes_are_those_of_the_papers():
    shapes = expected_shapes("small_fc_lopt", {"hidden_size": 4})
    assert shapes["mlp"] == {
        "w0": (39, 4),
        "b0": (4,),
        "w1": (4, 4),
        "b1": (4,),
        "w2": (4, 2),
        "b2": (2,),
    }
    assert (shapes["momentum_decays"], shapes["rms_decays"]) == ((3,), (1,))
    velo = expected_shapes("velo", {"hidden_size": 4})
    assert velo["mlp"]["w0"] == (256, 30, 4)
    assert velo["lstm"]["w"] == (1024, 2048)
    assert velo["controls"] == {"w": (512, 256), "b": (256,)}
    assert set(expected_shapes("celo_adam", {})) == {"lstm", "mix", "input", "step_size"}


@pytest.mark.parametrize("architecture", SCHEMAS)
def test_sizes_are_read_back_from_the_arrays(architecture):
    odd = {"hidden_size": 5, "hidden_layers": 3, "lstm_hidden_size": 7, "param_inits": 2}
    odd |= {"from_mlp_size": 4, "from_lstm_size": 6, "lstm_to_mlp_size": 8}
    config = {key: odd[key] for key in SCHEMAS[architecture].sizes}
    weights = validate(make(architecture, **config))
    assert inferred_sizes(architecture, weights.params, "test") == config
    assert set(weights.config) == set(SCHEMAS[architecture].defaults)


def test_works_inside_transformations():
    weights = make(hidden_size=4)

    def total(w):
        assert resolve(w, ("small_fc_lopt",)).config["hidden_size"] == 4
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))

    expected = sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(weights))
    assert float(jax.jit(total)(weights)) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(total)(weights)
    assert isinstance(gradient, Weights)
    np.testing.assert_allclose(
        gradient.params["mlp"]["w0"], 2 * weights.params["mlp"]["w0"], rtol=1e-6
    )
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), weights)
    np.testing.assert_allclose(jax.vmap(total)(stacked), [expected, 4 * expected], rtol=1e-5)


def test_unflattens_with_placeholders():
    weights = make(hidden_size=4)
    leaves, structure = jax.tree.flatten(weights)
    assert jax.tree.unflatten(structure, [None] * len(leaves)).params["rms_decays"] is None
    assert jax.tree.unflatten(structure, [object()] * len(leaves)).architecture == "small_fc_lopt"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(weights)]
    assert ".params['mlp']['w0']" in paths


def test_jit_compiles_once_for_equal_static_parts():
    calls = []

    @jax.jit
    def count(w):
        calls.append(1)
        return w.params["rms_decays"]

    count(make(seed=0, hidden_size=4))
    count(make(seed=1, hidden_size=4))
    assert len(calls) == 1


def test_equality_is_by_value():
    assert make(seed=0) == make(seed=0)
    assert hash(make(seed=0)) == hash(make(seed=0))
    assert make(seed=0) != make(seed=1)
    assert make(hidden_size=4) != make(hidden_size=5)
    assert make() != 3
    assert copy.deepcopy(make()) == make()
    assert pickle.loads(pickle.dumps(make())) == make()
    changed = Weights("small_fc_lopt", {}, make().params, {"source": "elsewhere"})
    assert changed != make()


def test_static_parts_are_immutable_and_hashable():
    weights = Weights("velo", {"a": [1, [2, {"b": None}]]}, {}, {"x": np.float32(0.5)})
    assert weights.config["a"] == (1, (2, StaticMapping({"b": None})))
    assert weights.config == {"a": [1, [2, {"b": None}]]}
    assert weights.metadata["x"] == 0.5
    hash(weights.config)
    with pytest.raises(TypeError):
        weights.config["a"] = 3
    with pytest.raises(AttributeError):
        weights.params = None
    with pytest.raises(TypeError, match="ndarray"):
        Weights("velo", {"a": np.zeros(3)}, {})
    with pytest.raises(TypeError, match="keys"):
        Weights("velo", {3: 1}, {})


def test_resolve_names_the_wrong_architecture():
    with pytest.raises(WeightsError, match=r"expected weights of velo.*found weights of small_fc"):
        resolve(make(), ("velo",))
    with pytest.raises(TypeError, match="weights must be"):
        resolve(3, ("velo",))


@pytest.fixture
def said(caplog, monkeypatch):
    """The warnings of lopt_jax; none counts as said before."""
    monkeypatch.setattr(partition, "_said", set())
    caplog.set_level(logging.WARNING, logger="lopt_jax")
    return lambda: [record.getMessage() for record in caplog.records]


def test_weights_of_another_family_are_mentioned(said):
    celo2 = load_weights("celo2_small")
    other = Weights("elo_celo2", celo2.config, celo2.params)
    lopt_jax.celo2(0.01, other)
    lopt_jax.elo_celo2(0.01, other)
    lopt_jax.mulo({"w": 2.0}, "small_fc_lopt")
    lopt_jax.small_fc_lopt("small_fc_lopt")
    one, two = said()
    assert one.startswith("celo2: the weights were meta-trained for elo_celo2,")
    assert two.startswith("mulo: the weights 'small_fc_lopt' were meta-trained for small_fc_lopt,")


def test_recommended_settings_are_mentioned_where_defaults_are_left(said):
    lopt_jax.celo2(0.003, "celo2_small")
    lopt_jax.celo2(weights="celo2_small", weight_decay=0.5)
    lopt_jax.celo2(lambda count: 0.001, "celo2_small")
    assert said() == []
    for _ in range(2):
        lopt_jax.celo2(weights="celo2_small")
    lopt_jax.velo(100, "velo_small")
    celo2, velo = said()
    assert celo2.startswith("celo2: left at learning_rate=0.001, weight_decay=0.0; its weights")
    assert "learning_rate=0.01, " in celo2
    assert "weight_decay=3.0, " in celo2
    assert "lopt_jax.lopt(num_steps)" in celo2
    assert "velo: left at weight_decay=0.0; " in velo
    assert "weight_decay=0.001 (chosen on five meta-training tasks" in velo


def broken(change):
    weights = make(hidden_size=4)
    params = jax.tree.map(np.copy, weights.params)
    config = dict(weights.config)
    change(params, config)
    return Weights(weights.architecture, config, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, c: p["mlp"].pop("w1"), "mlp/w1"),
        (lambda p, c: p.update(extra=np.zeros(3)), "extra"),
        (lambda p, c: p.update(rms_decays=np.zeros(2, np.float32)), r"shape \(2,\)"),
        (lambda p, c: p.update(rms_decays=np.full(1, np.nan, np.float32)), "NaN"),
        (lambda p, c: p.update(rms_decays=np.full(1, 1e300)), "infinite"),
        (lambda p, c: p.update(rms_decays=np.zeros(1, np.int32)), "floating-point"),
        (lambda p, c: p.update(rms_decays=np.zeros(1, np.complex64)), "floating-point"),
        (lambda p, c: p.update(rms_decays="text"), "to be an array"),
        (lambda p, c: p.update({3: np.zeros(1)}), "named arrays"),
        (lambda p, c: c.update(hidden_size=2**40), "hidden_size"),
        (lambda p, c: c.update(hidden_size=2**20), "at most 268435456 bytes"),
        (lambda p, c: c.update(hidden_size=True), "hidden_size"),
        (lambda p, c: c.update(step_mult=float("inf")), "step_mult"),
        (lambda p, c: c.update(initial_rms_decays=(1.0,)), r"\[0, 1\)"),
        (lambda p, c: c.update(initial_rms_decays=(0.9, 0.9)), "one rms decay or as many"),
        (lambda p, c: c.update(initial_rms_decays=()), "1 to 16 numbers"),
        (lambda p, c: c.update(initial_rms_decays=(0.9,) * 17), "1 to 16 numbers"),
        (lambda p, c: c.update(no_such_key=1), "no_such_key"),
    ],
)
def test_validation_names_what_is_wrong(change, message):
    with pytest.raises(WeightsError, match=message):
        validate(broken(change))


def test_float_types_become_float32():
    weights = make(hidden_size=4)
    double = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights)
    assert jax.tree.leaves(validate(double))[0].dtype == np.float32
    assert validate(double) == validate(weights)


def test_messages_are_made_in_bounded_time():
    nested: tuple = ()
    for _ in range(200):
        nested = (nested, nested)  # repr would have 2**200 parts
    assert len(brief(nested)) <= 160
    assert "int" in brief(10**10_000)


def test_deep_metadata_are_refused():
    for wrap in (lambda value: {"a": value}, lambda value: [value]):
        value = 1
        for _ in range(60):
            value = wrap(value)
        hash(make_with(value))
        for _ in range(540):
            value = wrap(value)
        with pytest.raises(ValueError, match="nested at most 64 deep"):
            make_with(value)


def make_with(value):
    return Weights("velo", {}, {}, {"x": value})


def test_weights_show_themselves():
    params = {"mlp": {"w0": np.zeros((2, 3)), "b0": np.zeros(3)}}
    recommended = {"learning_rate": 0.01, "schedule": "<cosine>"}
    metadata = {"licence": "MIT\x1b", "recommended": recommended, "meta_training": {"steps": 9}}
    weights = Weights("celo2", {"hidden_size": 3}, params, metadata)
    assert repr(weights).splitlines() == [
        "<lopt_jax.Weights of celo2: 2 arrays, 9 numbers",
        r"  licence: MIT\x1b",
        "  recommended: learning_rate=0.01, schedule='<cosine>'",
        "  config: hidden_size=3>",
    ]
    page = weights._repr_html_()
    assert "schedule=&#x27;&lt;cosine&gt;&#x27;</td>" in page
    assert "\x1b" not in page
    ET.fromstring(page)  # every element is closed
    traced = jax.eval_shape(lambda w: print(w) or w.params, weights)  # without values too
    assert traced["mlp"]["w0"].shape == (2, 3)


def test_messages_are_one_line_that_steers_no_terminal():
    error = weights_error("a\nb", expected="\x1b[2J", found="\ud800\u202e é", advice="x\r")
    assert str(error) == "a\\nb: expected \\x1b[2J, found \\ud800\\u202e é. x\\r"


def test_weights_of_whole_numbers_are_refused():
    """Nearly all of them would be zero."""
    weights = lopt_jax.load_weights("velo_small")
    whole = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), weights.params)
    with pytest.raises(WeightsError, match="floating-point numbers, found int32"):
        lopt_jax.velo(10, Weights("velo", weights.config, whole))


@pytest.mark.parametrize("architecture", [None, ["velo"], "VELO"])
def test_an_architecture_that_is_none_gets_no_advice(architecture):
    with pytest.raises(WeightsError, match=r"weights of velo, found weights of [^.]*\.$"):
        lopt_jax.velo(10, Weights(architecture, {}, {}))


def test_what_is_no_mapping_is_named():
    with pytest.raises(TypeError, match=r"config and metadata are mappings .* found \[1\]"):
        Weights("velo", [1], {})
