"""Matrices by a learned and normalised rule, the rest by AdamW: what the Celo2 family shares."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.accumulators import Accumulators
from lopt_jax.features import velo_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.optimizers.per_parameter import (
    Functions,
    PerParameterState,
    fixed_decays,
    network,
    per_parameter,
)
from lopt_jax.partition import Partition, on_whole
from lopt_jax.reductions import mean
from lopt_jax.rule import Rule, product_precision
from lopt_jax.tensors import StackedAxes, arrays_like, is_box, per_leaf, tensors_of
from lopt_jax.weights import Weights

ARCHITECTURES = ("celo2", "elo_celo2")  # one rule: their weights are of one kind
LEARNED, ADAMW = "learned", "adamw"
LabelFn = Callable[[Any, Any], str]  # from path and leaf to one of the two

_NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_NEWTON_SCHULZ_EPSILON = 1e-8
_CONSTANT_DIAGONAL = 256  # rows of at most so large a matrix as a constant of the program
_NORMALIZER_EPSILON = 1e-9


class AdamW(NamedTuple):
    """Settings of the AdamW of the leaves that are no matrices."""

    learning_rate_mult: Any  # its learning rate is this times the optimizer's
    weight_decay: Any
    adam: AdamSettings


def matrix_optimizer(
    weights: Weights,
    options: common.Options,
    adamw: AdamW,
    *,
    label_fn: LabelFn | None,
    max_gradient_norm: Any,
    orthogonal: bool,
) -> optax.GradientTransformationExtraArgs:
    """The learned rule, normalised, for matrices; AdamW for the rest.

    Args:
      weights: weights of one of `ARCHITECTURES`.
      options: the arguments that all optimizers share.
      adamw: AdamW's settings.
      label_fn: which leaves of rank two and more AdamW updates; None: none of them.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      orthogonal: whether the learned step is orthogonalised.

    Returns:
      An optax transformation with state `PerParameterState`. Leaves of AdamW's have its moments as
      first momentum and as second moment, and one element in place of every other accumulator.
    """
    common.check_number("adam_learning_rate_mult", adamw.learning_rate_mult)
    common.check_number("adam_weight_decay", adamw.weight_decay)
    common.check_decays("adam_betas", adamw.adam.betas, 2)
    common.check_number("adam_epsilon", adamw.adam.epsilon)
    if label_fn is not None and not callable(label_fn):
        raise TypeError(f"label_fn: expected a function of path and leaf, found {label_fn!r}.")
    if max_gradient_norm is not None:
        common.check_number("max_gradient_norm", max_gradient_norm)
    stacked_axes = options.stacked_axes
    learned = _learned_step(weights, options)

    def init(params: Any) -> PerParameterState:
        state = learned.init(params)
        labels = _labels(params, label_fn, stacked_axes)
        accumulators = _without_unused(state.accumulators, labels)
        beta1, beta2 = adamw.adam.betas
        dtypes = [
            common.stored_dtype(options.accumulator_dtype, (beta,), are_squares)
            for beta, are_squares in ((beta1, False), (beta2, True))
        ]
        return state._replace(accumulators=_with_adam_dtypes(accumulators, labels, dtypes))

    def update(
        meta_parameters: Any, gradients: Any, state: PerParameterState, params: Any, value: Any
    ) -> tuple[Any, PerParameterState]:
        del value
        labels = _labels(params, label_fn, stacked_axes)
        leaves, treedef = jax.tree.flatten(params)
        wide = [common.to_float32(p) for p in leaves]
        given = jax.tree.map(common.to_float32, treedef.flatten_up_to(gradients))
        if max_gradient_norm is not None:
            clip = common.clip_by_global_norm(max_gradient_norm)
            given = treedef.flatten_up_to(clip.update(treedef.unflatten(given), None)[0])
        rate, decay = options.rates(state.count, params)
        adam_options = dataclasses.replace(options, weight_decay=adamw.weight_decay)
        _, adam_decay = adam_options.rates(state.count, params)
        of_learned = [
            g if label == LEARNED else None for g, label in zip(given, labels, strict=True)
        ]
        steps, state = learned.update(
            meta_parameters,
            treedef.unflatten(of_learned),
            state,
            treedef.unflatten(wide),
            value=None,
        )
        steps = treedef.flatten_up_to(steps)
        first, *others = state.accumulators.momentum
        momentum = arrays_like("state: momentum", first, params)
        second_moment = arrays_like(
            "state: second_moment", state.accumulators.second_moment, params
        )

        updates: list = []
        for i, entry in enumerate(tensors_of(params, stacked_axes)):
            if given[i] is None:
                updates.append(None)
                continue
            if labels[i] == LEARNED:
                step = _normalized(steps[i], options, orthogonal, entry.leaf_partition)
                mult, leaf_decay = 1.0, decay
            else:
                step, momentum[i], second_moment[i] = adam_step(
                    adamw.adam, given[i], momentum[i], second_moment[i], state.count
                )
                mult, leaf_decay = adamw.learning_rate_mult, adam_decay
            decayed = per_leaf(leaf_decay, entry, wide[i]) * wide[i]
            updates.append((-mult * (rate * step + decayed)).astype(leaves[i].dtype))
        accumulators = state.accumulators._replace(
            momentum=(treedef.unflatten(momentum), *others),
            second_moment=treedef.unflatten(second_moment),
        )
        return treedef.unflatten(updates), state._replace(accumulators=accumulators)

    return common.transformation(init, update, weights.params, PerParameterState)


def _without_unused(accumulators: Accumulators, labels: list[str]) -> Accumulators:
    """One element in place of what AdamW does not read; boxes lose their axes' names with it."""

    def shrink(label: str, x: Any) -> Any:
        if label == LEARNED:
            return x
        if not is_box(x):
            return jnp.zeros((1,), x.dtype)
        box = x.replace_boxed(jnp.zeros((1,), x.unbox().dtype))
        return box.replace(names=(None,)) if hasattr(box, "names") else box

    def shrink_tree(tree: Any) -> Any:
        label = iter(labels)
        return jax.tree.map(lambda x: shrink(next(label), x), tree, is_leaf=is_box)

    first, *others = accumulators.momentum
    return accumulators._replace(
        momentum=(first, *map(shrink_tree, others)),
        row=shrink_tree(accumulators.row),
        column=shrink_tree(accumulators.column),
    )


