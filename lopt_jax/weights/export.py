"""Weights in the formats of other codes."""

from __future__ import annotations

import os

from lopt_jax.weights.base import Weights
from lopt_jax.weights.original_export import export_original
from lopt_jax.weights.pylo import export_pylo
from lopt_jax.weights.schema import validate
from lopt_jax.weights.sources import local_folder

FORMATS = {"pylo": export_pylo, "original": export_original}


def export_weights(weights: Weights, path: str | os.PathLike[str], format: str = "pylo") -> None:
    """Writes weights in the layout that another code loads.

    Args:
      weights: the weights; for PyLO of small_fc_lopt, mulo, elo, velo, celo2 or elo_celo2.
      path: the folder to write into; ~ is expanded. Beside the files is a card, `README.md`.
      format: "pylo" for what PyLO loads from the Hugging Face Hub: `model.safetensors` with
        `config.json`, for velo, which PyLO keeps in two models, the folders VeLO_RNN and VeLO_MLP;
        "original" for google/learned_optimization and amoudgl/celo: `theta.state`, flax msgpack,
        with `config.gin`.

    Raises:
      ValueError: another format; an architecture, a number of decays or a setting that the other
        code has not.
      WeightsError: the weights are not valid, or `path` is an address.
    """
    if format not in FORMATS:
        choices = " or ".join(map(repr, FORMATS))
        raise ValueError(f"format: expected {choices}, found {format!r}.")
    folder = local_folder(path)
    FORMATS[format](validate(weights, f"weights to export to {folder}"), folder)
