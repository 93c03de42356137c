"""Matrices by a learned and normalised rule, the rest by AdamW: what the Celo2 family shares."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax.accumulators import Accumulators
from lopt_jax.applying import LearnedTransformation
from lopt_jax.boxes import content, is_box, reboxed
from lopt_jax.context import Tracing
from lopt_jax.features import NormalizerAxes, velo_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.optimizers.fading import SquaredNorms, fading_factor, no_norms, with_norm
from lopt_jax.optimizers.linear import linear_rule
from lopt_jax.optimizers.orthogonal import NewtonSchulz, orthogonal_leaves
from lopt_jax.optimizers.per_parameter import (
    Functions,
    PerParameterState,
    fixed_decays,
    network,
    per_parameter,
)
from lopt_jax.optimizers.plans import LEARNED, LeafPlan, Matrix, Plans
from lopt_jax.partition import Partition
from lopt_jax.reductions import mean
from lopt_jax.rules.linear import NORMALIZER_EPSILON, normalized
from lopt_jax.rules.newton_schulz import QUINTIC, Coefficients, check_precision
from lopt_jax.rules.rule import Rule
from lopt_jax.tensors import (
    StackedAxes,
    Tensors,
    arrays_like,
    check_shapes,
    leaves_like,
    per_leaf,
    tensors_of,
)
from lopt_jax.weights import Weights

ARCHITECTURES = ("celo2", "elo_celo2")  # one rule: their weights are of one kind
LINEAR = "linear"


class AdamW(NamedTuple):
    """Settings of the AdamW of the leaves that are no matrices."""

    learning_rate_mult: Any  # its learning rate is this times the optimizer's
    weight_decay: Any
    adam: AdamSettings


class FadingState(NamedTuple):
    """State of lopt."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # trees like the params
    norms: SquaredNorms  # of gradients


