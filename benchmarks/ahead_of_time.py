"""Compiles one update for TPUs and GPUs that this machine does not have, and counts what it does.

    python benchmarks/ahead_of_time.py                            # two models, every target
    python benchmarks/ahead_of_time.py --targets "TPU v5e" --models 4m vit_b16 --optimizers velo

Nothing runs, so there are no times of a step: bytes, arithmetic and launches instead, of XLA alone,
without fused kernels. Rows go into docs/benchmarks/ahead_of_time.json, in place of older ones of
the same target, model and optimizer. For TPUs it needs libtpu (`pip install 'jax[tpu]'`), for GPUs
jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc. A target that cannot be compiled for has
its reason in its row.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# libtpu asks for these where there is no TPU
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    JAX_PLATFORMS="cpu",
)

import jax
from hlo_traffic import Program
from jax.experimental import topologies
from launches import compile_update

from lopt_jax import benchmark
from lopt_jax.applying import steering

RECORD = Path(__file__).parents[1] / "docs" / "benchmarks" / "ahead_of_time.json"
MINUTES = 20  # that a row may take

MODELS: dict[str, Callable[[], benchmark.Shapes]] = {
    "4m": lambda: {"w": (2048, 2048), "b": (2048,)},
    "67m": lambda: {"w": (8192, 8192), "b": (8192,)},
    "vit_b16": benchmark.vit_b16_shapes,
    "gpt2_355m": benchmark.gpt2_355m_shapes,
}
OPTIMIZERS = (
    "optax.adamw",
    "optax.contrib.muon",
    "lopt",
    "celo2",
    "velo",
    "celo",
    "small_fc_lopt_h4",
    "small_fc_lopt_h32",
)

# NVIDIA's data sheets: shared memory of a multiprocessor and of a block in KB, multiprocessors,
# bandwidth in GB/s, L2 in MB, clock in GHz, memory in GB.
GPUS = {
    "GPU 8.0": ("NVIDIA A100", 164, 163, 108, 2039, 40, 1.41, 80),
    "GPU 8.6": ("NVIDIA A10", 100, 99, 72, 600, 6, 1.70, 24),
    "GPU 8.9": ("NVIDIA L40S", 100, 99, 142, 864, 96, 2.52, 48),
    "GPU 9.0": ("NVIDIA H200", 228, 227, 132, 4800, 60, 1.98, 141),
    "GPU 10.0": ("NVIDIA B200", 228, 227, 148, 8000, 126, 1.97, 180),
    "GPU 12.0": ("NVIDIA RTX PRO 6000", 100, 99, 188, 1792, 128, 2.62, 96),
}
TPUS = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}
TARGETS = (*TPUS, *GPUS)


def device_of(target: str) -> Any:
    """A device of a target that programs can be compiled for."""
    if target in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
        return topology.devices[0]
    name, of_core, of_block, cores, bandwidth, cache, clock, memory = GPUS[target]
    major, minor = target.removeprefix("GPU ").split(".")
    threads = 2048 if target in ("GPU 8.0", "GPU 9.0", "GPU 10.0") else 1536
    config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {of_core << 10}
      shared_memory_per_block_optin: {of_block << 10} registers_per_core_limit: 65536
      registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth}000000000 l2_cache_size: {cache << 20} clock_rate_ghz: {clock}
      device_memory_size: {memory}000000000
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{name}"
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=config, topology="1x1x1"
    )
    return topology.devices[0]


def measured(target: str, model: str, optimizer: str) -> dict[str, Any]:
    """What is known of one compiled update."""
    device, shapes = device_of(target), MODELS[model]()
    tx = steering(benchmark.OPTIMIZERS[optimizer].make("xla"), device=device)
    began, processor = time.perf_counter(), time.process_time()
    compiled = compile_update(tx, shapes, device)
    seconds = time.perf_counter() - began, time.process_time() - processor
    elements = sum(math.prod(shape) for shape in shapes.values())
    cost = compiled.cost_analysis()  # none for GPUs that are not here
    traffic = Program(compiled.as_text()).traffic()
    return {
        "compile_s": round(seconds[0], 1),
        "compile_processor_s": round(seconds[1], 1),
        "main_bytes": round(traffic.main_bytes / elements, 1),
        "on_chip_bytes": round(traffic.on_chip_bytes / elements, 1),
        "xla_bytes": round(cost["bytes accessed"] / elements, 1) if cost else None,
        "flops": round(traffic.flops / elements),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "fusions": traffic.fusions,
        "launches": traffic.launches,
    }


def row_of(target: str, model: str, optimizer: str) -> dict[str, Any]:
    """A row of the record, by a process of its own: what XLA cannot compile may abort it."""
    names = {"target": target, "model": model, "optimizer": optimizer}
    own = ("--one", "--targets", target, "--models", model, "--optimizers", optimizer)
    try:
        done = subprocess.run(
            [sys.executable, __file__, *own],
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**names, "reason": f"not compiled in {MINUTES} minutes"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {**names, "reason": lines[-1][:300] if lines else f"exit status {done.returncode}"}
    return {**names, **json.loads(done.stdout.splitlines()[-1])}


def versions() -> dict[str, str]:
    """Of the packages that compile."""
    found = {"jax": jax.__version__}
    for package in ("libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=("4m", "vit_b16"))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--one", action="store_true", help="one row, in this process, to stdout")
    options = parser.parse_args()
    asked = [(t, m, o) for m in options.models for t in options.targets for o in options.optimizers]
    if options.one:
        print(json.dumps(measured(*asked[0])))
        return
    how = {
        **versions(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/ahead_of_time.py", *sys.argv[1:]]),
    }
    for names in asked:
        row = {**row_of(*names), **how}
        print(*row.values(), flush=True)
        rows = json.loads(options.record.read_text()) if options.record.exists() else []
        key = lambda row: (row["target"], row["model"], row["optimizer"])  # noqa: E731
        rows = [old for old in rows if key(old) != key(row)] + [row]
        order = [list(TARGETS), list(MODELS), list(OPTIMIZERS)]
        rows.sort(key=lambda row: [order[i].index(key(row)[i]) for i in (1, 0, 2)])
        options.record.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
