"""Writes the weights behind `lopt`: a direction that is a weighted sum of two features.

The weights of the sum are what `benchmarks/recipe_search.py` found on the tuning tasks of the scale
suite: python benchmarks/linear_rule.py checkpoints/lopt --record docs/benchmarks/recipe_search.json
"""

import argparse
import hashlib
from pathlib import Path

import jax.numpy as jnp

import lopt_jax
from lopt_jax.features import velo_features

WEIGHTS = {"gradient": 1.0, "momentum_0": 1.0}  # of features of root mean square one
CONFIG = {
    "hidden_size": 2,
    "hidden_layers": 1,
    "exp_mult": 0.0,
    "initial_momentum_decays": (0.9, 0.99, 0.999),
    "initial_rms_decays": (0.95,),
    "initial_adafactor_decays": (0.9, 0.99, 0.999),
}


def linear_network(weights):
    """An MLP of two hidden units whose first output is the weighted sum: relu(x) - relu(-x)."""
    names = [feature.name for feature in velo_features().factored]
    column = jnp.zeros((len(names),))
    for name, weight in weights.items():
        column = column.at[names.index(name)].set(weight)
    return {
        "w0": jnp.stack([column, -column], axis=1),
        "b0": jnp.zeros((2,)),
        "w1": jnp.zeros((2, 3)).at[:, 0].set(jnp.asarray([1.0, -1.0])),
        "b1": jnp.zeros((3,)),
    }


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
    weights = lopt_jax.Weights("celo2", CONFIG, {"mlp": linear_network(WEIGHTS)}, metadata)
    lopt_jax.save_weights(options.target, weights)
    print(f"{options.target}: {WEIGHTS}")


if __name__ == "__main__":
    main()