def matrix_optimizer(
    weights: Weights,
    options: common.Options,
    adamw: AdamW,
    *,
    plans: Plans,
    max_gradient_norm: Any,
    orthogonal: bool,
    precision: str = "auto",
    coefficients: Coefficients = QUINTIC,
    decay: common.ScalarOrSchedule | None = None,
    still_where_zero: bool = False,
    cautious_decay: bool = False,
    fading: Any = None,
) -> LearnedTransformation:
    """The learned rule, normalised, for matrices; AdamW for the rest.

    A leaf changes by -(rate * scale * step + decay * leaf_decay * parameter), where scale and
    leaf_decay are its plan's.

    Args:
      weights: weights of one of `ARCHITECTURES`.
      options: the arguments that all optimizers share.
      adamw: AdamW's settings.
      plans: what is done with each leaf.
      max_gradient_norm: gradients are scaled down to this global norm; None: not.
      orthogonal: whether the learned step is orthogonalised.
      precision: of the products that do that, as `newton_schulz`'s; `options` has the rule's.
      coefficients: of the polynomials that do that.
      decay: the fraction of a parameter that a step takes off, whatever the learning rate, a number
        or a schedule; None: weight decay times learning rate, as `options` and `adamw` say.
      still_where_zero: whether a matrix whose gradient is zero everywhere makes no step.
        Normalised, what the rule proposes for it would be as large as any other step.
      cautious_decay: whether learned leaves decay only where the step shrinks them, element by
        element (arXiv 2510.12402).
      fading: the threshold of `fading_factor`, which multiplies all steps. Where it is below one,
        the fraction 1 - factor of the decay is not cautious. None: steps have their full size.

    Returns:
      An optax transformation with state `PerParameterState`, with `fading` `FadingState`. Leaves of
      AdamW's have its moments as first momentum and as second moment, and one element in place of
      every other accumulator.
    """
    common.check_number("adam_learning_rate_mult", adamw.learning_rate_mult)
    common.check_number("adam_weight_decay", adamw.weight_decay)
    common.check_decays("adam_betas", adamw.adam.betas, 2)
    common.check_number("adam_epsilon", adamw.adam.epsilon)
    if max_gradient_norm is not None:
        common.check_number("max_gradient_norm", max_gradient_norm)
    check_precision(precision)
    stacked_axes = options.stacked_axes
    is_linear = weights.architecture == LINEAR
    of_axes = linear_rule if is_linear else _learned_step
    learned_step = functools.cache(functools.partial(of_axes, weights, options))

    def init(params: Any) -> PerParameterState | FadingState:
        state = learned_step("matrix").init(params)
        of_leaves = plans_of(plans, params, stacked_axes)
        accumulators = _without_unused(state.accumulators, of_leaves, is_linear)
        beta1, beta2 = adamw.adam.betas
        dtypes = [
            common.stored_dtype(options.accumulator_dtype, (beta,), are_squares)
            for beta, are_squares in ((beta1, False), (beta2, True))
        ]
        accumulators = _with_adam_dtypes(accumulators, of_leaves, dtypes)
        if fading is None:
            return state._replace(accumulators=accumulators)
        return FadingState(state.count, accumulators, no_norms())

    def update(
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: PerParameterState | FadingState,
        params: Any,
        value: Any,
    ) -> tuple[Any, PerParameterState | FadingState]:
        del value
        tensors = tensors_of(params, stacked_axes, tracing.shards)
        of_leaves = _plans_of(plans, params, tensors)
        leaves, treedef = jax.tree.flatten(params)
        given = jax.tree.map(common.to_float32, treedef.flatten_up_to(gradients))
        # leaves without a gradient may be anything, such as random keys
        wide = [
            p if g is None else common.to_float32(p) for p, g in zip(leaves, given, strict=True)
        ]
        count = optax.safe_increment(state.count)
        given, norms, factor = _clipped(
            state, tracing, treedef, given, count, max_gradient_norm, fading
        )
        steps, accumulators = _learned_steps(
            learned_step, tracing, meta_parameters, treedef, given, state, wide, tensors, of_leaves
        )
        if orthogonal:
            paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            how = NewtonSchulz(coefficients, precision)
            steps = _orthogonalized(steps, of_leaves, tensors, paths, how, tracing)
        steps = _normalized(steps, given, of_leaves, tensors, still_where_zero)
        steps, accumulators = _with_adam_steps(
            adamw.adam, steps, given, accumulators, params, of_leaves, count
        )
        rate, decay_of_learned, decay_of_adam = _rates(options, adamw, decay, state.count, params)
        rate = rate * factor

        def change(plan: LeafPlan, entry: Tensors, step: jax.Array, parameter: jax.Array) -> Any:
            is_learned = plan.rule == LEARNED
            decay_of_leaf = per_leaf(
                decay_of_learned if is_learned else decay_of_adam, entry, parameter
            )
            decayed = plan.decay * decay_of_leaf * parameter
            if cautious_decay and is_learned:
                decayed = jnp.where(step * parameter >= 0, decayed, (1 - factor) * decayed)
            mult = 1.0 if is_learned else adamw.learning_rate_mult
            return -mult * (plan.scale * rate * step + decayed)

        updates = [
            None if step is None else change(plan, entry, step, parameter).astype(leaf.dtype)
            for plan, entry, step, parameter, leaf in zip(
                of_leaves, tensors, steps, wide, leaves, strict=True
            )
        ]
        new_state: PerParameterState | FadingState = PerParameterState(count, accumulators)
        if norms is not None:
            new_state = FadingState(count, accumulators, norms)
        return treedef.unflatten(updates), new_state

    state_type = PerParameterState if fading is None else FadingState
    tx = common.transformation(options, init, update, weights.params, state_type)
    of_leaves = functools.partial(plans_of, plans, stacked_axes=stacked_axes)
    return LearnedTransformation.of(
        tx.init,
        tx.update,
        None,
        plans=of_leaves,
        without_kernels=learned_step("matrix").without_kernels,
    )


