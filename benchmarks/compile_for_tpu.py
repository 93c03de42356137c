"""Compiles an update for a TPU v5e, on a machine without one, and prints its memory and traffic.

JAX_PLATFORMS=cpu python benchmarks/compile_for_tpu.py --model mlp --optimizer velo

It needs the package libtpu (`pip install 'jax[tpu]'`). Nothing runs.
"""

import argparse
import os
import time

from jax.experimental import topologies
from launches import compile_update

from lopt_jax import benchmark

NO_TPU = {  # libtpu asks for these where there is no TPU
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=benchmark.MODELS, default="mlp")
    parser.add_argument("--optimizer", choices=benchmark.OPTIMIZERS, default="velo")
    options = parser.parse_args()
    os.environ.update(NO_TPU)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    tx, shapes = (
        benchmark.OPTIMIZERS[options.optimizer].make("xla"),
        benchmark.MODELS[options.model](),
    )
    began = time.perf_counter()
    compiled = compile_update(tx, shapes, topology.devices[0])
    seconds = time.perf_counter() - began
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    accessed = compiled.cost_analysis()["bytes accessed"] / 1e6
    print(
        f"{options.optimizer} on {options.model} for a TPU v5e: compiled in {seconds:.0f} s, "
        f"{temporary:.1f} MB temporary, {accessed:.0f} MB accessed"
    )


if __name__ == "__main__":
    main()