def _with_adam_dtypes(
    accumulators: Accumulators, labels: list[str], dtypes: Sequence[jnp.dtype]
) -> Accumulators:
    """AdamW's first and second moment in dtypes that hold averages of its decays."""

    def cast(tree: Any, dtype: jnp.dtype) -> Any:
        label = iter(labels)
        return jax.tree.map(lambda x: x if next(label) == LEARNED else x.astype(dtype), tree)

    first, *others = accumulators.momentum
    return accumulators._replace(
        momentum=(cast(first, dtypes[0]), *others),
        second_moment=cast(accumulators.second_moment, dtypes[1]),
    )


def _learned_step(weights: Weights, options: common.Options) -> Functions:
    """The rule's step, before it is normalised: an ascent direction."""
    config = weights.config
    rule = Rule(
        features=velo_features(
            len(config["initial_momentum_decays"]),
            rsqrt_epsilon=1e-8,
            normalizer_epsilon=_NORMALIZER_EPSILON,
            normalizer_axes="matrix",
        ),
        exp_mult=config["exp_mult"],
        gradient_clip=common.GRADIENT_CLIP,
        precision=options.precision,
    )
    return per_parameter(
        weights,
        rule,
        dataclasses.replace(options, weight_decay=0.0, weight_decay_mask=None),
        network=lambda meta, _: network(meta["mlp"]),
        decays=lambda _: fixed_decays(config),
        scales=lambda *_: (-1.0, 0.0),
    )


def _labels(params: Any, label_fn: LabelFn | None, stacked_axes: StackedAxes) -> list[str]:
    """Which of the two updates a leaf, in the order of the leaves."""
    labels = []
    for (path, leaf), entry in zip(
        jax.tree_util.tree_leaves_with_path(params),
        tensors_of(params, stacked_axes),
        strict=True,
    ):
        label = LEARNED if label_fn is None else label_fn(path, leaf)
        if label not in (LEARNED, ADAMW):
            raise ValueError(
                f"label_fn: expected {LEARNED!r} or {ADAMW!r}, found {label!r} for the leaf "
                f"{jax.tree_util.keystr(path)}."
            )
        labels.append(label if leaf.ndim - len(entry.stack) >= 2 else ADAMW)
    return labels


def _normalized(
    step: jax.Array, options: common.Options, orthogonal: bool, partition: Partition | None
) -> jax.Array:
    if orthogonal:  # no sum over shards: a product of the matrix with itself
        step = on_whole(lambda x: orthogonalize(x, options.precision), step, partition)
    return normalize_matrices(step, partition)


def orthogonalize(step: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """Nearly orthogonal matrices with the singular vectors of those in the last two axes.

    Args:
      step: (..., m, n).
      precision: of the matrix products.

    Returns:
      The same shape; singular values about one, by five Newton-Schulz iterations.
    """
    if not step.size:
        return step
    norm = jnp.sqrt(jnp.sum(jnp.square(step), axis=(-2, -1), keepdims=True))
    x = step / (norm + _NEWTON_SCHULZ_EPSILON)
    m, n = step.shape[-2:]
    # An iteration is a x + b g x + c g g x for g = x x'. The square completed, it is three products
    # with a number added to the diagonal in between. Where that is a constant, not made of an iota,
    # XLA's GPU backend takes it into the products: three kernels, where the three terms are five.
    a, b, c = _NEWTON_SCHULZ_COEFFICIENTS
    diagonal = (np if min(m, n) <= _CONSTANT_DIAGONAL else jnp).eye(min(m, n), dtype=x.dtype)
    inner, outer = diagonal * (b / (2 * c)), diagonal * (a - b * b / (4 * c))
    product = functools.partial(jnp.matmul, precision=product_precision(precision, x.dtype))
    for _ in range(_NEWTON_SCHULZ_STEPS):
        transposed = jnp.swapaxes(x, -2, -1)
        gram = product(x, transposed) if m <= n else product(transposed, x)
        shifted = gram + inner
        factor = c * product(shifted, shifted) + outer
        x = product(factor, x) if m <= n else product(x, factor)
    return x


def normalize_matrices(step: jax.Array, partition: Partition | None = None) -> jax.Array:
    """Matrices of root mean square one, in the last two axes, also from shards of them."""
    axes = (step.ndim - 2, step.ndim - 1)
    mean_square = mean(jnp.square(step), axes, partition, keepdims=True)
    return step * jax.lax.rsqrt(mean_square + _NORMALIZER_EPSILON)
