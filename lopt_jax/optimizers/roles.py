"""What a leaf of a model is - embedding, head, norm, bias or matrix - by its name and its shape.

Names are those of Flax's layers, linen and NNX, and those that people give their own. Shapes decide
where names do not: a kernel that nothing else reads is a head.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from lopt_jax.optimizers.plans import Matrix, flax_matrix, names_of

EMBEDDING, HEAD, NORM, BIAS, MATRIX, VECTOR = (
    "embedding",
    "head",
    "norm",
    "bias",
    "matrix",
    "vector",
)
ROLES = (EMBEDDING, HEAD, NORM, BIAS, MATRIX, VECTOR)

# Names of leaves whose layer multiplies an input by them: whatever the layer is called, they are no
# tables of embeddings.
_KERNELS = ("kernel", "w", "weight", "weights")
_BIASES = ("bias", "b", "offset", "beta")
_NORMS = ("scale", "gamma", "g")
_EMBEDDING_WORDS = ("wte", "wpe", "pos", "position", "positions", "positional", "posemb", "cls")
_HEAD_WORDS = ("head", "logits", "classifier", "unembed", "unembedding", "readout", "lmhead")
_BLOCK_WORDS = ("attention", "attn", "multi", "heads")


class Role(NamedTuple):
    """What a leaf is."""

    name: str  # one of `ROLES`
    reason: str  # how that was found out, for people
    matrix: Matrix = Matrix()  # of heads and matrices: its rows, the inputs, and its columns


class _Leaf(NamedTuple):
    path: Any
    names: tuple[str, ...]
    stack: tuple[int, ...]  # sizes of stacked axes
    shape: tuple[int, ...]  # of one tensor, without them


def roles_of(params: Any, stacked: Sequence[int]) -> list[Role]:
    """The role of every leaf.

    Args:
      params: the parameters, or a tree of shapes; whole arrays, not shards.
      stacked: the number of stacked axes of every leaf, in the order of `jax.tree.leaves`.

    Returns:
      A role for every leaf, in the same order.
    """
    leaves = [
        _Leaf(path, names_of(path), tuple(leaf.shape[:n]), tuple(leaf.shape[n:]))
        for (path, leaf), n in zip(
            jax.tree_util.tree_leaves_with_path(params), stacked, strict=True
        )
    ]
    roles = [_own_role(leaf) for leaf in leaves]
    roles = _without_depthwise(leaves, roles)
    heads = _heads(leaves, roles)
    return [
        Role(HEAD, heads[i], role.matrix) if i in heads else role for i, role in enumerate(roles)
    ]


def _words(name: str) -> list[str]:
    """The words of a name: of "lm_head", "LmHead" and "lmHead_0": lm and head."""
    parts = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return [word for word in re.split(r"[^a-zA-Z]+", parts.lower()) if word]


def _own_role(leaf: _Leaf) -> Role:
    """The role of a leaf by what it is itself; heads are still matrices."""
    name = leaf.names[-1].lower() if leaf.names else ""
    sizes = [size for size in leaf.shape if size != 1]
    if name in _BIASES:
        return Role(BIAS, f"named {name!r}")
    if name in _NORMS and len(sizes) < 2:
        return Role(NORM, f"named {name!r}")
    is_kernel = name in _KERNELS
    if _is_embedding(leaf, is_kernel) and len(leaf.shape) >= 2:
        return Role(EMBEDDING, f"named {'/'.join(leaf.names[-2:])!r}")
    if len(sizes) < 2:
        return Role(VECTOR, "one axis that is longer than one" if sizes else "a single number")
    matrix, reason = likely_matrix(leaf.path, leaf.shape)
    rows, columns = matrix_sizes(matrix, leaf.shape)
    if min(rows, columns) == 1:
        return Role(VECTOR, "its matrices have one row or one column")
    return Role(MATRIX, reason, matrix)


def likely_matrix(path: Any, shape: Sequence[int]) -> tuple[Matrix, str]:
    """Where the matrices of a leaf are, and why: leaves of any name as if they were Flax's kernels.

    Args:
      path: of the leaf, as `jax.tree_util` gives it.
      shape: of one tensor: without stacked axes.

    Returns:
      Its matrices, axes counted from the end, and why.
    """
    names = (*names_of(path)[:-1], "kernel")
    return flax_matrix(tuple(jax.tree_util.DictKey(name) for name in names), shape)


def matrix_sizes(matrix: Matrix, shape: Sequence[int]) -> tuple[int, int]:
    """The numbers of rows and of columns of the matrices of a tensor of a shape."""
    rank = len(shape)
    rows, columns = ([shape[axis % rank] for axis in axes] for axes in matrix)
    return math.prod(rows), math.prod(columns)


def _is_embedding(leaf: _Leaf, is_kernel: bool) -> bool:
    name = leaf.names[-1].lower() if leaf.names else ""
    layer = leaf.names[-2] if len(leaf.names) > 1 else ""
    own = _words(name)
    if is_kernel:  # a table where the layer is a table: not the kernels of an embedding network
        is_table = name != "kernel" and len(leaf.shape) == 2
        own = _words(layer) if is_table else []
    return any(word.startswith("emb") or word in _EMBEDDING_WORDS for word in own)


def _without_depthwise(leaves: Sequence[_Leaf], roles: Sequence[Role]) -> list[Role]:
    """Convolutions of one input channel as vectors, if there are several: the first may be grey."""
    single = [
        i
        for i, (leaf, role) in enumerate(zip(leaves, roles, strict=True))
        if role.name == MATRIX and len(leaf.shape) > 2 and leaf.shape[-2] == 1
        and len(role.matrix.columns) == 1
    ]  # fmt: skip
    if sum(math.prod(leaves[i].stack) for i in single) < 2:
        return list(roles)
    depthwise = Role(VECTOR, "a depthwise convolution: each channel has a filter of its own")
    return [depthwise if i in single else role for i, role in enumerate(roles)]


def _heads(leaves: Sequence[_Leaf], roles: Sequence[Role]) -> dict[int, str]:
    """The leaves that are heads, and why.

    Heads are found by name; else by size, where as many outputs as an embedding has rows; else
    where no other leaf reads as many inputs as the kernel has outputs.
    """
    kernels = [
        i
        for i, (leaf, role) in enumerate(zip(leaves, roles, strict=True))
        if not leaf.stack
        and len(leaf.shape) == 2
        and (role.name == MATRIX or role.name == VECTOR)
        and (not leaf.names or leaf.names[-1].lower() not in (*_BIASES, *_NORMS))
    ]
    named = {i: f"named {leaves[i].names[-2]!r}" for i in kernels if _is_named_head(leaves[i])}
    if named:
        return named
    rows = {
        leaf.shape[0]
        for leaf, role in zip(leaves, roles, strict=True)
        if role.name == EMBEDDING and len(leaf.shape) == 2 and leaf.shape[0] > leaf.shape[1]
    }
    sized = {
        i: f"as many outputs ({leaves[i].shape[1]}) as an embedding has rows"
        for i in kernels
        if leaves[i].shape[1] in rows and leaves[i].shape[1] > leaves[i].shape[0]
    }
    return sized or _last_layers(leaves, roles, kernels)


def _is_named_head(leaf: _Leaf) -> bool:
    if len(leaf.names) < 2:
        return False
    words = _words(leaf.names[-2])
    return any(w in _HEAD_WORDS for w in words) and not any(w in _BLOCK_WORDS for w in words)


def _last_layers(
    leaves: Sequence[_Leaf], roles: Sequence[Role], kernels: Sequence[int]
) -> dict[int, str]:
    """Kernels whose outputs nothing reads, those nearest to the root of the tree.

    A layer of a block, such as a gate whose outputs are halved, is deeper in the tree or comes
    several times in one shape.
    """
    inputs = collections.Counter(
        size for leaf, role in zip(leaves, roles, strict=True) for size in _inputs(leaf, role)
    )
    unread = [
        i
        for i in kernels
        if inputs[leaves[i].shape[1]] == int(leaves[i].shape[0] == leaves[i].shape[1])
    ]
    if not unread:
        return {}
    depth = min(len(leaves[i].names) for i in unread)
    nearest = [i for i in unread if len(leaves[i].names) == depth]
    shapes = collections.Counter(leaves[i].shape for i in nearest)
    return {
        i: f"no other layer reads its {leaves[i].shape[1]} outputs"
        for i in nearest
        if shapes[leaves[i].shape] == 1
    }


def _inputs(leaf: _Leaf, role: Role) -> set[int]:
    """How many inputs a leaf may read: a matrix its rows, a norm as many as it has elements."""
    if role.name == NORM:
        return {math.prod(leaf.shape)}
    if role.name == MATRIX:
        rows, _ = matrix_sizes(role.matrix, leaf.shape)
        # a convolution reads channels; an attention's output kernel reads heads or their product
        return {rows, *(leaf.shape[axis % len(leaf.shape)] for axis in role.matrix.rows)}
    if role.name == VECTOR and len(leaf.shape) == 2:
        return {leaf.shape[0]}
    return set()
