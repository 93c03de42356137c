"""A direction inside the recipe of `lopt`: where it starts, what is in the loop, what it sees.

And tasks of one shape in one program.
"""

import dataclasses
import lzma
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meta_trainer import TINY, assert_same

import lopt_jax
from lopt_jax.meta import data, evaluate, networks, rules
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.networks import Mlp
from lopt_jax.meta.tasks import (
    Characters,
    Pictures,
    Quadratic,
    SupervisedTask,
    Teacher,
    cross_entropy,
    held_out_tasks,
    join,
    training_tasks,
)
from lopt_jax.meta.trainer import Trainer

DIRECTIONS = ("lopt_direction", "lopt_linear", "lopt_direction_small")


def start_of(name):
    """The weights that a config starts from."""
    config = CONFIGS[name]
    sizes = dict(config.architecture_config)
    theta = initial_parameters(config.architecture, jax.random.key(5), sizes, dict(config.gains))
    return lopt_jax.Weights(config.architecture, sizes, theta, {})


def trained(tx, params, steps=12):
    """Parameters after steps along gradients that depend on them."""

    @jax.jit
    def step(params, state, count):
        gradients = jax.tree.map(lambda p: 0.1 * jnp.sin(3 * p + count), params)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(params)
    for count in range(steps):
        params, state = step(params, state, count)
    return params


