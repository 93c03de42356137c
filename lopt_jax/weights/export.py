"""Weights in the formats of other codes."""

from __future__ import annotations

import os
from pathlib import Path

from lopt_jax.brief import brief
from lopt_jax.weights.base import Weights
from lopt_jax.weights.original_export import THETA, export_original
from lopt_jax.weights.pylo import MODEL, export_pylo
from lopt_jax.weights.schema import validate
from lopt_jax.weights.sources import KNOWN_NAMES, MLP_FOLDER, RNN_FOLDER, local_folder
from lopt_jax.weights.store import DESCRIPTION

FORMATS = {"pylo": export_pylo, "original": export_original}


def export_weights(weights: Weights, path: str | os.PathLike[str], format: str = "pylo") -> None:
    """Writes weights in the layout that another code loads.

    Args:
      weights: the weights; for PyLO of small_fc_lopt, mulo, elo, velo, celo2 or elo_celo2.
      path: the folder to write into; ~ is expanded. Files of the same names are replaced. Beside
        them is a card, `README.md`.
      format: "pylo" for what PyLO loads from the Hugging Face Hub: `model.safetensors` with
        `config.json`, for velo, which PyLO keeps in two models, the folders VeLO_RNN and VeLO_MLP;
        "original" for google/learned_optimization and amoudgl/celo: `theta.state`, flax msgpack,
        with `config.gin`.

    Raises:
      ValueError: another format; an architecture, a number of decays or a setting that the other
        code has not.
      WeightsError: the weights are not valid, or `path` is an address.
      FileExistsError: the folder holds weights in another layout, which would be read in place of
        these.
    """
    if format not in tuple(FORMATS):
        choices = " or ".join(map(repr, FORMATS))
        raise ValueError(f"format: expected {choices}, found {brief(format)}.")
    folder = local_folder(path)
    weights = validate(weights, f"weights to export to {folder}")
    _refuse_other_layouts(folder, _names(weights.architecture, format))
    FORMATS[format](weights, folder)


def _names(architecture: str, format: str) -> tuple[str, ...]:
    """What tells a folder of these weights from others."""
    if format == "original":
        return (THETA,)
    return (RNN_FOLDER, MLP_FOLDER) if architecture == "velo" else (MODEL,)


def _refuse_other_layouts(folder: Path, own: tuple[str, ...]) -> None:
    known = dict.fromkeys((*KNOWN_NAMES, RNN_FOLDER, MLP_FOLDER, DESCRIPTION))
    others = [name for name in known if name not in own and (folder / name).exists()]
    if others:
        raise FileExistsError(
            f"{folder} holds other weights ({', '.join(others)}), which would be read in place of "
            "these: remove them, or take another folder."
        )
