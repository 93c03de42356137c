"""`lopt` with its defaults against AdamW and Muon at five rates each, on two small trainings.

A network on the handwritten digits that ship with scikit-learn, and a transformer on the bytes of
Python's standard library. Prints a table and draws the curves to outputs/quickstart.png.

python examples/quickstart.py
"""

import argparse
import sysconfig
import time
from collections import namedtuple
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lopt_jax
from lopt_jax.plot import COLOURS

POINTS = 20  # measurements of a run
LENGTH, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
PICTURE = Path("outputs/quickstart.png")


class Mlp(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        """From (batch, 64) pixels to (batch, 10) logits."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10, name="head")(x)


class Transformer(nn.Module):
    """A small decoder of bytes."""

    @nn.compact
    def __call__(self, x):
        """From (batch, length) bytes to (batch, length, 256) logits."""
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        mask = nn.make_causal_mask(x)
        x = nn.Embed(256, WIDTH, name="embedding")(x) + positions
        for _ in range(LAYERS):
            attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x = x + attention(nn.RMSNorm()(x), mask=mask)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.RMSNorm()(x))))
        return nn.Dense(256, use_bias=False, name="head")(nn.RMSNorm()(x))


# draw(key, train) gives a batch; test is inputs and labels
Training = namedtuple("Training", "name model train test draw steps")


def digits(steps):
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train, test = parts[::2], parts[1::2]

    def draw(key, data):
        rows = jax.random.randint(key, (128,), 0, len(data[0]))
        return data[0][rows], data[1][rows]

    return Training("digits", Mlp(), train, test, draw, steps)


def sources(steps):
    """Every tenth file of the standard library is for testing."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    join = lambda chosen: np.frombuffer(b"\n".join(f.read_bytes() for f in chosen), np.uint8)  # noqa: E731

    def draw(key, data, batch=8):
        starts = jax.random.randint(key, (batch,), 0, len(data) - LENGTH)
        rows = data[starts[:, None] + jnp.arange(LENGTH + 1)].astype(jnp.int32)
        return rows[:, :-1], rows[:, 1:]

    test = draw(jax.random.key(1), jnp.asarray(join(files[::10])), 128)
    train = jnp.asarray(join([f for i, f in enumerate(files) if i % 10]))
    return Training("bytes", Transformer(), train, test, draw, steps)


def warm_cosine(rate, steps):
    one = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 20, 1), steps)
    return lambda count: rate * one(count)


def adamw(rate, steps):
    tx = optax.adamw(warm_cosine(rate, steps), b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def muon(rate, steps):
    """Embeddings, head, norms and biases by its AdamW; kernels of attention as whole matrices."""

    def numbers(path, leaf):
        names = [key.key for key in path]
        if leaf.ndim < 2 or not {"embedding", "positions", "head"}.isdisjoint(names):
            return None
        inputs = range(leaf.ndim - 1) if "out" in names else [0]
        outputs = [axis for axis in range(leaf.ndim) if axis not in inputs]
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    tx = optax.contrib.muon(
        warm_cosine(rate, steps),
        weight_decay=0.1,
        adam_weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda p: jax.tree_util.tree_map_with_path(numbers, p),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


OPTIMIZERS = {  # with the rates that are tried
    "lopt": (lambda rate, steps: lopt_jax.lopt(steps, learning_rate=rate), (1.0,)),
    "adamw": (adamw, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    "muon": (muon, (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
}


def run(training, optimizer, rates):
    """Test losses by step, a row a rate: (rates, POINTS)."""
    every = training.steps // POINTS

    def loss_of(params, x, y):
        logits = training.model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(rate, data, test):
        tx = optimizer(rate, training.steps)
        params = training.model.init(jax.random.key(0), test[0][:1])["params"]

        def step(carry, number):
            params, state = carry
            batch = training.draw(jax.random.fold_in(jax.random.key(2), number), data)
            updates, state = tx.update(jax.grad(loss_of)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        def part(carry, first):
            carry, _ = jax.lax.scan(step, carry, first + jnp.arange(every))
            return carry, loss_of(carry[0], *test)

        return jax.lax.scan(part, (params, tx.init(params)), every * jnp.arange(POINTS))[1]

    of_all_rates = jax.jit(jax.vmap(one, (0, None, None)))
    return np.asarray(of_all_rates(jnp.asarray(rates), training.train, training.test))


def draw_curves(trainings, results):
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, training in zip(figure.subplots(1, 2), trainings, strict=True):
        for name in OPTIMIZERS:
            color = COLOURS[name]
            losses = results[training.name, name]
            for i, curve in enumerate(losses):
                best = i == np.nanargmin(losses[:, -1])
                label = name + (f", best of {len(losses)} rates" if len(losses) > 1 else "")
                style = {"linewidth": 2, "label": label} if best else {"alpha": 0.25}
                steps = np.linspace(0, training.steps, POINTS + 1)[1:]
                axes.plot(steps, curve, color=color, **style)
        axes.set(title=training.name, xlabel="step", ylabel="test loss (nats)", yscale="log")
        axes.plot([], color="gray", alpha=0.5, label="their other rates")
        axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main():
    trainings, results = (digits(400), sources(300)), {}
    for training in trainings:
        for name, (optimizer, rates) in OPTIMIZERS.items():
            begin = time.perf_counter()
            results[training.name, name] = run(training, optimizer, rates)
            print(f"{training.name}: {name}, {time.perf_counter() - begin:.0f} s", flush=True)
    titles = [f"{t.name}, {t.steps} steps" for t in trainings]
    table = Table("optimizer", "rate", *titles, title="Test loss at the end")
    for name, (_, rates) in OPTIMIZERS.items():
        for i, rate in enumerate(rates):
            ends = [results[t.name, name][:, -1] for t in trainings]
            cells = [f"{x[i]:.4f}" + (" *" if i == np.nanargmin(x) else "") for x in ends]
            table.add_row(name, "none given" if name == "lopt" else f"{rate:g}", *cells)
    Console().print(table, "* this optimizer's best rate", sep="\n")
    draw_curves(trainings, results)
    print(f"Curves: {PICTURE}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # for --help
    main()
