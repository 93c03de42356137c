"""What published recipes need of the trainer, against numpy: losses, schedules, experts, stores."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt_jax.meta import rules
from lopt_jax.meta.config import MetaTrainConfig
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.estimators import EstimatorState, Resumption, no_mask, truncated_pes
from lopt_jax.meta.experts import guidance_at, make_expert
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.original_starts import STARTS
from lopt_jax.meta.tasks import Quadratic
from lopt_jax.meta.trainer import Trainer, learning_rate, outer_optimizer
from lopt_jax.meta.unroll import Guidance, Objective, Struggle, Unroll, imitation_losses
from lopt_jax.weights.schema import expected_shapes, schema_of

THETA = {"log_learning_rate": jnp.float32(np.log(0.3))}
TRAINING_LOSS = Objective(measure="training", logarithm=False, ceiling=10.0, final_weight=0.0)
UNROLL = Unroll(
    Quadratic(3), rules.learned_sgd, 6, 3, min_horizon=12, max_horizon=60, objective=TRAINING_LOSS
)


def descend(state, steps, rate=0.3):
    """Losses before each step of gradient descent on the state's bowl, and where it ends."""
    curvature, minimum = (np.asarray(x, np.float64) for x in state.content)
    x = np.asarray(state.params["x"], np.float64)
    losses = []
    for _ in range(steps):
        losses.append(0.5 * np.mean(curvature * (x - minimum) ** 2))
        x = x - rate * curvature * (x - minimum) / 3
    return losses, x


@pytest.mark.parametrize("name", rules.SCHEDULES)
def test_schedules(name):
    steps = np.arange(200)
    level = np.ones(200)
    start = 0
    if name.startswith("warmup"):
        start = 10
        level = np.minimum(1, (steps + 1) / 10)
    if name.endswith("cosine"):
        fraction = np.clip((steps - start) / (200 - start), 0, 1)
        level = level * 0.5 * (1 + np.cos(np.pi * fraction))
    found = jax.vmap(rules.make_schedule(name, jnp.int32(200)))(jnp.arange(200))
    np.testing.assert_allclose(found, level, rtol=1e-5, atol=1e-6)


def test_the_mean_training_loss_is_the_objective():
    state = jax.jit(UNROLL.init)(THETA, jax.random.key(0))
    losses, end = descend(state, 6)
    new, loss, metrics = jax.jit(UNROLL.advance)(THETA, jax.random.key(1), state)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(new.params["x"], end, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.final_score, np.mean(losses[3:]), rtol=1e-5)
    assert metrics.diverged == 0.0
    score = TRAINING_LOSS.score
    assert score(jnp.float32(jnp.nan), jnp.float32(2.0)) == score(jnp.float32(99.0), 2.0) == 20.0


def test_lives_are_uniform_or_log_uniform():
    keys = jax.random.split(jax.random.key(0), 4000)
    for horizons, mean in (("uniform", 105.0), ("log_uniform", 190 / np.log(20))):
        unroll = Unroll(Quadratic(1), rules.learned_sgd, 10, 5, 10, 200, horizons=horizons)
        lengths = 10 * jax.vmap(unroll._draw_truncations)(keys)
        assert 10 <= lengths.min() < 20
        assert 190 < lengths.max() <= 200
        assert np.mean(lengths) == pytest.approx(mean, rel=0.04)


def test_struggle_is_the_one_sided_cumulative_sum():
    losses = np.random.default_rng(0).normal(size=40).astype(np.float32)
    total = highest = 0.0
    for before, after in itertools.pairwise(losses):
        total = max(0.0, total + float(after) - float(before))
        highest = max(highest, total)
    found = Struggle.none().after(jnp.asarray(losses[:15])).after(jnp.asarray(losses[15:]))
    np.testing.assert_allclose(found, [losses[-1], total, highest], rtol=1e-5, atol=1e-6)
    assert Struggle.none().after(jnp.float32([5, 4, 3])).highest == 0.0


