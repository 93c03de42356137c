"""Leaves that hold the layers of a scanned model, where Flax's names tell, and a word about them.

It decides nothing: `stacked_axes` does. It says what is likely to be a mistake, once, in the log.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax.partition import say_once

# How flax.linen names a module that nn.scan or nn.vmap made of a class, if the user does not.
_OF_LINEN = re.compile(r"(Scan|Vmap)[A-Z]\w*_\d+")
# Names of an axis of layers, as in metadata_params={nn.PARTITION_NAME: "layers"}.
_OF_AXES = re.compile(
    r"(layers?|blocks?|stack(ed)?|scan(ned)?|repeats?|depth)(_.*)?|.*_(layers|scan)"
)
# Names of a subtree that scans of hand-written models have.
_OF_SUBTREES = re.compile(r"(layers|blocks|layer_stack|stack(ed)?(_\w+)?|scan(ned)?(_\w+)?)")
# NNX keeps the names of axes in a variable's metadata; older names last.
_METADATA = ("out_sharding", "sharding", "sharding_names")


class _Leaf(NamedTuple):
    path: tuple[str, ...]  # keys of the tree, without what is inside a box
    shape: tuple[int, ...]
    axis: str | None  # the name of the first axis


def say_stacks(params: Any, stacked_axes: Any) -> None:
    """Says in the log where `stacked_axes` seems to be forgotten, or to be given too widely.

    Args:
      params: pytree of arrays, or of anything with a shape; in Flax's boxes, where it has any.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.
    """
    leaves = _leaves(params)
    if stacked_axes is None:
        prefixes = scanned_subtrees(params)
        if prefixes:
            names = sorted({"".join(f"[{key!r}]" for key in prefix) for prefix in prefixes})
            tests = " or ".join(f"{name!r} in jax.tree_util.keystr(path)" for name in names)
            say_once(
                f"{', '.join(names) or 'params'}: the first axis of these leaves seems to be one "
                "of layers. Without stacked_axes each leaf is one tensor, whose statistics mix its "
                f"layers. stacked_axes={f'lambda path, leaf: int({tests})' if tests else 1} treats "
                "each layer as the tensor that it is; stacked_axes=0 says that all is right."
            )
    elif isinstance(stacked_axes, int | np.integer) and stacked_axes > 0:
        stacks = {leaf.shape[:stacked_axes] for leaf in leaves}
        if len(stacks) > 1:
            name, shape = min(
                (("".join(f"[{key!r}]" for key in leaf.path), leaf.shape) for leaf in leaves),
                key=lambda item: len(item[1]),
            )
            say_once(
                f"stacked_axes={stacked_axes} holds for every leaf, and their first axes differ: "
                f"{', '.join(map(str, sorted(stacks)))}. The leaf {name} of shape {shape} is split "
                f"into {int(np.prod(shape[:stacked_axes]))} tensors of shape "
                f"{shape[stacked_axes:]}. Where some leaves alone are stacks, give a function: "
                "stacked_axes=lambda path, leaf: int('layers' in jax.tree_util.keystr(path))."
            )


def scanned_subtrees(params: Any) -> list[tuple[str, ...]]:
    """The paths of subtrees all of whose leaves have a first axis of layers, as far as names tell.

    Args:
      params: as in `say_stacks`.

    Returns:
      Keys from the root, shortest first; none of them is inside of another.
    """
    leaves = _leaves(params)
    subtrees: dict[tuple[str, ...], list[_Leaf]] = {}
    for leaf in leaves:
        for n in range(len(leaf.path) + 1):
            subtrees.setdefault(leaf.path[:n], []).append(leaf)
    found = [
        _widened(leaf, subtrees)
        for leaf in leaves
        if leaf.axis is not None and _OF_AXES.fullmatch(leaf.axis)
    ]
    for path, inside in subtrees.items():
        key = path[-1] if path else ""
        is_of_linen = _OF_LINEN.fullmatch(key)
        is_of_others = _OF_SUBTREES.fullmatch(key) and _has_matrices_and_vectors(inside)
        if (is_of_linen or is_of_others) and _one_length(inside):
            found.append(path)
    outermost: list[tuple[str, ...]] = []
    for path in sorted(found, key=lambda path: (len(path), path)):
        if not any(path[: len(outer)] == outer for outer in outermost):
            outermost.append(path)
    return outermost


def _widened(leaf: _Leaf, subtrees: dict[tuple[str, ...], list[_Leaf]]) -> tuple[str, ...]:
    """The largest subtree around a leaf whose leaves all have its length."""
    ends = range(len(leaf.path) + 1)
    return next(leaf.path[:n] for n in ends if _one_length(subtrees[leaf.path[:n]]))


def _one_length(leaves: Sequence[_Leaf]) -> bool:
    """Whether the first axes of all leaves have one length."""
    return all(leaf.shape for leaf in leaves) and len({leaf.shape[0] for leaf in leaves}) == 1


def _has_matrices_and_vectors(leaves: Sequence[_Leaf]) -> bool:
    """Whether there are leaves of rank two, vectors of every layer, and of rank three and more."""
    ranks = {len(leaf.shape) for leaf in leaves}
    return min(ranks) == 2 and max(ranks) >= 3


def _leaves(params: Any) -> list[_Leaf]:
    with_paths = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda x: _axes_of_box(x) is not None
    )
    out = []
    for path, x in with_paths:
        axes = _axes_of_box(x)
        array = next(iter(jax.tree.leaves(x)), x)
        keys = tuple(_key(entry) for entry in path)
        out.append(_Leaf(keys, tuple(np.shape(array)), axes[0] if axes else None))
    return out


def _key(entry: Any) -> str:
    return str(next(getattr(entry, k) for k in ("key", "name", "idx") if hasattr(entry, k)))


def _axes_of_box(x: Any) -> tuple[str | None, ...] | None:
    """The names of a boxed array's axes, of linen's boxes and NNX's variables; None of others."""
    axes = getattr(x, "names", None) if hasattr(type(x), "replace_boxed") else None
    if axes is None and hasattr(type(x), "get_metadata"):
        metadata = x.get_metadata()
        axes = next((metadata[key] for key in _METADATA if metadata.get(key)), ())
    if axes is None:
        return None
    axes = getattr(axes, "spec", axes)  # of a NamedSharding
    return tuple(axis if isinstance(axis, str) else None for axis in axes)
