"""Runs a function of one tensor over all tensors of a tree, whole or in shards.

It is for rules other than the per-parameter networks that `lopt_jax.engine` knows. The tensors are
grouped and split as they are there. Tensors without gradient or without elements take no part: what
is said here of all tensors is said of those that do.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax import engine
from lopt_jax.accumulators import Accumulators
from lopt_jax.context import Tracing
from lopt_jax.features import FeatureSet
from lopt_jax.partition import Partition
from lopt_jax.rows import in_order, take_rows
from lopt_jax.rules.rule import Rule, TensorArrays, TensorUpdate
from lopt_jax.split_stacks import own_rows, whole_rows
from lopt_jax.tensors import StackedAxes, Tensors, number_of
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
    return _positions(_taking_part(grouped, grouped.tensors))


def _taking_part(grouped: engine.Grouped, tensors: Sequence[Tensors]) -> list[Tensors]:
    """The entries of the leaves in groups, in the tree's order."""
    leaves = sorted(i for group in grouped.groups for i in group.leaves)
    return [tensors[i] for i in leaves]


def _positions(tensors: Sequence[Tensors]) -> np.ndarray:
    """Where the tensors of some leaves are."""
    return np.asarray([k for x in tensors for k in range(x.first, x.first + x.count)], int)


def _numbered(tensors: Sequence[Tensors]) -> list[Tensors]:
    """The entries of some leaves, their tensors numbered by themselves."""
    first = itertools.accumulate((x.count for x in tensors), initial=0)
    return [replace(x, first=i) for x, i in zip(tensors, first, strict=False)]


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
    tensors = _numbered(_taking_part(grouped, grouped.tensors))
    of_all, own = _positions(_taking_part(grouped, grouped.own)), own_rows(tensors, own)
    results = []
    for group, inputs in zip(grouped.groups, grouped.inputs, strict=True):
        of_tensor = functools.partial(function, grouped.tracing, group.partition)
        own_of_group = take_rows(own, np.searchsorted(of_all, group.tensors))
        results.append(
            xla.over_tensors(of_tensor, inputs, own_of_group, shared, in_axes=(0, 0, None))
        )
    return results


def numbers(grouped: engine.Grouped, results: Sequence[Result]) -> Any:
    """The numbers of all tensors: the tree of arrays, each with a row a tensor.

    Args:
      grouped: of `group`; there is a tensor.
      results: of `over_tensors`.
    """
    own = in_order(
        [
            (group.tensors, result.numbers)
            for group, result in zip(grouped.groups, results, strict=True)
        ]
    )
    of_all, here = (_numbered(_taking_part(grouped, x)) for x in (grouped.tensors, grouped.own))
    return whole_rows(of_all, here, own)


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
