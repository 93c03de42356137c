"""Matrices by a learned and normalised rule, the rest by AdamW: what the Celo2 family shares."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib._muon import orthogonalize_via_newton_schulz

from lopt_jax import engine
from lopt_jax.features import velo_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import fixed_decays, network, per_parameter
from lopt_jax.rule import Rule
from lopt_jax.weights import Weights

ARCHITECTURES = ("celo2", "elo_celo2")  # one rule: their weights are of one kind
LEARNED, ADAMW = "learned", "adamw"
LabelFn = Callable[[Any, Any], str]  # from path and leaf to one of the two

_NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_NEWTON_SCHULZ_EPSILON = 1e-8
_NORMALIZER_EPSILON = 1e-9
_GRADIENT_CLIP = 1000.0


class AdamW(NamedTuple):
    """Settings of the AdamW of the leaves that are no matrices."""

    learning_rate_mult: Any  # its learning rate is this times the optimizer's
    weight_decay: Any
    betas: tuple[float, float]
    epsilon: float


def matrix_optimizer(
    weights: Weights,
    options: common.Options,
    adam: AdamW,
    *,
    label_fn: LabelFn | None,
    max_gradient_norm: Any,
    orthogonal: bool,
) -> optax.GradientTransformationExtraArgs:
    """Composes clipping, the learned rule, its normalisation, AdamW, weight decay, learning rate.

    Args:
      weights: weights of one of `ARCHITECTURES`.
      options: the arguments that all optimizers share.
      adam: AdamW's settings.
      label_fn: which leaves of rank two and more AdamW updates; None: none of them.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      orthogonal: whether the learned step is orthogonalised.

    Returns:
      An optax transformation; its state is that of `optax.partition`, chained if there is clipping.
    """
    common.check_number("adam_learning_rate_mult", adam.learning_rate_mult)
    common.check_number("adam_weight_decay", adam.weight_decay)
    if max_gradient_norm is not None:
        common.check_number("max_gradient_norm", max_gradient_norm)

    def normalize(step: jax.Array) -> jax.Array:
        return normalize_matrices(orthogonalize(step, options.precision) if orthogonal else step)

    def build(meta_parameters: Any, labels: Any, mask: Any) -> Any:
        learned = optax.chain(
            _learned_step(Weights(weights.architecture, weights.config, meta_parameters), options),
            optax.stateless(lambda steps, _: jax.tree.map(normalize, steps)),
            optax.add_decayed_weights(options.weight_decay, mask),
            optax.scale_by_learning_rate(options.learning_rate),
        )
        adamw = optax.chain(
            optax.clip(_GRADIENT_CLIP),
            optax.scale_by_adam(*adam.betas, eps=adam.epsilon),
            optax.add_decayed_weights(adam.weight_decay, mask),
            optax.scale_by_learning_rate(options.learning_rate),
            optax.scale(adam.learning_rate_mult),
        )
        both = optax.partition({LEARNED: learned, ADAMW: adamw}, labels)
        if max_gradient_norm is None:
            return both
        return optax.chain(common.clip_by_global_norm(max_gradient_norm), both)

    def init(params: Any) -> Any:
        labels = _labels(params, label_fn, options.stacked_axes)
        wide = jax.tree.map(common.to_float32, params)
        return build(weights.params, labels, options.weight_decay_mask).init(wide)

    def update(
        meta_parameters: Any, gradients: Any, state: Any, params: Any, value: Any
    ) -> tuple[Any, Any]:
        del value
        labels = _labels(params, label_fn, options.stacked_axes)
        mask = options.weight_decay_mask
        if callable(mask):  # optax would call it with the gradients, some of which may be None
            mask = mask(params)
        gradients, wide = (jax.tree.map(common.to_float32, x) for x in (gradients, params))
        updates, state = build(meta_parameters, labels, mask).update(gradients, state, wide)
        leaves, treedef = jax.tree.flatten(params)
        updates = [
            None if u is None else u.astype(p.dtype)
            for u, p in zip(treedef.flatten_up_to(updates), leaves, strict=True)
        ]
        return treedef.unflatten(updates), state

    return common.transformation(init, update, weights.params)


def _learned_step(
    weights: Weights, options: common.Options
) -> optax.GradientTransformationExtraArgs:
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
        gradient_clip=_GRADIENT_CLIP,
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


def _labels(params: Any, label_fn: LabelFn | None, stacked_axes: engine.StackedAxes) -> Any:
    """Tree like the params: which of the two updates a leaf."""
    tensors = iter(engine.tensors_of(params, stacked_axes))

    def label(path: Any, leaf: Any) -> str:
        if leaf.ndim - len(next(tensors).stack) < 2:
            return ADAMW
        chosen = LEARNED if label_fn is None else label_fn(path, leaf)
        if chosen not in (LEARNED, ADAMW):
            raise ValueError(
                f"label_fn: expected {LEARNED!r} or {ADAMW!r}, found {chosen!r} for the leaf "
                f"{jax.tree_util.keystr(path)}."
            )
        return chosen

    return jax.tree_util.tree_map_with_path(label, params)


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
    with jax.default_matmul_precision(precision.name.lower()):
        return orthogonalize_via_newton_schulz(
            step,
            jnp.asarray(_NEWTON_SCHULZ_COEFFICIENTS, step.dtype),
            _NEWTON_SCHULZ_STEPS,
            eps=_NEWTON_SCHULZ_EPSILON,
            dimension_numbers=MuonDimensionNumbers(reduction_axis=-2, output_axis=-1),
        )


def normalize_matrices(step: jax.Array) -> jax.Array:
    """Matrices of root mean square one, in the last two axes."""
    mean_square = jnp.mean(jnp.square(step), axis=(-2, -1), keepdims=True)
    return step * jax.lax.rsqrt(mean_square + _NORMALIZER_EPSILON)
