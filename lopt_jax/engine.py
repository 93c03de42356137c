"""Maps a rule over a pytree of parameters, in two passes.

What sets the networks may look at all tensors between the two. Leaves become tensors, tensors
groups, and groups calls of a backend, which run on the shards of tensors where these are split.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import xla
from lopt_jax.accumulators import (
    Accumulators,
    Decays,
    FactoredDims,
    each_second_moment,
    second_moments,
)
from lopt_jax.backends import choose_backend, kernels_split
from lopt_jax.context import tracing
from lopt_jax.groups import (
    TURNS,
    Call,
    Factors,
    Group,
    GroupDims,
    GroupInputs,
    Leaves,
    alike_vectors,
    dtypes_of,
    gather,
    join_vectors,
    make_calls,
    make_groups,
    scatter,
)
from lopt_jax.partition import Partition, Partitions, is_local, spread
from lopt_jax.rows import concatenate, in_order, join_trees, part_taker, take_rows, unknown_zero
from lopt_jax.rule import MLP, Moments, Rule, Statistics, TensorUpdate
from lopt_jax.tensors import (
    StackedAxes,
    Tensors,
    check_shapes,
    leaves_like,
    number_of,
    paths,
    tensors_of,
)

# The first accumulator and the parameter decide how a group is split, in a draw the accumulator: it
# stands for more arrays. A gradient that comes otherwise is no news: its way is the batch's sum.
_GUIDES = (2, 1)


class _Shards(NamedTuple):
    """Parts of a call that are equal in shape and split alike."""

    unit: int
    members: list[int]  # positions among all parts of the call
    partition: Partition | None
    on_kernels: bool


def _shards_of(
    call: Call, groups: Sequence[Group], inputs: Sequence[GroupInputs], partitions: Partitions
) -> list[_Shards]:
    """The parts of a call, by unit and by how they are split."""
    out, first = [], 0
    for i, unit in enumerate(call.units):
        alike: dict[Partition | None, list[int]] = {}
        for k in range(first, first + len(unit)):
            alike.setdefault(partitions[k], []).append(k)
        first += len(unit)
        for partition, members in alike.items():
            # of each it is said if the kernels cannot
            able = [
                call.on_kernels and kernels_split(groups[k], partition, inputs[k]) for k in members
            ]
            out.append(_Shards(i, members, partition, all(able)))
    return out


def _moments_like(rule: Rule, group: Group, tensors: int) -> Moments:
    """Shapes of the moments of so many whole tensors like a group's."""
    shape = group.shape if group.partition is None else group.partition.shape
    of = lambda *shape: jax.ShapeDtypeStruct((tensors, *shape), jnp.float32)  # noqa: E731
    row = column = None
    if group.dims is not None:
        row, column = (of(*shape[:d], *shape[d + 1 :]) for d in (group.dims.d0, group.dims.d1))
    needs_parameter = rule.parameter_scale or rule.accumulator_statistics
    return Moments(row, column, of() if needs_parameter else None)


def _whole_moments(
    pieces: Sequence[Sequence[tuple[_Shards, list[int], Moments]]],
    groups: Sequence[Group],
) -> jax.Array:
    """Moments of whole tensors in one array, by one sum over devices, from those of shards."""
    split = [x.partition for unit in pieces for x, _, _ in unit if x.partition is not None]
    of_all = [name for p in split for name in p.names(range(len(p.shape)))]
    names = tuple(dict.fromkeys(of_all))

    def own(x: _Shards, members: list[int], moments: Moments) -> Moments:
        dims = groups[members[0]].dims
        shape = groups[members[0]].shape
        partition = x.partition or Partition(shape, ((),) * len(shape))

        def part(array: Any, dim: int | None) -> Any:
            if array is None:
                return None
            kept = Partition((), ()) if dim is None else partition.without(dim)
            return kept.stacked(array.shape[0]).own_part(array, names)

        return Moments(
            part(moments.row, None if dims is None else dims.d0),
            part(moments.column, None if dims is None else dims.d1),
            part(moments.parameter_mean_square, None),
        )

    whole = [in_order([(members, own(x, members, m)) for x, members, m in unit]) for unit in pieces]
    nothing = jnp.zeros((0,), jnp.float32)  # where no tensor has moments
    flat = jnp.concatenate([nothing, *(x.reshape(-1) for x in jax.tree.leaves(whole))])
    return jax.lax.psum(flat, names) if names else flat