def _clipped(
    state: PerParameterState | FadingState,
    tracing: Tracing,
    treedef: Any,
    gradients: Sequence[Any],
    count: jax.Array,
    max_norm: Any,
    threshold: Any,
) -> tuple[Sequence[Any], SquaredNorms | None, Any]:
    """Gradients scaled down to a global norm; its averages, and how steps fade with them.

    Args:
      state: before this update.
      tracing: what steers the trace.
      treedef: of the params.
      gradients: float32, one for each leaf; None: it has none.
      count: () int32, updates made, this one included.
      max_norm: what gradients are scaled down to; None: they are not.
      threshold: of `fading_factor`.

    Returns:
      The gradients; the averages with those of this update, and the factor of all steps, None and
      one where steps do not fade.
    """
    if max_norm is None and not isinstance(state, FadingState):
        return gradients, None, 1.0
    tree = treedef.unflatten(gradients)
    squared = common.squared_global_norm(tracing, tree)
    if max_norm is not None:
        gradients = treedef.flatten_up_to(common.clipped(tree, squared, max_norm))
    if not isinstance(state, FadingState):
        return gradients, None, 1.0
    left = jnp.float32(squared)
    if max_norm is not None:
        left = jnp.minimum(left, jnp.square(max_norm))
    norms = with_norm(state.norms, left, count)
    return gradients, norms, fading_factor(norms, count, threshold)


def _rates(
    options: common.Options,
    adamw: AdamW,
    decay: common.ScalarOrSchedule | None,
    count: jax.Array,
    params: Any,
) -> tuple[Any, Any, Any]:
    """The learning rate, and the decays of learned leaves and of AdamW's."""
    rate, of_learned = options.rates(count, params)
    if decay is None:
        adam_options = dataclasses.replace(options, weight_decay=adamw.weight_decay)
        return rate, of_learned, adam_options.rates(count, params)[1]
    of_all = common.weight_decay_of_tensors(
        decay(count) if callable(decay) else decay,
        options.weight_decay_mask,
        params,
        options.stacked_axes,
    )
    return rate, of_all, of_all


def plans_of(plans: Plans, params: Any, stacked_axes: StackedAxes) -> list[LeafPlan]:
    """The plan of every leaf, in the order of the leaves."""
    return _plans_of(plans, params, tensors_of(params, stacked_axes))


def _plans_of(plans: Plans, params: Any, tensors: Sequence[Tensors]) -> list[LeafPlan]:
    """The same, of leaves that may be shards."""
    leaves, treedef = jax.tree.flatten(params)
    whole = [
        leaf
        if entry.leaf_partition is None
        else jax.ShapeDtypeStruct(entry.leaf_partition.shape, leaf.dtype)
        for leaf, entry in zip(leaves, tensors, strict=True)
    ]
    return plans(treedef.unflatten(whole), [len(entry.stack) for entry in tensors])


def _without_unused(
    accumulators: Accumulators, plans: Sequence[LeafPlan], is_linear: bool
) -> Accumulators:
    """One element in place of what a leaf's rule does not read; boxes lose their axes' names.

    The linear rule reads momenta alone.
    """

    def shrink(x: Any) -> Any:
        if not is_box(x):
            return jnp.zeros((1,), x.dtype)
        return reboxed(x, jnp.zeros((1,), content(x).dtype), (None,))

    def only_of(is_read: Callable[[LeafPlan], bool], tree: Any) -> Any:
        of_leaf = iter(plans)
        return jax.tree.map(
            lambda x: x if is_read(next(of_leaf)) else shrink(x), tree, is_leaf=is_box
        )

    of_learned = functools.partial(only_of, lambda plan: plan.rule == LEARNED)
    of_second_moment = functools.partial(only_of, lambda plan: plan.rule != LEARNED)
    first, *others = accumulators.momentum
    second_moment = accumulators.second_moment
    return accumulators._replace(
        momentum=(first, *map(of_learned, others)),
        second_moment=of_second_moment(second_moment) if is_linear else second_moment,
        row=of_learned(accumulators.row),
        column=of_learned(accumulators.column),
    )


