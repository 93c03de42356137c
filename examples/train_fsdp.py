"""Trains a small transformer, split over a mesh of two axes, with any optimizer of this library.

    python examples/train_fsdp.py --mesh data=4,model=2 --steps 300
    JAX_NUM_CPU_DEVICES=8 python examples/train_fsdp.py --mesh data=8      # on a laptop

It learns the bytes of Python's standard library. Parameters and optimizer state are split over the
mesh; the optimizer needs no change for that. Run it again after an interruption, even a kill -9: it
goes on from the last complete checkpoint, and ends with the same parameters.
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


class Transformer(nn.Module):
    """Bytes (batch, length) to logits (batch, length, 256)."""

    layers: int
    width: int
    length: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps int32 bytes to float32 logits of the next byte."""
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(256, self.width)(x) + positions[: x.shape[1]]
        for _ in range(self.layers):
            h = nn.LayerNorm()(x)
            q, k, v = jnp.split(nn.Dense(3 * self.width)(h), 3, axis=-1)
            heads = lambda y: y.reshape((*y.shape[:-1], -1, 16))  # noqa: E731
            h = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
            x = x + nn.Dense(self.width)(h.reshape(x.shape))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(256, name="head")(nn.LayerNorm()(x))


def read_text(limit: int) -> np.ndarray:
    """The first bytes of the standard library's sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(f.read_bytes() for f in files)[:limit], np.uint8)


def batch_at(text: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """The batch of a step: a function of the step alone, so that a resumed run sees the same."""
    starts = np.random.default_rng(step).integers(0, len(text) - length - 1, batch)
    return np.stack([text[i : i + length + 1] for i in starts]).astype(np.int32)


def make_mesh(description: str) -> Mesh:
    """The mesh that --mesh describes, such as data=4,model=2; one axis may be -1, the rest."""
    try:
        sizes = {name: int(size) for name, size in (x.split("=") for x in description.split(","))}
    except ValueError:
        wrong = f"expected axes and their sizes such as data=4,model=2, found {description!r}"
        raise argparse.ArgumentTypeError(wrong) from None
    known = int(np.prod([n for n in sizes.values() if n > 0]))
    sizes = {k: n if n > 0 else jax.device_count() // known for k, n in sizes.items()}
    count = int(np.prod(list(sizes.values())))
    if not 0 < count <= jax.device_count():
        wrong = f"expected at most {jax.device_count()} devices, those there are, found {sizes}"
        raise argparse.ArgumentTypeError(wrong)
    devices = np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def spec_of(mesh: Mesh, x: Any) -> P:
    """Splits the last dimension over "model" and the first over "data", where they divide."""
    entries: list = [None] * x.ndim
    for axis, dim in (("model", x.ndim - 1), ("data", 0)):
        size = mesh.shape.get(axis, 1)
        if x.ndim >= 2 and size > 1 and entries[dim] is None and x.shape[dim] % size == 0:
            entries[dim] = axis
    return P(*entries)


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformationExtraArgs:
    """The optimizer that --optimizer names."""
    if args.optimizer == "adamw":
        return optax.with_extra_args_support(optax.adamw(1e-3))
    constructor = getattr(lopt_jax, args.optimizer)
    given = {"weights": args.weights} if args.weights else {}
    if args.optimizer in ("lopt", "velo", "celo", "celo_adam"):
        given["num_steps"] = args.steps
    return constructor(**given)


def continue_log(log: Path, done: int) -> None:
    """Keeps the lines of the steps that the checkpoint has; a kill leaves one file whole."""
    lines = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
    new = log.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(log)


def plot(log: Path, title: str) -> None:
    """The loss curve, beside the log; without matplotlib there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="training loss (nats a byte)", title=title)
    figure.savefig(log.with_name("loss.png"), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", type=make_mesh, default="data=-1", help="-1: all other devices")
    parser.add_argument("--optimizer", default="lopt", help="of lopt_jax, or adamw")
    parser.add_argument("--weights", help="its weights: a name or a path")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--text", type=int, default=4_000_000, help="bytes to train on")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("outputs/train_fsdp"))
    args = parser.parse_args()

    mesh, text = args.mesh, read_text(args.text)
    print(f"{mesh.size} devices ({jax.devices()[0].device_kind}), mesh {dict(mesh.shape)}")
    model, tx = Transformer(args.layers, args.width, args.length), make_optimizer(args)

    def start() -> tuple[Any, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, args.length), jnp.int32))
        return params, tx.init(params)

    # Parameters and state are made in parts: nothing is ever whole on one device.
    shapes = jax.eval_shape(start)
    specs = jax.tree.map(functools.partial(spec_of, mesh), shapes[0])
    of_params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    placed = of_params, lopt_jax.sharding.state_shardings(tx, shapes[0], specs, mesh)
    of_batch = NamedSharding(mesh, P("data" if "data" in mesh.shape else None))

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*placed, None))
    def train_step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = model.apply(params, batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    # Orbax writes under a temporary name and renames: a checkpoint is complete or not there.
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
        params, state = jax.jit(start, out_shardings=placed)()
    continue_log(log, done)

    began = time.perf_counter()
    with log.open("a") as lines:
        for step in range(done + 1, args.steps + 1):
            batch = jax.device_put(batch_at(text, step, args.batch, args.length), of_batch)
            params, state, loss = train_step(params, state, batch)
            lines.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")
            if step % args.print_every == 0 or step == args.steps:
                rate = (step - done) / (time.perf_counter() - began)
                print(f"step {step}/{args.steps}  loss {loss:.4f}  {rate:.1f} steps/s", flush=True)
            if step % args.save_every == 0 or step == args.steps:
                lines.flush()
                manager.save(step, args=ocp.args.StandardSave((params, state)))
    manager.close()
    plot(log, args.optimizer)
    print(f"done: {log.parent}")


if __name__ == "__main__":
    main()