def _apart(flat: jax.Array, like: Any) -> Any:
    """The inverse of joining a tree's arrays, flattened, in one."""
    leaves, treedef = jax.tree.flatten(like)
    ends = list(itertools.accumulate((x.size for x in leaves), initial=0))
    return treedef.unflatten(
        [
            flat[i:j].reshape(x.shape)
            for x, (i, j) in zip(leaves, itertools.pairwise(ends), strict=True)
        ]
    )


def _of_shards(moments: Moments, partition: Partition | None, dims: FactoredDims | None) -> Moments:
    """Moments of this device's shards from those of whole tensors."""
    if partition is None or dims is None or moments.row is None:
        return moments

    def part(x: jax.Array, dim: int) -> jax.Array:
        return partition.without(dim).stacked(x.shape[0]).shard(x)

    return moments._replace(row=part(moments.row, dims.d0), column=part(moments.column, dims.d1))


def _guides(inputs: Sequence[GroupInputs]) -> list[list[int]]:
    """For each part the positions of `_GUIDES` among the leaves of all."""
    starts = np.cumsum([0, *(len(jax.tree.leaves(x)) for x in inputs)])
    return [[int(start) + i for i in _GUIDES] for start in starts[:-1]]


def _crosses(call: Call, groups: Sequence[Group]) -> bool:
    """Whether a call's moments leave the code of a shard: they are those of whole tensors then.

    What the kernels make at once of tensors that are split in different ways is no array of shards.
    """
    joins = call.on_kernels and len(groups) > 1
    return joins and not is_local() and groups[0].partition is None


def _alike(
    call: Call, shards: Sequence[_Shards], inputs: Sequence[GroupInputs]
) -> list[list[tuple[_Shards, int]]]:
    """The parts that XLA updates: one by one, or where they take turns, alike ones together."""
    pairs = [(x, k) for x in shards if not x.on_kernels for k in x.members]
    if not call.in_turn:
        return [[pair] for pair in pairs]
    alike: dict[Any, list[tuple[_Shards, int]]] = {}
    for x, k in pairs:
        key = (x.partition, inputs[k].gradient.shape, dtypes_of(inputs[k]))
        alike.setdefault(key, []).append((x, k))
    together = [some for some in alike.values() if len(some) >= TURNS]
    return together + [[pair] for some in alike.values() if len(some) < TURNS for pair in some]


def _moments_dims(dims: Sequence[GroupDims], moments: Sequence[Moments]) -> list[Moments]:
    """The dims of moments that do not leave the code of a shard: one group is a unit there."""
    return [d.moments(x) for d, x in zip(dims, moments, strict=False)]


def _settings(rule: Rule, call: Call, groups: Sequence[Group], *more: Any) -> tuple:
    """What is static of a pass, for `spread`; devices have other names in other processes."""
    return rule, call, tuple(groups), replace(tracing(), device=None), *more


