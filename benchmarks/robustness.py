"""Does `lopt` ever diverge? Random small networks, 300 steps each, as it comes.

    python benchmarks/robustness.py           # trains them, writes docs/benchmarks/robustness.json
    python benchmarks/robustness.py --show    # the sentences of docs/scale.md about the records

Norms, activation, loss, its scale and the batch are random. Fifty networks have batches of 1 to
512, five of every shape; two hundred more have batches of 1 to 8, twenty of every shape. Those of
one shape are trained side by side by one compiled program.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt_jax

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "tanh": jnp.tanh, "silu": jax.nn.silu}
ACTIVATIONS["sin"] = jnp.sin
SHAPES = (  # depth and width
    (1, 4), (2, 4), (8, 4), (5, 16), (3, 32), (8, 32), (4, 64), (6, 64), (2, 256), (1, 512),
)  # fmt: skip
STEPS, EXAMPLES, INPUTS, OUTPUTS = 300, 512, 8, 5
RECORDS = Path(__file__).parents[1] / "docs" / "benchmarks" / "robustness.json"


@dataclasses.dataclass(frozen=True)
class Group:
    """Networks that are drawn alike.

    Attributes:
      name: in the records.
      seed: of the draws.
      each: networks of every shape.
      largest: batches have one example to so many, log-uniform.
    """

    name: str
    seed: int
    each: int
    largest: int

    def draws(self):
        """The settings of every shape's networks: (depth, width) and a list for each shape."""
        generator = np.random.default_rng(self.seed)
        for shape in SHAPES:
            yield shape, [draw(generator, self.largest) for _ in range(self.each)]


GROUPS = (Group("all batches", 0, 5, EXAMPLES), Group("small batches", 1, 20, 8))


def draw(generator, largest):
    """A network's settings, but for its shape."""
    return {
        "activation": int(generator.integers(len(ACTIVATIONS))),
        "has_norms": int(generator.integers(2)),
        "classifies": int(generator.integers(2)),
        "batch": int(np.exp(generator.uniform(0, np.log(largest + 1)))),
        "scale": float(10 ** generator.uniform(-3, 3)),
        "seed": int(generator.integers(1 << 30)),
    }


