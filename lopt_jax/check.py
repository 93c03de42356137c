"""`lopt check`: do the fused kernels agree with XLA on this machine?

Every case runs in a process of its own, so that a compiler that aborts is a failure and nothing
more. What passes is written down for this GPU and these versions; on GPUs newer than Hopper
`backend="auto"` takes the kernels only then.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.cli import positive_integer
from lopt_jax.optimizers.celo import celo
from lopt_jax.optimizers.small_fc_lopt import small_fc_lopt
from lopt_jax.optimizers.velo import velo
from pallas_kernels import checked
from pallas_kernels.supports import CUDA_CORES, KERNELS, MATRIX_UNITS, device_reason

STEPS = 3
# Of the largest parameter change. Kernels and XLA add up in another order; networks amplify it.
TOLERANCE = 1e-4
SHAPES: dict[str, tuple[int, ...]] = {
    "kernel": (512, 384),
    "bias": (384,),
    "convolution": (3, 3, 64, 64),
    "layers": (4, 256, 128),
    "odd": (130, 37),
    "embedding": (1003, 68),
    "scale": (),
}


@dataclass(frozen=True)
class Case:
    """One thing to check.

    Attributes:
      kernels: of `pallas_kernels.supports.KERNELS`, that it runs.
      make: makes the optimizer for a backend.
    """

    kernels: str
    make: Callable[[str], optax.GradientTransformationExtraArgs]


CASES = {
    "velo": Case(CUDA_CORES, lambda backend: velo(100, "velo_small", backend=backend)),
    "celo": Case(CUDA_CORES, lambda backend: celo(100, "celo_small", backend=backend)),
    "small_fc_lopt": Case(MATRIX_UNITS, lambda backend: small_fc_lopt(backend=backend)),
    "small_fc_lopt, highest precision": Case(
        CUDA_CORES, lambda backend: small_fc_lopt(backend=backend, precision="highest")
    ),
}


class Finding(NamedTuple):
    """What a case showed."""

    error: float  # largest difference to XLA, relative to the largest change of a parameter
    repeats: bool  # whether a second run gave the same bits

    @property
    def problem(self) -> str:
        """What is wrong, or ""."""
        if not self.error <= TOLERANCE:
            return f"differs from XLA by {self.error:.1e} of the largest change"
        return "" if self.repeats else "two runs differ"


def compare(case: Case) -> Finding:
    """Takes some steps with the kernels, twice, and by XLA.

    Raises:
      NotImplementedError: the kernels cannot run here.
    """
    on_kernels, again = (_trained(case.make("pallas")) for _ in range(2))
    by_xla, start = _trained(case.make("xla")), _draw(0)
    change = max(float(np.max(np.abs(by_xla[k] - start[k]))) for k in SHAPES)
    errors = [float(np.max(np.abs(on_kernels[k] - by_xla[k]))) for k in SHAPES]
    repeats = all(np.array_equal(on_kernels[k], again[k]) for k in SHAPES)
    error = max(errors) if np.isfinite(errors).all() else float("inf")
    return Finding(error / change, repeats)


def _trained(tx: optax.GradientTransformationExtraArgs) -> dict[str, np.ndarray]:
    """Parameters after some steps with random gradients."""

    @jax.jit
    def step(gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    params: Any = jax.tree.map(jnp.asarray, _draw(0))
    state = tx.init(params)
    for i in range(STEPS):
        params, state = step(_draw(1 + i), params, state)
    return jax.tree.map(np.asarray, params)


def _draw(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(0.1 * random.standard_normal(shape), np.float32)
        for name, shape in SHAPES.items()
    }


def add_commands(commands: Any) -> None:
    """Registers `lopt check`."""
    parser = commands.add_parser("check", help="compare the fused kernels with XLA on this GPU")
    parser.add_argument(
        "--seconds",
        type=positive_integer,
        default=600,
        metavar="N",
        help="limit of each of the cases (default: 600)",
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Checks every kind of kernel; 0 where all that this GPU can run agree with XLA, else 1."""
    if options.case is not None:
        print(json.dumps(compare(CASES[options.case])._asdict()))
        return 0
    # so that the processes of the cases find memory beside this one
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    reason = device_reason(device)
    if reason is not None:
        print(f"No fused kernels here: {reason}. Updates run as XLA operations.")
        return 0
    passed = passing(lambda name: in_own_process(name, options.seconds))
    file = keep(device, passed)
    print(f"{file}: {', '.join(passed) or 'no kernels'} on {device.device_kind}")
    return 0 if passed else 1


def passing(check: Callable[[str], Finding | str]) -> list[str]:
    """The kernels all of whose cases pass.

    Args:
      check: returns what a case, by its name, showed, or what stopped it.

    Returns:
      Names of `KERNELS`.
    """
    failed = set()
    for name, case in CASES.items():
        finding = check(name)
        problem = finding if isinstance(finding, str) else finding.problem
        if problem:
            failed.add(case.kernels)
        detail = f"FAILED: {problem}" if isinstance(finding, str) or problem else _detail(finding)
        print(f"{name} ({case.kernels}): {detail}", flush=True)
    return [kernels for kernels in KERNELS if kernels not in failed]


def _detail(finding: Finding) -> str:
    return f"passed, {finding.error:.1e} of the largest change (limit {TOLERANCE:.0e})"


def in_own_process(name: str, seconds: float) -> Finding | str:
    """What a case showed in a process of its own, or what stopped it."""
    command = [sys.executable, "-m", "lopt_jax.cli", "check", "--case", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} seconds"
    if done.returncode != 0:
        last = ["", *done.stderr.strip().splitlines()][-1]
        return f"exit status {done.returncode}: {last[:200]}"
    return Finding(**json.loads(done.stdout.splitlines()[-1]))


def keep(device: jax.Device, passed: Sequence[str], file: Path | None = None) -> Path:
    """Writes down what passed on a device; returns the file."""
    check = checked.Check(
        device_kind=device.device_kind,
        compute_capability=str(getattr(device, "compute_capability", "")),
        versions=checked.versions(),
        kernels=tuple(passed),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return checked.keep(check, file)
