"""One run of a backend over some groups, on the shards of their tensors where these are split.

Inside a run it is known how every tensor is split. Groups whose tensors are equal and split alike
are a batch there: the kernels take all batches at once, XLA one after another.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lopt_jax.accumulators import Accumulators, Decays, each_second_moment
from lopt_jax.backends import kernels_split
from lopt_jax.batches import TURNS, Group, Run, equal
from lopt_jax.context import Tracing
from lopt_jax.device_statistics import joined, of_shards, shapes_of, split
from lopt_jax.partition import BATCH, Dims, Partition, Partitions, spread
from lopt_jax.rows import in_order, join_trees
from lopt_jax.rules.rule import Moments, Rule, Statistics, TensorArrays, TensorUpdate
from lopt_jax.settings import TensorSettings
from lopt_jax.xla import passes
from lopt_jax.xla.network import XlaNetwork

# The arrays whose shardings decide how a group is split: its first accumulator and its parameter.
# If both are split into equally many parts, the accumulator does: it stands for more arrays. How a
# gradient arrives says nothing of how it is to be kept.
_DECIDING = (2, 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupMoments:
    """Moments of the tensors of some groups, joined.

    Attributes:
      members: positions of the groups.
      moments: with a leading axis of tensors.
    """

    members: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    moments: Moments


class _Batch(NamedTuple):
    """Groups of a run whose tensors are equal and split alike."""

    members: list[int]  # positions among the groups of the run
    partition: Partition | None
    on_kernels: bool


def _batches(
    run: Run, groups: Sequence[Group], inputs: Sequence[TensorArrays], partitions: Partitions
) -> list[_Batch]:
    """The batches of a run; what the kernels cannot take because of how it is split is XLA's."""
    batches = []
    for members in equal(range(len(groups)), groups, inputs, partitions):
        partition = partitions[members[0]]
        splits = [
            run.on_kernels and kernels_split(groups[k], partition, inputs[k]) for k in members
        ]
        able = all(splits)
        if able or (run.in_turn and len(members) >= TURNS):
            batches.append(_Batch(members, partition, able))
        else:
            batches += [_Batch([k], partition, False) for k in members]
    return batches


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
) -> list[GroupMoments]:
    """Pass A over the groups of a run.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      run: the run.
      groups: its groups.
      inputs: their arrays.

    Returns:
      Moments, whose members are positions among the groups of the run.
    """
    crosses = _crosses(run, groups, tracing)

    def pass_a(
        tracing: Tracing, partitions: Partitions, inputs: Sequence[TensorArrays]
    ) -> list[GroupMoments] | jax.Array:
        batches = _batches(run, groups, inputs, partitions)
        on_kernels = [batch for batch in batches if batch.on_kernels]
        made = []
        if on_kernels:
            from pallas_kernels import step

            moments = step.first_pass(rule, tracing, _units(on_kernels, groups, inputs))
            pairs = zip(on_kernels, moments, strict=True)
            made += [GroupMoments(tuple(batch.members), x) for batch, x in pairs]
        for batch in batches:
            for k in [] if batch.on_kernels else batch.members:
                made.append(GroupMoments((k,), passes.moments_of(rule, batch.partition, inputs[k])))
        if crosses:
            pieces = [(x.members, x.moments) for x in made]
            return joined(pieces, groups, partitions, [x.gradient.shape[0] for x in inputs])
        return made

    dims = [_GroupDims.of(group, i) for i, group in enumerate(groups)]

    def result_dims(result: Any) -> Any:
        if crosses:
            return _shared(result)
        return [GroupMoments(x.members, dims[x.members[0]].moments(x.moments)) for x in result]

    made = _on_shards(
        pass_a,
        groups,
        (list(inputs),),
        ([d.arrays(x) for d, x in zip(dims, inputs, strict=True)],),
        result_dims,
        tracing,
        (rule, run, tuple(groups)),
    )
    if not crosses:
        return made
    counts = [x.gradient.shape[0] for x in inputs]
    like = [shapes_of(rule, *pair) for pair in zip(groups, counts, strict=True)]
    return [GroupMoments((k,), x) for k, x in enumerate(split(made, like))]


