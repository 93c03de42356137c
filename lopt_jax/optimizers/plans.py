"""What an optimizer of matrices does with each leaf: its rule, its matrices, its rates, and why.

Plans are static: they follow from paths and shapes, and everything that one says is a constant of
the compiled update.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from lopt_jax.brief import brief

LEARNED, ADAMW = "learned", "adamw"
LAST_TWO = "last_two"

LabelFn = Callable[[Any, Any], str | None]  # from path and leaf to one of the two; None: as found
# from path and leaf to rows and columns, each an axis or several; None: as without the function
MatrixAxes = Callable[[Any, Any], Any] | Literal["last_two"] | None


class Matrix(NamedTuple):
    """Which axes of a leaf make the rows of its matrices, and which the columns.

    Axes may count from the end. Every other axis is a batch axis: one of separate matrices. It is
    what `optax.contrib.MuonDimensionNumbers` says with reduction axes and output axes.
    """

    rows: tuple[int, ...] = (-2,)
    columns: tuple[int, ...] = (-1,)

    def axes(self, rank: int) -> tuple[int, ...]:
        """All axes of the matrices of a leaf of this rank, from the first, in order."""
        return tuple(sorted(axis % rank for axis in (*self.rows, *self.columns)))


class LeafPlan(NamedTuple):
    """What is done with one leaf."""

    rule: str  # "learned" or "adamw"
    matrix: Matrix = Matrix()  # where its matrices are; AdamW does not read it
    scale: float | jax.Array = 1.0  # multiplies the step, beside the learning rate
    decay: float | jax.Array = 1.0  # multiplies the optimizer's weight decay
    reason: str = ""  # why, for people


# From the params, whose leaves have the shapes of whole arrays, and the number of stacked axes of
# each leaf, to a plan for each leaf, both in the order of `jax.tree.leaves`.
Plans = Callable[[Any, Sequence[int]], list[LeafPlan]]


def celo2_plans(label_fn: LabelFn | None, matrix_axes: MatrixAxes) -> Plans:
    """The plans of the Celo2 family: a leaf of rank two and more is learned, unless labelled.

    Args:
      label_fn: from path and leaf to "learned", "adamw" or None; None: "learned".
      matrix_axes: where the matrices are; None: as `flax_matrix` says.

    Returns:
      The function; it raises ValueError or TypeError naming argument and leaf.

    Raises:
      TypeError: an argument is none of those.
    """
    check_functions(label_fn, matrix_axes)

    def plan(path: Any, leaf: Any, stacked: int) -> LeafPlan:
        name = jax.tree_util.keystr(path)
        label = None if label_fn is None else label_fn(path, leaf)
        if label is not None and not (isinstance(label, str) and label in (LEARNED, ADAMW)):
            raise ValueError(
                f"label_fn: expected {LEARNED!r}, {ADAMW!r} or None, found {brief(label)} for the "
                f"leaf {name}."
            )
        rank = leaf.ndim - stacked
        if rank < 2:
            return LeafPlan(ADAMW, reason=f"of rank {rank}")
        if label == ADAMW:
            return LeafPlan(ADAMW, reason="label_fn says so")
        matrix, reason = matrix_of(matrix_axes, path, leaf, stacked)
        return LeafPlan(LEARNED, matrix, reason=reason)

    def plans(params: Any, stacked: Sequence[int]) -> list[LeafPlan]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return [plan(path, leaf, n) for (path, leaf), n in zip(leaves, stacked, strict=True)]

    return plans


def check_functions(label_fn: LabelFn | None, matrix_axes: MatrixAxes) -> None:
    """Raises TypeError, naming the argument, unless both are what optimizers of matrices take."""
    if label_fn is not None and not callable(label_fn):
        raise TypeError(f"label_fn: expected a function of path and leaf, found {brief(label_fn)}.")
    is_named = isinstance(matrix_axes, str) and matrix_axes == LAST_TWO
    if matrix_axes is not None and not is_named and not callable(matrix_axes):
        raise TypeError(
            f"matrix_axes: expected a function of path and leaf, {LAST_TWO!r} or None; found "
            f"{brief(matrix_axes)}."
        )


def matrix_of(matrix_axes: MatrixAxes, path: Any, leaf: Any, stacked: int) -> tuple[Matrix, str]:
    """Where the matrices of a leaf are, and why.

    Args:
      matrix_axes: from path and leaf to rows and columns, or to None: as `flax_matrix` says.
      path: of the leaf, as `jax.tree_util` gives it.
      leaf: the leaf, or its shape.
      stacked: its stacked axes.

    Returns:
      The axes, and the reason, for people.

    Raises:
      TypeError, ValueError: the function returned no axes of this leaf; the message names it.
    """
    chosen = matrix_axes(path, leaf) if callable(matrix_axes) else None
    if chosen is not None:
        name = jax.tree_util.keystr(path)
        return _checked(chosen, name, leaf.ndim, stacked), "matrix_axes says so"
    if matrix_axes == LAST_TWO:
        return Matrix(), "the last two axes, as matrix_axes says"
    return flax_matrix(path, leaf.shape[stacked:])


def _checked(chosen: Any, name: str, rank: int, stacked: int) -> Matrix:
    """A `Matrix` from what `matrix_axes` returned, or an error naming the leaf."""
    many = lambda x: (x,) if hasattr(x, "__index__") else tuple(x)  # noqa: E731
    try:
        rows, columns = map(many, chosen)
        axes = [axis.__index__() for axis in (*rows, *columns)]
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            "matrix_axes: expected the axes of rows and those of columns, such as ((0,), (1, 2)); "
            f"found {brief(chosen)} for the leaf {name}."
        ) from None
    in_range = all(-rank <= axis < rank for axis in axes)
    from_first = {axis % rank for axis in axes}
    if not rows or not columns or not in_range or len(from_first) < len(axes):
        raise ValueError(
            f"matrix_axes: expected different axes of the leaf {name}, which has {rank}, for rows "
            f"and columns; found {brief(chosen)}."
        )
    if min(from_first) < stacked:
        raise ValueError(
            f"matrix_axes: the leaf {name} has {stacked} stacked axes, which are in no matrix; "
            f"found {brief(chosen)}."
        )
    return Matrix(rows, columns)


# -- Flax's layers -------------------------------------------------------------------------------

_KERNEL = "kernel"  # the name of the weights of all of Flax's layers, linen and NNX
# layers from features to heads: those of Flax's attention, and names that people give their own
_TO_HEADS = ("query", "key", "value", "qkv", "kv", "q", "k", "v", "q_proj", "k_proj", "v_proj")
_FROM_HEADS = ("out", "o", "out_proj", "o_proj")


def names_of(path: Any) -> tuple[str, ...]:
    """The names on the way to a leaf; of metadata boxes, such as Flax's, they say nothing."""
    if path and isinstance(path[-1], jax.tree_util.FlattenedIndexKey):
        path = path[:-1]  # a box that names no fields
    elif path and getattr(path[-1], "name", None) in ("value", "raw_value"):
        path = path[:-1]  # the field of a box; a dictionary's key has no name
    named = lambda key: getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))  # noqa: E731
    return tuple(str(named(key)) for key in path)


