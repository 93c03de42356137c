"""Runs a function of one tensor over all tensors of a tree, whole or in shards.

It is for rules other than the per-parameter networks that `lopt_jax.engine` knows. The tensors are
grouped and split as they are there. Tensors without gradient or without elements take no part: what
is said here of all tensors is said of those that do.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax import engine
from lopt_jax.accumulators import Accumulators
from lopt_jax.batches import Group
from lopt_jax.context import Tracing
from lopt_jax.features import FeatureSet
from lopt_jax.partition import Partition, Partitions
from lopt_jax.partitioned import GroupDims, on_shards, shared_dims
from lopt_jax.rows import in_order, take_rows
from lopt_jax.rules.rule import Rule, TensorArrays, TensorUpdate
from lopt_jax.tensors import StackedAxes, number_of
from lopt_jax.xla import passes as xla


class Result(NamedTuple):
    """What is made of one tensor, or of a group's with a leading axis of tensors."""

    update: Any  # to be added to the parameter; None where there is none
    accumulators: Any  # in their dtypes; None where there is no update
    numbers: Any  # tree of arrays: what the tensor has of its own


# from what steers the trace, the partition, the arrays of a tensor, what the tensor has of its own,
# and what all share, to its result
OfTensor = Callable[[Tracing, Partition | None, TensorArrays, Any, Any], Result]

_NO_NETWORK = Rule(FeatureSet((), ()))


def group(
    tracing: Tracing,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    stacked_axes: StackedAxes,
) -> engine.Grouped:
    """The tensors of a tree, in groups of one shape.

    Args:
      tracing: what steers the trace.
      gradients: tree like params; None where a parameter has no gradient.
      params: pytree of arrays.
      accumulators: trees, of `lopt_jax.tensors.init_accumulators`.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.

    Returns:
      What the functions below take.

    Raises:
      ValueError: the state is one of other params; the message names the leaf.
    """
    return engine.group_tensors(
        _NO_NETWORK, tracing, gradients, params, accumulators, stacked_axes, "xla"
    )


def positions(grouped: engine.Grouped) -> np.ndarray:
    """Where the tensors are among those of the whole tree, in its order."""
    return np.sort(np.asarray([k for group in grouped.groups for k in group.tensors], int))


def taken(grouped: engine.Grouped, tree: Any) -> Any:
    """The rows of the tensors, from arrays with a row for each of the whole tree."""
    own = positions(grouped)
    return tree if len(own) == number_of(grouped.tensors) else take_rows(tree, own)


def put_back(grouped: engine.Grouped, old: Any, new: Any) -> Any:
    """The inverse of `taken`: the new rows of the tensors, and the old ones of the others."""
    own = positions(grouped)
    if len(own) == number_of(grouped.tensors):
        return new
    return jax.tree.map(lambda x, rows: x.at[own].set(rows), old, new)


def over_tensors(
    grouped: engine.Grouped, function: OfTensor, own: Any, shared: Any
) -> list[Result]:
    """Runs a function of one tensor over groups of them.

    Args:
      grouped: of `group`.
      function: of one tensor; it takes sums over shards through `lopt_jax.reductions`.
      own: tree of arrays with a row a tensor.
      shared: tree of arrays.

    Returns:
      The results of each group, with a leading axis of its tensors.
    """
    of_all = positions(grouped)
    return [
        _over_group(
            function,
            grouped.tracing,
            group,
            inputs,
            take_rows(own, np.searchsorted(of_all, group.tensors)),
            shared,
        )
        for group, inputs in zip(grouped.groups, grouped.inputs, strict=True)
    ]


def _over_group(
    function: OfTensor,
    tracing: Tracing,
    group: Group,
    inputs: TensorArrays,
    own: Any,
    shared: Any,
) -> Result:
    dims = GroupDims.of(group, 0)

    def of_group(
        tracing: Tracing,
        partitions: Partitions,
        inputs: Sequence[TensorArrays],
        own: Any,
        shared: Any,
    ) -> Result:
        of_tensor = functools.partial(function, tracing, partitions[0])
        return xla.over_tensors(of_tensor, inputs[0], own, shared, in_axes=(0, 0, None))

    def result_dims(result: Result) -> Result:
        return Result(
            None if result.update is None else dims.elementwise,
            None if result.update is None else dims.accumulators(result.accumulators),
            dims.by_tensor(result.numbers),
        )

    return on_shards(
        of_group,
        [group],
        ([inputs], own, shared),
        ([dims.arrays(inputs)], dims.by_tensor(own), shared_dims(shared)),
        result_dims,
        tracing,
        (group,),
    )


def numbers(grouped: engine.Grouped, results: Sequence[Result]) -> Any:
    """The numbers of all tensors: the tree of arrays, each with a row a tensor.

    Args:
      grouped: of `group`; there is a tensor.
      results: of `over_tensors`.
    """
    return in_order(
        [
            (group.tensors, result.numbers)
            for group, result in zip(grouped.groups, results, strict=True)
        ]
    )


def as_trees(grouped: engine.Grouped, results: Sequence[Result]) -> tuple[Any, Accumulators]:
    """Updates and accumulators as trees like the params.

    Args:
      grouped: of `group`.
      results: of `over_tensors`; each has an update and accumulators.

    Returns:
      The updates in the parameters' dtypes, None where there is no gradient, and the accumulators,
      in their dtypes; those of what is not updated stay.
    """
    updates = [TensorUpdate(x.update, x.accumulators, None) for x in results]
    return engine.as_trees(grouped, updates, engine.zero_of(grouped))