def init(key, depth, width):
    """Parameters; hidden layers and norms are stacked."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[-2] ** 0.5  # noqa: E731
    return {
        "first": {"kernel": normal(keys[0], INPUTS, width), "bias": jnp.zeros(width)},
        "hidden": {
            "kernel": normal(keys[1], depth - 1, width, width),
            "bias": jnp.zeros((depth - 1, width)),
        },
        "norm": {"scale": jnp.ones((depth, width)), "bias": jnp.zeros((depth, width))},
        "out": {"kernel": normal(keys[2], width, OUTPUTS), "bias": jnp.zeros(OUTPUTS)},
    }


def stacked_axes(path, leaf):
    """One stacked axis for hidden layers and norms."""
    del leaf
    return int(path[0].key in ("hidden", "norm"))


def losses_of(params, x, y, settings):
    """The scaled loss of every example: (examples,)."""
    return loss_of_outputs(outputs_of(params, x, settings), y, settings)


def outputs_of(params, x, settings):
    """What a network makes of inputs: (examples, outputs)."""

    def activate(x, norm):
        normed = jax.nn.standardize(x) * norm["scale"] + norm["bias"]
        x = jnp.where(settings["has_norms"] > 0, normed, x)
        return jax.lax.switch(settings["activation"], list(ACTIVATIONS.values()), x)

    def layer(x, leaves):
        dense, norm = leaves
        return activate(x @ dense["kernel"] + dense["bias"], norm), None

    first, out = params["first"], params["out"]
    first_norm = jax.tree.map(lambda x: x[0], params["norm"])
    others = jax.tree.map(lambda x: x[1:], params["norm"])
    x = activate(x @ first["kernel"] + first["bias"], first_norm)
    x, _ = jax.lax.scan(layer, x, (params["hidden"], others))
    return x @ out["kernel"] + out["bias"]


def loss_of_outputs(outputs, y, settings):
    """The scaled loss of every example: (examples,)."""
    classes = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.argmax(y, axis=-1))
    squares = jnp.mean(jnp.square(outputs - y), axis=-1)
    return settings["scale"] * jnp.where(settings["classifies"] > 0, classes, squares)


def best_constant(y, settings):
    """The loss of the best outputs that are the same for all examples: ()."""
    shares = jnp.mean(jax.nn.one_hot(jnp.argmax(y, axis=-1), OUTPUTS), axis=0)
    outputs = jnp.where(settings["classifies"] > 0, jnp.log(shares + 1e-12), jnp.mean(y, axis=0))
    return jnp.mean(loss_of_outputs(jnp.broadcast_to(outputs, y.shape), y, settings))


def train(networks, depth, width):
    """Losses over all examples of networks of one shape.

    Returns three lists: before training, after it, and of the best constant outputs.
    """
    settings = {name: np.asarray([n[name] for n in networks]) for name in networks[0]}
    rows = max(n["batch"] for n in networks)
    return [losses.tolist() for losses in jax.device_get(_train(settings, depth, width, rows))]


@functools.partial(jax.jit, static_argnames=("depth", "width", "most", "steps"))
def _train(settings, depth, width, most, steps=STEPS):
    """The three losses, (lanes,) each; no batch is larger than `most`."""

    @jax.vmap
    def one(settings):
        keys = jax.random.split(jax.random.key(settings["seed"]), 4)
        x = jax.random.normal(keys[0], (EXAMPLES, INPUTS))
        y = jnp.sin(2 * x @ jax.random.normal(keys[1], (INPUTS, OUTPUTS)))
        params = init(keys[2], depth, width)
        tx = lopt_jax.lopt(steps, stacked_axes=stacked_axes)

        def batch_loss(params, rows):
            is_drawn = jnp.arange(most) < settings["batch"]
            losses = losses_of(params, x[rows], y[rows], settings)
            return jnp.sum(jnp.where(is_drawn, losses, 0)) / settings["batch"]

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(keys[3], number)
            rows = jax.random.randint(key, (EXAMPLES,), 0, EXAMPLES)[:most]
            updates, state = tx.update(jax.grad(batch_loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        (after, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
        first, last = (jnp.mean(losses_of(p, x, y, settings)) for p in (params, after))
        return first, last, best_constant(y, settings)

    return one(settings)


def records_of(group, say):
    """Trains a group: a record for each network, and a line for each as it ends."""
    names = list(ACTIVATIONS)
    for (depth, width), networks in group.draws():
        for n, first, last, constant in zip(networks, *train(networks, depth, width), strict=True):
            record = {
                "group": group.name, "depth": depth, "width": width, "batch": n["batch"],
                "activation": names[n["activation"]], "norms": bool(n["has_norms"]),
                "loss": "classes" if n["classifies"] else "squares",
                "scale": float(f"{n['scale']:.4g}"), "seed": n["seed"],
                "first": float(f"{first:.6g}"), "last": float(f"{last:.6g}"),
                "constant": float(f"{constant:.6g}"),
            }  # fmt: skip
            say("  ".join(f"{key} {value}" for key, value in record.items()))
            yield record


def write(records):
    """Writes the records, with what they were made on."""
    made = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": f"{os.cpu_count()} CPU cores"
        if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind,
        "steps": STEPS,
    }
    lines = ",\n".join(json.dumps(record) for record in records)
    head = json.dumps(made)[:-1]
    RECORDS.write_text(f'{head}, "networks": [\n{lines}\n]}}\n')


def ends_well(record):
    """Whether a training ended finite, and below where it began."""
    return bool(np.isfinite(record["last"]) and record["last"] < record["first"])


def summary(found):
    """The records in words, a sentence a line."""
    lines = [f"{found['device']}, jax {found['jax']}, {found['date']}; {found['steps']} steps."]
    for group in GROUPS:
        rows = [row for row in found["networks"] if row["group"] == group.name]
        finite = sum(np.isfinite(row["last"]) for row in rows)
        ratios = [row["last"] / row["first"] for row in rows]
        others = [row for row in rows if not ends_well(row)]
        lines.append(
            f"Of {len(rows)} networks with batches of 1 to {group.largest}, {finite} ended finite, "
            f"and {len(rows) - len(others)} below where they began; the median at "
            f"{np.median(ratios):.2f} times the first loss, the highest at {np.max(ratios):.3f}."
        )
        if others:
            lines.append(
                f"Of those that did not ({len(others)}), the largest batch is "
                f"{max(row['batch'] for row in others)}, and "
                f"{sum(row['first'] < 1.01 * row['constant'] for row in others)} began within 1% "
                "of the loss of the best constant outputs."
            )
    return "\n".join(lines)


def main():
    """Trains the networks, or shows what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.show:
        begin = time.perf_counter()
        say = lambda text: print(f"{time.perf_counter() - begin:5.0f} s  {text}", flush=True)  # noqa: E731
        write([record for group in GROUPS for record in records_of(group, say)])
    print(summary(json.loads(RECORDS.read_text())))


if __name__ == "__main__":
    main()
