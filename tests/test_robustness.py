"""Random small networks do not diverge under `lopt`: those of benchmarks/robustness.py."""

import importlib.util
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def robustness():
    spec = importlib.util.spec_from_file_location("robustness", ROOT / "benchmarks/robustness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(robustness):
    return json.loads(robustness.RECORDS.read_text())


def test_the_page_says_what_the_records_say(robustness, found):
    page = (ROOT / "docs/scale.md").read_text()
    assert robustness.summary(found) in page


def test_the_records_are_of_the_networks_that_the_script_draws(robustness, found):
    drawn = [
        (group.name, depth, width, n["batch"], n["seed"])
        for group in robustness.GROUPS
        for (depth, width), networks in group.draws()
        for n in networks
    ]
    names = ("group", "depth", "width", "batch", "seed")
    assert [tuple(row[name] for name in names) for row in found["networks"]] == drawn
    assert found["steps"] == robustness.STEPS


def test_none_diverged(robustness, found):
    """What did not end below where it began learned from one example a step, and ends near it."""
    for row in found["networks"]:
        assert math.isfinite(row["last"])
        assert robustness.ends_well(row) or (
            row["batch"] == 1 and row["last"] < 1.03 * row["first"]
        )


def test_the_best_constant(robustness):
    """Of classes the entropy of their shares; of squares the variance."""
    y = jnp.eye(5)[jnp.array([0, 0, 0, 1])] * 2.0
    classes = robustness.best_constant(y, {"classifies": 1, "scale": 3.0})
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    np.testing.assert_allclose(classes, 3 * entropy, rtol=1e-5)
    squares = robustness.best_constant(y, {"classifies": 0, "scale": 1.0})
    np.testing.assert_allclose(squares, np.mean(np.var(np.asarray(y), axis=0)), rtol=1e-5)


@pytest.mark.slow  # each shape takes many seconds to compile
def test_all_end_as_recorded(robustness, found):
    """Finite, and no further above the first loss than the highest of the records."""
    group = robustness.GROUPS[0]
    highest = max(row["last"] / row["first"] for row in found["networks"])
    for shape, networks in group.draws():
        first, last, _ = map(np.asarray, robustness.train(networks, *shape))
        assert (last < max(highest, 1.03) * first).all()
