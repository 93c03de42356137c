"""Constants of `lopt`'s recipe on the small training tasks: one at a time, beside AdamW and Muon.

python benchmarks/small_search.py --out small.json
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

import lopt_jax
from lopt_jax.meta import evaluate
from lopt_jax.meta.tasks import held_out_tasks, training_tasks

TASKS = (
    "digits_mlp_64",
    "digits_conv_8",
    "china_autoencoder",
    "teacher_regression",
    "tables_few_mlp_32x2",
    "bytes_rnn_32",
)
VALUES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)


def lopt_with(name):
    """`lopt` with one constant of its recipe multiplied."""

    def build(multiple, steps):
        if name == "rate":
            return lopt_jax.lopt(steps, learning_rate=multiple)
        base = lopt_jax.Recipe()
        recipe = dataclasses.replace(base, **{name: multiple * getattr(base, name)})
        return lopt_jax.lopt(steps, recipe=recipe)

    values = VALUES if name != "decay" else (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    return evaluate.Contender(f"lopt_{name}", build, values)


def main():
    """Runs the search and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/small.json"))
    parser.add_argument("--names", default="rate,decay,vector,head_limit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--horizons", default="200,1000")
    parser.add_argument("--held-out", action="store_true", help="lopt as it comes, held-out tasks")
    options = parser.parse_args()
    begin = time.perf_counter()
    known = evaluate.baselines()
    if options.held_out:
        tasks = held_out_tasks()
        build = lambda rate, steps: lopt_jax.lopt(steps, learning_rate=rate)  # noqa: E731
        contenders = [evaluate.Contender("lopt", build, (1.0,))]
    else:
        tasks = {name: training_tasks()[name] for name in TASKS}
        contenders = [lopt_with(name) for name in options.names.split(",")]
        contenders += [known["adamw"], known["muon"]]
    curves = evaluate.run_curves(
        tasks,
        contenders,
        [int(h) for h in options.horizons.split(",")],
        options.seeds,
        ahead=14,
    )
    records = []
    for (task, name, horizon), found in curves.items():
        contender = next(c for c in contenders if c.name == name)
        valid = np.asarray(found.valid)[..., -1].mean(-1)
        train = np.asarray(found.train)[..., -1].mean(-1)
        records.append(
            {
                "task": task, "optimizer": name, "horizon": horizon,
                "rates": list(contender.learning_rates),
                "valid": valid.tolist(), "train": train.tolist(),
            }
        )  # fmt: skip
        cells = [f"{x:.4g}" for x in valid]
        if name in known:
            best = int(np.nanargmin(valid))
            cells = [f"best {valid[best]:.4g} (train {train[best]:.3g})"]
        print(f"{task:22} {horizon:5} {name:16} {' '.join(cells)}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