def test_imitation_losses_are_of_all_leaves_together():
    rng = np.random.default_rng(0)
    own = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    experts = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    for least_rank, names in ((0, ["w", "b"]), (2, ["w"])):
        a, b = (np.concatenate([x[n].ravel() for n in names]) for x in (own, experts))
        norms = np.linalg.norm(a), np.linalg.norm(b)
        wanted = [1 - a @ b / (norms[0] * norms[1]), abs(norms[0] - norms[1])]
        found = imitation_losses(*jax.tree.map(jnp.float32, (own, experts)), least_rank)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_an_expert_moves_its_part_of_the_way(weight):
    unroll = dataclasses.replace(UNROLL, expert=optax.sgd(0.1))
    state = jax.jit(unroll.init)(THETA, jax.random.key(0))
    guidance = Guidance(jnp.float32(weight), 0.5, 0.2)
    new, loss, _ = jax.jit(unroll.advance)(THETA, jax.random.key(1), state, guidance)
    # Both are gradient descent, so the mixture is one with the mean of the rates.
    rate = weight * 0.1 + (1 - weight) * 0.3
    losses, end = descend(state, 6, rate)
    np.testing.assert_allclose(new.params["x"], end, rtol=1e-4, atol=1e-6)
    curvature, minimum = (np.asarray(x, np.float64) for x in state.content)
    x, sizes = np.asarray(state.params["x"], np.float64), []
    for _ in range(6):
        gradient = curvature * (x - minimum) / 3
        sizes.append(0.2 * np.linalg.norm(gradient))
        x = x - rate * gradient
    # The directions are the same.
    np.testing.assert_allclose(loss, 0.3 * np.mean(losses) + 0.2 * np.mean(sizes), rtol=1e-4)
    with pytest.raises(ValueError, match="guidance: expected with an expert"):
        unroll.advance(THETA, jax.random.key(1), state)


def test_guidance_falls_between_two_steps():
    def at(step):
        return [float(x) for x in guidance_at(step, 10, 30, (0.7, 0.21), (0.3, 0.0))]

    np.testing.assert_allclose(at(0), [1.0, 0.7, 0.3], rtol=1e-6)
    np.testing.assert_allclose(at(10), at(0))
    np.testing.assert_allclose(at(15), [0.75, 0.5775, 0.225], rtol=1e-6)
    np.testing.assert_allclose(at(99), [0.0, 0.21, 0.0], rtol=1e-6, atol=1e-7)


def test_experts_take_their_documented_steps():
    params, gradient = {"b": jnp.ones(2)}, {"b": jnp.array([3.0, -4.0])}
    nadam = optax.nadam(0.003)  # what Muon does with vectors
    wanted = {
        "adamw": [-0.01, 0.01],
        "sgdm": [-0.03, 0.04],
        "muon": nadam.update(gradient, nadam.init(params))[0]["b"],
    }
    for name, step in wanted.items():
        expert = make_expert(name, 0.01)
        updates, _ = expert.update(gradient, expert.init(params), params)
        np.testing.assert_allclose(updates["b"], step, rtol=1e-5)


RESUMING = dataclasses.replace(UNROLL, watched="training")
PAIRS, SLOTS = 300, 3
INIT, ESTIMATE = map(jax.jit, truncated_pes(RESUMING, PAIRS, 1e-6, 2.0, Resumption(0.8, SLOTS)))


