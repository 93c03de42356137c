"""The shipped weights beside the authors' released Celo and tuned Adam, on handwritten digits.

python benchmarks/released_celo.py --weights FOLDER --json released_celo.json

A 64-128-10 ReLU MLP, shuffled passes over 80% of scikit-learn's digits in batches of 128, losses of
the last parameters over the whole training set and the test set. Adam: the best of the twelve rates
of `lopt meta-eval`, cosine schedule. FOLDER, no part of this project: {celo,celo_adam}/theta.state.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lopt_jax
from lopt_jax.meta.evaluate import Contender, baselines
from lopt_jax.meta.rules import cosine_schedule, decays_at_rank_two

BATCH, SEEDS = 128, 3
MEASURES = ("train loss", "test loss", "test accuracy")


def load_data(split: str) -> list[np.ndarray]:
    """Images to train on and to test on, labels of both; "ordered" tests on the last 20%."""
    images, labels = load_digits(return_X_y=True)
    how = {"shuffle": False} if split == "ordered" else {"random_state": 0, "stratify": labels}
    return train_test_split((images / 16).astype(np.float32), labels, test_size=0.2, **how)


def contenders(folder: Path | None) -> list[Contender]:
    """Shipped weights as their cards say, released ones where there is a folder, and Adam."""
    decay: Any = {"weight_decay": 3.0, "weight_decay_mask": decays_at_rank_two}
    make: dict[str, Any] = {
        "celo2_small": lambda n: lopt_jax.celo2(cosine_schedule(n, 0.01), "celo2_small", **decay),
        "small_fc_lopt": lambda n: lopt_jax.small_fc_lopt(learning_rate=cosine_schedule(n)),
        "celo_small": lambda n: lopt_jax.celo(n, "celo_small"),
    }
    if folder is not None:
        paths = {name: folder / name / "theta.state" for name in ("celo", "celo_adam")}
        celo, adam = (lopt_jax.convert_weights(p, architecture=n) for n, p in paths.items())
        make["released celo"] = lambda n: lopt_jax.celo(n, celo)
        make["released celo_adam"] = lambda n: lopt_jax.celo_adam(n, adam)
    rules = [Contender(k, lambda _, n, k=k: make[k](n), (1.0,)) for k in make]  # type: ignore[misc]
    return [*rules, baselines()["adam"]]


def start(seed: jax.Array, steps: int, examples: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """Parameters, and batches (steps, BATCH) of shuffled passes that leave their remainder out."""
    keys = jax.random.split(jax.random.key(seed), 3)
    w0 = jax.random.normal(keys[0], (64, 128)) * (2 / 64) ** 0.5
    w1 = jax.random.normal(keys[1], (128, 10)) * (1 / 128) ** 0.5
    each = examples // BATCH
    shuffled = jax.vmap(lambda key: jax.random.permutation(key, examples)[: each * BATCH])
    batches = shuffled(jax.random.split(keys[2], -(-steps // each))).reshape(-1, BATCH)[:steps]
    return {"w0": w0, "b0": jnp.zeros(128), "w1": w1, "b1": jnp.zeros(10)}, batches


def measure(params: Any, images: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and accuracy."""
    logits = jax.nn.relu(images @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def train(contender: Contender, steps: Any, data: Any) -> np.ndarray:
    """`MEASURES` of every learning rate and seed, (rates, seeds, 3), in one compiled program."""
    x, test_x, y, test_y = (jnp.asarray(array) for array in data)

    def run(rate: jax.Array, seed: jax.Array) -> jax.Array:
        tx = optax.with_extra_args_support(contender.build(rate, steps))

        def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
            loss = lambda p: measure(p, x[batch], y[batch])[0]  # noqa: E731
            value, gradients = jax.value_and_grad(loss)(carry[0])
            updates, state = tx.update(gradients, carry[1], carry[0], value=value)
            return (optax.apply_updates(carry[0], updates), state), None

        params, batches = start(seed, steps, len(x))
        params = jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]
        return jnp.stack([measure(params, x, y)[0], *measure(params, test_x, test_y)])

    every = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
    return np.asarray(every(jnp.asarray(contender.learning_rates), jnp.arange(SEEDS)))


def rows_of(contender: Contender, steps: int, results: np.ndarray) -> list[str]:
    """Rows of the table; where there are many rates, the best by test and by training loss."""
    name, rates = contender.name, contender.learning_rates
    numbers = np.stack([f(results, axis=1) for f in (np.mean, np.min, np.max)], axis=-1)
    best = {i: numbers[:, i, 0].argsort()[0] for i in (1, 0)}  # nan comes last
    named = {f"{name} {rates[k]:.2g}, best {MEASURES[i]}": k for i, k in best.items()}
    chosen = named if len(rates) > 1 else {name: 0}
    text = "| {} | {} | {:.1e} ({:.1e}..{:.1e}) | {:.3f} ({:.3f}..{:.3f}) | {:.1%} |"
    return [text.format(steps, label, *numbers[k].flat) for label, k in chosen.items()]


def main() -> None:
    """Trains, prints a table and writes the measurements of every rate and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="with the released weights")
    parser.add_argument("--split", choices=("random", "ordered"), default="random")
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run there")
    options = parser.parse_args()
    rows = ["| steps | optimizer | " + " | ".join(MEASURES) + " |", "| ---: | --- |" + 3 * " --- |"]
    runs = []
    for steps in options.steps:
        for contender in contenders(options.weights):
            print(f"{contender.name}, {steps} steps", file=sys.stderr, flush=True)
            results = train(contender, steps, load_data(options.split))
            rows += rows_of(contender, steps, results)
            run = {"optimizer": contender.name, "rates": contender.learning_rates, "steps": steps}
            runs.append(run | {"results": results.tolist()})
    print("\n".join(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
