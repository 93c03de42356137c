"""Width multipliers of the maximal update parametrisation (μP)."""

from typing import Any

import jax


def width_multipliers(params: Any, base_params: Any) -> Any:
    """How many times wider each matrix's input is than in a base model: what `mulo` divides by.

    Dimensions in which the two models differ are those that grow with the width. A leaf with two of
    them is matrix-like (a hidden layer), and its multiplier is the ratio of the first: in Flax,
    kernels are (..., inputs, outputs). Leaves with one or none are vector-like (biases, norms,
    input and output layers): their multiplier is 1.

    Args:
      params: the model's parameters, or their shapes (`jax.eval_shape`).
      base_params: the same of a narrower model of the same structure, at the width that the
        learning rate, or the learned optimizer, was tuned for.

    Returns:
      A tree of floats like params.

    Raises:
      ValueError: the trees or the ranks of a leaf differ, or a leaf differs in more than two
        dimensions.

    Reference:
      Yang et al., arXiv 2203.03466, table 8 (Adam); Belilovsky-Lab/pylo,
      `pylo/optim/MuLO_naive.py`.
    """
    if jax.tree.structure(params) != jax.tree.structure(base_params):
        raise ValueError(
            f"base_params: expected the structure of params, {jax.tree.structure(params)}; found "
            f"{jax.tree.structure(base_params)}."
        )

    def multiplier(path: Any, leaf: Any, base: Any) -> float:
        shape, base_shape = tuple(leaf.shape), tuple(base.shape)
        where = f"{jax.tree_util.keystr(path)} of shape {shape}, {base_shape} in the base model"
        if len(shape) != len(base_shape):
            raise ValueError(f"base_params: expected leaves of the same rank; found {where}.")
        grown = [
            i for i, sizes in enumerate(zip(shape, base_shape, strict=True)) if len({*sizes}) > 1
        ]
        if len(grown) > 2:
            raise ValueError(
                f"params: expected at most two dimensions that grow with the width; found {where}. "
                "Reshape the leaf, or grow fewer dimensions."
            )
        if len(grown) < 2:
            return 1.0
        return shape[grown[0]] / base_shape[grown[0]]

    return jax.tree_util.tree_map_with_path(multiplier, params, base_params)
