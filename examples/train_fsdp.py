"""Trains a small transformer with a learned optimizer, sharded over all devices.

The text is on every machine: the sources of Python's standard library, as bytes. Parameters and
optimizer state are split over the mesh; the optimizer needs no change for that.

    python examples/train_fsdp.py --mesh data=4,model=2 --steps 300 --folder outputs/fsdp
    JAX_NUM_CPU_DEVICES=8 python examples/train_fsdp.py --mesh data=8      # on a laptop

Run it again after an interruption, a kill -9 included: it goes on from the last complete checkpoint
and ends with the parameters that it would have ended with.
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
        return nn.Dense(256)(nn.LayerNorm()(x))


def read_text(limit: int) -> np.ndarray:
    """The standard library's sources, in the order of their names, as bytes."""
    folder, parts, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size > limit:
            break
    return np.frombuffer(b"".join(parts), np.uint8)


def batch_at(text: np.ndarray, step: int, batch: int, length: int) -> np.ndarray:
    """The batch of a step: a function of the step alone, so that a resumed run sees the same."""
    starts = np.random.default_rng(step).integers(0, len(text) - length - 1, batch)
    return np.stack([text[i : i + length + 1] for i in starts]).astype(np.int32)


def make_mesh(description: str) -> Mesh:
    """The mesh that --mesh describes, such as data=4,model=2; one axis may be -1, the rest."""
    try:
        sizes = {name: int(size) for name, size in (x.split("=") for x in description.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected axes and their sizes such as data=4,model=2, found {description!r}"
        ) from None
    known = int(np.prod([n for n in sizes.values() if n > 0]))
    sizes = {k: n if n > 0 else jax.device_count() // known for k, n in sizes.items()}
    count = int(np.prod(list(sizes.values())))
    if not 0 < count <= jax.device_count():
        raise argparse.ArgumentTypeError(
            f"expected at most {jax.device_count()} devices, those there are, found {description!r}"
        )
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
    if args.optimizer in ("velo", "celo", "celo_adam"):
        given["num_steps"] = args.steps
    return constructor(**given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mesh", type=make_mesh, default="data=-1", help="such as data=4,model=2; -1: the rest"
    )
    parser.add_argument("--optimizer", default="small_fc_lopt", help="of lopt_jax, or adamw")
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

    mesh = args.mesh
    print(f"{mesh.size} devices ({jax.devices()[0].device_kind}), mesh {dict(mesh.shape)}")
    text = read_text(args.text)
    model = Transformer(args.layers, args.width, args.length)
    tx = make_optimizer(args)

    # Parameters and state are born sharded: nothing is ever whole on one device.
    example = jax.ShapeDtypeStruct((1, args.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    specs = jax.tree.map(functools.partial(spec_of, mesh), shapes)
    of_params = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    of_state = sharding.state_shardings(tx, shapes, specs, mesh)
    of_batch = NamedSharding(mesh, P("data" if "data" in mesh.shape else None))

    @functools.partial(jax.jit, out_shardings=(of_params, of_state))
    def start() -> tuple[Any, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, args.length), jnp.int32))
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(of_params, of_state, None))
    def train_step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = model.apply(params, batch[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return jnp.mean(losses)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    # Orbax writes under a temporary name and renames: a checkpoint is complete or not there.
    folder = args.folder.absolute()
    manager = ocp.CheckpointManager(
        folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )
    done = manager.latest_step()
    losses: list[float] = []
    if done is None:
        done = 0
        params, state = start()
    else:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(start),
            (of_params, of_state),
        )
        params, state = manager.restore(done, args=ocp.args.StandardRestore(abstract))
        losses = read_losses(folder / "losses.jsonl")[:done]
        print(f"resumed after step {done}")
    write_losses(folder / "losses.jsonl", losses)

    began, first = time.perf_counter(), done
    with open(folder / "losses.jsonl", "a") as log:
        for step in range(done, args.steps):
            batch = jax.device_put(batch_at(text, step, args.batch, args.length), of_batch)
            params, state, loss = train_step(params, state, batch)
            losses.append(float(loss))
            log.write(json.dumps({"step": step, "loss": losses[-1]}) + "\n")
            count = step + 1
            if count % args.print_every == 0 or count == args.steps:
                rate = (count - first) / (time.perf_counter() - began)
                left = (args.steps - count) / rate
                print(
                    f"step {count}/{args.steps}  loss {losses[-1]:.4f}  {rate:.1f} steps/s  "
                    f"{left:.0f} s left",
                    flush=True,
                )
            if count % args.save_every == 0 or count == args.steps:
                log.flush()
                manager.save(count, args=ocp.args.StandardSave((params, state)))
    manager.wait_until_finished()
    manager.close()
    plot(losses, folder / "loss.png", args.optimizer)
    print(f"done: {folder}/loss.png, checkpoint {args.steps} in {folder}/checkpoints")


def read_losses(path: Path) -> list[float]:
    """The losses of the steps so far; the last line may be cut short."""
    losses: list[float] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            losses.append(json.loads(line)["loss"])
        except ValueError:
            break
    return losses


def write_losses(path: Path, losses: list[float]) -> None:
    """Replaces the log, in one step that cannot be cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in enumerate(losses))
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(lines))
    temporary.replace(path)


def plot(losses: list[float], path: Path, optimizer: str) -> None:
    """The loss curve."""
    try:
        import matplotlib
    except ImportError:
        print("no loss curve: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(losses)
    axes.set(xlabel="step", ylabel="loss (nats a byte)", title=optimizer)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
