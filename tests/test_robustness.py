"""Random small networks do not diverge under `lopt`: those of benchmarks/robustness.py."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "robustness.py"


def trainings(shapes):
    """Batch sizes, and losses before and after, of the script's networks of the first shapes."""
    spec = importlib.util.spec_from_file_location("robustness", PATH)
    robustness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(robustness)
    generator = np.random.default_rng(0)
    for depth, width in robustness.SHAPES[:shapes]:
        networks = [robustness.draw(generator) for _ in range(robustness.LANES)]
        settings = {name: np.asarray([n[name] for n in networks]) for name in networks[0]}
        yield from zip(settings["batch"], *robustness.train(settings, depth, width), strict=True)


def test_the_smallest_networks_end_below_where_they_began():
    for _, first, last in trainings(1):
        assert last < first


@pytest.mark.slow
def test_all_end_finite():
    """And below where they began, but for what learns from one example a step."""
    for batch, first, last in trainings(None):
        assert last < (first if batch > 1 else 1.1 * first)
