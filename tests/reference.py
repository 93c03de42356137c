"""Trajectories of the reference implementations, and the bound within which they are met."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt_jax

FIXTURES = Path(__file__).parent / "fixtures"
RELEASED = Path(__file__).parents[2] / "shared" / "weights"  # real weights: not in the repository


class Trajectory(NamedTuple):
    """A recorded run: parameters at the start, gradients and losses, parameters after each step."""

    init: dict[str, np.ndarray]
    gradients: list[dict[str, np.ndarray]]
    losses: list[np.ndarray | None]
    params: list[dict[str, np.ndarray]]


def config(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name / "config.json").read_text())


def trajectory(name: str) -> Trajectory:
    with np.load(FIXTURES / name / "trajectory.npz") as data:
        arrays = dict(data)
    leaves = sorted(key.removeprefix("init/") for key in arrays if key.startswith("init/"))
    steps = sorted({int(key.split("/")[1]) for key in arrays if key.startswith("params/")})
    losses = arrays.get("loss")
    return Trajectory(
        init={k: arrays[f"init/{k}"] for k in leaves},
        gradients=[{k: arrays[f"grad/{t}/{k}"] for k in leaves} for t in steps],
        losses=[None if losses is None else losses[i] for i in range(len(steps))],
        params=[{k: arrays[f"params/{t}/{k}"] for k in leaves} for t in steps],
    )


def weights(name: str, architecture: str | None = None, **overrides: Any) -> lopt_jax.Weights:
    """The weights of a fixture, with the settings that its file cannot say."""
    (path,) = [
        p
        for p in (FIXTURES / name).iterdir()
        if p.name in ("theta.state", "params", "params.checkpoint", "model.safetensors")
    ]
    return lopt_jax.convert_weights(path, architecture=architecture, config=overrides or None)


def released_weights(name: str) -> lopt_jax.Weights:
    """Released weights; skips the test where they are not at hand."""
    path = RELEASED / name / "theta.state"
    if not path.is_file():
        pytest.skip(f"needs the released weights of {name} in {RELEASED}")
    return lopt_jax.convert_weights(path, architecture=name)


def worst_error(tx: optax.GradientTransformation, reference: Trajectory) -> tuple[float, str]:
    """Runs an optimizer along a recorded run.

    Returns:
      The largest error over steps and leaves, as a fraction of the bound that every leaf must meet
      (max|p - p_ref| <= 5e-5 max|p_ref - p_init| + 1e-6 max|p_ref|), and where it occurred.
    """
    params = jax.tree.map(jnp.asarray, reference.init)
    state = tx.init(params)
    update = jax.jit(optax.with_extra_args_support(tx).update)
    worst, where = 0.0, ""
    for step, gradients in enumerate(reference.gradients):
        updates, state = update(gradients, state, params, value=reference.losses[step])
        params = optax.apply_updates(params, updates)
        for leaf, expected in reference.params[step].items():
            error = np.max(np.abs(np.asarray(params[leaf], np.float64) - expected))
            moved = np.max(np.abs(expected - reference.init[leaf]))
            bound = 5e-5 * moved + 1e-6 * np.max(np.abs(expected))
            if not error / bound <= worst:
                worst, where = float(error / bound), f"step {step}, leaf {leaf}"
    return worst, where
