"""Weights in the files of the original code: `theta.state` with `config.gin`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lopt_jax.weights.arguments import gin_text
from lopt_jax.weights.base import Weights, thaw
from lopt_jax.weights.files import write
from lopt_jax.weights.hub import export_card
from lopt_jax.weights.layouts import (
    FEATURE_GROUPS,
    FIELDS,
    MODULE,
    MODULES,
    OWN_MODULE,
    SEPARATE_WEIGHTS,
    put,
    write_fields,
)
from lopt_jax.weights.sources import GIN

THETA = "theta.state"
CARD = "README.md"


def export_original(weights: Weights, folder: Path) -> None:
    """Writes `theta.state`, flax msgpack, with `config.gin` where the original has such a class.

    Args:
      weights: validated weights.
      folder: to write them into, with a card, `README.md`.

    Raises:
      ValueError: the original has no such architecture, or a value of config fixed to another.
    """
    if weights.architecture not in FIELDS:
        raise ValueError(
            "weights must be of an architecture that the original code has "
            f"({', '.join(FIELDS)}), found {weights.architecture!r}"
        )
    from flax.serialization import msgpack_serialize  # slow to import

    has_scalars = bool(thaw(weights.metadata).get(SEPARATE_WEIGHTS))
    gin = gin_text(weights.architecture, weights.config)
    if gin is not None and has_scalars:
        gin = (
            f"AdafacMLPLOpt.concat_weights = False\nAdafacMLPLOpt.{SEPARATE_WEIGHTS} = True\n{gin}"
        )
    theta = original_tree(weights.architecture, weights.params, has_scalars)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / THETA, msgpack_serialize(theta))
    if gin is not None:
        write(folder / GIN, gin.encode())
    card = export_card(weights, folder.name, "of google/learned_optimization and amoudgl/celo")
    write(folder / CARD, card.encode())


def original_tree(
    architecture: str, params: Mapping[str, Any], has_scalars: bool = False
) -> dict[str, Any]:
    """The original's tree of meta-parameters, the inverse of `original.convert_original`.

    Args:
      architecture: the architecture.
      params: in the canonical layout.
      has_scalars: whether every weight of the network is a scalar of its own
        (`make_separate_weights`).

    Returns:
      Nested dicts of float32 arrays.
    """
    tree: dict[str, Any] = {}
    write_fields(FIELDS[architecture], params, tree)
    if "mix" in params:  # HyperV2 computes a first mixing layer and discards it
        unused = {key: np.zeros_like(value) for key, value in params["mix"].items()}
        put(tree, ("rnn_params", "linear"), unused)
    layers = range(len(params.get("mlp", {})) // 2)
    if architecture in MODULES:
        for i, kind in itertools.product(layers, "wb"):
            path = (*MODULES[architecture], f"{MODULE}{i}", kind)
            put(tree, path, np.asarray(params["mlp"][f"{kind}{i}"]))
    elif architecture in OWN_MODULE:
        own = {name: np.asarray(array) for name, array in params["mlp"].items()}
        if "ff_mod_stack" in OWN_MODULE[architecture]:
            own |= _in_groups(own.pop("w0"))
        elif has_scalars:
            own = _in_scalars(own)
        put(tree, OWN_MODULE[architecture], own)
    return tree


def _in_groups(first: np.ndarray) -> dict[str, np.ndarray]:
    parts = np.split(first, np.cumsum(FEATURE_GROUPS)[:-1], axis=-2)
    return {f"w0__{i}": np.ascontiguousarray(part) for i, part in enumerate(parts)}


def _in_scalars(layers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "_".join(map(str, (name, *place))): np.asarray(array[place])
        for name, array in layers.items()
        for place in np.ndindex(array.shape)
    }
