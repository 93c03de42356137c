"""The estimators against the gradient of the whole unroll, on a quadratic family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt_jax.meta.estimators import (
    ESTIMATORS,
    full_es,
    no_mask,
    truncated_backprop,
    truncated_es,
    truncated_pes,
)
from lopt_jax.meta.rules import learned_sgd
from lopt_jax.meta.tasks import Quadratic
from lopt_jax.meta.unroll import Objective, Unroll

STEPS, TRUNCATION = 8, 2
SIGMA = 0.02


@dataclasses.dataclass(frozen=True)
class Plain(Objective):
    """The loss itself, unweighted: its gradient has a closed form."""

    def score(self, loss, initial_loss):
        return loss

    def weight(self, fraction):
        return jnp.ones_like(fraction)


UNROLL = Unroll(
    Quadratic(3), learned_sgd, TRUNCATION, 1, min_horizon=STEPS, max_horizon=STEPS,
    objective=Plain(),
)  # fmt: skip
THETA = {"log_learning_rate": jnp.float32(np.log(0.3))}


def expected_gradient():
    """d/d(log rate) of the mean over steps of E[loss], in float64 by numpy.

    The bowl is 0.5 * mean(c * d^2), gradient c * d / 3, so d_t = d_0 * (1 - rate * c / 3)^t with
    d_0 the difference of two standard normals: E[d_0^2] = 2. c is uniform in [0.5, 2].
    """
    curvature = np.linspace(0.5, 2.0, 20001)
    rate = 0.3
    shrink = 1 - rate * curvature / 3
    total = 0.0
    for t in range(1, STEPS + 1):
        # d/d(log rate) of 0.5 * c * 2 * shrink^(2t)
        total += np.mean(curvature * 2 * t * shrink ** (2 * t - 1) * (-rate * curvature / 3))
    return total / STEPS


def late_bias():
    """The same without what a truncation does to later ones: what truncated ES converges to."""
    curvature = np.linspace(0.5, 2.0, 20001)
    rate = 0.3
    shrink = 1 - rate * curvature / 3
    total = 0.0
    for t in range(1, STEPS + 1):
        inside = (t - 1) % TRUNCATION + 1  # steps of this truncation that the perturbation saw
        power = curvature * shrink ** (2 * t - 1) * (-rate * curvature / 3)
        total += np.mean(2 * inside * power)
    return total / STEPS


def sample_gradients(estimator, count=300):
    """Gradients of `count` outer steps after the first, cut-short lives are over."""
    state = jax.jit(estimator.init)(THETA, jax.random.key(0))

    def step(state, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        estimate, state = estimator.estimate(THETA, key, state, no_mask(THETA))
        return state, estimate.gradient["log_learning_rate"]

    warm = STEPS // TRUNCATION
    _, gradients = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(count + warm)))(state)
    gradients = np.asarray(gradients[warm:], np.float64)
    # Successive estimates share lives, so the standard error comes from means over blocks.
    blocks = gradients.reshape(-1, 2 * warm if count % (2 * warm) == 0 else 1).mean(1)
    return gradients.mean(), blocks.std(ddof=1) / np.sqrt(len(blocks))


def test_persistent_es_is_the_gradient_of_the_whole_unroll():
    mean, error = sample_gradients(truncated_pes(UNROLL, 256, SIGMA, clip=1e9), 320)
    assert error < 0.05 * abs(expected_gradient())
    assert abs(mean - expected_gradient()) < 3.5 * error


def test_full_es_is_the_gradient_of_the_whole_unroll():
    mean, error = sample_gradients(full_es(UNROLL, 128, SIGMA, clip=1e9), 160)
    assert error < 0.05 * abs(expected_gradient())
    assert abs(mean - expected_gradient()) < 3.5 * error


@pytest.mark.parametrize("make", [truncated_es, truncated_backprop])
def test_truncated_estimators_have_the_known_bias(make):
    mean, error = sample_gradients(make(UNROLL, 256, SIGMA, clip=1e9), 320)
    assert abs(mean - late_bias()) < 3.5 * error
    # The bias is towards zero and many standard errors wide.
    assert abs(mean) < 0.6 * abs(expected_gradient())
    assert abs(mean - expected_gradient()) > 10 * error


def test_persistent_es_forgets_perturbations_when_a_life_ends():
    estimator = truncated_pes(UNROLL, 4, SIGMA)
    state = jax.jit(estimator.init)(THETA, jax.random.key(0))
    step = jax.jit(estimator.estimate)
    for i in range(12):
        before = state
        _, state = step(THETA, jax.random.key(i), before, no_mask(THETA))
        over = np.asarray(before.particles.step[:, 0] >= before.particles.end[:, 0])
        steps = np.asarray(state.particles.step[:, 0])
        np.testing.assert_array_equal(steps[over], TRUNCATION)
        old = np.asarray(before.accumulator["log_learning_rate"])
        new = np.asarray(state.accumulator["log_learning_rate"])
        # One perturbation is 0.02 or so; a life's accumulated one differs from it.
        assert np.all(np.abs(new[over]) < 5 * SIGMA)
        assert np.all(np.abs((new - old)[~over]) < 5 * SIGMA)


@pytest.mark.parametrize("name", ["truncated_pes", "full_es", "truncated_es"])
def test_masked_meta_parameters_get_no_gradient(name):
    estimator = ESTIMATORS[name](UNROLL, 4, SIGMA)
    state = estimator.init(THETA, jax.random.key(0))
    mask = {"log_learning_rate": jnp.float32(0.0)}
    estimate, _ = jax.jit(estimator.estimate)(THETA, jax.random.key(1), state, mask)
    assert float(estimate.gradient["log_learning_rate"]) == 0.0


def test_a_pair_that_is_not_finite_counts_as_zero():
    class Broken(Plain):
        def score(self, loss, initial_loss):
            return jnp.where(initial_loss > 1.0, jnp.nan, loss)

    unroll = dataclasses.replace(UNROLL, objective=Broken())
    estimator = truncated_pes(unroll, 64, SIGMA)
    state = estimator.init(THETA, jax.random.key(0))
    estimate, _ = jax.jit(estimator.estimate)(THETA, jax.random.key(1), state, no_mask(THETA))
    assert 0.0 < float(estimate.rejected) < 1.0
    assert np.isfinite(float(estimate.gradient["log_learning_rate"]))


def test_lives_end_at_log_uniform_horizons_and_start_staggered():
    unroll = Unroll(Quadratic(), learned_sgd, 10, 5, min_horizon=20, max_horizon=640)
    keys = jax.random.split(jax.random.key(0), 4000)
    states = jax.vmap(lambda k: unroll.init(THETA, k, True))(keys)
    horizons, ends = np.asarray(states.horizon), np.asarray(states.end)
    assert horizons.min() == 20
    assert horizons.max() == 640
    assert np.all(horizons % 10 == 0)
    # Log-uniform on [20, 640]: the median is the geometric mean, 113.
    assert abs(np.log(np.median(horizons) / np.sqrt(20 * 640))) < 0.15
    assert np.all(ends <= horizons)
    assert 0.4 < np.mean(ends / horizons) < 0.7
    later = jax.vmap(lambda k: unroll.init(THETA, k))(keys[:10])
    np.testing.assert_array_equal(later.end, later.horizon)


def test_objective_is_bounded_and_ignores_nan():
    objective = Objective(floor=0.01, ceiling=3.0, final_weight=4.0)
    one = jnp.float32(1.0)
    assert float(objective.score(jnp.float32(0.0), one)) == pytest.approx(np.log(0.01), rel=1e-5)
    for bad in (jnp.nan, jnp.inf, 1e30):
        score = objective.score(jnp.float32(bad), one)
        assert float(score) == pytest.approx(np.log(3.01), rel=1e-5)
    fractions = np.linspace(0, 1, 10001)
    weights = np.asarray(objective.weight(jnp.asarray(fractions)))
    assert weights.mean() == pytest.approx(1.0, abs=1e-3)


def test_unroll_refuses_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="measure_every"):
        Unroll(Quadratic(), learned_sgd, 10, 3)
    with pytest.raises(ValueError, match="min_horizon"):
        Unroll(Quadratic(), learned_sgd, 50, 10, min_horizon=20)
