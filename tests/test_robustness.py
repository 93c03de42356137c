"""Random small networks do not diverge under `lopt`: those of benchmarks/robustness.py."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # each shape takes many seconds to compile

PATH = Path(__file__).parents[1] / "benchmarks" / "robustness.py"


def trainings():
    """Batch sizes, and losses before and after, of the script's networks."""
    spec = importlib.util.spec_from_file_location("robustness", PATH)
    robustness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(robustness)
    generator = np.random.default_rng(0)
    for depth, width in robustness.SHAPES:
        networks = [robustness.draw(generator) for _ in range(robustness.LANES)]
        settings = {name: np.asarray([n[name] for n in networks]) for name in networks[0]}
        yield from zip(settings["batch"], *robustness.train(settings, depth, width), strict=True)


def test_all_end_finite():
    """And below where they began, but for what learns from one example a step."""
    for batch, first, last in trainings():
        assert last < (first if batch > 1 else 1.1 * first)
