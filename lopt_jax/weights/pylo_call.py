"""How an exported folder is used in PyLO: the call, with all that PyLO takes as arguments.

PyLO's files hold the network alone. Multipliers and decays are arguments of its optimizers, whose
defaults belong to other weights. Reference: the constructors in pylo/optim of Belilovsky-Lab/pylo.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lopt_jax.weights.base import Weights
from lopt_jax.weights.sources import MLP_FOLDER, RNN_FOLDER

DECAYS = ("momentum_decays", "rms_decays", "adafactor_decays")  # learned offsets


class _Optimizer(NamedTuple):
    module: str
    name: str
    first: str  # what the user fills in
    config: tuple[str, ...]  # of ours, that are arguments under the same names


_INITIAL = tuple(f"initial_{name}" for name in DECAYS)
_OPTIMIZERS = {
    "small_fc_lopt": _Optimizer(
        "AdafacLO_naive", "AdafacLO_naive", "params", ("exp_mult", "step_mult", *_INITIAL)
    ),
    "mulo": _Optimizer(
        "MuLO_naive", "MuLO_naive", "params", ("exp_mult", "step_mult", *_INITIAL)
    ),
    "elo": _Optimizer(
        "ELO_naive", "ELO_naive", "params, num_steps, step_mult=rate", ("exp_mult", *_INITIAL)
    ),
    "velo": _Optimizer(
        "Velo_naive", "VeLO", "params, num_steps=num_steps, lr=1.0",
        ("exp_mult", "step_mult", *_INITIAL),
    ),
    "celo2": _Optimizer(
        "CELO2_naive", "CELO2_naive", "params, num_steps, peak_lr=rate", ("exp_mult", *_INITIAL)
    ),
    "elo_celo2": _Optimizer(
        "ELO_CELO2_naive", "ELO_CELO2_naive", "params, num_steps, peak_lr=rate",
        ("exp_mult", *_INITIAL),
    ),
}  # fmt: skip


def pylo_call(weights: Weights, folder: str) -> str:
    """The lines of Python that use an exported folder in PyLO as the weights are meant.

    Args:
      weights: of an architecture that PyLO has.
      folder: the exported folder, as PyLO's arguments name it.

    Returns:
      An import, and a call with one argument a line.
    """
    optimizer = _OPTIMIZERS[weights.architecture]
    arguments = optimizer.first.split(", ")
    if weights.architecture == "velo":
        pairs = (("hf_key_rnn", RNN_FOLDER), ("hf_key_mlp", MLP_FOLDER))
        arguments += [f"{name}={f'{folder}/{part}'!r}" for name, part in pairs]
    else:
        arguments.append(f"hf_key={folder!r}")
    arguments += [f"{key}={weights.config[key]!r}" for key in optimizer.config]
    for key in DECAYS:
        if key in weights.params:
            numbers = ", ".join(map(str, np.asarray(weights.params[key], np.float32)))
            arguments.append(f"{key}=[{numbers}]")
    lines = [f"    {argument}," for argument in arguments]
    head = f"from pylo.optim.{optimizer.module} import {optimizer.name}"
    return "\n".join([head, "", f"optimizer = {optimizer.name}(", *lines, ")"])
