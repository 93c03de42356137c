"""A run of a backend over groups, on the shards of their tensors where these are split.

Where nothing is split it is the backend itself, `lopt_jax.backends`. Else the partitioner is told
what every dimension of every array is, and asks for the code of a shard.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax import backends
from lopt_jax.accumulators import Accumulators, Decays, each_second_moment
from lopt_jax.backends import GroupStatistics
from lopt_jax.batches import Group, Run
from lopt_jax.context import Tracing
from lopt_jax.device_statistics import joined, shapes_of, split
from lopt_jax.partition import BATCH, Dims, Partitions, is_explicit, spread
from lopt_jax.rules.rule import (
    AccumulatorStatistics,
    GradientStatistics,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.settings import TensorSettings
from lopt_jax.xla.network import XlaNetwork

# The arrays whose shardings decide how a group is split: its first accumulator and its parameter.
# If both are split into equally many parts, the accumulator does: it stands for more arrays. How a
# gradient arrives says nothing of how it is to be kept.
_DECIDING = (2, 1)


def _is_known(tracing: Tracing, groups: Sequence[Group], inputs: Sequence[TensorArrays]) -> bool:
    """Whether it is known here how all tensors are split: where there is one device, not at all."""
    if any(group.partition is not None for group in groups):
        return True
    leaves = map(jax.tree.leaves, inputs)
    return tracing.is_local and not any(is_explicit(x[i]) for x in leaves for i in _DECIDING)


def _crosses(run: Run, groups: Sequence[Group], tracing: Tracing) -> bool:
    """Whether a run's moments leave the code of a shard: they are those of whole tensors then.

    What the kernels make at once of tensors that are split in different ways is no array of shards.
    """
    return (
        run.on_kernels and len(groups) > 1 and not tracing.is_local and groups[0].partition is None
    )


def gradient_statistics(
    rule: Rule,
    tracing: Tracing,
    run: Run,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
) -> list[GroupStatistics]:
    """Pass A, as `backends.gradient_statistics`; moments of arrays that are split are, too."""
    if _is_known(tracing, groups, inputs):
        partitions = [group.partition for group in groups]
        return backends.gradient_statistics(rule, tracing, run, groups, inputs, partitions)
    crosses = _crosses(run, groups, tracing)
    counts = [x.gradient.shape[0] for x in inputs]
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]

    def pass_a(
        tracing: Tracing, partitions: Partitions, inputs: Sequence[TensorArrays]
    ) -> list[GroupStatistics] | jax.Array:
        made = backends.gradient_statistics(rule, tracing, run, groups, inputs, partitions)
        if not crosses:
            return made
        return joined([(x.members, x.moments) for x in made], groups, partitions, counts)

    def result_dims(result: Any) -> Any:
        return shared_dims(result) if crosses else _moments_dims(dims, result)

    arrays = [d.arrays(x) for d, x in zip(dims, inputs, strict=True)]
    settings = (rule, run, tuple(groups))
    made = on_shards(pass_a, groups, (list(inputs),), (arrays,), result_dims, tracing, settings)
    if not crosses:
        return made
    like = [shapes_of(rule, *pair) for pair in zip(groups, counts, strict=True)]
    return [GroupStatistics((k,), x) for k, x in enumerate(split(made, like))]


def update(
    rule: Rule,
    tracing: Tracing,
    run: Run,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    moments: Sequence[GroupStatistics],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
    zero: jax.Array | None,
) -> tuple[list[TensorUpdate], AccumulatorStatistics | None]:
    """Passes B and C, as `backends.update`."""
    if _is_known(tracing, groups, inputs):
        partitions = [group.partition for group in groups]
        return backends.update(
            rule,
            tracing,
            run,
            groups,
            inputs,
            partitions,
            moments,
            decays,
            settings,
            networks,
            zero if tracing.is_local else None,
        )
    crosses = _crosses(run, groups, tracing)
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    of_tensors: Callable[[Any], Any] = dims[0].by_tensor if len(dims) == 1 else shared_dims

    def passes_b_and_c(
        tracing: Tracing,
        partitions: Partitions,
        inputs: Sequence[TensorArrays],
        moments: Sequence[GroupStatistics],
        decays: Decays,
        settings: TensorSettings,
    ) -> tuple[list[TensorUpdate], AccumulatorStatistics | None]:
        # what a partitioner runs is another program: it has a zero of its own
        return backends.update(
            rule,
            tracing,
            run,
            groups,
            inputs,
            partitions,
            moments,
            decays,
            settings,
            networks,
            zero=None,
            moments_are_whole=crosses,
        )

    return on_shards(
        passes_b_and_c,
        groups,
        (list(inputs), list(moments), decays, settings),
        (
            [d.arrays(x) for d, x in zip(dims, inputs, strict=True)],
            shared_dims(list(moments)) if crosses else _moments_dims(dims, moments),
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
        (rule, run, tuple(groups), tuple(networks), settings.mlp_per_tensor),
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


def _moments_dims(
    dims: Sequence["GroupDims"], moments: Sequence[GroupStatistics]
) -> list[GroupStatistics]:
    """Dims of the moments of groups."""
    return [GroupStatistics(x.members, dims[x.members[0]].moments(x.moments)) for x in moments]


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

    def moments(self, tree: GradientStatistics) -> GradientStatistics:
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
