"""Operations of an inner step of meta-training, counted in the compiled program.

    JAX_PLATFORMS=cpu python benchmarks/meta_launches.py lopt_direction --tasks words_transformer_48
    JAX_PLATFORMS=cpu python benchmarks/meta_launches.py lopt_direction --device h200

On a GPU each is a launch, and their number decides. For an H200 it compiles without one, with the
packages that benchmarks/launches.py names. Nothing is tuned to the GPU, so single kernels can
differ from those that run there.
"""

import argparse
import collections
import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
from hlo_traffic import Program
from jax.experimental import topologies
from launches import H200, NO_LAUNCH, placed

from lopt_jax.applying import steering
from lopt_jax.meta import estimators
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.estimators import no_mask
from lopt_jax.meta.trainer import Trainer


def compiled(config, device):
    """The text of one outer step's unrolls of a config's only task, compiled for a device."""
    if device != "cpu":  # what is traced has to know, since the host has no such device
        estimators.in_batch = lambda tx, size: steering(tx, batch=size, device="gpu")
    trainer = Trainer(config)
    shapes = trainer.shapes()

    def outer_step(theta, state, step):
        key = trainer._key(step, 0)
        return trainer.estimators[0].estimate(theta, key, state, no_mask(theta), None)

    arguments = (shapes.meta_parameters, shapes.estimators[0], jax.ShapeDtypeStruct((), jnp.int32))
    place = functools.partial(placed, device=device_named(device))
    lowered = jax.jit(outer_step, donate_argnums=1).lower(*map(place, arguments))
    return lowered.compile().as_text()


def device_named(name):
    """A device: this host's CPU, or an H200 that it need not have."""
    if name == "cpu":
        return jax.devices("cpu")[0]
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=H200, topology="1x1x1"
    )
    return topology.devices[0]


def inner_step(program):
    """The opcodes of the innermost loop's body that do something, counted: the longest of all."""
    bodies = [
        re.search(r"body=%?([\w.\-]+)", instruction.rest)[1]
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.opcode == "while"
    ]
    counts = [
        collections.Counter(
            x.opcode for x in program.computations[body] if x.opcode not in NO_LAUNCH
        )
        for body in bodies
    ]
    return max(counts, key=collections.Counter.total)


def main():
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("--tasks", help="names with commas; left out: the config's")
    parser.add_argument("--device", choices=("cpu", "h200"), default="cpu")
    parser.add_argument("--pairs", type=int, default=64)
    options = parser.parse_args()
    config = dataclasses.replace(CONFIGS[options.config], num_pairs=options.pairs, join=False)
    for task in options.tasks.split(",") if options.tasks else config.tasks:
        began = time.perf_counter()
        text = compiled(dataclasses.replace(config, tasks=(task,)), options.device)
        counts = inner_step(Program(text))
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        seconds = time.perf_counter() - began
        print(f"{task}: {counts.total()} ({kinds}), compiled in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
