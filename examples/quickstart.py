"""A learned optimizer, as it comes, against Adam at five learning rates.

Trains a small Flax model on the handwritten digits that ship with scikit-learn. Prints a table and
draws the curves to outputs/quickstart.png.

python examples/quickstart.py
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lopt_jax
from lopt_jax.flax import TrainState

STEPS = 2000
STEPS_A_CALL = 100  # each compiled call makes this many steps, then the test set is evaluated
BATCH = 128
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PICTURE = Path("outputs/quickstart.png")


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        """Maps (batch, 64) pixels to (batch, 10) logits."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)


def loss_and_accuracy(state, params, images, labels):
    logits = state.apply_fn({"params": params}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels)


@jax.jit
def train(state, images, labels, batches):
    """Trains on each row of indices in turn; returns the state and each step's loss."""

    def step(state, batch):
        def loss_of(params):
            return loss_and_accuracy(state, params, images[batch], labels[batch])[0]

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        # the one line that differs from training with optax.adam: the loss goes along
        return state.apply_gradients(grads=gradients, value=loss), loss

    return jax.lax.scan(step, state, batches)


evaluate = jax.jit(
    lambda state, images, labels: loss_and_accuracy(state, state.params, images, labels)
)


def run(name, tx, data, advance):
    """Trains one model; returns its row of the table and its curves."""
    train_images, test_images, train_labels, test_labels = data
    model = MLP()
    params = model.init(jax.random.key(0), train_images[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.replace(step=jnp.zeros((), jnp.int32))
    batches = np.random.default_rng(0).integers(
        len(train_images), size=(STEPS // STEPS_A_CALL, STEPS_A_CALL, BATCH)
    )
    start = time.perf_counter()
    losses, test_losses = [], []
    for part in batches:
        state, part_losses = train(state, train_images, train_labels, part)
        losses.append(np.asarray(part_losses))
        test_losses.append(float(evaluate(state, test_images, test_labels)[0]))
        advance(STEPS_A_CALL)
    seconds = time.perf_counter() - start
    train_loss, _ = evaluate(state, train_images, train_labels)
    test_loss, accuracy = evaluate(state, test_images, test_labels)
    return {
        "name": name,
        "train": float(train_loss),
        "test": float(test_loss),
        "accuracy": float(accuracy),
        "seconds": seconds,
        "losses": np.concatenate(losses),
        "test_losses": np.asarray(test_losses),
    }


def show(results):
    best = min((r for r in results if r["name"].startswith("adam")), key=lambda r: r["test"])
    table = Table("optimizer", title=f"Digits, {STEPS} steps of {BATCH} images, cosine schedule")
    for column in ("train loss", "test loss", "test accuracy", "seconds"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r["name"] + (" (best Adam)" if r is best else ""),
            f"{r['train']:.2g}",
            f"{r['test']:.4f}",
            f"{100 * r['accuracy']:.1f}%",
            f"{r['seconds']:.1f}",
            style="bold" if r is results[0] else None,
        )
    Console().print(table)


def draw(results):
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, r in enumerate(results):
        style = {"color": "black", "linewidth": 2} if i == 0 else {"color": f"C{i}", "alpha": 0.8}
        smooth = r["losses"].reshape(-1, STEPS_A_CALL // 4).mean(axis=1)
        left.plot(
            np.arange(1, len(smooth) + 1) * STEPS_A_CALL / 4, smooth, label=r["name"], **style
        )
        steps = np.arange(1, len(r["test_losses"]) + 1) * STEPS_A_CALL
        right.plot(steps, r["test_losses"], label=r["name"], **style)
    for axes, title in ((left, "training loss"), (right, "test loss")):
        axes.set(title=title, xlabel="step", yscale="log")
    right.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main():
    data = load_data()
    cosine = lambda rate: optax.cosine_decay_schedule(rate, STEPS)  # noqa: E731
    optimizers = {"small_fc_lopt": lopt_jax.small_fc_lopt(learning_rate=cosine(1.0))}
    optimizers |= {f"adam {rate:g}": optax.adam(cosine(rate)) for rate in LEARNING_RATES}
    results = []
    columns = (TextColumn("{task.description:14}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=STEPS * len(optimizers))
        for name, tx in optimizers.items():
            progress.update(task, description=name)
            results.append(run(name, tx, data, lambda n: progress.advance(task, n)))
    show(results)
    draw(results)
    print(f"Curves: {PICTURE}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # for --help
    main()
