"""Runs a function of one tensor over all tensors of a tree, whole or in shards.

It is for rules other than the per-parameter networks that `lopt_jax.engine` knows. The tensors are
grouped and split as they are there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import engine, xla
from lopt_jax.accumulators import Accumulators
from lopt_jax.features import FeatureSet
from lopt_jax.groups import Group, GroupDims, GroupInputs, scatter
from lopt_jax.partition import Partition, spread
from lopt_jax.rows import in_order, part_taker, take_rows, unknown_zero
from lopt_jax.rule import Rule, TensorUpdate
from lopt_jax.tensors import StackedAxes, number_of

# (partition, arrays of a tensor, what the tensor has of its own, what all share) -> its results;
# update and accumulators may be None, statistics are a tree of arrays with one row a tensor
OfTensor = Callable[[Partition | None, GroupInputs, Any, Any], TensorUpdate]

_NO_NETWORK = Rule(FeatureSet((), ()))
_GUIDES = (2, 1)  # the first accumulator and the parameter decide how a group is split


def grouped(
    gradients: Any, params: Any, accumulators: Accumulators, stacked_axes: StackedAxes
) -> engine.Prepared:
    """The tensors of a tree that have gradients and elements, in groups of one shape.

    Args:
      gradients: tree like params; None where a parameter has no gradient.
      params: pytree of arrays.
      accumulators: trees, of `lopt_jax.tensors.init_accumulators`.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.

    Returns:
      What the functions below take.

    Raises:
      ValueError: the state is one of other params; the message names the leaf.
    """
    return engine.first_pass(_NO_NETWORK, gradients, params, accumulators, stacked_axes, "xla")


def over_tensors(
    prepared: engine.Prepared, function: OfTensor, own: Any, shared: Any
) -> list[TensorUpdate]:
    """Runs a function of one tensor over groups of them.

    Args:
      prepared: of `grouped`.
      function: of one tensor; it takes sums over shards through `lopt_jax.reductions`.
      own: tree of arrays with a leading axis of all the tree's tensors.
      shared: tree of arrays.

    Returns:
      The results of each group, with a leading axis of its tensors.
    """
    return [
        _over_group(function, group, inputs, take_rows(own, group.tensors), shared)
        for group, inputs in zip(prepared.groups, prepared.inputs, strict=True)
    ]


def _over_group(
    function: OfTensor, group: Group, inputs: GroupInputs, own: Any, shared: Any
) -> TensorUpdate:
    dims = GroupDims.of(group)

    def run(
        partitions: Sequence[Partition | None], inputs: GroupInputs, own: Any, shared: Any
    ) -> TensorUpdate:
        of_tensor = functools.partial(function, partitions[0])
        return xla.over_tensors(of_tensor, inputs, own, shared, in_axes=(0, 0, None))

    def result_dims(result: TensorUpdate) -> TensorUpdate:
        return TensorUpdate(
            None if result.update is None else dims.elementwise,
            None if result.update is None else dims.accumulators(result.accumulators),
            dims.by_tensor(result.statistics),
        )

    return spread(
        run,
        (inputs, own, shared),
        (dims.inputs(inputs), dims.by_tensor(own), dims.shared(shared)),
        result_dims,
        [group.shape],
        [group.partition],
        guides=[_GUIDES],
        names=[group.name],
        settings=group,
    )


def by_tensor(prepared: engine.Prepared, results: Sequence[TensorUpdate], default: Any) -> Any:
    """The statistics of all tensors.

    Args:
      prepared: of `grouped`.
      results: of `over_tensors`.
      default: a tree like the statistics, whose arrays broadcast against those of all tensors: what
        tensors without gradient or without elements have.

    Returns:
      The tree, each array with a leading axis of all the tree's tensors.
    """
    count = number_of(prepared.tensors)
    pieces = [
        (group.tensors, result.statistics)
        for group, result in zip(prepared.groups, results, strict=True)
    ]
    if sum(len(positions) for positions, _ in pieces) == count and pieces:
        return in_order(pieces)
    spread_out = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)[1:]))  # noqa: E731
    out = jax.tree.map(spread_out, default)
    for positions, rows in pieces:
        out = jax.tree.map(lambda x, new, k=positions: x.at[np.asarray(k)].set(new), out, rows)
    return out


def as_trees(
    prepared: engine.Prepared, results: Sequence[TensorUpdate]
) -> tuple[Any, Accumulators]:
    """Updates and accumulators as trees like the params.

    Args:
      prepared: of `grouped`.
      results: of `over_tensors`; each has an update and accumulators.

    Returns:
      The updates in the parameters' dtypes, None where there is no gradient, and the accumulators,
      in their dtypes; those of what is not updated stay.
    """
    out = prepared.out
    gradients = [x.gradient for x in prepared.inputs]
    zero = unknown_zero(min(gradients, key=lambda x: x.size)) if gradients else None
    takers = part_taker(zero), part_taker(zero, of_state=True)
    for group, result in zip(prepared.groups, results, strict=True):
        scatter(group, prepared.tensors, result.update, result.accumulators, takers, out)
    updates = [
        u if has else None for u, has in zip(out.updates, prepared.has_gradient, strict=True)
    ]
    accumulators = prepared.accumulators_treedef.unflatten(jax.tree.leaves(out.accumulators))
    return prepared.treedef.unflatten(updates), accumulators


def where_updated(prepared: engine.Prepared, new: Any, old: Any) -> Any:
    """What is kept of every tensor: the old rows of those without gradient or without elements.

    Args:
      prepared: of `grouped`.
      new: tree of arrays with a leading axis of all the tree's tensors.
      old: the same tree, before this step.

    Returns:
      The tree.
    """
    updated = np.zeros((number_of(prepared.tensors),), bool)
    updated[[k for group in prepared.groups for k in group.tensors]] = True
    if updated.all():
        return new
    chosen = lambda x, y: jnp.where(updated.reshape((-1, *(1,) * (x.ndim - 1))), x, y)  # noqa: E731
    return jax.tree.map(chosen, new, old)
