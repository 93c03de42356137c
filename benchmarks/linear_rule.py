"""Writes the weights behind `lopt`: a direction that is a weighted sum of two features.

The weights of the sum are what `benchmarks/recipe_search.py` found on the tuning tasks of the scale
suite: python benchmarks/linear_rule.py checkpoints/lopt --record docs/benchmarks/recipe_search.json
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

import lopt_jax

MOMENTUM_DECAYS = (0.9,)
WEIGHTS = {"gradient": 1.0, "momentum": 1.0}  # of features of root mean square one


def main():
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--record", type=Path, help="the records of the search")
    options = parser.parse_args()
    record = options.record
    metadata = {
        "source": "lopt_jax: benchmarks/recipe_search.py and benchmarks/linear_rule.py",
        "licence": "Apache-2.0",
        "use": "lopt_jax.lopt(num_steps)",
        "meta_training": {
            "method": "coordinate search of a linear direction and the recipe around it",
            "weights_of_features": WEIGHTS,
            "tasks": "tuning_gpt5m and tuning_gpt18m of lopt_jax.meta.scale.tasks, 1,000 steps",
            "hardware": "1 NVIDIA H200",
            "jax": "0.11.2",
            "date": "2026-12-01",
            "records_sha256": hashlib.sha256(record.read_bytes()).hexdigest() if record else "",
        },
    }
    params = {"weights": np.asarray(list(WEIGHTS.values()), np.float32)}
    config = {"initial_momentum_decays": MOMENTUM_DECAYS}
    weights = lopt_jax.Weights("linear", config, params, metadata)
    lopt_jax.save_weights(options.target, weights)
    print(f"{options.target}: {WEIGHTS}")


if __name__ == "__main__":
    main()
