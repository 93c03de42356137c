"""Milliseconds a step of sharded optimizers on 1, 2, 4 and 8 devices of one machine.

For each optimizer: the update under FSDP through jit, under `distributed` in shard_map, and
replicated, dispatched step by step from the host and ten steps in one program, which shows what the
devices take; the optimizer state on each device; the bytes that collectives move, read off the
compiled program, and the time that these collectives take alone; a training step of the Flax model
under FSDP; and how far parameters are from those of one device after 20 steps.

    python benchmarks/sharded_step.py --json docs/benchmarks/sharding_h200.json
    JAX_NUM_CPU_DEVICES=8 python benchmarks/sharded_step.py --model tiny   # a dry run anywhere
    python benchmarks/sharded_step.py --plot docs/benchmarks/sharding_h200.json

Cases run in order of importance, and the records are written after each: a run that is cut short,
or ended by `--seconds`, keeps what it has.
"""

import argparse
import datetime
import functools
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import sharding
from lopt_jax.benchmark import busy_ms, gpu_events, random_weights
from lopt_jax.collectives import Collective, collectives, moved_bytes
from lopt_jax.optimizers.plans import LEARNED

STEPS_OF_PARITY = 20
STEPS_OF_LOOP = 40  # in one program: what the devices take, whatever the host's dispatch does
LEAST_CALLS = 3  # of one timing, so that the host hands out the next while the devices work
TOKENS = (4, 1024)  # of each device in a training step: batch, length


def moving_weights(architecture: str, **config: Any) -> lopt_jax.Weights:
    """Random weights, large enough that twenty steps move parameters by percents."""
    weights = random_weights(architecture, **config)
    larger = {
        key: value if key.endswith("_decays") else jax.tree.map(lambda x: 15 * x, value)
        for key, value in weights.params.items()
    }
    return lopt_jax.Weights(weights.architecture, weights.config, larger)


def velo(backend: str) -> optax.GradientTransformation:
    return lopt_jax.velo(10_000, moving_weights("velo"), backend=backend)


def small_fc_lopt_h32(backend: str) -> optax.GradientTransformation:
    weights = moving_weights("small_fc_lopt", hidden_size=32)
    return lopt_jax.small_fc_lopt(weights, backend=backend)


def adamw(backend: str) -> optax.GradientTransformation:
    del backend
    return optax.with_extra_args_support(optax.adamw(1e-3))


def lopt(backend: str) -> optax.GradientTransformation:
    return lopt_jax.lopt(10_000, backend=backend)


def celo2(backend: str) -> optax.GradientTransformation:
    return lopt_jax.celo2(1e-3, backend=backend)


def muon(backend: str) -> optax.GradientTransformation:
    """Muon with the matrices that `lopt` finds."""
    del backend

    def dimensions(params: Any) -> Any:
        numbers = [
            optax.contrib.MuonDimensionNumbers(*plan.matrix) if plan.rule == LEARNED else None
            for plan in lopt("auto").plans(params)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), numbers)

    transformation = optax.contrib.muon(
        1e-3, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2
    )
    return optax.with_extra_args_support(transformation)


OPTIMIZERS = {
    "lopt": lopt,
    "velo": velo,
    "celo2": celo2,
    "optax.contrib.muon": muon,
    "optax.adamw": adamw,
    "small_fc_lopt_h32": small_fc_lopt_h32,
}
TINY = models.GPT2(layers=2, width=64, heads=4, vocabulary=515, positions=32)
MODULES = {"gpt2_355m": models.GPT2(dtype=jnp.bfloat16), "tiny": TINY}


class Case(NamedTuple):
    """One thing to measure."""

    kind: str  # "update", "train" or "parity"
    optimizer: str
    backend: str
    mode: str  # "fsdp", "distributed" or "replicated"
    devices: int


class Program(NamedTuple):
    """A compiled step and its arguments; the state is donated."""

    compiled: Any
    state: Any
    rest: tuple
    compile_s: float

    def run(self, steps: int) -> tuple["Program", float]:
        """Milliseconds a step, and the program with its new state."""
        state = self.state
        start = time.perf_counter()
        for _ in range(steps):
            state, *out = self.compiled(state, *self.rest)
        jax.block_until_ready((state, out))
        return self._replace(state=state), 1e3 * (time.perf_counter() - start) / steps


def fsdp_spec(shape: tuple[int, ...], devices: int) -> P:
    """Splits the first dimension that the devices divide; leaves of 4096 and fewer stay whole."""
    for d, n in enumerate(shape):
        if devices > 1 and n % devices == 0 and math.prod(shape) > sharding.REPLICATED_ELEMENTS:
            return P(*[None] * d, "data")
    return P()


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))


