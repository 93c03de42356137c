"""Rows of arrays with a leading axis of tensors: joined and taken."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def concatenate(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays joined along their leading axis; a single one is no operation."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def join_trees(trees: Sequence[Any]) -> Any:
    """Trees of arrays with a leading axis, joined along it."""
    return jax.tree.map(lambda *xs: concatenate(xs), *trees)


def in_order(pieces: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Joins trees of arrays with a leading axis of tensors, given the positions of these."""
    joined = join_trees([tree for _, tree in pieces])
    positions = [k for members, _ in pieces for k in members]
    if positions == sorted(positions):
        return joined
    return take_rows(joined, np.argsort(positions))


def take_rows(tree: Any, positions: Any) -> Any:
    """Some tensors of arrays with a leading axis of tensors."""
    return jax.tree.map(lambda x: x[np.asarray(positions)], tree)
