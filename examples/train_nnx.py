"""A vision transformer in Flax NNX on Fashion-MNIST, trained by `lopt`; nothing is tuned.

    python -m lopt_jax.meta.prepare outputs/data fashion_mnist   # once: 31 MB from Debian's archive
    python examples/train_nnx.py --steps 2000
    python examples/train_nnx.py --optimizer adamw --rate 0.002  # to compare

Without the prepared file it trains on the small digits that ship with scikit-learn. It saves a
checkpoint at the end and now and then; run it again to go on from there.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import lopt_jax


class Block(nnx.Module):
    """Attention and an MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (batch, places, width) to the same."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Vit(nnx.Module):
    """A vision transformer; the mean over places is classified."""

    def __init__(self, side: int, patch: int, width: int, layers: int, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, width, (patch, patch), (patch, patch), rngs=rngs)
        places = (side // patch) ** 2
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (places, width)))
        blocks = [Block(width, max(width // 32, 1), rngs) for _ in range(layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From images (batch, side, side) in [0, 1] to logits (batch, 10)."""
        x = self.patches(images[..., None])
        x = x.reshape(len(x), -1, x.shape[-1]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def load(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and test images (N, side, side) in [0, 1] with their labels."""
    path = folder / "fashion_mnist.npz"
    if path.exists():
        with np.load(path) as data:
            parts = [(data[f"{s}_images"] / 255.0, data[f"{s}_labels"]) for s in ("train", "test")]
        return tuple((x.astype(np.float32), y.astype(np.int32)) for x, y in parts)
    print(
        f"no {path}: training on scikit-learn's digits. For Fashion-MNIST run\n"
        f"    python -m lopt_jax.meta.prepare {folder} fashion_mnist"
    )
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    test = np.arange(len(x)) % 5 == 0
    return (x[~test], y[~test]), (x[test], y[test])


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """`lopt`, or AdamW under a cosine with warm-up at the given rate."""
    if args.optimizer == "lopt":
        return lopt_jax.lopt(args.steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.steps // 20, args.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))


def loss_of(model: Vit, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model: Vit, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, gradients, value=loss)
    return loss


@nnx.jit
def correct(model: Vit, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(model(x).argmax(-1) == y)


def accuracy(model: Vit, x: np.ndarray, y: np.ndarray, batch: int = 512) -> float:
    parts = range(0, len(x), batch)
    return sum(int(correct(model, x[i : i + batch], y[i : i + batch])) for i in parts) / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=("lopt", "adamw"), default="lopt")
    parser.add_argument("--rate", type=float, default=0.002, help="of adamw")
    parser.add_argument("--steps", type=int, default=2000, help="of the whole training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="prepared data")
    parser.add_argument("--folder", type=Path, default=Path("outputs/train_nnx"))
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()

    (x, y), test = load(args.data)
    model = Vit(x.shape[1], x.shape[1] // 4, args.width, args.layers, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_optimizer(args), wrt=nnx.Param)
    count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count:,} parameters, {len(x):,} images, {jax.devices()[0].device_kind}")
    if args.optimizer == "lopt":
        print(lopt_jax.describe(lopt_jax.lopt(args.steps), nnx.state(model, nnx.Param)))

    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    manager = ocp.CheckpointManager(args.folder.absolute(), options=options)
    done = manager.latest_step() or 0
    if done:
        empty = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state((model, optimizer)))
        nnx.update((model, optimizer), manager.restore(done, args=ocp.args.StandardRestore(empty)))
        print(f"resumed after step {done}")

    began = time.perf_counter()
    for step in range(done, args.steps):
        # a function of the step alone, so that a resumed run sees the same batches
        rows = np.random.default_rng(step).integers(0, len(x), args.batch)
        loss = train_step(model, optimizer, x[rows], y[rows])
        if (step + 1) % max(args.steps // 20, 1) == 0:
            rate = (step + 1 - done) / (time.perf_counter() - began)
            print(
                f"step {step + 1}/{args.steps}  loss {float(loss):.4f}  {rate:.1f} steps/s",
                flush=True,
            )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            saved = nnx.state((model, optimizer))
            manager.save(step + 1, args=ocp.args.StandardSave(saved))
    manager.wait_until_finished()
    manager.close()
    print(f"test accuracy {accuracy(model, *test):.2%}")


if __name__ == "__main__":
    main()
