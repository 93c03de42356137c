"""The passes over groups of tensors that a partitioner may split over devices.

XLA is told what every dimension of every array is, and asks for the code of a shard: there the
backends run as they do where nothing is split. Each call is one operation of the partitioner.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax import backends
from lopt_jax.accumulators import Accumulators, Decays, each_second_moment
from lopt_jax.batches import Group, make_batches, one_by_one
from lopt_jax.context import Tracing
from lopt_jax.device_statistics import joined, of_shards, shapes_of, split
from lopt_jax.partition import BATCH, Dims, Partitions, spread
from lopt_jax.rows import in_order, join_trees
from lopt_jax.rules.rule import GradientStatistics, Rule, TensorArrays, TensorUpdate
from lopt_jax.settings import TensorSettings
from lopt_jax.xla.network import XlaNetwork

# The arrays whose shardings decide how a group is split: its first accumulator and its parameter.
# If both are split into equally many parts, the accumulator does: it stands for more arrays. How a
# gradient arrives says nothing of how it is to be kept.
_DECIDING = (2, 1)


def _operations(
    tracing: Tracing, groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[list[int]]:
    """Which groups one operation of the partitioner takes, by their positions.

    XLA asks for the code of each operation, and traces and lowers it apart, so one takes all groups
    of a backend that it may split in any way. Stacks may be split along their axis of tensors, so
    they are not among them.
    """
    batches = make_batches(tracing, groups, inputs, [None] * len(groups))
    in_order = [i for batch in batches if batch.on_kernels for i in batch.members]
    in_order += [i for i, group in enumerate(groups) if not group.on_kernels]
    together: dict[Any, list[int]] = {}
    for i in in_order:
        group = groups[i]
        is_one = len(group.tensors) == 1 or group.lengths is not None
        together.setdefault(group.on_kernels if is_one else group, []).append(i)
    return list(together.values())


def _leaves_the_shards(groups: Sequence[Group]) -> bool:
    """Whether the statistics of an operation's gradients leave it as those of whole tensors.

    What the kernels make at once of tensors that are split in different ways is no array of shards.
    """
    return groups[0].on_kernels and len(groups) > 1


def gradient_statistics(
    rule: Rule, tracing: Tracing, groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[GradientStatistics]:
    """Pass A, as `backends.gradient_statistics` of each group by itself."""
    results: dict[int, GradientStatistics] = {}
    for members in _operations(tracing, groups, inputs):
        own = [groups[k] for k in members]
        made = _gradient_statistics(rule, tracing, own, [inputs[k] for k in members])
        results |= dict(zip(members, made, strict=True))
    return [results[k] for k in range(len(groups))]


def _gradient_statistics(
    rule: Rule, tracing: Tracing, groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[GradientStatistics]:
    """Pass A over the groups of one operation."""
    leaves_shards = _leaves_the_shards(groups)
    counts = [x.gradient.shape[0] for x in inputs]
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]

    def pass_a(
        tracing: Tracing, partitions: Partitions, inputs: Sequence[TensorArrays]
    ) -> list[GradientStatistics] | jax.Array:
        # results of XLA are those of groups, so that they are the same however these are split
        batches = (
            make_batches(tracing, groups, inputs, partitions)
            if groups[0].on_kernels
            else one_by_one(groups, partitions)
        )
        made = backends.gradient_statistics(rule, tracing, batches, groups, inputs)
        if not leaves_shards:
            return made
        members = [batch.members for batch in batches]
        return joined(list(zip(members, made, strict=True)), groups, partitions, counts)

    def result_dims(result: Any) -> Any:
        if leaves_shards:
            return shared_dims(result)
        return [d.statistics(x) for d, x in zip(dims, result, strict=True)]

    arrays = [d.arrays(x) for d, x in zip(dims, inputs, strict=True)]
    settings = (rule, tuple(groups))
    made = on_shards(pass_a, groups, (list(inputs),), (arrays,), result_dims, tracing, settings)
    if not leaves_shards:
        return made
    return split(made, [shapes_of(rule, *pair) for pair in zip(groups, counts, strict=True)])


def update(
    rule: Rule,
    tracing: Tracing,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    statistics: Sequence[GradientStatistics],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
) -> tuple[list[TensorUpdate], list[tuple[Sequence[int], Any]]]:
    """Passes B and C, as `backends.update`; the settings are of all tensors of the tree."""
    updates: dict[int, TensorUpdate] = {}
    kept: list[tuple[Sequence[int], Any]] = []
    for members in _operations(tracing, groups, inputs):
        tensors = [i for k in members for i in groups[k].tensors]
        made, of_tensors = _update(
            rule,
            tracing,
            [groups[k] for k in members],
            [inputs[k] for k in members],
            [statistics[k] for k in members],
            decays,
            settings.rows(tensors),
            [networks[k] for k in members],
        )
        updates |= dict(zip(members, made, strict=True))
        kept.append((tensors, of_tensors))
    return [updates[k] for k in range(len(groups))], kept


def _update(
    rule: Rule,
    tracing: Tracing,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    statistics: Sequence[GradientStatistics],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
) -> tuple[list[TensorUpdate], Any]:
    """Passes B and C over the groups of one operation, and the statistics of all their tensors."""
    leaves_shards = _leaves_the_shards(groups)
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    of_tensors: Callable[[Any], Any] = dims[0].by_tensor if len(dims) == 1 else shared_dims

    def passes_b_and_c(
        tracing: Tracing,
        partitions: Partitions,
        inputs: Sequence[TensorArrays],
        statistics: Sequence[GradientStatistics],
        decays: Decays,
        settings: TensorSettings,
    ) -> tuple[list[TensorUpdate], Any]:
        batches = make_batches(tracing, groups, inputs, partitions)
        of_batches = [join_trees([statistics[k] for k in batch.members]) for batch in batches]
        if leaves_shards:
            of_batches = [
                of_shards(x, batch.partition, groups[batch.members[0]].dims)
                for x, batch in zip(of_batches, batches, strict=True)
            ]
        ends = np.cumsum([0, *(x.gradient.shape[0] for x in inputs)])
        tensors = [range(i, j) for i, j in itertools.pairwise(ends)]
        # what a partitioner runs is another program: it has a zero of its own
        made, kept = backends.update(
            rule,
            tracing,
            batches,
            groups,
            inputs,
            of_batches,
            decays,
            settings,
            tensors,
            networks,
            zero=None,
        )
        return made, in_order(kept) if rule.accumulator_statistics else None

    return on_shards(
        passes_b_and_c,
        groups,
        (list(inputs), list(statistics), decays, settings),
        (
            [d.arrays(x) for d, x in zip(dims, inputs, strict=True)],
            shared_dims(list(statistics))
            if leaves_shards
            else [d.statistics(x) for d, x in zip(dims, statistics, strict=True)],
            shared_dims(decays),
            TensorSettings(
                of_tensors(settings.mlp) if settings.mlp_per_tensor else shared_dims(settings.mlp),
                of_tensors(settings.scale),
                of_tensors(settings.weight_decay),
                of_tensors(settings.statistics),
                settings.mlp_per_tensor,
            ),
        ),
        lambda result: (
            [d.update(x) for d, x in zip(dims, result[0], strict=True)],
            of_tensors(result[1]),
        ),
        tracing,
        (rule, tuple(groups), tuple(networks), settings.mlp_per_tensor),
    )


def on_shards(
    function: Callable[..., Any],
    groups: Sequence[Group],
    operands: tuple,
    operand_dims: tuple,
    result_dims: Callable[[Any], Any],
    tracing: Tracing,
    settings: tuple,
) -> Any:
    """Runs a function of groups on shards; its first operand are their arrays."""
    starts = np.cumsum([0, *(len(jax.tree.leaves(x)) for x in operands[0])])
    return spread(
        function,
        operands,
        operand_dims,
        result_dims,
        [group.shape for group in groups],
        [group.partition for group in groups],
        guides=[[int(start) + i for i in _DECIDING] for start in starts[:-1]],
        names=[group.name for group in groups],
        tracing=tracing,
        settings=settings,
    )


# What the partitioner is told of the arrays


def shared_dims(tree: Any) -> Any:
    """Dims of arrays that are whole on every device."""
    return jax.tree.map(lambda x: Dims((None,) * np.ndim(x)), tree)


class GroupDims(NamedTuple):
    """What the dimensions of a group's arrays are."""

    elementwise: Dims
    row: Dims
    column: Dims

    part: int

    @classmethod
    def of(cls, group: Group, part: int) -> "GroupDims":
        """The dims of a group's arrays; it is one of the parts that run together."""
        rank = len(group.shape)
        without = lambda d: Dims((BATCH, None, *(i for i in range(rank) if i != d)), part)  # noqa: E731
        dims = group.dims
        if group.lengths is not None:  # their positions are counted from the first on
            whole = Dims((None,) * (rank + 1), part)
            return cls(whole, Dims((None,) * (rank + 2), part), Dims((None, None), part), part)
        return cls(
            elementwise=Dims((BATCH, *range(rank)), part),
            row=without(dims.d0 if dims else None),
            column=without(dims.d1) if dims else Dims((BATCH, None), part),
            part=part,
        )

    def by_tensor(self, tree: Any) -> Any:
        """Arrays with a leading axis of tensors."""
        axes = lambda x: (BATCH,) + (None,) * (x.ndim - 1)  # noqa: E731
        return jax.tree.map(lambda x: Dims(axes(x), self.part), tree)

    def accumulators(self, tree: Accumulators) -> Accumulators:
        """The accumulators."""
        return Accumulators(
            momentum=tuple(self.elementwise for _ in tree.momentum),
            second_moment=each_second_moment(lambda _: self.elementwise, tree.second_moment),
            row=None if tree.row is None else self.row,
            column=None if tree.column is None else self.column,
        )

    def arrays(self, tree: TensorArrays) -> TensorArrays:
        """What a step reads."""
        accumulators = self.accumulators(tree.accumulators)
        return TensorArrays(self.elementwise, self.elementwise, accumulators)

    def statistics(self, tree: GradientStatistics) -> GradientStatistics:
        """The results of pass A."""
        vector = lambda dims: Dims((BATCH, *dims.labels[2:]), self.part)  # noqa: E731
        return GradientStatistics(
            row=None if tree.row is None else vector(self.row),
            column=None if tree.column is None else vector(self.column),
            parameter_mean_square=self.by_tensor(tree.parameter_mean_square),
        )

    def update(self, tree: TensorUpdate) -> TensorUpdate:
        """The results of passes B and C."""
        return TensorUpdate(
            update=self.elementwise,
            accumulators=self.accumulators(tree.accumulators),
            statistics=self.by_tensor(tree.statistics),
        )