def flax_matrix(path: Any, shape: Sequence[int]) -> tuple[Matrix, str]:
    """Where the matrices of a leaf are, by the names and shapes of Flax's layers.

    What is no kernel of Flax's by its name has its matrices in the last two axes. So has a kernel
    of rank three that nothing says more of: it may as well be a stack of layers or of experts.

    Args:
      path: of the leaf, as `jax.tree_util` gives it.
      shape: of one tensor: without stacked axes.

    Returns:
      Its matrices, axes counted from the end, and why.
    """
    names = names_of(path)
    rank = len(shape)
    if rank == 2:
        return Matrix(), "a matrix"
    if not names or names[-1] != _KERNEL:
        return Matrix(), "the last two axes: no kernel of Flax's by its name"
    layer = names[-2].lower() if len(names) > 1 else ""
    everything = range(-rank, 0)
    if "conv" in layer:
        return _split(everything, rank - 1), "a convolution's kernel: window and inputs by outputs"
    if layer in _TO_HEADS:
        is_fused = rank > 3 and "kv" in layer and shape[-4] > shape[-3]
        own = range(-4 if is_fused else -3, 0)  # (features, 3, heads, head size), or without the 3
        return _split(own, 1), "a kernel of attention: features by heads"
    if layer in _FROM_HEADS:
        return _split(range(-3, 0), 2), "a kernel of attention: heads by features"
    if shape[0] > shape[1] and shape[0] >= max(shape):
        return _split(everything, 1), "the longest axis by the others: a kernel from features"
    if rank > 3 and shape[0] == shape[1]:
        return _split(everything, rank - 1), "by its shape a convolution's kernel"
    return Matrix(), "the last two axes: its shape does not say more"


def _split(axes: Sequence[int], rows: int) -> Matrix:
    return Matrix(tuple(axes[:rows]), tuple(axes[rows:]))
