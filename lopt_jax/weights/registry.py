"""`load_weights` and `resolve`: weights by name or path. (Remote names follow.)"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lopt_jax.weights.base import Weights, weights_error
from lopt_jax.weights.schema import check_structure
from lopt_jax.weights.store import is_checkpoint, load_checkpoint


def embedded_folder() -> Path:
    """Returns the folder of the weights that ship with the library."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "checkpoints"  # in a wheel
    return inside if inside.is_dir() else package.parent / "checkpoints"


def load_weights(name_or_path: str | os.PathLike[str]) -> Weights:
    """Loads weights by registered name, or from a path to a checkpoint of ours."""
    if isinstance(name_or_path, str) and name_or_path and not os.path.dirname(name_or_path):
        embedded = embedded_folder() / name_or_path
        if is_checkpoint(embedded):
            return load_checkpoint(embedded)
    return load_checkpoint(name_or_path)


def resolve(weights: str | os.PathLike[str] | Weights, architectures: Sequence[str]) -> Weights:
    """Returns the weights that an optimizer's constructor was given.

    Args:
      weights: a registered name, a path, or `Weights` (whose leaves may be traced).
      architectures: those that the optimizer can run.

    Returns:
      Weights of one of `architectures`, with a complete config and the right shapes.

    Raises:
      WeightsError: they cannot be loaded, or are of another architecture.
      TypeError: `weights` is none of the three.
    """
    if isinstance(weights, Weights):
        found, source = weights, "weights"
    elif isinstance(weights, str | os.PathLike):
        found, source = load_weights(weights), os.fspath(weights)
    else:
        raise TypeError(
            f"weights must be a name, a path, or lopt_jax.Weights, found {type(weights).__name__}"
        )
    if found.architecture not in architectures:
        raise weights_error(
            source,
            expected=f"weights of {' or '.join(architectures)}",
            found=f"weights of {found.architecture}",
            advice="Take the optimizer of that architecture, or other weights.",
        )
    return check_structure(found, source)