@pytest.mark.parametrize("name", ["lopt_direction", "lopt_linear"])
@pytest.mark.parametrize(
    "network",
    [networks.Mlp((12, 8, 6, 4), True), networks.ConvNet(6, (4, 6), 3, 3)],
    ids=["mlp", "conv"],
)
def test_the_start_is_the_lopt_that_ships(name, network):
    params = network.init(jax.random.key(0), jnp.float32(1.0))
    wanted = trained(lopt_jax.lopt(12), params)
    found = trained(lopt_jax.lopt(12, start_of(name)), params)
    for a, b, p in zip(*map(jax.tree.leaves, (found, wanted, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(np.max(np.abs(b - p))), rtol=1e-5)
        assert float(np.max(np.abs(b - p))) > 1e-4


def test_the_start_of_the_linear_rule_is_named_by_gains():
    config = {"initial_momentum_decays": (0.9, 0.99)}
    weights = initial_parameters("linear", jax.random.key(0), config, {"momentum_1": 0.5})
    np.testing.assert_array_equal(weights["weights"], [0.0, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"gains: the linear rule has no \['momentum_2'\]"):
        initial_parameters("linear", jax.random.key(0), config, {"momentum_2": 0.5})
    with pytest.raises(ValueError, match="architecture_config: expected initial_momentum_decays"):
        initial_parameters("linear", jax.random.key(0), {}, {})


def test_the_recipe_is_in_the_loop():
    weights = start_of("lopt_linear")
    make = rules.make_rule(
        "linear", weights.config, learning_rate=0.5, weight_decay=2.0, recipe="lopt"
    )
    params = networks.Mlp((6, 5, 4, 3)).init(jax.random.key(1), jnp.float32(1.0))
    found = trained(
        make(weights.params, jnp.int32(40), rules.make_schedule("constant", 40)), params
    )
    wanted = trained(lopt_jax.lopt(40, weights, learning_rate=0.5, weight_decay=2.0), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    with pytest.raises(ValueError, match=r"recipe: lopt takes weights of celo2, .*; found 'velo'"):
        rules.make_rule("velo", {}, recipe="lopt")


def test_evaluation_has_the_recipe_that_the_meta_training_had():
    start = start_of("lopt_linear")
    metadata = {
        "recommended": {"learning_rate": 1.0, "weight_decay": 1.0},
        "meta_training": {"recipe": "lopt"},
    }
    contender = evaluate.learned("it", dataclasses.replace(start, metadata=metadata))
    assert contender.learning_rates == (1.0,)
    params = networks.Mlp((6, 5, 4, 3)).init(jax.random.key(1), jnp.float32(1.0))
    found = trained(contender.build(jnp.float32(1.0), jnp.int32(40)), params)
    wanted = trained(lopt_jax.lopt(40, start), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    other = evaluate.learned("it", dataclasses.replace(start_of("lopt_direction"), metadata={}))
    assert other.digest != contender.digest


def test_meta_training_moves_the_weights_of_a_direction():
    """The gradient is that of the direction: Adam's leaves alone have none."""
    config = dataclasses.replace(
        TINY, architecture="linear", architecture_config=(("initial_momentum_decays", (0.9,)),),
        gains=(("gradient", 1.0), ("momentum_0", 1.0)), recipe="lopt", schedule="constant",
        weight_decay=1.0, num_pairs=2, outer_steps=2, log_every=1,
    )  # fmt: skip
    bowl = Trainer(config).train()
    np.testing.assert_array_equal(bowl.meta_parameters["weights"], [1.0, 1.0])
    net = Trainer(dataclasses.replace(config, tasks=("tables_mlp_16",))).train()
    assert np.all(np.asarray(net.meta_parameters["weights"]) != 1.0)
    assert np.isfinite(net.history[-1].loss)


def test_what_is_reported_as_held_out_is_not_seen():
    tasks, held_out = training_tasks(), held_out_tasks()
    for name in DIRECTIONS:
        for task in CONFIGS[name].tasks:
            assert task not in held_out
            source = tasks[task].source
            # The scale suite's evidence has Fashion-MNIST, the small suite's Python's sources.
            assert not (isinstance(source, Pictures) and source.name != "clipart")
            assert not (isinstance(source, Characters) and source.text != "brown")


def test_prepared_texts_are_read_as_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    text = b"The Fulton County\n" + bytes(range(32, 127)) * 400
    (tmp_path / "brown.txt.xz").write_bytes(lzma.compress(text))
    found = data.load_text("brown", 30_000)
    assert found.tokens[:18].tolist() == [b - 31 for b in text[:17]] + [0]
    assert (len(found.tokens), found.num_train) == (30_000, 24_000)
    source = Characters(8, False, "brown")
    batch = source.batch(jax.random.key(0), source.sample(jax.random.key(1)), "train", 5)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert source.data_hashes() == {"brown": data.load_text("brown").sha256}
    (tmp_path / "docs.txt.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'docs.txt.xz'}: expected text")):
        data.load_text("docs")
    with pytest.raises(ValueError, match="name: expected brown or docs"):
        data.load_text("gcide")
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="prepare FOLDER brown"):
        data.load_text("brown")


def _teacher(name, noise, size=4):
    return SupervisedTask(
        name, Teacher((6, 4, 3), True, max_noise=noise), Mlp((6, size, 3)), cross_entropy, 5
    )


def test_tasks_that_differ_in_their_examples_alone_are_joined():
    first, wide, second = _teacher("a", 0.5), _teacher("b", 0.5, 5), _teacher("c", 0.02)
    groups = join([first, Quadratic(), wide, second])
    assert [(task.name, count) for task, count in groups] == [
        ("a+c", 2), ("quadratic", 1), ("b", 1),
    ]  # fmt: skip
    task = groups[0][0]
    keys = jax.random.split(jax.random.key(0), 40)
    contents = jax.vmap(task.sample)(keys)
    assert 8 < int(contents.which.sum()) < 32
    for which, single in enumerate((first, second)):
        place = int(np.flatnonzero(contents.which == which)[0])
        content = jax.tree.map(lambda x, place=place: x[place], contents)
        own = content.contents[which]
        key = jax.random.key(7)
        params = task.init(key, content)
        assert_same(params, single.init(key, own))
        for split in ("train", "valid"):
            batch = task.batch(key, content, split)
            assert_same(batch, single.batch(key, own, split))
            assert task.loss(params, content, batch) == single.loss(params, own, batch)
        assert_same(task.examples(content, "valid", 9), single.examples(own, "valid", 9))


def test_a_joined_task_counts_as_many():
    """The meta-gradient and the report weigh a program by the tasks that it stands for."""
    config = dataclasses.replace(TINY, tasks=("a", "b", "c"), join=True, outer_steps=1)
    tasks = {"a": _teacher("a", 0.5), "b": _teacher("b", 0.5, 5), "c": _teacher("c", 0.02)}
    trainer = Trainer(config, tasks=tasks)
    assert trainer.counts == [2, 1]
    state = trainer.init()
    assert [jax.tree.leaves(s.accumulator)[0].shape[0] for s in state.estimators] == [8, 4]
    assert trainer._mean(np.float32(1.0), np.float32(4.0)) == 2.0
    result = trainer.train()
    assert len(result.history[0].task_scores) == 2
    assert np.isfinite(result.history[0].loss)
    assert Trainer(dataclasses.replace(config, join=False), tasks=tasks).counts == [1, 1, 1]