def _with_adam_dtypes(
    accumulators: Accumulators, plans: Sequence[LeafPlan], dtypes: Sequence[jnp.dtype]
) -> Accumulators:
    """AdamW's first and second moment in dtypes that hold averages of its decays."""

    def cast(tree: Any, dtype: jnp.dtype) -> Any:
        of_leaf = iter(plans)
        return jax.tree.map(lambda x: x if next(of_leaf).rule == LEARNED else x.astype(dtype), tree)

    first, *others = accumulators.momentum
    return accumulators._replace(
        momentum=(cast(first, dtypes[0]), *others),
        second_moment=cast(accumulators.second_moment, dtypes[1]),
    )


def _learned_step(
    weights: Weights, options: common.Options, normalizer_axes: NormalizerAxes
) -> Functions:
    """The rule's step, before it is normalised: an ascent direction."""
    config = weights.config
    rule = Rule(
        features=velo_features(
            len(config["initial_momentum_decays"]),
            rsqrt_epsilon=1e-8,
            normalizer_epsilon=NORMALIZER_EPSILON,
            normalizer_axes=normalizer_axes,
        ),
        exp_mult=config["exp_mult"],
        gradient_clip=common.GRADIENT_CLIP,
        precision=options.precision,
        hidden_size=config["hidden_size"],
    )
    return per_parameter(
        weights,
        rule,
        dataclasses.replace(options, weight_decay=0.0, weight_decay_mask=None),
        network=lambda meta, _: network(meta["mlp"]),
        decays=lambda _: fixed_decays(config),
        scales=lambda *_: (-1.0, 0.0),
    )


def _learned_steps(
    learned_step: Callable[[NormalizerAxes], Functions],
    tracing: Tracing,
    meta_parameters: Any,
    treedef: Any,
    gradients: Sequence[Any],
    state: PerParameterState | FadingState,
    params: Sequence[Any],
    tensors: Sequence[Tensors],
    plans: Sequence[LeafPlan],
) -> tuple[list[Any], Accumulators]:
    """The rule's steps of the leaves that are planned so, None of others; the new accumulators.

    Gradients and params are lists of leaves. Leaves whose features are normalised over the same
    axes, counted from the end, are updated together.
    """
    axes = _normalizer_axes(plans, tensors)
    kinds = dict.fromkeys(x for x in axes if x is not None) or {"matrix": None}
    steps, accumulators = [None] * len(plans), state.accumulators
    for kind in kinds:
        of_kind = [g if x == kind else None for g, x in zip(gradients, axes, strict=True)]
        updates, new = learned_step(kind).update(
            tracing,
            meta_parameters,
            treedef.unflatten(of_kind),
            PerParameterState(state.count, accumulators),
            treedef.unflatten(params),
            value=None,
        )
        accumulators = new.accumulators
        made = treedef.flatten_up_to(updates)
        steps = [old if x is None else x for old, x in zip(steps, made, strict=True)]
    return steps, accumulators


def _normalizer_axes(
    plans: Sequence[LeafPlan], tensors: Sequence[Tensors]
) -> list[NormalizerAxes | None]:
    """The axes of tensors over which their features are normalised: those of their matrices.

    None for leaves of AdamW's.
    """

    def of_leaf(plan: LeafPlan, entry: Tensors) -> NormalizerAxes | None:
        if plan.rule != LEARNED:
            return None
        rank = len(entry.stack) + len(entry.shape)
        axes = plan.matrix.axes(rank)
        if axes == (rank - 2, rank - 1):
            return "matrix"
        return "tensor" if len(axes) == len(entry.shape) else tuple(a - rank for a in axes)

    out = [of_leaf(plan, entry) for plan, entry in zip(plans, tensors, strict=True)]
    higher = [x for x, entry in zip(out, tensors, strict=True) if len(entry.shape) > 2]
    if "tensor" in higher and "matrix" not in higher:
        # of rank two both are the same axes: so all leaves are updated together
        return ["tensor" if x == "matrix" else x for x in out]
    return out


