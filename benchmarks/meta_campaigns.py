"""Runs or goes on with campaigns of meta-training for a bounded time, selects, and prints a table.

python benchmarks/meta_campaigns.py checkpoints/campaigns lopt_direction lopt_linear --seconds 560

Every campaign has its own folder, and its share of the time: first its meta-training, then the
selection. The same command goes on. Compiled programs are kept, so that a second run on the same
machine compiles nothing.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from lopt_jax.meta import campaign, ranking, selection

GRACE = 20.0  # seconds for imports and files at the end, of every command
# Programs compile faster, and every compilation chooses the same kernels.
GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 "
    "--xla_disable_hlo_passes=triton-softmax-rewriter"
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    seconds: float
    status: int


def environment(cache):
    """Of the commands: compiled programs are kept, and memory is taken as it is needed."""
    given = dict(os.environ)
    given.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.absolute()))
    given.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if given.get("JAX_PLATFORMS") != "cpu":
        given.setdefault("XLA_FLAGS", GPU_FLAGS)
    return given


def run(name, arguments, seconds, variables):
    """Runs a command of `lopt`, printing its lines; ends it where it takes longer than it may."""
    command = [sys.executable, "-u", "-m", "lopt_jax.meta.cli", *arguments]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )

    def stop():
        print(f"[{name}] ended after {seconds + GRACE:.0f} s", flush=True)
        process.kill()

    timer = threading.Timer(seconds + GRACE, stop)
    timer.start()
    with process:
        for line in process.stdout:
            print(f"[{name}] {line}", end="", flush=True)
    timer.cancel()
    return Ended(time.monotonic() - begin, process.returncode)


def train_all(options, budget, variables):
    """Meta-trains every config, so many at a time."""
    ended = {}
    waiting = list(options.configs)
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                if not waiting:
                    return
                config = waiting.pop(0)
            folder = folder_of(options.out, config)
            arguments = ["meta-train", config, "--campaign", str(folder), "--seconds", str(budget)]
            for item in options.set:
                arguments += ["--set", item]
            ended[config] = run(folder.name, arguments, budget, variables)

    threads = [threading.Thread(target=work) for _ in range(options.together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def folder_of(out, config):
    """The folder of a campaign: named as the config or its file."""
    return out / Path(config).stem


def row(options, config, ended):
    """A line of the table."""
    folder = folder_of(options.out, config)
    if not campaign.exists(folder):
        return f"| {folder.name} | 0 | {ended.seconds:.0f} | | | | | |"
    kept = campaign.read(folder)
    last = kept.record["runs"][-1] if kept.record["runs"] else {"from": 0, "to": 0, "seconds": 0}
    settings = kept.config
    each = 2 * settings.num_pairs * settings.truncation_length * len(settings.tasks)
    inner = each * (last["to"] - last["from"])
    rate = f"{inner / last['seconds']:,.0f}" if last["seconds"] > 0 else ""
    steps = sorted(selection.spread(kept.steps[1:], 5))
    means = [(step, ranking.mean_loss(kept, step)) for step in steps]
    curve = ", ".join(f"{step:,}: {loss:.4f}" for step, loss in means if loss is not None)
    best = change = ""
    records = selection.current_records(kept, options.select_steps)
    if records:
        rows, base = ranking.rank(records)
        found = ranking.best_of(rows)
        if found is not None:
            losses = ", ".join(f"{t} {x:.4f}" for t, x in found.losses.items())
            best = f"{found.label}: {losses}"
            change = f"{100 * math.expm1(found.score):+.2f}% ({base})"
    return (
        f"| {folder.name} | {kept.step:,} of {settings.outer_steps:,} | {ended.seconds:.0f} "
        f"| {last['seconds']:.0f} | {rate} | {curve} | {best} | {change} |"
    )


def main():
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the campaigns' folders")
    parser.add_argument("configs", nargs="+", help="names or JSON files")
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything")
    parser.add_argument("--select-seconds", type=float, default=100.0, help="of them, a selection")
    parser.add_argument("--together", type=int, default=1, help="meta-trainings at a time")
    parser.add_argument("--select-tasks", help="names with commas; left out: those of meta-select")
    parser.add_argument("--select-steps", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=9, help="sets of weights in a selection")
    parser.add_argument("--data", help="folder of prepared data; left out: $LOPT_JAX_DATA")
    parser.add_argument("--jax-cache", type=Path, default=Path("outputs/jax_cache"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    begin = time.monotonic()
    count = len(options.configs)
    waves = -(-count // options.together)
    budget = (options.seconds - count * (options.select_seconds + GRACE)) / waves - GRACE
    if budget <= 0:
        parser.error(f"--seconds: {options.seconds:g} leaves no time to train {count} configs")
    options.out.mkdir(parents=True, exist_ok=True)
    variables = environment(options.jax_cache)
    if options.data is not None:
        variables["LOPT_JAX_DATA"] = options.data
    ended = train_all(options, budget, variables)
    for config in options.configs:
        folder = folder_of(options.out, config)
        if not campaign.exists(folder) or options.select_seconds <= 0:
            continue
        left = options.seconds - (time.monotonic() - begin) - GRACE
        seconds = min(options.select_seconds, left)
        if seconds <= 0:
            print(f"[{folder.name}] no time to select", flush=True)
            continue
        arguments = ["meta-select", str(folder), "--seconds", str(seconds)]
        arguments += ["--steps", str(options.select_steps)]
        arguments += ["--checkpoints", str(options.checkpoints)]
        if options.select_tasks:
            arguments += ["--tasks", options.select_tasks]
        run(folder.name, arguments, seconds, variables)
    print("| campaign | outer steps | seconds, all | training | inner steps/s "
          "| meta-loss by step | best weights | against |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |")
    for config in options.configs:
        print(row(options, config, ended[config]))
    print(f"{time.monotonic() - begin:.0f} s")
    return max(one.status for one in ended.values())


if __name__ == "__main__":
    sys.exit(main())