def named(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)


def random_on(mesh: Mesh, shapes: Any, specs: Any, seed: int) -> Any:
    """Random arrays that are made where they live."""
    shardings = jax.tree.leaves(named(mesh, specs))
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key: jax.Array, shape: tuple[int, ...], where: NamedSharding) -> jax.Array:
        x = 0.02 * jax.random.normal(key, shape, jnp.float32)
        return jax.lax.with_sharding_constraint(x, where)

    made = [make(k, x.shape, s) for k, x, s in zip(keys, leaves, shardings, strict=True)]
    return treedef.unflatten(made)


def initial(init: Callable, params: Any, shardings: Any) -> Any:
    """The optimizer's state, born where it is to live."""
    return jax.jit(init, out_shardings=shardings)(params)


def compiled(step: Callable, state: Any, *rest: Any, out_shardings: Any = None) -> Program:
    start = time.perf_counter()
    program = (
        jax.jit(step, donate_argnums=0, out_shardings=out_shardings).lower(state, *rest).compile()
    )
    return Program(program, state, rest, time.perf_counter() - start)


def looped(step: Callable, steps: int) -> Callable:
    """Several steps as one; each one's updates are written over the last one's."""
    if steps == 1:
        return step

    def loop(state: Any, gradients: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        def body(_: Any, carry: Any) -> Any:
            # or what depends on gradients and parameters alone would be computed once
            carry, inputs = jax.lax.optimization_barrier((carry, (gradients, params)))
            return step(carry[0], *inputs, loss)

        return jax.lax.fori_loop(0, steps, body, (state, jax.tree.map(jnp.zeros_like, params)))

    return loop


def update_program(case: Case, shapes: Any, steps: int = 1) -> Program:
    """The optimizer's update alone."""
    tx = OPTIMIZERS[case.optimizer](case.backend)
    mesh = mesh_of(case.devices)
    loss = jnp.float32(1.0)
    if case.mode == "distributed":
        return distributed_program(tx, mesh, shapes, loss, steps)
    splits = case.mode == "fsdp"
    specs = jax.tree.map(lambda x: fsdp_spec(x.shape, case.devices) if splits else P(), shapes)
    params, gradients = (random_on(mesh, shapes, specs, seed) for seed in (0, 1))
    shardings = sharding.state_shardings(tx, shapes, specs, mesh)
    state = initial(tx.init, params, shardings)

    def step(state: Any, gradients: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params, value=loss)
        return state, updates

    out = (shardings, named(mesh, specs))
    return compiled(looped(step, steps), state, gradients, params, loss, out_shardings=out)


def distributed_program(tx: Any, mesh: Mesh, shapes: Any, loss: jax.Array, steps: int) -> Program:
    whole = jax.tree.map(lambda _: P(), shapes)
    params, gradients = (random_on(mesh, shapes, whole, seed) for seed in (0, 1))
    specs = sharding.distributed_specs(tx, shapes, "data", mesh.size)
    tx = sharding.distributed(tx, "data")
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = initial(wrap(tx.init, in_specs=P(), out_specs=specs), params, named(mesh, specs))

    def step(state: Any, gradients: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params, value=loss)
        return state, updates

    several = wrap(looped(step, steps), in_specs=(specs, P(), P(), P()), out_specs=(specs, P()))
    return compiled(several, state, gradients, params, loss)


def train_program(case: Case, shapes: Any, module: models.GPT2) -> Program:
    """A training step under FSDP: the batch and every large leaf are split over the devices."""
    tx = OPTIMIZERS[case.optimizer](case.backend)
    mesh = mesh_of(case.devices)
    specs = jax.tree.map(lambda x: fsdp_spec(x.shape, case.devices), shapes)
    params = random_on(mesh, shapes, specs, 0)
    of_params = named(mesh, specs)
    of_state = sharding.state_shardings(tx, shapes, specs, mesh)
    state = initial(tx.init, params, of_state)
    batch, length = TOKENS[0] * case.devices, min(TOKENS[1], module.positions)
    tokens = np.random.default_rng(0).integers(0, module.vocabulary, (batch, length + 1), np.int32)
    tokens = jax.device_put(tokens, NamedSharding(mesh, P("data")))

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        logits = module.apply({"params": params}, tokens[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def step(carry: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        gradients = jax.lax.with_sharding_constraint(gradients, of_params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    out = ((of_params, of_state), NamedSharding(mesh, P()))
    return compiled(step, (params, state), tokens, out_shardings=out)


def collectives_program(found: list[Collective], mesh: Mesh) -> Program:
    """The same collectives, on arrays of the same sizes, and nothing else."""
    n = mesh.size

    def run(xs: list[jax.Array]) -> list[jax.Array]:
        out = []
        for c, x in zip(found, xs, strict=True):
            if c.kind == "all-gather":
                out.append(jax.lax.all_gather(x[: max(x.size // n, 1)], "data", tiled=True))
            elif c.kind == "reduce-scatter":
                out.append(jax.lax.psum_scatter(x, "data", tiled=True))
            elif c.kind == "all-reduce":
                out.append(jax.lax.psum(x, "data"))
            else:
                shift = [(i, (i + 1) % n) for i in range(n)]
                out.append(jax.lax.ppermute(x, "data", shift))
        return out

    elements = [-(-max(c.bytes // 4, 1) // n) * n for c in found]
    arrays = [jnp.ones((k,), jnp.float32) for k in elements]
    wrapped = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P("data"), check_vma=False)
    everywhere = jax.device_put(arrays, NamedSharding(mesh, P()))
    start = time.perf_counter()
    program = jax.jit(lambda _, xs: (0, wrapped(xs))).lower(0, everywhere).compile()
    return Program(program, 0, (everywhere,), time.perf_counter() - start)


def median_ms(program: Program, repetitions: int) -> tuple[Program, float]:
    program, _ = program.run(1)
    program, first = program.run(2)
    inner = max(LEAST_CALLS, min(50, math.ceil(40 / first)))
    times = []
    for _ in range(repetitions):
        program, ms = program.run(inner)
        times.append(ms)
    return program, statistics.median(times)


def measured_busy_ms(program: Program) -> tuple[Program, float | None]:
    """Milliseconds of a call that a GPU works, and the program with its new state."""
    after = [program]

    def run() -> Any:
        after[0], _ = program.run(2)
        return after[0].state

    events = gpu_events(run) if jax.default_backend() == "gpu" else []
    return after[0], busy_ms(events) / 2 if events else None


def bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def parity(case: Case, shapes: Any) -> dict[str, float]:
    """Parameters after some steps, against those of one device.

    Returns:
      The largest difference over the largest parameter, and over the largest movement, of the worst
      leaf; and the largest movement over the largest parameter, of the leaf that moved most.
    """

    def trajectory(devices: int) -> tuple[Any, Any]:
        program = update_program(case._replace(devices=devices), shapes)
        state, (gradients, params, loss) = program.state, program.rest
        start = jax.tree.map(np.asarray, params)
        for i in range(STEPS_OF_PARITY):
            scale = jnp.float32(1 - 0.1 * (i % 5))
            g = jax.tree.map(lambda x, s=scale: x * s, gradients)
            state, updates = program.compiled(state, g, params, loss * scale)
            params = optax.apply_updates(params, updates)
        return start, jax.tree.map(np.asarray, params)

    start, expected = trajectory(1)
    _, found = trajectory(case.devices)
    worst, of_moved, moved = 0.0, 0.0, 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (start, expected, found)), strict=True):
        error = float(np.max(np.abs(c.astype(np.float64) - b)))
        largest, movement = float(np.max(np.abs(b))), float(np.max(np.abs(b - a)))
        worst = max(worst, error / (largest or 1.0))
        of_moved = max(of_moved, error / (movement or 1.0))
        moved = max(moved, movement / (largest or 1.0))
    return {"parity": worst, "parity_of_moved": of_moved, "moved": moved}


def measure(case: Case, model: str, repetitions: int) -> dict[str, Any]:
    """The record of one case."""
    module = MODULES[model]
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    record: dict[str, Any] = {
        "model": model,
        **case._asdict(),
        "dtype": "float32",
        "ms": None,
        "copy_fraction": None,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if case.kind == "parity":
        return record | parity(case, shapes)
    program = (
        update_program(case, shapes)
        if case.kind == "update"
        else train_program(case, shapes, module)
    )
    memory = program.compiled.memory_analysis()
    state = program.state if case.kind == "update" else program.state[1]
    record["state_bytes"] = bytes_per_device(state)
    record["compile_s"] = program.compile_s
    record["temp_bytes"] = 0 if memory is None else memory.temp_size_in_bytes
    found = collectives(program.compiled)
    record["collectives"] = sum(c.times for c in found)
    record["collective_bytes"] = moved_bytes(found)
    record["collective_kinds"] = {
        kind: moved_bytes(found, kind) for kind in sorted({c.kind for c in found})
    }
    program, record["ms"] = median_ms(program, repetitions)
    program, record["busy_ms"] = measured_busy_ms(program)
    if case.kind == "update":
        del program, state
        loop, ms = median_ms(update_program(case, shapes, STEPS_OF_LOOP), repetitions)
        record["loop_ms"] = ms / STEPS_OF_LOOP
        del loop
    record["collective_ms"] = 0.0
    if found and case.devices > 1:
        alone = collectives_program(found, mesh_of(case.devices))
        _, record["collective_ms"] = median_ms(alone, repetitions)
    record["collective_share"] = record["collective_ms"] / record.get("loop_ms", record["ms"])
    return record


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What is to be measured, the most important first."""
    counts = [n for n in options.devices if n <= jax.device_count()]
    several = [n for n in counts if n > 1]
    for optimizer in options.optimizers:
        backends = ["xla"] if optimizer == "optax.adamw" else options.backends
        for backend in backends:
            for kind in options.kinds:
                if kind == "parity":
                    yield from (Case(kind, optimizer, backend, "fsdp", n) for n in several[:1])
                elif kind == "train":
                    yield from (Case(kind, optimizer, backend, "fsdp", n) for n in counts)
                else:
                    yield from (Case(kind, optimizer, backend, "replicated", n) for n in counts[:1])
                    for mode in options.modes:
                        yield from (Case(kind, optimizer, backend, mode, n) for n in several)


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown."""
    columns = (
        "kind optimizer backend mode devices ms ms_in_a_loop busy_ms state_MB collectives moved_MB"
    )
    columns += " share compile_s"
    lines = [
        "| " + " | ".join(columns.split()) + " |",
        "|" + " --- |" * len(columns.split()),
    ]
    for r in records:
        if r.get("ms") is None:
            continue
        cells = [r[k] for k in ("kind", "optimizer", "backend", "mode", "devices")]
        in_loop = f"{r['loop_ms']:.2f}" if "loop_ms" in r else ""
        busy = f"{r['busy_ms']:.2f}" if r.get("busy_ms") is not None else ""
        cells += [
            f"{r['ms']:.2f}",
            in_loop,
            busy,
            f"{r['state_bytes'] / 1e6:.0f}",
            r["collectives"],
        ]
        cells += [f"{r['collective_bytes'] / 1e6:.2f}", f"{100 * r['collective_share']:.0f}%"]
        cells += ["" if r["compile_s"] is None else f"{r['compile_s']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for r in records:
        if "parity" in r:
            lines.append(
                f"\n{r['optimizer']}, {r['backend']}, {r['devices']} devices: parameters after "
                f"{STEPS_OF_PARITY} steps within {r['parity']:.1e} of one device's "
                f"({r['parity_of_moved']:.1e} of the movement)."
            )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of an update, in a loop, over the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    updates = [r for r in records if r["kind"] == "update" and "loop_ms" in r]
    alone = {
        (r["optimizer"], r["backend"]): (r["devices"], r["loop_ms"])
        for r in updates
        if r["mode"] == "replicated"
    }
    series: dict[tuple, list] = {}
    for r in updates:
        if r["mode"] != "replicated":
            key = (r["optimizer"], r["backend"])
            points = series.setdefault((*key, r["mode"]), [alone[key]] if key in alone else [])
            points.append((r["devices"], r["loop_ms"]))
    for (optimizer, backend, mode), points in series.items():
        label = f"{optimizer}, {backend}, {mode}"
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    top = 1.4 * max(ms for points in series.values() for _, ms in points)
    axes.set(xlabel="devices", ylabel="ms a step, many in a program", ylim=(0, top))
    ticks = sorted({r["devices"] for r in records})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.legend(fontsize=7, loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODULES, default="gpt2_355m")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--backends", nargs="+", default=["xla"], help="xla, pallas")
    parser.add_argument("--modes", nargs="+", default=["fsdp", "distributed", "replicated"])
    parser.add_argument("--kinds", nargs="+", default=["update", "parity", "train"])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after these")
    parser.add_argument("--json", type=Path, help="add the records to this file")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only plot and print records")
    options = parser.parse_args()
    if options.plot is not None:
        records = json.loads(options.plot.read_text())
        plot(records, options.plot.with_suffix(".png"))
        print(table(records))
        return
    start = time.perf_counter()
    records = []
    if options.json is not None and options.json.exists():
        records = json.loads(options.json.read_text())
    for case in cases(options):
        if time.perf_counter() - start > options.seconds:
            print(f"out of time before {case}", flush=True)
            break
        try:
            record = measure(case, options.model, options.repetitions)
        except Exception:  # the other cases are still worth measuring
            print(f"{case} failed:\n{traceback.format_exc(limit=-3)}", flush=True)
            continue
        records.append(record)
        brief = {
            k: record.get(k)
            for k in ("ms", "compile_s", "state_bytes", "collective_bytes", "collective_ms")
        } | {k: v for k, v in record.items() if k.startswith("parity")}
        print(f"{time.perf_counter() - start:.0f} s", *case, brief, flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(records, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
