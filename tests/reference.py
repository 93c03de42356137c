"""Trajectories of the reference implementations, and the bound within which they are met."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt_jax

FIXTURES = Path(__file__).parent / "fixtures"
AS_USERS = {  # whatever flags the tests set: how XLA compiles programs for users
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
RELEASED = Path(__file__).parents[2] / "shared" / "weights"  # real weights: not in the repository


class Trajectory(NamedTuple):
    """A recorded run: parameters at the start, gradients and losses, parameters after each step."""

    init: dict[str, np.ndarray]
    gradients: list[dict[str, np.ndarray]]
    losses: list[np.ndarray | None]
    params: list[dict[str, np.ndarray]]
    are_validation: list[bool]  # steps whose loss is one of validation: nothing moves


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
        are_validation=[bool(x) for x in arrays.get("is_valid", np.zeros(len(steps)))],
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


def _small_fc(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return lopt_jax.small_fc_lopt(weights(name, step_mult=0.01), **options)


def _velo(
    name: str, given: lopt_jax.Weights | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    settings = config(name)
    return lopt_jax.velo(
        settings["num_steps"],
        weights(name, **settings["kwargs"]) if given is None else given,
        gradient_accumulation=settings.get("num_accumulate"),
        **options,
    )


def _coupled_weight_decay(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    """As `WeightDecayWrapper` of google/learned_optimization, optimizers/optimizer_wrappers.py.

    The decay of the original's wrapper goes through the gradient and the loss, as L2
    regularisation; `weight_decay` of the optimizers here is decoupled from both.
    """
    tx, weight_decay = _velo(name, **options), 0.01

    def update(gradients: Any, state: Any, params: Any, value: Any) -> tuple[Any, Any]:
        penalty = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
        gradients = jax.tree.map(lambda g, p: g + weight_decay * p, gradients, params)
        return tx.update(gradients, state, params, value=value + weight_decay * penalty)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _celo(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return getattr(lopt_jax, name)(config(name)["num_steps"], released_weights(name), **options)


def _celo_random(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    architecture = name.removesuffix("_random")
    given = weights(name, architecture)
    return getattr(lopt_jax, architecture)(config(name)["num_steps"], given, **options)


def _celo2(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return getattr(lopt_jax, name)(0.01, weights(name), **{"precision": "highest", **options})


def _pylo(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    """PyLO's; its safetensors do not always say which optimizer they belong to."""
    settings = config(name)
    constructor = getattr(lopt_jax, settings["optimizer"])
    if settings["optimizer"] != "elo":
        options = {"precision": "highest", "adam_learning_rate_mult": 20.0, **options}
    given, decay = weights(name, settings["optimizer"]), settings["weight_decay"]
    return constructor(settings["lr"], given, weight_decay=decay, **options)


def _mulo(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    settings = config(name)  # the decay offsets and step_mult of its weights are the released
    multipliers, decay = settings["width_multipliers"], settings["weight_decay"]
    return lopt_jax.mulo(multipliers, weights(name, "mulo"), weight_decay=decay, **options)


def _adafac(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    settings = config(name)["kwargs"]
    keys = [key for key in settings if key.startswith("initial_") or key.endswith("_mult")]
    given = weights(name, **{key: settings[key] for key in keys})
    return lopt_jax.adafac_mlp_lopt(given, **options)


def _mlp_lopt(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return lopt_jax.mlp_lopt(weights(name, step_mult=0.01), **options)


def _nn_adam(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    kwargs = config(name)["kwargs"]
    settings = {key: kwargs[key] for key in ("output_scale", "decay_strength")}
    return lopt_jax.nn_adam(weights(name, **settings), **options)


def _rnn_mlp_lopt(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return lopt_jax.rnn_mlp_lopt(weights(name, step_mult=0.01), **options)


def _plain(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return getattr(lopt_jax, name)(weights(name), **options)


_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "small_fc_lopt_h4": _small_fc,
    "small_fc_lopt_h32": _small_fc,
    "velo": _velo,
    "velo_bugged_flags": _velo,
    "velo_gradient_accumulation": _velo,
    "velo_weight_decay": _coupled_weight_decay,
    "celo": _celo,
    "celo_adam": _celo,
    "celo_random": _celo_random,
    "celo_adam_random": _celo_random,
    "celo2": _celo2,
    "celo2_base": _celo2,
    "celo2_adamw": _pylo,
    "elo": _pylo,
    "elo_celo2": _pylo,
    "mulo": _mulo,
    "learnable_sgd": _plain,
    "learnable_sgdm": _plain,
    "learnable_adam": _plain,
    "velo_s": _velo,
    "nn_adam": _nn_adam,
    "rnn_mlp_lopt": _rnn_mlp_lopt,
    "rnn_mlp_lopt_validation": _rnn_mlp_lopt,
    "nn_adam_decay": _nn_adam,
    "mlp_lopt": _mlp_lopt,
    "adafac_mlp_lopt": _adafac,
    "adafac_mlp_lopt_decays": _adafac,
    "adafac_mlp_lopt_separate_weights": _adafac,
}
NAMES = tuple(_OPTIMIZERS)


def optimizer(name: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a recorded run, with the run's settings.

    Args:
      name: of `NAMES`.
      **options: further arguments of its constructor; `given`: other weights of VeLO.
    """
    return _OPTIMIZERS[name](name, **options)


def worst_error(
    tx: optax.GradientTransformation, reference: Trajectory, compiled: dict[str, Any]
) -> tuple[float, str]:
    """Runs an optimizer along a recorded run.

    Args:
      tx: the optimizer.
      reference: the recorded run.
      compiled: compiler options of its update.

    Returns:
      The largest error over steps and leaves, as a fraction of the bound that every leaf must meet
      (max|p - p_ref| <= 5e-5 max|p_ref - p_init| + 1e-6 max|p_ref|), and where it occurred.
    """
    params = jax.tree.map(jnp.asarray, reference.init)
    state = tx.init(params)
    update = jax.jit(optax.with_extra_args_support(tx).update, compiler_options=compiled)
    worst, where = 0.0, ""
    for step, gradients in enumerate(reference.gradients):
        loss = reference.losses[step]
        if reference.are_validation[step]:
            state = lopt_jax.observe_validation_loss(state, loss)
        else:
            updates, state = update(gradients, state, params, value=loss)
            params = optax.apply_updates(params, updates)
        for leaf, expected in reference.params[step].items():
            error = np.max(np.abs(np.asarray(params[leaf], np.float64) - expected))
            moved = np.max(np.abs(expected - reference.init[leaf]))
            bound = 5e-5 * moved + 1e-6 * np.max(np.abs(expected))
            if not error / bound <= worst:
                worst, where = float(error / bound), f"step {step}, leaf {leaf}"
    return worst, where


def check(
    tx: optax.GradientTransformation,
    run: Trajectory,
    record_property: Callable[[str, object], None],
    limit: float = 1,
    compiled: dict[str, Any] = AS_USERS,
) -> None:
    """Asserts that an optimizer meets a recorded run.

    Args:
      tx: the optimizer.
      run: the recorded run.
      record_property: pytest's fixture: keeps the error, as a share of the bound, in the report.
      limit: of that share.
      compiled: compiler options of its update.
    """
    worst, where = worst_error(tx, run, compiled)
    record_property("share of the bound", round(worst, 3))
    assert worst <= limit, f"{worst:.2f} times the bound at {where}"
