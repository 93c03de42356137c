"""What a sharded update moves between devices, and what it keeps on each: compiled, not run.

    python benchmarks/sharded_traffic.py --model gpt2_355m --devices 8

prints, for FSDP and tensor parallelism under jit and for `distributed`, the bytes that collectives
move, as a share of the parameters' bytes, the state on each device, and the floating-point
operations of all devices over those of one.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import sharded_step
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lopt_jax import sharding
from lopt_jax.collectives import collectives, moved_bytes

# Only the partitioned program is read: no effort goes into code that will not run.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def abstract(tree: Any, mesh: Any, specs: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)),
        tree,
        specs,
    )


def last_spec(shape: tuple[int, ...], devices: int) -> P:
    """Splits the last dimension that the devices divide, as tensor parallelism splits outputs."""
    for d in reversed(range(len(shape))):
        is_large = math.prod(shape) > sharding.REPLICATED_ELEMENTS
        if devices > 1 and shape[d] % devices == 0 and is_large:
            return P(*[None] * d, "data")
    return P()


def traffic(optimizer: str, model: str, mode: str, devices: int) -> dict[str, Any]:
    """Compiles one update and reads its collectives."""
    start = time.perf_counter()
    tx = sharded_step.OPTIMIZERS[optimizer]("xla")
    module = sharded_step.MODULES[model]
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    state = jax.eval_shape(tx.init, shapes)
    mesh = sharded_step.mesh_of(devices)
    loss = jax.ShapeDtypeStruct((), jnp.float32)

    def update(state: Any, gradients: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params, value=loss)
        return state, updates

    if mode in ("fsdp", "tensor"):
        inner = tx
        split = sharded_step.fsdp_spec if mode == "fsdp" else last_spec
        specs = jax.tree.map(lambda x: split(x.shape, devices), shapes)
        state_specs = sharding.state_specs(tx, shapes, specs)
        out = (sharded_step.named(mesh, state_specs), sharded_step.named(mesh, specs))
        step = jax.jit(update, out_shardings=out)
        params = abstract(shapes, mesh, specs)
    else:
        inner = sharding.distributed(tx, "data")
        state_specs = sharding.distributed_specs(tx, shapes, "data", devices)
        wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        step = jax.jit(
            wrap(update, in_specs=(state_specs, P(), P(), P()), out_specs=(state_specs, P()))
        )
        params = abstract(shapes, mesh, jax.tree.map(lambda _: P(), shapes))
    placed = abstract(state, mesh, state_specs)
    compiled = step.lower(placed, params, params, loss).compile(OPTIONS)
    found = collectives(compiled)
    alone = jax.jit(lambda s, g, p, v: tx.update(g, s, p, value=v)[::-1])
    of_one = alone.lower(state, shapes, shapes, loss).compile(OPTIONS)
    flops = lambda program: float(program.cost_analysis()["flops"])  # noqa: E731
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    per_device = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(placed)
    )
    kinds = {kind: moved_bytes(found, kind) for kind in sorted({c.kind for c in found})}
    return {
        "model": model,
        "optimizer": optimizer,
        "mode": mode,
        "devices": devices,
        "parameter_bytes": size(shapes),
        "collectives": sum(c.times for c in found),
        "collective_bytes": kinds,
        "share": moved_bytes(found) / size(shapes),
        "largest": max((c.largest for c in found), default=0),
        "flops_over_one_device": devices * flops(compiled) / flops(of_one),
        "state_bytes": size(state),
        "state_bytes_per_device": per_device,
        "state_share": per_device / size(state),
        "seconds": time.perf_counter() - start,
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sharded_step.MODULES, default="gpt2_355m")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--optimizers", nargs="+", default=list(sharded_step.OPTIMIZERS))
    parser.add_argument("--modes", nargs="+", default=["fsdp", "tensor", "distributed"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    records = []
    for optimizer in options.optimizers:
        for mode in options.modes:
            records.append(traffic(optimizer, options.model, mode, options.devices))
            print(json.dumps(records[-1]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
