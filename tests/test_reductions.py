"""Means of several arrays in one pass, and statistics about centres, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt_jax.accumulators import Decays, update_momentum, update_second_moment
from lopt_jax.reductions import means
from lopt_jax.rules.centred import expected_means, statistics_about
from lopt_jax.rules.rule import AccumulatorStatistics


@pytest.mark.parametrize("axes", ["all", "last two"])
@pytest.mark.parametrize("shape", [(512, 96), (1009, 40), (3, 128, 100), (2, 35, 600), (70_000,)])
def test_means(shape, axes):
    """Leading axes that can be cut into equal parts, a prime one, and none."""
    rank = len(shape)
    where = tuple(range(rank) if axes == "all" else range(max(rank - 2, 0), rank))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) + k for k in range(3)]
    run = jax.jit(lambda *xs: means([jnp.square(x) for x in xs], where))
    got = run(*arrays)
    for x, mean in zip(arrays, got, strict=True):
        expected = np.mean(np.square(x.astype(np.float64)), where, keepdims=True)
        # a vector is added one element after another
        np.testing.assert_allclose(mean, expected, rtol=2e-5 if rank == 1 else 2e-6)
    jax.tree.map(np.testing.assert_array_equal, run(*arrays), got)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_statistics_about_centres_lose_no_digits(offset):
    """Also where accumulators are far from zero and gradients are not."""
    rng = np.random.default_rng(0)
    draw = lambda: rng.standard_normal(4096)  # noqa: E731
    decays = Decays(np.float32([0.9, 0.999]), np.float32(0.99), np.zeros(1, np.float32))
    momentum = [draw() + offset, draw() - offset]
    second, gradient = np.square(draw()) + offset, draw() + 1
    old = AccumulatorStatistics(
        jnp.float32([x.mean() for x in momentum]),
        jnp.float32([x.var() for x in momentum]),
        jnp.float32(second.mean()),
        jnp.float32(second.var()),
    )
    new = [update_momentum(m, gradient, d) for m, d in zip(momentum, decays.momentum, strict=True)]
    new.append(update_second_moment(second, gradient, decays.second_moment))
    centres = expected_means(
        old, decays, jnp.float32(gradient.mean()), jnp.float32(np.square(gradient).mean())
    )
    distances = [np.float32(x) - c for x, c in zip(new, np.asarray(centres), strict=True)]
    got = statistics_about(
        centres,
        jnp.stack([jnp.mean(d) for d in distances]),
        jnp.stack([jnp.mean(jnp.square(d)) for d in distances]),
    )
    mean = np.append(got.momentum_mean, got.second_moment_mean)
    variance = np.append(got.momentum_variance, got.second_moment_variance)
    np.testing.assert_allclose(mean, [x.mean() for x in new], rtol=1e-5)
    np.testing.assert_allclose(variance, [x.var() for x in new], rtol=1e-4)
