"""One step of a rule over a pytree of parameters, in two calls.

What sets the networks may look at all tensors between the two. Leaves become tensors, tensors of
equal shape groups; a backend updates the groups, run by run, and the results become leaves again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import runs as of_runs
from lopt_jax.accumulators import Accumulators, Decays, each_second_moment, second_moments
from lopt_jax.backends import GroupStatistics, choose_backend
from lopt_jax.batches import (
    Group,
    Run,
    alike_vectors,
    gather,
    make_groups,
    make_runs,
    pad_vectors,
    scatter,
)
from lopt_jax.compiler.slices import opaque_zero, part_taker
from lopt_jax.context import Tracing
from lopt_jax.rows import concatenate
from lopt_jax.rules.rule import MLP, AccumulatorStatistics, Rule, TensorArrays, TensorUpdate
from lopt_jax.settings import TensorSettings
from lopt_jax.tensors import (
    StackedAxes,
    Tensors,
    check_shapes,
    leaves_like,
    number_of,
    paths,
    tensors_of,
)
from lopt_jax.xla import passes as xla


class Prepared(NamedTuple):
    """A step after its first pass: what the second needs."""

    tracing: Tracing
    tensors: list[Tensors]  # of each leaf
    leaves: list[TensorArrays]  # the arrays of each leaf; the gradient may be None
    groups: list[Group]
    inputs: list[TensorArrays]  # of each group
    runs: list[Run]
    moments: list[list[GroupStatistics]]  # of each run; members are positions among its groups
    treedef: Any  # of the params
    accumulators: Accumulators  # trees as they came: boxes of rows and columns name other axes


def first_pass(
    rule: Rule,
    tracing: Tracing,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    stacked_axes: StackedAxes,
    backend: str = "auto",
) -> Prepared:
    """Pass A over every tensor of a tree.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      gradients: tree like params; None where a parameter has no gradient: it is not updated.
      params: pytree of arrays.
      accumulators: trees, of `init_accumulators`.
      stacked_axes: as in `tensors_of`.
      backend: "auto", "xla" or "pallas".

    Returns:
      The prepared step.

    Raises:
      NotImplementedError: the backend is "pallas" and the kernels cannot run here.
      ValueError: the state is one of other params; the message names the leaf.
    """
    tensors = tensors_of(params, stacked_axes, tracing.shards)
    leaves = _leaves(gradients, params, accumulators)
    groups = make_groups(
        tensors, [x.parameter for x in leaves], [x.gradient for x in leaves], paths(params)
    )
    inputs = [gather(group, tensors, leaves, tracing.is_local) for group in groups]
    vectors = alike_vectors(groups, inputs, tracing.is_local)
    chosen = choose_backend(rule, backend, tracing, groups, inputs, vectors)
    groups, inputs, on_kernels = pad_vectors(groups, inputs, chosen, vectors)
    inputs = [
        x if on else xla.joined_once(tracing, x, len(group.leaves))
        for x, on, group in zip(inputs, on_kernels, groups, strict=True)
    ]
    runs = make_runs(tracing, on_kernels, groups, inputs)
    moments = [
        of_runs.gradient_statistics(
            rule, tracing, run, [groups[i] for i in run.members], [inputs[i] for i in run.members]
        )
        for run in runs
    ]
    treedef = jax.tree.structure(params)
    return Prepared(tracing, tensors, leaves, groups, inputs, runs, moments, treedef, accumulators)


def parameter_mean_squares(prepared: Prepared) -> jax.Array:
    """Mean square of the parameters of every tensor: (tensors,) float32, zero for empty ones."""
    order, pieces = [], []
    for run, moments in zip(prepared.runs, prepared.moments, strict=True):
        for x in moments:
            groups = [prepared.groups[run.members[k]] for k in x.members]
            order += [i for group in groups for i in group.tensors]
            pieces.append(x.moments.parameter_mean_square)
    count = number_of(prepared.tensors)
    return _by_tensor(pieces, order, jnp.zeros((count,), jnp.float32))


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
    groups, runs, tracing = prepared.groups, prepared.runs, prepared.tracing
    count = number_of(prepared.tensors)
    scale, weight_decay = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (scale, weight_decay)
    )
    settings = TensorSettings(mlp, scale, weight_decay, statistics, mlp_per_tensor)
    networks = xla.networks_of(tracing, groups)
    gradients = [x.gradient for x in prepared.inputs]
    # the smallest is the least likely to be split
    zero = opaque_zero(tracing, min(gradients, key=lambda x: x.size)) if gradients else None
    small = xla.joined_runs(rule, tracing, runs, groups, networks, settings)
    results = _updated_together(rule, prepared, small, decays, settings)  # of each group
    order, new_statistics = [], []
    for i, (run, moments) in enumerate(zip(runs, prepared.moments, strict=True)):
        if i in small:
            continue
        own = [groups[k] for k in run.members]
        tensors = [k for group in own for k in group.tensors]
        updates, kept = of_runs.update(
            rule,
            tracing,
            run,
            own,
            [prepared.inputs[k] for k in run.members],
            moments,
            decays,
            settings.rows(tensors),
            [networks[k] for k in run.members],
            zero,
        )
        results |= dict(zip(run.members, updates, strict=True))
        order += tensors
        new_statistics.append(kept)
    if statistics is not None and new_statistics:
        statistics = jax.tree.map(
            lambda default, *rows: _by_tensor(rows, order, default), statistics, *new_statistics
        )
    updates, accumulators = as_trees(rule, prepared, results, zero)
    return updates, accumulators, statistics


def _updated_together(
    rule: Rule, prepared: Prepared, runs: Sequence[int], decays: Decays, settings: TensorSettings
) -> dict[int, TensorUpdate]:
    """Results of runs of one group of small tensors each, whose network runs once for all."""
    if not runs:
        return {}
    members = [prepared.runs[i].members[0] for i in runs]
    settings = replace(settings, statistics=None)
    updates = xla.small_updates(
        rule,
        prepared.tracing.platform,
        [prepared.inputs[k] for k in members],
        [prepared.moments[i][0].moments for i in runs],
        decays,
        [settings.rows(prepared.groups[k].tensors) for k in members],
    )
    return dict(zip(members, updates, strict=True))


def _by_tensor(arrays: Sequence[jax.Array], order: Sequence[int], default: jax.Array) -> jax.Array:
    """Arrays with a leading axis of tensors, joined in the order of all tensors.

    Args:
      arrays: the arrays.
      order: the positions of their tensors.
      default: (tensors, ...), of those that are not among them.
    """
    if not arrays:
        return default
    joined = concatenate(arrays)
    if len(order) == len(default):
        return joined[np.argsort(np.asarray(order))]
    return default.at[np.asarray(order)].set(joined)


def _leaves(gradients: Any, params: Any, accumulators: Accumulators) -> list[TensorArrays]:
    """The arrays of every leaf; None for the rows and columns of a rule that has none."""
    leaves, treedef = jax.tree.flatten(params)
    gradient_leaves = treedef.flatten_up_to(gradients)
    momentum = [leaves_like("state: momentum", m, params) for m in accumulators.momentum]
    second_moment = each_second_moment(
        lambda v: leaves_like("state: second_moment", v, params), accumulators.second_moment
    )
    for averages in (*momentum, *second_moments(second_moment)):
        # of what is not updated here there may be less
        updated = zip(averages, gradient_leaves, strict=True)
        check_shapes("state: accumulators", [None if g is None else x for x, g in updated], params)
    none = [None] * len(leaves)
    rows = jax.tree.leaves(accumulators.row) or none
    columns = jax.tree.leaves(accumulators.column) or none

    def of_leaf(i: int) -> Accumulators:
        second = each_second_moment(lambda averages: averages[i], second_moment)
        return Accumulators(tuple(m[i] for m in momentum), second, rows[i], columns[i])

    return [
        TensorArrays(gradient, parameter, of_leaf(i))
        for i, (gradient, parameter) in enumerate(zip(gradient_leaves, leaves, strict=True))
    ]


def as_trees(
    rule: Rule, prepared: Prepared, results: dict[int, TensorUpdate], zero: jax.Array | None
) -> tuple[Any, Accumulators]:
    """Updates and accumulators as trees, the inverse of `_leaves` and of the groups.

    Args:
      rule: the rule.
      prepared: the step.
      results: of each group.
      zero: of `opaque_zero`.

    Returns:
      Updates like the params, or where the rule applies them the new params; the accumulators.
    """
    take, take_state = part_taker(zero), part_taker(None if prepared.tracing.joined_state else zero)
    of_leaves: dict[int, TensorUpdate] = {}
    for k, result in results.items():
        group = prepared.groups[k]
        old = [prepared.leaves[i] for i in group.leaves]
        parts = scatter(group, prepared.tensors, result, old, take, take_state, prepared.tracing)
        of_leaves |= dict(zip(group.leaves, parts, strict=True))
    updates, accumulators = [], []
    for i, leaf in enumerate(prepared.leaves):
        if i in of_leaves:
            updates.append(of_leaves[i].update)
            accumulators.append(of_leaves[i].accumulators)
            continue
        # without a gradient, or without elements
        still = leaf.parameter if rule.applies else jnp.zeros_like(leaf.parameter)
        updates.append(None if leaf.gradient is None and not rule.applies else still)
        accumulators.append(leaf.accumulators)
    columns = [
        *zip(*(x.momentum for x in accumulators), strict=True),
        *zip(*(second_moments(x.second_moment) for x in accumulators), strict=True),
        *zip(*((x.row, x.column) for x in accumulators), strict=True),
    ]
    # boxes of rows and columns name other axes than the params' boxes
    treedef = jax.tree.structure(prepared.accumulators)
    new_accumulators = treedef.unflatten(jax.tree.leaves(columns))
    return prepared.treedef.unflatten(updates), new_accumulators
