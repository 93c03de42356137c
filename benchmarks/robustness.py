"""Does `lopt` ever diverge? Fifty random small networks, 300 steps each, as it comes.

Norms, activation, loss, its scale and the batch are random, five networks of every shape. Those of
one shape are trained side by side by one compiled program: python benchmarks/robustness.py
"""

import argparse
import functools
import sys
import time

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
STEPS, EXAMPLES, INPUTS, OUTPUTS, LANES = 300, 512, 8, 5, 5


def draw(generator):
    """A network's settings, but for its shape."""
    return {
        "activation": generator.integers(len(ACTIVATIONS)),
        "has_norms": generator.integers(2),
        "classifies": generator.integers(2),
        "batch": int(np.exp(generator.uniform(0, np.log(EXAMPLES + 1)))),
        "scale": 10 ** generator.uniform(-3, 3),
        "seed": generator.integers(1 << 30),
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
    outputs = x @ out["kernel"] + out["bias"]
    classes = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.argmax(y, axis=-1))
    squares = jnp.mean(jnp.square(outputs - y), axis=-1)
    return settings["scale"] * jnp.where(settings["classifies"] > 0, classes, squares)


@functools.partial(jax.jit, static_argnames=("depth", "width", "steps"))
def train(settings, depth, width, steps=STEPS):
    """Losses over all examples before and after training: (lanes,), (lanes,)."""

    @jax.vmap
    def one(settings):
        keys = jax.random.split(jax.random.key(settings["seed"]), 4)
        x = jax.random.normal(keys[0], (EXAMPLES, INPUTS))
        y = jnp.sin(2 * x @ jax.random.normal(keys[1], (INPUTS, OUTPUTS)))
        params = init(keys[2], depth, width)
        tx = lopt_jax.lopt(steps, stacked_axes=stacked_axes)

        def batch_loss(params, rows):
            is_drawn = jnp.arange(EXAMPLES) < settings["batch"]
            losses = losses_of(params, x[rows], y[rows], settings)
            return jnp.sum(jnp.where(is_drawn, losses, 0)) / settings["batch"]

        def step(carry, number):
            params, state = carry
            key = jax.random.fold_in(keys[3], number)
            rows = jax.random.randint(key, (EXAMPLES,), 0, EXAMPLES)
            updates, state = tx.update(jax.grad(batch_loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        (after, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
        return [jnp.mean(losses_of(p, x, y, settings)) for p in (params, after)]

    return one(settings)


def is_well(first, last):
    """Whether a training ended finite, and below where it began."""
    return bool(np.isfinite(last) and last < first)


def main():
    """Trains the networks; returns whether some did not end well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = list(ACTIVATIONS)
    generator, begin, ratios, bad = np.random.default_rng(options.seed), time.perf_counter(), [], 0
    for depth, width in SHAPES:
        networks = [draw(generator) for _ in range(LANES)]
        settings = {name: np.asarray([n[name] for n in networks]) for name in networks[0]}
        for n, first, last in zip(networks, *train(settings, depth, width), strict=True):
            ratios.append(float(last / first))
            bad += not is_well(first, last)
            print(
                f"{time.perf_counter() - begin:5.0f} s  {'ok ' if is_well(first, last) else 'BAD'}"
                f"  depth {depth}  width {width:3}  batch {n['batch']:3}"
                f"  {names[n['activation']]:4}  {'norms' if n['has_norms'] else '     '}"
                f"  {'classes' if n['classifies'] else 'squares'}  loss x {n['scale']:7.3g}"
                f"  ends at {ratios[-1]:.3g} of its first",
                flush=True,
            )
    print(
        f"{len(ratios)} networks, {bad} of which did not end well; the last loss over the first: "
        f"median {np.median(ratios):.3g}, largest {np.max(ratios):.3g}"
    )
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