def _first_pass(
    rule: Rule, call: Call, groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Moments]:
    """Pass A over the groups of a call, on the shards of their tensors.

    Returns:
      Moments of each unit, with a leading axis of tensors.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    crosses = _crosses(call, groups)

    def first(partitions: Partitions, inputs: Sequence[GroupInputs]) -> Any:
        shards = _shards_of(call, groups, inputs, partitions)
        on_kernels = [x for x in shards if x.on_kernels]
        made: Iterator[Moments] = iter(())
        if on_kernels:
            from pallas_kernels import step

            made = iter(step.first_pass(rule, _step_units(on_kernels, groups, inputs)))
        pieces: list[list[tuple[_Shards, list[int], Moments]]] = [[] for _ in call.units]
        for x in shards:
            pairs = [(inputs[k].gradient, inputs[k].parameter) for k in x.members]
            of_shards = next(made) if x.on_kernels else xla.moments_of(rule, x.partition, pairs)
            pieces[x.unit].append((x, x.members, of_shards))
        if crosses:
            return _whole_moments(pieces, groups)
        return [in_order([piece[1:] for piece in unit]) for unit in pieces]

    moments = spread(
        first,
        (list(inputs),),
        ([d.inputs(x) for d, x in zip(dims, inputs, strict=True)],),
        lambda result: dims[0].shared(result) if crosses else _moments_dims(dims, result),
        [group.shape for group in groups],
        [group.partition for group in groups],
        guides=_guides(inputs),
        names=[group.name for group in groups],
        settings=_settings(rule, call, groups),
    )
    if not crosses:
        return moments
    by_unit = iter(zip(groups, inputs, strict=True))
    like = []
    for unit in call.units:
        members = list(itertools.islice(by_unit, len(unit)))
        tensors = sum(x.gradient.shape[0] for _, x in members)
        like.append(_moments_like(rule, members[0][0], tensors))
    return _apart(moments, like)


def _step_units(
    shards: Sequence[_Shards], groups: Sequence[Group], inputs: Sequence[GroupInputs]
) -> list[Any]:
    """The parts of a call as the kernels take them."""
    from pallas_kernels import step

    return [
        step.Unit(
            [step.Part(*inputs[k]) for k in x.members], x.partition, groups[x.members[0]].lengths
        )
        for x in shards
    ]


def _second_pass(
    rule: Rule,
    call: Call,
    groups: Sequence[Group],
    inputs: Sequence[GroupInputs],
    moments: Sequence[Moments],
    mlp_per_tensor: bool,
    decays: Decays,
    factors: Factors,
    zero: jax.Array | None,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over the groups of a call, on the shards of their tensors.

    Returns:
      The updates of each group, and where the kernels made them and the rule keeps statistics,
      these for all tensors.
    """
    dims = [GroupDims.of(group, i) for i, group in enumerate(groups)]
    crosses = _crosses(call, groups)
    own_zero = zero if is_local() else None  # what a partitioner runs is another program

    def passes(
        partitions: Partitions,
        inputs: Sequence[GroupInputs],
        moments: Sequence[Moments],
        decays: Decays,
        factors: Factors,
    ) -> tuple[list[TensorUpdate], Statistics | None]:
        updates: list[Any] = [None] * len(inputs)
        kept: list[tuple[list[int], Any]] = []
        ends = np.cumsum([0, *(x.gradient.shape[0] for x in inputs)])
        tensors = lambda members: [i for k in members for i in range(ends[k], ends[k + 1])]  # noqa: E731

        def moments_of(x: _Shards, members: Sequence[int]) -> Moments:
            of_unit = [k for k, group in enumerate(call.members) if group in call.units[x.unit]]
            out = moments[x.unit]
            if list(members) != of_unit:
                first = ends[of_unit[0]]
                out = take_rows(out, [i - first for i in tensors(members)])
            return _of_shards(out, x.partition, groups[members[0]].dims) if crosses else out

        shards = _shards_of(call, groups, inputs, partitions)
        on_kernels = [x for x in shards if x.on_kernels]
        if on_kernels:
            from pallas_kernels import step

            positions = tensors([k for x in on_kernels for k in x.members])
            of = factors.rows(positions, mlp_per_tensor)
            made, statistics = step.second_pass(
                rule,
                _step_units(on_kernels, groups, inputs),
                [moments_of(x, x.members) for x in on_kernels],
                of.mlp,
                mlp_per_tensor,
                decays,
                of.scale,
                of.weight_decay,
                of.statistics,
                own_zero,
            )
            for x, of_unit in zip(on_kernels, made, strict=True):
                for k, update in zip(x.members, of_unit, strict=True):
                    updates[k] = update
            kept.append((positions, statistics))
        for pairs in _alike(call, shards, inputs):
            x, members = pairs[0][0], [k for _, k in pairs]
            run = (
                xla.passes(rule, mlp_per_tensor)
                if x.partition is None
                else xla.on_xla(rule, mlp_per_tensor, x.partition)
            )
            of = factors.rows(tensors(members), mlp_per_tensor)
            of_members = [inputs[k] for k in members]
            own_moments = (
                moments_of(x, members)
                if members == x.members
                else join_trees([moments_of(y, [k]) for y, k in pairs])
            )
            results, statistics = xla.updates_in_turn(
                run, of_members, own_moments, decays, of, mlp_per_tensor
            )
            for k, update in zip(members, results, strict=True):
                updates[k] = update
            kept.append((tensors(members), statistics))
        if any(statistics is None for _, statistics in kept):
            return updates, None
        return updates, in_order(kept)

    shared, of_all = dims[0].shared, dims[0].by_tensor if len(dims) == 1 else dims[0].shared
    return spread(
        passes,
        (list(inputs), list(moments), decays, factors),
        (
            [d.inputs(x) for d, x in zip(dims, inputs, strict=True)],
            shared(list(moments)) if crosses else _moments_dims(dims, moments),
            shared(decays),
            Factors(
                of_all(factors.mlp) if mlp_per_tensor else shared(factors.mlp),
                *of_all((factors.scale, factors.weight_decay, factors.statistics)),
            ),
        ),
        lambda result: (
            [d.result(x) for d, x in zip(dims, result[0], strict=True)],
            of_all(result[1]),
        ),
        [group.shape for group in groups],
        [group.partition for group in groups],
        guides=_guides(inputs),
        names=[group.name for group in groups],
        settings=_settings(rule, call, groups, mlp_per_tensor),
    )


