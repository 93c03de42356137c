"""One step of a rule over a pytree of parameters, whole or in shards, in two calls.

What sets the networks may look at all tensors between the two. Leaves become tensors, tensors of
equal shape groups, groups with equal code batches; a backend updates the batches, and the results
become leaves again.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import backends
from lopt_jax.accumulators import Accumulators, Decays, each_second_moment
from lopt_jax.batches import Batch, Group, gather, make_batches, make_groups, scatter
from lopt_jax.compiler.slices import opaque_zero, part_taker
from lopt_jax.context import Tracing
from lopt_jax.rows import join_trees, take_rows
from lopt_jax.rules.rule import (
    MLP,
    AccumulatorStatistics,
    GradientStatistics,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.settings import TensorSettings
from lopt_jax.split_stacks import own_rows, own_tensors, whole_rows
from lopt_jax.tensors import StackedAxes, Tensors, check_shapes, number_of, paths, tensors_of
from lopt_jax.xla import passes as xla


class Grouped(NamedTuple):
    """The tensors of a tree, in groups that are updated together."""

    tracing: Tracing
    tensors: list[Tensors]  # of each leaf
    own: list[Tensors]  # those of this device, which the groups have, see `lopt_jax.split_stacks`
    leaves: list[TensorArrays]  # the arrays of each leaf; the gradient may be None
    groups: list[Group]
    inputs: list[TensorArrays]  # of each group
    params: Any  # structure of the params
    accumulators: Any  # structure of the accumulators: boxes of rows and columns name other axes


class Prepared(NamedTuple):
    """A step after its first pass: what the second needs."""

    grouped: Grouped
    batches: list[Batch]
    statistics: list[GradientStatistics]  # of the gradients of each batch


def group_tensors(
    rule: Rule,
    tracing: Tracing,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    stacked_axes: StackedAxes,
    backend: str = "auto",
) -> Grouped:
    """Groups the tensors of a tree.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      gradients: tree like params; None where a parameter has no gradient: it is not updated.
      params: pytree of arrays.
      accumulators: trees, of `init_accumulators`.
      stacked_axes: as in `tensors_of`.
      backend: "auto", "xla" or "pallas".

    Returns:
      The groups.

    Raises:
      NotImplementedError: the backend is "pallas" and the kernels cannot run here.
      ValueError: the state is one of other params; the message names the leaf.
    """
    tensors = tensors_of(params, stacked_axes, tracing.shards, may_split_stacks=tracing.is_shard)
    own = own_tensors(tensors, jax.tree.leaves(params))
    leaves = _leaves(gradients, params, accumulators)
    groups = make_groups(
        own, [x.parameter for x in leaves], [x.gradient for x in leaves], paths(params)
    )
    inputs = [gather(group, own, leaves) for group in groups]
    groups, inputs = backends.assign_backends(rule, backend, tracing, groups, inputs)
    structures = jax.tree.structure(params), jax.tree.structure(accumulators)
    return Grouped(tracing, tensors, own, leaves, groups, inputs, *structures)


def first_pass(rule: Rule, grouped: Grouped) -> Prepared:
    """Pass A over every tensor of a tree.

    Args:
      rule: the rule.
      grouped: of `group_tensors`.

    Returns:
      The prepared step.
    """
    tracing, groups, inputs = grouped.tracing, grouped.groups, grouped.inputs
    batches = make_batches(tracing, groups, inputs)
    statistics = backends.gradient_statistics(rule, tracing, batches, groups, inputs)
    return Prepared(grouped, batches, statistics)


def parameter_mean_squares(prepared: Prepared) -> jax.Array:
    """Mean square of the parameters of every tensor: (tensors,) float32, zero for empty ones."""
    grouped, groups = prepared.grouped, prepared.grouped.groups
    order = [i for batch in prepared.batches for k in batch.members for i in groups[k].tensors]
    arrays = [x.parameter_mean_square for x in prepared.statistics]
    of_empty = jnp.zeros((number_of(grouped.own),), jnp.float32)
    return whole_rows(grouped.tensors, grouped.own, _by_tensor(arrays, order, of_empty))


def second_pass(
    rule: Rule,
    prepared: Prepared,
    mlp: MLP,
    mlp_per_tensor: bool,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: AccumulatorStatistics | None = None,
) -> tuple[Any, Accumulators, AccumulatorStatistics | None]:
    """Passes B and C over every tensor of a tree.

    Args:
      rule: the rule.
      prepared: of `first_pass`.
      mlp: the network: one for all tensors, or with a leading axis of tensors.
      mlp_per_tensor: whether it has that axis.
      decays: decay rates.
      scale: () or (tensors,), as in `rules.rule.update`.
      weight_decay: () or (tensors,), as in `rules.rule.update`.
      statistics: the last step's, each with a leading axis of tensors, where the rule keeps them;
        tensors that are not updated keep theirs.

    Returns:
      Updates like the params (in their dtypes; None where there was no gradient), or the new params
      where the rule applies its updates; the new accumulators, and the new statistics.
    """
    grouped = prepared.grouped
    tracing, groups, inputs = grouped.tracing, grouped.groups, grouped.inputs
    count = number_of(grouped.tensors)
    scale, weight_decay = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (scale, weight_decay)
    )
    own = functools.partial(own_rows, grouped.tensors)
    settings = TensorSettings(
        own(mlp) if mlp_per_tensor else mlp,
        own(scale),
        own(weight_decay),
        own(statistics),
        mlp_per_tensor,
    )
    zero = zero_of(grouped)
    results, kept = backends.update(
        rule,
        tracing,
        prepared.batches,
        groups,
        inputs,
        prepared.statistics,
        decays,
        settings,
        xla.networks_of(tracing, groups),
        zero,
    )
    if statistics is not None:
        order = [i for tensors, _ in kept for i in tensors]
        new = _by_tensor([x for _, x in kept], order, settings.statistics)
        statistics = whole_rows(grouped.tensors, grouped.own, new)
    updates, accumulators = as_trees(grouped, results, zero, rule.applies)
    return updates, accumulators, statistics


def zero_of(grouped: Grouped) -> jax.Array | None:
    """The zero that parts of groups are taken by, see `lopt_jax.compiler.slices`."""
    # the smallest is the least likely to be split
    smallest = min((x.gradient for x in grouped.inputs), key=lambda x: x.size, default=None)
    return None if smallest is None else opaque_zero(grouped.tracing, smallest)


def _by_tensor[Tree](trees: Sequence[Tree], order: Sequence[int], defaults: Tree) -> Tree:
    """Arrays with a leading axis of tensors, joined in the order of all tensors.

    Args:
      trees: trees of arrays.
      order: the positions of their tensors.
      defaults: the same of all tensors, for those that are not among them.
    """
    if not trees:
        return defaults
    joined = join_trees(trees)
    if all(len(order) == len(x) for x in jax.tree.leaves(defaults)):
        return take_rows(joined, np.argsort(order))
    return jax.tree.map(lambda old, x: old.at[np.asarray(order)].set(x), defaults, joined)


def _leaves(gradients: Any, params: Any, accumulators: Accumulators) -> list[TensorArrays]:
    """The arrays of every leaf; None for the rows and columns of a rule that has none.

    The structure of the accumulators is known to be right, and the shapes are, but of shards.
    """
    parameters, treedef = jax.tree.flatten(params)
    given = treedef.flatten_up_to(gradients)
    none = [None] * len(parameters)
    columns = Accumulators(
        tuple(map(jax.tree.leaves, accumulators.momentum)),
        each_second_moment(jax.tree.leaves, accumulators.second_moment),
        jax.tree.leaves(accumulators.row) or none,
        jax.tree.leaves(accumulators.column) or none,
    )
    is_column = lambda x: isinstance(x, list)  # noqa: E731
    for averages in jax.tree.leaves((columns.momentum, columns.second_moment), is_leaf=is_column):
        # of what is not updated here there may be less
        updated = [None if g is None else x for x, g in zip(averages, given, strict=True)]
        check_shapes("state: accumulators", updated, params)
    return [
        TensorArrays(
            gradient,
            parameter,
            jax.tree.map(lambda column, i=i: column[i], columns, is_leaf=is_column),
        )
        for i, (gradient, parameter) in enumerate(zip(given, parameters, strict=True))
    ]


def as_trees(
    grouped: Grouped, results: Sequence[TensorUpdate], zero: jax.Array | None, applies: bool = False
) -> tuple[Any, Accumulators]:
    """Updates and accumulators as trees, the inverse of `_leaves` and of the groups.

    Args:
      grouped: the groups.
      results: of each group.
      zero: of `zero_of`.
      applies: whether the updates are the new parameters.

    Returns:
      Updates like the params, or where the rule applies them the new params; the accumulators.
    """
    take = part_taker(zero)
    take_state = part_taker(None if grouped.tracing.joined_state else zero)
    of_leaves: dict[int, TensorUpdate] = {}
    for group, result in zip(grouped.groups, results, strict=True):
        parts = scatter(
            group,
            grouped.own,
            result,
            [grouped.leaves[i] for i in group.leaves],
            take,
            take_state,
            grouped.tracing.without,
        )
        of_leaves |= dict(zip(group.leaves, parts, strict=True))
    updates, accumulators = [], []
    for i, leaf in enumerate(grouped.leaves):
        if i in of_leaves:
            updates.append(of_leaves[i].update)
            accumulators.append(of_leaves[i].accumulators)
            continue
        # without a gradient, or without elements
        still = leaf.parameter if applies else jnp.zeros_like(leaf.parameter)
        updates.append(None if leaf.gradient is None and not applies else still)
        accumulators.append(leaf.accumulators)
    columns = zip(*map(jax.tree.leaves, accumulators), strict=True)
    flat = [x for column in columns for x in column]
    return grouped.params.unflatten(updates), grouped.accumulators.unflatten(flat)