def update(
    rule: Rule,
    tracing: Tracing,
    run: Run,
    groups: Sequence[Group],
    inputs: Sequence[TensorArrays],
    moments: Sequence[GroupMoments],
    decays: Decays,
    settings: TensorSettings,
    networks: Sequence[XlaNetwork],
    zero: jax.Array | None,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over the groups of a run.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      run: the run.
      groups: its groups.
      inputs: their arrays.
      moments: of `gradient_statistics`.
      decays: decay rates.
      settings: of the run's tensors.
      networks: for each group how XLA runs the network.
      zero: that parts are taken by, see `lopt_jax.compiler.slices`.

    Returns:
      The updates of each group, and where the rule keeps statistics, these for all tensors.
    """
    crosses = _crosses(run, groups, tracing)
    own_zero = zero if tracing.is_local else None  # what a partitioner runs is another program

    def passes_b_and_c(
        tracing: Tracing,
        partitions: Partitions,
        inputs: Sequence[TensorArrays],
        moments: Sequence[GroupMoments],
        decays: Decays,
        settings: TensorSettings,
    ) -> tuple[list[TensorUpdate], Statistics | None]:
        ends = np.cumsum([0, *(x.gradient.shape[0] for x in inputs)])
        known = {x.members: x.moments for x in moments}

        def tensors(members: Sequence[int]) -> list[int]:
            return [i for k in members for i in range(ends[k], ends[k + 1])]

        def moments_of(batch: _Batch) -> Moments:
            whole = known.get(tuple(batch.members))
            if whole is None:
                whole = join_trees([known[(k,)] for k in batch.members])
            dims = groups[batch.members[0]].dims
            return of_shards(whole, batch.partition, dims) if crosses else whole

        updates: dict[int, TensorUpdate] = {}
        statistics: list[tuple[list[int], Any]] = []
        batches = _batches(run, groups, inputs, partitions)
        on_kernels = [batch for batch in batches if batch.on_kernels]
        if on_kernels:
            from pallas_kernels import step

            positions = tensors([k for batch in on_kernels for k in batch.members])
            of_batches, kept = step.second_pass(
                rule,
                tracing,
                _units(on_kernels, groups, inputs),
                list(map(moments_of, on_kernels)),
                settings.rows(positions),
                decays,
                own_zero,
            )
            for batch, of_batch in zip(on_kernels, of_batches, strict=True):
                updates |= dict(zip(batch.members, of_batch, strict=True))
            statistics.append((positions, kept))
        for batch in batches:
            if batch.on_kernels:
                continue
            positions = tensors(batch.members)
            results, kept = passes.updates(
                rule,
                tracing,
                networks[batch.members[0]],
                batch.partition,
                [inputs[k] for k in batch.members],
                moments_of(batch),
                decays,
                settings.rows(positions),
            )
            updates |= dict(zip(batch.members, results, strict=True))
            statistics.append((positions, kept))
        in_run = [updates[k] for k in range(len(inputs))]
        if any(kept is None for _, kept in statistics):
            return in_run, None
        return in_run, in_order(statistics)

    dims = [_GroupDims.of(group, i) for i, group in enumerate(groups)]
    of_tensors: Callable[[Any], Any] = dims[0].by_tensor if len(dims) == 1 else _shared
    dims_of_settings = TensorSettings(
        of_tensors(settings.mlp) if settings.mlp_per_tensor else _shared(settings.mlp),
        of_tensors(settings.scale),
        of_tensors(settings.weight_decay),
        of_tensors(settings.statistics),
        settings.mlp_per_tensor,
    )
    return _on_shards(
        passes_b_and_c,
        groups,
        (list(inputs), list(moments), decays, settings),
        (
            [d.arrays(x) for d, x in zip(dims, inputs, strict=True)],
            [
                GroupMoments(
                    x.members,
                    _shared(x.moments) if crosses else dims[x.members[0]].moments(x.moments),
                )
                for x in moments
            ],
            _shared(decays),
            dims_of_settings,
        ),
        lambda result: (
            [d.update(x) for d, x in zip(dims, result[0], strict=True)],
            of_tensors(result[1]),
        ),
        tracing,
        (rule, run, tuple(groups), tuple(networks), settings.mlp_per_tensor),
    )


def _units(
    batches: Sequence[_Batch], groups: Sequence[Group], inputs: Sequence[TensorArrays]
) -> list[Any]:
    """Batches as the kernels take them."""
    from pallas_kernels import step

    return [
        step.Unit(
            [inputs[k] for k in batch.members], batch.partition, groups[batch.members[0]].lengths
        )
        for batch in batches
    ]


# What the partitioner is told of the arrays


def _on_shards(
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


def _shared(tree: Any) -> Any:
    """Dims of arrays that are whole on every device."""
    return jax.tree.map(lambda x: Dims((None,) * np.ndim(x)), tree)


class _GroupDims(NamedTuple):
    """What the dimensions of a group's arrays are."""

    elementwise: Dims
    row: Dims
    column: Dims

    part: int

    @classmethod
    def of(cls, group: Group, part: int) -> "_GroupDims":
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

    def moments(self, tree: Moments) -> Moments:
        """The results of pass A."""
        vector = lambda dims: Dims((BATCH, *dims.labels[2:]), self.part)  # noqa: E731
        return Moments(
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
