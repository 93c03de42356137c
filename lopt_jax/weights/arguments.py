"""Arguments of the original's optimizers, as a `config.gin` has them, and the config here.

References: the constructors of google/learned_optimization, learned_optimizers/*.py and
research/general_lopt/hyper_v2.py, and of amoudgl/celo, celo/optimizers/*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_jax.brief import brief
from lopt_jax.weights.base import weights_error
from lopt_jax.weights.schema import schema_of

# class -> architecture; of several classes of an architecture the first is the one that is written
CLASSES = {
    "HyperV2": "velo",
    "AdafacMLPLOpt": "small_fc_lopt",
    "MuAdafacMLPLOpt": "mulo",
    "Celo": "celo",
    "Celo2": "celo2",
    "Celo2Base": "celo2",
    "MLPLOpt": "mlp_lopt",
    "NNAdam": "nn_adam",
    "RNNMLPLOpt": "rnn_mlp_lopt",
    "LearnableSGD": "learnable_sgd",
    "LearnableSGDM": "learnable_sgdm",
    "LearnableAdam": "learnable_adam",
}
# argument there -> keys of config here, where the names differ
_OF_HYPER = {"ff_hidden_size": ("hidden_size",), "ff_hidden_layers": ("hidden_layers",)}
_RENAMED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("HyperV2", "Celo", "Celo2", "Celo2Base"), _OF_HYPER),
    "RNNMLPLOpt": {
        "step_multiplier": ("step_mult",),
        "magnitude_rate": ("exp_mult",),
        "hidden_layer": ("hidden_layers",),
        "lstm_to_ff": ("lstm_to_mlp_size",),
        "decays": ("initial_momentum_decays", "initial_rms_decays"),
    },
}
# keys of config that are no arguments there: fixed numbers, or those of `init` alone
_NOT_THERE: Mapping[str, tuple[str, ...]] = {
    "MLPLOpt": ("initial_momentum_decays",),
    "NNAdam": ("initial_momentum_decays", "initial_rms_decays"),
    "LearnableSGDM": ("initial_momentum_decays",),
    "LearnableAdam": ("initial_momentum_decays", "initial_rms_decays"),
}
# Arguments that change what the original computes and that no optimizer here has: only the
# value that equals what is implemented is accepted.
_FIXED_OF_HYPER = {
    "mix_layers": True,
    "with_validation_feature_dim": False,
    "with_g": True,
    "with_m": True,
    "with_m_feat": True,
    "with_rms": True,
    "with_rms_feat": True,
    "with_rms_norm_g": True,
    "with_rsqrt_rms": True,
    "with_p": True,
    "with_fac_norm_g": True,
    "with_fac_rms": True,
    "with_fac_rsqrt": True,
    "with_grad_clip_feat": True,
    "with_fac_mom_mult": True,
    "with_rms_only_norm_g": True,
    "adafactor_accumulator": True,
    "param_scale_mult": True,
    "precondition_output": False,
    "rnn_state_decay": 0.0,
    "constant_loss": False,
    "clip_param_scale_amount": None,
}


def gin_config(
    bindings: Mapping[tuple[str, str], object], known: frozenset[str], source: object
) -> tuple[str | None, dict[str, Any]]:
    """Takes architecture and config out of the bindings of a `config.gin`.

    Args:
      bindings: (name, key) -> value.
      known: the config keys of all architectures.
      source: the file, for the message.

    Returns:
      The architecture, None where the file names no optimizer that is known here, and its config.

    Raises:
      WeightsError: the optimizer has an argument set that no optimizer here implements.
    """
    reference = bindings.get(("run_train", "lopt"))
    names = {name for name, _ in bindings if name in CLASSES}
    name = reference[1:] if isinstance(reference, str) and reference.startswith("@") else ""
    if name not in CLASSES:
        if len(names) != 1:
            return None, {}
        (name,) = names
    config: dict[str, Any] = {}
    for (owner, argument), value in bindings.items():
        if owner != name:
            continue
        if name == "HyperV2" and argument in _FIXED_OF_HYPER:
            if value != _FIXED_OF_HYPER[argument]:
                raise weights_error(
                    source,
                    expected=f"{name}.{argument} = {_FIXED_OF_HYPER[argument]}, the only value "
                    "implemented here",
                    found=brief(value),
                )
            continue
        config |= {key: value for key in _keys(name, argument) if key in known}
    return CLASSES[name], config


def gin_text(architecture: str, config: Mapping[str, Any]) -> str | None:
    """The `config.gin` of a config: the inverse of reading one.

    Args:
      architecture: the architecture.
      config: its complete config.

    Returns:
      The text; None where no class of the original is configured so.

    Raises:
      ValueError: a value that is fixed there is another here.
    """
    name = next((name for name, of in CLASSES.items() if of == architecture), None)
    if name is None:
        return None
    defaults = schema_of(architecture, "architecture").defaults
    fixed = _NOT_THERE.get(name, ())
    for key in fixed:
        if config[key] != defaults[key]:
            raise ValueError(
                f"config: {name} has {key} = {defaults[key]} fixed; found {config[key]}."
            )
    arguments = {keys: argument for argument, keys in _renamed(name).items()}
    lines, left = [], [key for key in config if key not in fixed]
    for keys, argument in arguments.items():
        if set(keys) <= set(left):
            values = {config[key] for key in keys}
            if len(values) > 1:
                raise ValueError(f"config: {name} has one {argument} for {keys}; found {values}.")
            lines.append(f"{name}.{argument} = {values.pop()!r}")
            left = [key for key in left if key not in keys]
    # an argument of one of two codes: written where it says something
    optional = {"ff_mult"}
    left = [key for key in left if key not in optional or config[key] != defaults[key]]
    lines += [f"{name}.{key} = {config[key]!r}" for key in left]
    return "".join(f"{line}\n" for line in [*sorted(lines), f"run_train.lopt = @{name}()"])


def _renamed(name: str) -> Mapping[str, tuple[str, ...]]:
    return _RENAMED.get(name, {})


def _keys(name: str, argument: str) -> tuple[str, ...]:
    return _renamed(name).get(argument, (argument,))