def test_lives_go_on_from_stored_states_with_their_perturbations():
    state = INIT(THETA, jax.random.key(0))
    # Every life is over; slot i of every pair holds a state of 100 (i + 1) steps.
    steps = jnp.broadcast_to(100 * (1 + jnp.arange(SLOTS)), (PAIRS, 2, SLOTS))
    stored = state.stored._replace(
        particles=state.stored.particles._replace(step=steps),
        accumulator={"log_learning_rate": jnp.asarray(steps[:, 0], jnp.float32)},
    )
    over = state.particles._replace(step=state.particles.end)
    state = EstimatorState(over, state.accumulator, stored)
    still = jax.tree.map(jnp.zeros_like, no_mask(THETA))  # no perturbations on top
    _, new = ESTIMATE(THETA, jax.random.key(1), state, still)
    began = np.asarray(new.particles.step - 6)
    np.testing.assert_array_equal(began[:, 0], began[:, 1])
    np.testing.assert_array_equal(new.accumulator["log_learning_rate"], began[:, 0])
    share = np.bincount(began[:, 0] // 100, minlength=4) / PAIRS
    np.testing.assert_allclose(share, [0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3], atol=0.08)
    lengths = np.asarray(new.particles.horizon)[:, 0] - began[:, 0]
    assert 12 <= lengths.min() <= lengths.max() <= 60
    np.testing.assert_array_equal(new.particles.end, new.particles.horizon)


def test_states_are_stored_where_losses_rise_and_where_lives_end():
    theta = {"log_learning_rate": jnp.float32(0.0)}  # a rate of 1 at curvatures of 0.5 to 2

    def bowl(*curvatures):
        """Of the first pairs; above 2 * dimension the loss rises."""
        all_pairs = jnp.ones(PAIRS).at[: len(curvatures)].set(jnp.array(curvatures))
        return jnp.broadcast_to(all_pairs[:, None, None], (PAIRS, 2, 3))

    state = INIT(theta, jax.random.key(0))
    ends = jnp.full((PAIRS, 2), 60, jnp.int32).at[2].set(6)
    particles = state.particles._replace(
        content=state.particles.content._replace(curvature=bowl(1.0, 7.0)),
        step=jnp.zeros((PAIRS, 2), jnp.int32),
        end=ends,
    )
    state = state._replace(particles=particles)
    _, new = ESTIMATE(theta, jax.random.key(1), state, no_mask(theta))
    np.testing.assert_array_equal(new.stored.next_slot[:4], [0, 1, 1, 0])
    highest = np.asarray(new.particles.struggle.highest)
    assert highest[0, 0] == highest[2, 0] == 0 < highest[1, 0] == highest[1, 1]
    # It is the state from before the truncation.
    for pair in (1, 2):
        held = new.stored.particles.params["x"][pair, :, 0]
        np.testing.assert_array_equal(held, particles.params["x"][pair])
        assert new.stored.accumulator["log_learning_rate"][pair, 0] == 0.0
        np.testing.assert_array_equal(new.stored.particles.step[pair, :, 0], 0)
    # On it falls again: nothing more is stored.
    calm = new.particles._replace(
        content=new.particles.content._replace(curvature=bowl(1.0)),
        end=jnp.full((PAIRS, 2), 600, jnp.int32),
    )
    _, later = ESTIMATE(theta, jax.random.key(2), new._replace(particles=calm), no_mask(theta))
    np.testing.assert_array_equal(later.stored.next_slot[:4], [0, 1, 1, 0])


def test_outer_steps_are_of_adamw():
    config = MetaTrainConfig(
        "test", "learned_sgd", (), ("quadratic",), outer_learning_rate=0.01, outer_warmup=2,
        outer_schedule="constant", outer_weight_decay=0.1, outer_second_decay=0.999,
        gradient_clip=1.0,
    )  # fmt: skip
    rates = [float(learning_rate(config, step, 100)) for step in (0, 1, 99)]
    np.testing.assert_allclose(rates, [0.005, 0.01, 0.01], rtol=1e-6)
    optimizer = outer_optimizer(config)
    theta = {"x": jnp.float32([2.0, -1.0])}
    updates, state = optimizer.update({"x": jnp.float32([3.0, 4.0])}, optimizer.init(theta), theta)
    updates, _ = optimizer.update({"x": jnp.float32([0.1, 0.0])}, state, theta)
    gradients = [np.array([0.6, 0.8]), np.array([0.1, 0.0])]  # the first one clipped to norm 1
    mean = square = 0.0
    for gradient in gradients:
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
    wanted = (mean / (1 - 0.9**2)) / (np.sqrt(square / (1 - 0.999**2)) + 1e-8)
    np.testing.assert_allclose(updates["x"], wanted + 0.1 * np.array([2.0, -1.0]), rtol=1e-4)


def test_a_start_without_gains_is_random_throughout():
    config = dict(CONFIGS["celo2_paper"].architecture_config)
    mlp = initial_parameters("elo_celo2", jax.random.key(0), config, {})["mlp"]
    for layer, (fan_in, fan_out) in enumerate([(30, 8), (8, 8), (8, 3)]):
        weights = np.asarray(mlp[f"w{layer}"])
        assert weights.shape == (fan_in, fan_out)
        assert 0.5 < np.std(weights) * np.sqrt(fan_in) < 1.1
        np.testing.assert_array_equal(mlp[f"b{layer}"], np.zeros(fan_out))
    assert set(initial_parameters("elo", jax.random.key(0), config, {})) == {"mlp"}


@pytest.mark.parametrize("architecture", STARTS)
def test_older_rules_start_as_the_original_does(architecture):
    sizes = dict.fromkeys(schema_of(architecture, "test").sizes, 4) | {"hidden_layers": 2}
    config = {key: sizes[key] for key in schema_of(architecture, "test").sizes}
    start = initial_parameters(architecture, jax.random.key(0), config, {})
    shapes = expected_shapes(architecture, config)
    assert jax.tree.map(lambda x: x.shape, start) == shapes
    make = rules.make_rule(architecture, config, learning_rate=0.5)
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    gradient = jax.tree.map(jnp.cos, params)

    def step(optimizer, state):
        return optax.with_extra_args_support(optimizer).update(gradient, state, params, value=1.0)

    optimizer = make(start, 10, lambda count: jnp.float32(1.0))
    updates, state = step(optimizer, optimizer.init(params))
    m, v = 0.1 * gradient["w"], 0.001 * jnp.square(gradient["w"])
    usual = {
        "learnable_sgd": 0.01 * gradient["w"],
        "learnable_sgdm": 0.01 * gradient["w"],
        "learnable_adam": 1e-3 * (m / 0.1) / (jnp.sqrt(v / 0.001 + 1e-8) + 1e-8),
        "nn_adam": 1e-4 * m / (jnp.sqrt(v + 1e-10) + 1e-8),
    }
    if architecture in usual:
        np.testing.assert_allclose(updates["w"], -0.5 * usual[architecture], rtol=1e-3)
    assert np.abs(updates["w"]).max() > 0
    if architecture == "nn_adam":  # the LSTM moves nothing yet
        for moved, at_first in zip(state.logarithms, start["initial"].values(), strict=True):
            np.testing.assert_allclose(moved, at_first, atol=1e-4)


def test_rules_that_pass_no_features_take_no_gains():
    with pytest.raises(ValueError, match="gains: expected none, as nn_adam passes no features"):
        initial_parameters("nn_adam", jax.random.key(0), {"lstm_hidden_size": 4}, {"rms_0": 1.0})


@pytest.mark.parametrize("name", ["celo2_paper", "elo_celo2_paper", "elo_small_fc_paper"])
def test_recipes_of_papers_trace(name):
    """On a small task of matrices and vectors; the pictures need to be prepared."""
    config = dataclasses.replace(CONFIGS[name], tasks=("teacher_regression",), num_pairs=2)
    trainer = Trainer(config)
    state = trainer.shapes()
    estimator = trainer.estimators[0]
    guidance = None if trainer.expert is None else Guidance(1.0, 0.7, 0.3)
    estimate, after = jax.eval_shape(
        lambda theta, state: estimator.estimate(
            theta, jax.random.key(0), state, no_mask(theta), guidance
        ),
        state.meta_parameters, state.estimators[0],
    )  # fmt: skip
    assert jax.tree.map(jnp.shape, estimate.gradient) == jax.tree.map(
        jnp.shape, state.meta_parameters
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state.estimators[0]
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"resume": 1.5}, "resume: expected at most 1"),
        ({"resume": 0.5, "estimator": "full_es"}, "resume: full_es has no stored states"),
        ({"imitation_size": (0.4, 0.0)}, "imitation_direction: expected parts"),
        ({"expert_steps": (10, 5)}, "expert_steps: expected numbers that rise"),
        ({"expert": "lion"}, "expert: expected one of , adamw, muon, sgdm; found 'lion'"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, constant"),
    ],
)
def test_wrong_settings_of_recipes(setting, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["tiny"], **setting)


def test_one_scale_a_problem_over_six_decades():
    config = CONFIGS["celo2_paper"]
    task = Trainer(dataclasses.replace(config, tasks=("teacher_regression",))).tasks[0]
    sample = jax.jit(jax.vmap(lambda key: task.sample(key).scales))
    first, *others = jax.tree.leaves(sample(jax.random.split(jax.random.key(0), 2000)))
    for scales in others:
        np.testing.assert_array_equal(scales, first)
    decades = np.log10(first)
    assert -3 <= decades.min() < -2.9 < 2.9 < decades.max() <= 3
    assert np.mean(decades) == pytest.approx(0, abs=0.15)
    assert np.std(decades) == pytest.approx(6 / np.sqrt(12), rel=0.05)
