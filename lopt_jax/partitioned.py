"""A function of parameters and what belongs to them, where a partitioner may split them.

The function is one operation of the partitioner: XLA is told what every dimension of every array
is, and asks for the code of a shard. That code is the function as it runs inside
`lopt_jax.sharding.distributed`, told of what the leaves are shards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax

from lopt_jax.accumulators import Accumulators, each_second_moment
from lopt_jax.context import Tracing
from lopt_jax.partition import Dims, Partition, Partitions, may_be_split, spread, whole_dims
from lopt_jax.tensors import StackedAxes, accumulator_dims, paths, tensors_of

# From what steers the trace, trees of gradients, params and accumulators, and a tree of arrays that
# every device has whole, to trees of updates and accumulators, and what every device has whole
Function = Callable[[Tracing, Any, Any, Accumulators, Any], tuple[Any, Accumulators, Any]]


def on_shards(
    function: Function,
    tracing: Tracing,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    whole: Any,
    stacked_axes: StackedAxes,
    settings: Any,
) -> tuple[Any, Accumulators, Any]:
    """Runs a function of params on the shards of them.

    Args:
      function: the function. It reads no other traced array than its arguments: XLA asks for its
        code while it compiles. In its `Tracing` it finds of what the leaves are shards.
      tracing: what steers the trace.
      gradients: tree like params; None where a parameter has no gradient.
      params: pytree of arrays.
      accumulators: trees like the params, of `lopt_jax.tensors.init_accumulators`.
      whole: tree of arrays.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.
      settings: as in `lopt_jax.partition.spread`.

    Returns:
      The function's results.
    """
    leaves, arrays = jax.tree.leaves(params), jax.tree.leaves((gradients, params, accumulators))
    if tracing.shards is not None or not leaves or not may_be_split(tracing, arrays):
        return function(tracing, gradients, params, accumulators, whole)
    names = paths(params)
    shapes = [leaf.shape for leaf in leaves]
    like_params = [Dims(tuple(range(len(shape))), i) for i, shape in enumerate(shapes)]
    treedef = jax.tree.structure(params)

    def dims_of(gradients: Any, accumulators: Accumulators, whole: Any) -> tuple[Any, Any, Any]:
        given = treedef.flatten_up_to(gradients)
        of_gradients = [None if g is None else d for g, d in zip(given, like_params, strict=True)]
        of_accumulators = _accumulator_dims(accumulators, params, stacked_axes)
        return treedef.unflatten(of_gradients), of_accumulators, whole_dims(whole)

    def of_shards(tracing: Tracing, partitions: Partitions, *trees: Any) -> Any:
        if any(partitions):
            pairs = zip(partitions, shapes, strict=True)
            known = [p or Partition(shape, ((),) * len(shape)) for p, shape in pairs]
            tracing = replace(tracing, shards=tuple(zip(names, known, strict=True)))
        return function(tracing, *trees)

    operands = gradients, params, accumulators, whole
    of_gradients, of_accumulators, of_whole = dims_of(gradients, accumulators, whole)
    return spread(
        of_shards,
        operands,
        (of_gradients, treedef.unflatten(like_params), of_accumulators, of_whole),
        lambda result: dims_of(*result),
        shapes,
        [None] * len(leaves),
        _guides(operands),
        names,
        tracing,
        settings,
    )


def _guides(operands: tuple[Any, Any, Accumulators, Any]) -> list[list[int]]:
    """The positions of the arrays whose shardings decide how a leaf is split.

    They are its first momentum and the parameter. If both are split into equally many parts, the
    momentum decides: it stands for more arrays. How a gradient arrives says nothing of how it is to
    be kept.
    """
    flat, treedef = jax.tree.flatten(operands)
    _, params, accumulators, _ = treedef.unflatten(range(len(flat)))
    deciding = [*accumulators.momentum[:1], params]
    return [list(guides) for guides in zip(*map(jax.tree.leaves, deciding), strict=True)]


def _accumulator_dims(
    accumulators: Accumulators, params: Any, stacked_axes: StackedAxes
) -> Accumulators:
    """What each dimension of the accumulators is."""
    leaves = jax.tree.leaves(params)
    kinds = zip(
        *(
            accumulator_dims(len(leaf.shape), entry)
            for leaf, entry in zip(leaves, tensors_of(params, stacked_axes), strict=True)
        ),
        strict=True,
    )
    elementwise, row, column = map(list, kinds)

    def of_tree(labels: Sequence[tuple[int | None, ...]], tree: Any) -> Any:
        arrays, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(_dims(labels, arrays, leaves) if arrays else [])

    return Accumulators(
        momentum=tuple(of_tree(elementwise, tree) for tree in accumulators.momentum),
        second_moment=each_second_moment(
            lambda tree: of_tree(elementwise, tree), accumulators.second_moment
        ),
        row=of_tree(row, accumulators.row),
        column=of_tree(column, accumulators.column),
    )


def _dims(
    labels: Sequence[tuple[int | None, ...]], arrays: Sequence[jax.Array], leaves: Sequence[Any]
) -> Iterator[Dims]:
    """Dims of one array a leaf; one that is not like its leaf is whole on every device."""
    for i, (known, x, leaf) in enumerate(zip(labels, arrays, leaves, strict=True)):
        sizes = zip(known, x.shape, strict=False)
        is_like = len(known) == x.ndim and all(
            d is None or leaf.shape[d] == size for d, size in sizes
        )
        yield Dims(known if is_like else (None,) * x.ndim, i)