class Prepared(NamedTuple):
    """A step after its first pass: what the second needs."""

    groups: list[Group]
    tensors: list[Tensors]
    inputs: list[GroupInputs]
    calls: list[Call]  # groups that are updated together
    moments: list[list[Moments]]  # of each unit of each call
    params: list  # the leaves
    out: Leaves
    treedef: Any  # of the params
    accumulators_treedef: Any  # boxes of rows and columns name other axes than the params' boxes
    has_gradient: list[bool]


def first_pass(
    rule: Rule,
    gradients: Any,
    params: Any,
    accumulators: Accumulators,
    stacked_axes: StackedAxes,
    backend: str = "auto",
) -> Prepared:
    """Pass A over every tensor of a tree.

    Args:
      rule: the rule.
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
    leaves, treedef = jax.tree.flatten(params)
    gradient_leaves = treedef.flatten_up_to(gradients)
    tensors = tensors_of(params, stacked_axes)
    lists = Accumulators(
        momentum=tuple(leaves_like("state: momentum", m, params) for m in accumulators.momentum),
        second_moment=each_second_moment(
            lambda v: leaves_like("state: second_moment", v, params), accumulators.second_moment
        ),
        row=jax.tree.leaves(accumulators.row),
        column=jax.tree.leaves(accumulators.column),
    )
    for of_leaves in (*lists.momentum, *second_moments(lists.second_moment)):
        # of what is not updated here there may be less
        updated = zip(of_leaves, gradient_leaves, strict=True)
        check_shapes("state: accumulators", [None if g is None else x for x, g in updated], params)
    groups = make_groups(tensors, leaves, gradient_leaves, paths(params))
    inputs = [gather(group, tensors, gradient_leaves, leaves, lists) for group in groups]
    vectors = alike_vectors(groups, inputs)
    chosen = choose_backend(rule, backend, groups, inputs, vectors)
    for members in vectors:
        if chosen[members[0]]:
            joined = join_vectors([groups[i] for i in members], [inputs[i] for i in members])
            groups[members[0]], inputs[members[0]] = joined
    gone = {i for members in vectors if chosen[members[0]] for i in members[1:]}
    kept = [i for i in range(len(groups)) if i not in gone]
    groups, inputs = [groups[i] for i in kept], [inputs[i] for i in kept]
    chosen = [chosen[i] for i in kept]
    for i, group in enumerate(groups):
        if not chosen[i] and len(group.leaves) > xla.JOINED_BY_READERS:
            inputs[i] = jax.lax.optimization_barrier(inputs[i])
    calls = make_calls(chosen, groups, inputs)
    moments = [
        _first_pass(rule, call, [groups[i] for i in of], [inputs[i] for i in of])
        for call, of in zip(calls, [call.members for call in calls], strict=True)
    ]
    return Prepared(
        groups=groups,
        tensors=tensors,
        inputs=inputs,
        calls=calls,
        moments=moments,
        params=leaves,
        out=Leaves(updates=[jnp.zeros_like(x) for x in leaves], accumulators=lists),
        treedef=treedef,
        accumulators_treedef=jax.tree.structure(accumulators),
        has_gradient=[g is not None for g in gradient_leaves],
    )


def parameter_mean_squares(prepared: Prepared) -> jax.Array:
    """Mean square of the parameters of every tensor: (tensors,) float32, zero for empty ones."""
    pieces = [unit.parameter_mean_square for call in prepared.moments for unit in call]
    return _by_tensor(prepared, pieces)


def _by_tensor(prepared: Prepared, arrays: Sequence[jax.Array], default: Any = None) -> jax.Array:
    """Puts arrays with one row a tensor of each call into the order of all tensors."""
    order = [k for call in prepared.calls for i in call.members for k in prepared.groups[i].tensors]
    count = number_of(prepared.tensors)
    if not arrays:
        return jnp.zeros((count,), jnp.float32) if default is None else default
    joined = concatenate(arrays)
    if len(order) == count:
        return joined[np.argsort(np.asarray(order))]
    if default is None:
        default = jnp.zeros((count, *joined.shape[1:]), joined.dtype)
    return default.at[np.asarray(order)].set(joined)


def second_pass(
    rule: Rule,
    prepared: Prepared,
    mlp: MLP,
    mlp_per_tensor: bool,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    statistics: Statistics | None = None,
) -> tuple[Any, Accumulators, Statistics | None]:
    """Passes B and C over every tensor of a tree.

    Args:
      rule: the rule.
      prepared: of `first_pass`.
      mlp: the network: one for all tensors, or with a leading axis of tensors.
      mlp_per_tensor: whether it has that axis.
      decays: decay rates.
      scale: () or (tensors,), as in `rule.second_pass`.
      weight_decay: () or (tensors,), as in `rule.second_pass`.
      statistics: the last step's, each with a leading axis of tensors, where the rule keeps them;
        tensors that are not updated keep theirs.

    Returns:
      Updates like the params (in their dtypes; None where there was no gradient), or the new params
      where the rule applies its updates; the new accumulators, and the new statistics.
    """
    count = number_of(prepared.tensors)
    if rule.applies:  # of a copy: what is not updated stays
        prepared = prepared._replace(out=prepared.out._replace(updates=list(prepared.params)))
    scale, weight_decay = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count,)) for x in (scale, weight_decay)
    )
    gradients = [x.gradient for x in prepared.inputs]
    # the smallest is the least likely to be split
    zero = unknown_zero(min(gradients, key=lambda x: x.size)) if gradients else None
    takers = part_taker(zero), part_taker(zero, of_state=True)
    new_statistics = []
    hidden = mlp.biases[0].shape[-1]
    joined = xla.joined_calls(rule, prepared.calls, prepared.groups, hidden, mlp_per_tensor)
    if joined:
        places = [prepared.calls[i].members[0] for i in joined]
        groups = [prepared.groups[place] for place in places]
        rows = [np.asarray(group.tensors) for group in groups]
        results = xla.small_passes(
            rule,
            mlp,
            [prepared.inputs[place] for place in places],
            [prepared.moments[i][0] for i in joined],
            decays,
            [(scale[of_group], weight_decay[of_group]) for of_group in rows],
        )
        for group, result in zip(groups, results, strict=True):
            out = prepared.out
            scatter(group, prepared.tensors, result.update, result.accumulators, takers, out)
    for i, (call, moments) in enumerate(zip(prepared.calls, prepared.moments, strict=True)):
        if i in joined:
            continue
        groups = [prepared.groups[i] for i in call.members]
        of_all = Factors(mlp, scale, weight_decay, statistics if call.on_kernels else None)
        results, kept = _second_pass(
            xla.network_form(rule, groups[0], prepared.groups),
            call,
            groups,
            [prepared.inputs[i] for i in call.members],
            moments,
            mlp_per_tensor,
            decays,
            of_all.rows([k for group in groups for k in group.tensors], mlp_per_tensor),
            zero,
        )
        for group, result in zip(groups, results, strict=True):
            out = prepared.out
            scatter(group, prepared.tensors, result.update, result.accumulators, takers, out)
        new_statistics.append(kept)
    accumulators = prepared.accumulators_treedef.unflatten(
        jax.tree.leaves(prepared.out.accumulators)
    )
    if statistics is not None and new_statistics:
        statistics = jax.tree.map(
            lambda default, *rows: _by_tensor(prepared, rows, default), statistics, *new_statistics
        )
    updates = [
        u if has or rule.applies else None
        for u, has in zip(prepared.out.updates, prepared.has_gradient, strict=True)
    ]
    return prepared.treedef.unflatten(updates), accumulators, statistics
