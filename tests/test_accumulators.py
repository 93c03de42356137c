"""The factored second moment's conventions."""

import itertools

import numpy as np
import pytest

from lopt_jax.accumulators import factored_dims
from lopt_jax.features import small_fc_features
from lopt_jax.rules import rule as rules


@pytest.fixture
def unstable_sort(monkeypatch):
    """numpy's sort as some processors run it: of equal elements the last comes first."""
    stable = np.argsort

    def unstable(x, *args, kind=None, **kwargs):
        if kind == "stable":
            return stable(x, *args, kind=kind, **kwargs)
        x = np.asarray(x)
        return x.size - 1 - stable(x[::-1], *args, kind="stable", **kwargs)

    monkeypatch.setattr(np, "argsort", unstable)
    assert list(np.argsort([64, 64, 3, 3])) == [3, 2, 1, 0]


@pytest.mark.usefixtures("unstable_sort")
def test_of_equal_dimensions_the_later_one_is_the_larger():
    assert factored_dims((64, 64, 3, 3)) == (0, 1)
    assert factored_dims((3, 3, 64, 64)) == (2, 3)
    assert factored_dims((8, 8)) == (0, 1)
    assert factored_dims((5, 9, 5, 2)) == (2, 1)
    assert factored_dims((7,)) is None
    for shape in itertools.product((1, 2, 3), repeat=4):
        d1, d0 = factored_dims(shape)
        largest = max(shape)
        assert d0 == max(i for i, n in enumerate(shape) if n == largest)
        others = [n for i, n in enumerate(shape) if i != d0]
        assert d1 == max(i for i, n in enumerate(shape) if n == max(others) and i != d0)


@pytest.mark.usefixtures("unstable_sort")
def test_row_and_column_means_are_those_of_any_host():
    """The row is the mean over the last of the largest dimensions."""
    gradient = np.random.default_rng(0).standard_normal((4, 4, 2, 2)).astype(np.float32)
    rule = rules.Rule(small_fc_features())
    moments = rules.gradient_statistics(rule, gradient, np.ones_like(gradient))
    np.testing.assert_allclose(moments.row, np.square(gradient).mean(1), rtol=1e-6)
    np.testing.assert_allclose(moments.column, np.square(gradient).mean(0), rtol=1e-6)
