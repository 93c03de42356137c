"""What an update launches on an H200, found by compiling for one; no GPU is needed.

JAX_PLATFORMS=cpu python benchmarks/launches.py --model gpt2_355m --optimizer velo --backend auto

With `--step train` it is a whole training step, that of `benchmarks/train_step.py`. It
needs the packages jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc. Prints the kernels and
copies of the compiled program by kind, and its temporaries. Nothing is tuned to the GPU, so single
kernels can differ from those that run there.
"""

import argparse
import collections
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import train_step
from jax.experimental import topologies

from lopt_jax import benchmark
from pallas_kernels import supports

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
NO_LAUNCH = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


def compile_for_h200(model: str, optimizer: str, backend: str, step: str = "update") -> Any:
    """The compiled step: an update alone, or a training step ("train")."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=H200, topology="1x1x1"
    )
    tx = benchmark.OPTIMIZERS[optimizer].make(backend)
    if step == "train":
        train, arguments = train_step.step_of(tx, *train_step.MODELS[model]())
        on_gpu = placed(arguments, topology.devices[0])
        return jax.jit(train, donate_argnums=(0, 1)).lower(*on_gpu).compile()
    return compile_update(tx, benchmark.MODELS[model](), topology.devices[0])


def placed(tree: Any, device: Any) -> Any:
    """Shapes that lie on a device."""
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def compile_update(tx: Any, shapes: benchmark.Shapes, device: Any) -> Any:
    """The compiled update of float32 parameters of these shapes, with the state donated."""

    def update(state: Any, gradients: Any, params: Any, loss: Any) -> Any:
        updates, state = tx.update(gradients, state, params, value=loss)
        return state, updates

    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    value = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = placed((jax.eval_shape(tx.init, params), params, params, value), device)
    return jax.jit(update, donate_argnums=0).lower(*arguments).compile()


def launches(text: str) -> collections.Counter:
    """Kernels and copies of a compiled program, by kind and by the operation they come from."""
    out: collections.Counter = collections.Counter()
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        found = re.match(r"\s+(?:ROOT )?%(\S+) = (?:.*?) ([a-z][a-z0-9\-]*)\(", line)
        if found and found[2] not in NO_LAUNCH:
            source = re.search(r'op_name="([^"]*)"', line)
            out[re.sub(r"[.\d_]+$", "", found[1]), source[1][-60:] if source else ""] += 1
    return out


def main() -> None:
    """Prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=benchmark.MODELS, default="gpt2_355m")
    parser.add_argument("--optimizer", choices=benchmark.OPTIMIZERS, default="velo")
    parser.add_argument("--backend", choices=("xla", "auto"), default="auto")
    parser.add_argument("--step", choices=("update", "train"), default="update")
    options = parser.parse_args()
    supports.unsupported_reason = lambda *_, **__: None  # type: ignore[assignment]
    start = time.perf_counter()
    compiled = compile_for_h200(options.model, options.optimizer, options.backend, options.step)
    seconds = time.perf_counter() - start
    counts = launches(compiled.as_text())
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{counts.total()} launches, {temporary:.1f} MB temporary, {seconds:.0f} s to compile")
    for (kind, source), count in counts.most_common(40):
        print(f"{count:5} {kind} {source}")


if __name__ == "__main__":
    main()
