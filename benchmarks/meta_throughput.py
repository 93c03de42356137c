"""Inner steps a second of meta-training, against the same unroll with a hand-written adam.

One outer step unrolls `--pairs` antithetic pairs of `--task` for one truncation. The comparison
replaces the learned rule by Adam with a learned learning rate: same task, same batches, same
perturbations, same measurements.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import benchmark
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.estimators import no_mask, truncated_pes
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.rules import make_rule
from lopt_jax.meta.tasks import training_tasks
from lopt_jax.meta.unroll import Unroll

LENGTH = 50  # inner steps of an outer step


def program(architecture, config, options, task, pairs):
    """One outer step's unrolls, compiled, and the meta-parameters and state it starts from."""
    rule = make_rule(architecture, config, **options)
    unroll = Unroll(training_tasks()[task], rule, LENGTH, 10, 100, 1000)
    estimator = truncated_pes(unroll, pairs)
    theta = initial_parameters(architecture, jax.random.key(0), config, {"rms_0": 1.0})
    state = jax.jit(estimator.init)(theta, jax.random.key(1))

    def step(theta, state, i):
        key = jax.random.fold_in(jax.random.key(2), i)
        estimate, state = estimator.estimate(theta, key, state, no_mask(theta))
        return estimate.loss, state

    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=1).lower(theta, state, jnp.int32(0)).compile()
    return compiled, theta, state, time.perf_counter() - began


def measure(compiled, theta, state, repetitions):
    """What is measured of a program: a dictionary.

    Forms of a rule share the first loss but for rounding. Busy time and launches are those of one
    outer step, by the profiler, on GPUs.
    """
    first_loss, state = compiled(theta, state, jnp.int32(0))
    jax.block_until_ready(first_loss)
    seconds = []
    for i in range(1, repetitions + 1):
        began = time.perf_counter()
        loss, state = compiled(theta, state, jnp.int32(i))
        jax.block_until_ready((loss, state))
        seconds.append(time.perf_counter() - began)
    events = benchmark.gpu_events(lambda: compiled(theta, state, jnp.int32(0)))
    return {
        "seconds": float(np.median(seconds)),
        "first_loss": float(first_loss),
        "busy_milliseconds": benchmark.busy_ms(events) if events else None,
        "launches": len(events) or None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="digits_mlp_64")
    parser.add_argument("--pairs", default="128")
    parser.add_argument(
        "--configs", default="small_fc_lopt,small_fc_lopt_h4,celo_small,celo2_small,velo_small"
    )
    parser.add_argument("--backends", default="own", help="xla, auto; own: that of the config")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", default=None)
    arguments = parser.parse_args()
    rows = []
    for task in arguments.tasks.split(","):
        for pairs in map(int, arguments.pairs.split(",")):
            kinds = {("adam", "xla"): ("learned_adam", {}, {})}
            for name, backend in itertools.product(
                arguments.configs.split(","), arguments.backends.split(",")
            ):
                config = CONFIGS[name]
                backend = config.backend if backend == "own" else backend
                options = {
                    "learning_rate": config.learning_rate_peak,
                    "weight_decay": config.weight_decay,
                    "backend": backend,
                    "precision": "default" if config.architecture == "celo2" else "own",
                }
                parts = config.architecture, dict(config.architecture_config), options
                kinds[name, backend] = parts
            # Compiled side by side, timed one after the other.
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                waiting = [pool.submit(program, *kind, task, pairs) for kind in kinds.values()]
                programs = [future.result() for future in waiting]
            of_adam = None
            for key, (*parts, compile_seconds) in zip(kinds, programs, strict=True):
                name, backend = key
                measured = measure(*parts, arguments.repetitions)
                seconds = measured.pop("seconds")
                of_adam = of_adam or seconds
                row = {
                    "config": name,
                    "architecture": kinds[key][0],
                    "backend": backend,
                    "task": task,
                    "pairs": pairs,
                    "inner_steps_per_second": 2 * pairs * LENGTH / seconds,
                    "milliseconds_per_outer_step": 1e3 * seconds,
                    "times_adam": seconds / of_adam,
                    "compile_seconds": compile_seconds,
                    **measured,
                }
                rows.append(row)
                print(
                    f"{task} {pairs} pairs {name:18} {backend:4} "
                    f"{row['inner_steps_per_second']:12,.0f} inner steps/s "
                    f"{row['times_adam']:6.2f} times adam's time "
                    f"(first loss {row['first_loss']:.6f}, {row['launches']} launches, "
                    f"compiled in {compile_seconds:.0f} s)",
                    flush=True,
                )
    if arguments.json:
        record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        Path(arguments.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