def _orthogonalized(
    steps: Sequence[Any],
    plans: Sequence[LeafPlan],
    tensors: Sequence[Tensors],
    paths: Sequence[Any],
    how: NewtonSchulz,
    tracing: Tracing,
) -> list[Any]:
    """The steps, those of learned leaves with their matrices made nearly orthogonal."""
    learned = [
        i
        for i, (step, plan) in enumerate(zip(steps, plans, strict=True))
        if step is not None and plan.rule == LEARNED
    ]
    orthogonal = orthogonal_leaves(
        [steps[i] for i in learned],
        [plans[i].matrix for i in learned],
        [tensors[i] for i in learned],
        [jax.tree_util.keystr(paths[i]) for i in learned],
        how,
        tracing,
    )
    by_position = dict(zip(learned, orthogonal, strict=True))
    return [by_position.get(i, step) for i, step in enumerate(steps)]


def _normalized(
    steps: Sequence[Any],
    gradients: Sequence[Any],
    plans: Sequence[LeafPlan],
    tensors: Sequence[Tensors],
    still_where_zero: bool,
) -> list[Any]:
    """The steps, those of learned leaves with their matrices of root mean square one.

    Args:
      steps: of the leaves; None: it has no gradient or is AdamW's.
      gradients: of the leaves.
      plans: of the leaves.
      tensors: how the leaves are seen as tensors.
      still_where_zero: whether a matrix whose gradient is zero everywhere makes no step.
    """
    out: list[Any] = []
    for step, gradient, plan, entry in zip(steps, gradients, plans, tensors, strict=True):
        if step is not None and plan.rule == LEARNED:
            step = normalize_matrices(step, plan.matrix, entry.leaf_partition)
            if still_where_zero:
                step = _still_where_zero(step, gradient, plan.matrix, entry.leaf_partition)
        out.append(step)
    return out


def _with_adam_steps(
    settings: AdamSettings,
    steps: Sequence[Any],
    gradients: Sequence[Any],
    accumulators: Accumulators,
    params: Any,
    plans: Sequence[LeafPlan],
    count: jax.Array,
) -> tuple[list[Any], Accumulators]:
    """The steps with those of AdamW's leaves, and the accumulators with its moments.

    Args:
      settings: of Adam.
      steps: of learned leaves; None of the others.
      gradients: of the leaves; None: it has none, and makes no step.
      accumulators: of all leaves.
      params: the parameters.
      plans: of the leaves.
      count: () int32, updates made, this one included.
    """
    first, *others = accumulators.momentum
    momentum = arrays_like("state: momentum", first, params)
    second_moment = leaves_like("state: second_moment", accumulators.second_moment, params)
    is_adams = [plan.rule != LEARNED for plan in plans]
    read = [x if own else None for x, own in zip(second_moment, is_adams, strict=True)]
    check_shapes("state: second_moment", read, params)
    out = list(steps)
    for i, gradient in enumerate(gradients):
        if is_adams[i] and gradient is not None:
            made = adam_step(settings, gradient, momentum[i], second_moment[i], count)
            out[i], momentum[i], second_moment[i] = made
    return out, accumulators._replace(
        momentum=(jax.tree.structure(params).unflatten(momentum), *others),
        # its boxes have other names where a matrix keeps one number
        second_moment=jax.tree.structure(accumulators.second_moment).unflatten(second_moment),
    )


def _still_where_zero(
    step: jax.Array, gradient: jax.Array, matrix: Matrix, partition: Partition | None
) -> jax.Array:
    """The step, but zero for matrices whose gradient is zero everywhere."""
    is_other = (gradient != 0).astype(jnp.float32)  # NaN is other than zero
    share = mean(is_other, matrix.axes(gradient.ndim), partition, keepdims=True)
    return jnp.where(share > 0, step, 0)


def rule_precision(precision: str) -> str:
    """The precision of the rule's own products, where Newton-Schulz has this one."""
    return {"auto": "highest", "bfloat16": "high"}.get(precision, precision)


def normalize_matrices(
    step: jax.Array, matrix: Matrix, partition: Partition | None = None
) -> jax.Array:
    """The step of a leaf, its matrices of root mean square one; also from shards of them."""
    return normalized(step, matrix.axes(step.ndim), partition)
