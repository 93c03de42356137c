"""A GPT of 12M to 124M parameters in Flax linen, trained by `lopt`; nothing is tuned.

    python examples/train_lm.py --size 12m --steps 1000                 # on Python's own sources
    python examples/train_lm.py --size 124m --tokens train.bin --vocabulary 50257 --steps 5000

Layers are scanned, arithmetic is in bfloat16, parameters and optimizer state are split over all
devices. Sizes count the layers; embedding and head come on top. A token file is a flat array of
uint16, or an .npy file. Run it again after an interruption: it goes on from the last checkpoint and
sees the batches that it would have seen.
"""

import argparse
import functools
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import sharding

SIZES = {"tiny": (32, 2), "12m": (384, 7), "35m": (512, 11), "124m": (896, 13)}  # width, layers


class Block(nn.Module):
    """Attention and an MLP, each added to what comes in."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """From (batch, length, width) to the same and None, as `nn.scan` wants it."""
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
        qkv = dense(3 * width, name="qkv")(nn.RMSNorm(dtype=jnp.bfloat16, name="norm_1")(x))
        query, key, value = jnp.split(qkv.reshape(*x.shape[:2], -1, min(width, 64)), 3, axis=2)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, name="out")(y.reshape(x.shape))
        y = nn.RMSNorm(dtype=jnp.bfloat16, name="norm_2")(x)
        return x + dense(width, name="down")(nn.gelu(dense(4 * width, name="up")(y))), None


class Gpt(nn.Module):
    """A decoder of tokens."""

    vocabulary: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From (batch, length) int32 to logits (batch, length, vocabulary) float32."""
        embed = functools.partial(nn.Embed, features=self.width, dtype=jnp.bfloat16)
        x = embed(self.vocabulary, name="embedding")(tokens)
        x = x + embed(tokens.shape[1], name="positions")(jnp.arange(tokens.shape[1]))
        scanned = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scanned(name="blocks")(x, None)
        x = nn.RMSNorm(dtype=jnp.bfloat16, name="norm")(x)
        head = nn.Dense(self.vocabulary, use_bias=False, dtype=jnp.bfloat16, name="head")
        return head(x).astype(jnp.float32)


def stacked_axes(path: Any, leaf: Any) -> int:
    """The leaves of the scanned blocks have one axis of layers."""
    return int("['blocks']" in jax.tree_util.keystr(path))


def read_tokens(path: Path | None) -> np.ndarray:
    """A token file, or the installed Python's sources as bytes."""
    if path is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        files = [f for f in files if "site-packages" not in f.parts][:1000]
        return np.frombuffer(b"\n".join(f.read_bytes() for f in files), np.uint8)
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    return np.memmap(path, np.uint16, mode="r")


def batch_at(tokens: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """The batch of a step, (batch, length + 1) int32: a function of the step alone."""
    starts = np.random.default_rng(step).integers(0, len(tokens) - length, batch)
    return np.stack([tokens[i : i + length + 1] for i in starts]).astype(np.int32)


def split(leaf: Any, devices: int) -> P:
    """Splits the last axis that the devices divide; small leaves stay whole."""
    for axis in reversed(range(leaf.ndim)) if leaf.size > 4096 else ():
        if leaf.shape[axis] % devices == 0:
            return P(*[None] * axis, "data")
    return P()


def plot(path: Path) -> None:
    """The loss curve of a log; without matplotlib there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows])
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title="lopt")
    figure.savefig(path.with_name("loss.png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="12m")
    parser.add_argument("--tokens", type=Path, help="uint16 tokens or .npy; else Python's sources")
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000, help="of the whole training")
    parser.add_argument("--batch", type=int, default=32, help="a multiple of the devices")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("outputs/train_lm"))
    args = parser.parse_args()

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    if args.batch % mesh.size:
        parser.error(f"--batch: expected a multiple of {mesh.size} devices, found {args.batch}")
    train(args, mesh)


def train(args: argparse.Namespace, mesh: Mesh) -> None:
    tokens = read_tokens(args.tokens)
    model = Gpt(args.vocabulary, *SIZES[args.size])
    tx = lopt_jax.lopt(args.steps, stacked_axes=stacked_axes)

    def init() -> tuple[Any, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, args.length), jnp.int32))["params"]
        return params, tx.init(params)

    # Parameters and state are made in parts: nothing is ever whole on one device.
    shapes = jax.eval_shape(init)
    specs = jax.tree.map(lambda leaf: split(leaf, mesh.size), shapes[0])
    on_mesh = functools.partial(jax.tree.map, lambda spec: NamedSharding(mesh, spec))
    placed = on_mesh(specs), sharding.state_shardings(tx, shapes[0], specs, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]))
    print(f"{count / 1e6:.1f}M parameters, {len(tokens):,} tokens, {mesh.size} devices", flush=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*placed, None))
    def train_step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        params, state = lopt_jax.update_params(tx, gradients, state, params, value=loss)
        return params, state, loss

    log = args.folder.absolute() / "losses.jsonl"
    manager = ocp.CheckpointManager(
        log.parent / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )
    done = manager.latest_step() or 0
    if done:
        where = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        abstract = jax.tree.map(where, shapes, placed)
        params, state = manager.restore(done, args=ocp.args.StandardRestore(abstract))
        print(f"resumed after step {done}")
    else:
        params, state = jax.jit(init, out_shardings=placed)()
        log.write_text("")

    began = time.perf_counter()
    for step in range(done + 1, args.steps + 1):
        batch = batch_at(tokens, step, args.batch, args.length)
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        params, state, loss = train_step(params, state, batch)
        if step % max(args.steps // 100, 1) == 0:
            rate = (step - done) / (time.perf_counter() - began)
            left = (args.steps - step) / rate
            print(f"step {step}/{args.steps}  loss {loss:.3f}  {left:.0f} s left", flush=True)
            with log.open("a") as lines:
                lines.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")
        if step % args.save_every == 0 or step == args.steps:
            manager.save(step, args=ocp.args.StandardSave((params, state)))
    manager.close()
    plot(log)
    print(f"done: {log.parent}")


if __name__ == "__main__":
    main()
