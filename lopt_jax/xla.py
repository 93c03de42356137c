"""The passes of a rule over groups, on XLA.

`lopt_jax.rule` has them for one tensor. Here is how many tensors take them: with wide layers
written out or not, large equal ones in turn, small ones together. What is fastest differs between
devices, and some of it takes too long to compile where groups are many.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax import rule as rules
from lopt_jax.accumulators import Accumulators, Decays, factored_dims
from lopt_jax.backends import batch_size
from lopt_jax.context import Tracing, platform, tracing
from lopt_jax.groups import Call, Factors, Group, GroupInputs
from lopt_jax.partition import Partition, is_local
from lopt_jax.rows import join_trees, part_taker, unknown_zero
from lopt_jax.rule import MLP, Moments, Rule, Statistics, TensorUpdate
from lopt_jax.turns import in_turn

# On a CPU, wide layers of so large groups are written out, unless that would take long to compile.
WRITTEN_OUT_ELEMENTS, WRITTEN_OUT_GROUPS = 1 << 17, 8
# Leaves that are updated together are joined in each of the kernels that read them where they are
# so few. With more, each of these is slow to compile: with joins of 24 up to two seconds.
JOINED_BY_READERS = 8
# On a GPU, where a step is hundreds of trainings, small tensors of so many groups take the passes
# of large ones: a quarter of the bytes and fewer launches, for a minute more of compilation.
FUSED_SMALL_GROUPS = 16


def over_tensors(function: Callable, *arguments: Any, in_axes: Any = 0) -> Any:
    """`jax.vmap`, but a single tensor keeps its rank: XLA then sees no axis of size one."""
    axes = (in_axes,) * len(arguments) if isinstance(in_axes, int) else in_axes
    sizes = {
        x.shape[0]
        for argument, axis in zip(arguments, axes, strict=True)
        if axis == 0
        for x in jax.tree.leaves(argument)
    }
    if sizes != {1}:
        return jax.vmap(function, in_axes=axes)(*arguments)
    single = [
        jax.tree.map(lambda x: x[0], argument) if axis == 0 else argument
        for argument, axis in zip(arguments, axes, strict=True)
    ]
    return jax.tree.map(lambda x: x[None], function(*single))


def network_form(rule: Rule, group: Group, groups: Sequence[Group]) -> Rule:
    """The rule for a group: with its network written out where that is worth its compilation."""
    device = platform()
    if device == "cpu":
        # other weights are read anew for every element, also those that a partitioner hands on
        known = tracing().constant_weights and is_local()
        is_worth = lambda group: known and group.size >= WRITTEN_OUT_ELEMENTS  # noqa: E731
        few = sum(map(is_worth, groups)) <= WRITTEN_OUT_GROUPS
        return replace(rule, write_out=few and is_worth(group))
    if device == "gpu" and batch_size() > 1 and len(groups) <= FUSED_SMALL_GROUPS:
        return replace(rule, small_elements=0)
    return rule


def on_xla(
    rule: Rule, mlp_per_tensor: bool, partition: Partition | None
) -> Callable[..., TensorUpdate]:
    """Passes B and C over tensors of one shape, or the shards of them."""
    axes = (0 if mlp_per_tensor else None, 0, 0, 0, 0, None, 0, 0)

    def lopt_passes(*arguments: Any) -> TensorUpdate:
        function = functools.partial(rules.second_pass, rule, partition=partition)
        return over_tensors(function, *arguments, in_axes=axes)

    return lopt_passes


def passes(rule: Rule, mlp_per_tensor: bool) -> Callable[..., TensorUpdate]:
    """The same over whole tensors, traced once for all groups of a shape, of equal optimizers."""
    return _passes(rule, mlp_per_tensor, tracing(), platform())


# Keys hold no arrays and no transformation: neither weights nor programs of an optimizer that is
# gone are kept.
@functools.lru_cache(maxsize=64)
def _passes(rule: Rule, mlp_per_tensor: bool, how: Tracing, on: str) -> Callable[..., TensorUpdate]:
    del how, on  # what the trace reads
    return jax.jit(on_xla(rule, mlp_per_tensor, None))


def moments_of(
    rule: Rule, partition: Partition | None, pairs: Sequence[tuple[jax.Array, jax.Array]]
) -> Moments:
    """Pass A over groups of equal arrays. It is too short for turns.

    Args:
      rule: the rule.
      partition: where the arrays are shards of tensors, how these are spread.
      pairs: gradients and parameters of each group, with a leading axis of tensors.

    Returns:
      Moments, with a leading axis of the tensors of all groups.
    """
    run = _first_pass(rule, partition, tracing(), platform())
    return join_trees([run(*pair) for pair in pairs])


@functools.lru_cache(maxsize=64)
def _first_pass(
    rule: Rule, partition: Partition | None, how: Tracing, on: str
) -> Callable[..., Moments]:
    del how, on
    function = functools.partial(rules.first_pass, rule, partition=partition)
    return jax.jit(functools.partial(over_tensors, function))


def updates_in_turn(
    run: Callable[..., TensorUpdate],
    inputs: Sequence[GroupInputs],
    moments: Moments,
    decays: Decays,
    factors: Factors,
    mlp_per_tensor: bool,
) -> tuple[list[TensorUpdate], Statistics | None]:
    """Passes B and C over groups of equal arrays, one after another.

    Args:
      run: of `on_xla`.
      inputs: of each group.
      moments: with a leading axis of the tensors of all groups.
      decays: decay rates.
      factors: what these tensors have.
      mlp_per_tensor: whether each has a network of its own.

    Returns:
      The updates of each group, and the statistics of all tensors.
    """

    def update(x: GroupInputs, moments: Moments, factors: Factors) -> TensorUpdate:
        return run(factors.mlp, moments, *x, decays, factors.scale, factors.weight_decay)

    if len(inputs) == 1:
        alone = update(inputs[0], moments, factors)
        return [alone._replace(statistics=None)], alone.statistics

    by_turn = lambda x: x.reshape((len(inputs), -1, *x.shape[1:]))  # noqa: E731
    by_tensor = lambda x: x.reshape((-1, *x.shape[2:]))  # noqa: E731
    vectors = [(x.accumulators.row, x.accumulators.column) for x in inputs]
    mlp = factors.mlp if mlp_per_tensor else ()
    of_tensors = jax.tree.map(by_turn, (moments, factors[1:], mlp))
    small = (jax.tree.map(lambda *xs: jnp.stack(xs), *vectors), of_tensors)

    def turn(read: Any, state: Any, small: Any) -> Any:
        (gradient, parameter), (momentum, second_moment) = read, state
        (row, column), (moments, others, mlp) = small
        accumulators = Accumulators(momentum, second_moment, row, column)
        of = Factors(mlp if mlp_per_tensor else factors.mlp, *others)
        made = update(GroupInputs(gradient, parameter, accumulators), moments, of)
        new = made.accumulators
        out = made.update.astype(parameter.dtype)
        return (new.momentum, new.second_moment), out, (new.row, new.column, made.statistics)

    states, updates, (rows, columns, statistics) = in_turn(
        turn,
        [(x.gradient, x.parameter) for x in inputs],
        [(x.accumulators.momentum, x.accumulators.second_moment) for x in inputs],
        [x.parameter for x in inputs],
        small,
    )
    take = part_taker(unknown_zero(inputs[0].gradient), of_state=True)

    def own(x: jax.Array, k: int) -> jax.Array:
        return take(x, (k, *(0 for _ in x.shape[1:])), (1, *x.shape[1:]))[0]

    made = []
    for k, ((momentum, second_moment), x) in enumerate(zip(states, updates, strict=True)):
        row, column = jax.tree.map(lambda x, k=k: own(x, k), (rows, columns))
        new = Accumulators(momentum, second_moment, row, column)
        made.append(TensorUpdate(x, new, None))
    return made, jax.tree.map(by_tensor, statistics)


def joined_calls(
    rule: Rule, calls: Sequence[Call], groups: Sequence[Group], hidden: int, mlp_per_tensor: bool
) -> list[int]:
    """Calls of small tensors whose wide network runs once for all of them.

    On a GPU a launch takes longer than the products of a small tensor. Few groups at a time: every
    feature of each of them is code of one kernel.
    """
    joins = platform() == "gpu" and len(groups) <= FUSED_SMALL_GROUPS
    apart = mlp_per_tensor or rule.accumulator_statistics or not is_local()
    if not joins or apart or hidden < rules.WIDE_HIDDEN_SIZE:
        return []

    def is_small(call: Call) -> bool:
        group = groups[call.members[0]]  # XLA's calls are of one
        return group.partition is None and math.prod(group.shape) <= rule.small_elements

    return [i for i, call in enumerate(calls) if not call.on_kernels and is_small(call)]


def small_passes(
    rule: Rule,
    mlp: MLP,
    inputs: Sequence[GroupInputs],
    moments: Sequence[Moments],
    decays: Decays,
    rates: Sequence[tuple[jax.Array, jax.Array]],
) -> list[TensorUpdate]:
    """Passes B and C over small tensors of several shapes, whose network runs once for all.

    Args:
      rule: the rule; it keeps no statistics.
      mlp: the network, which they share.
      inputs: of each group.
      moments: of each group, with a leading axis of tensors.
      decays: decay rates.
      rates: scale and weight decay of each group, (tensors,).

    Returns:
      The updates of each group.
    """

    def before(moments: Moments, x: GroupInputs) -> tuple[jax.Array, jax.Array, Accumulators]:
        dims = factored_dims(x.gradient.shape)
        operands, row, column = rules.operands_after(rule, moments, *x, decays, dims)
        features = rule.features.for_tensor(dims is not None)
        new = Accumulators(operands.momentum, operands.second_moment, row, column)
        stored = rules.as_stored(new, x.accumulators)
        return rules.small_tensor_inputs(rule, features, operands), operands.parameter, stored

    prepared = [over_tensors(before, *pair) for pair in zip(moments, inputs, strict=True)]
    flat = [jnp.moveaxis(x, 1, 0).reshape((x.shape[1], -1)) for x, *_ in prepared]
    ends = np.cumsum([x.shape[1] for x in flat])
    # rows of a product that are not whole multiples of 64 bytes are read a word at a time
    flat.append(jnp.zeros((flat[0].shape[0], -int(ends[-1]) % 16), flat[0].dtype))
    steps = rules.small_tensor_step(rule, mlp, jnp.concatenate(flat, axis=1))
    after = functools.partial(rules.tensor_update, rule)
    return [
        TensorUpdate(over_tensors(after, of, x.reshape(p.shape), p, *pair), stored, None)
        for x, of, (_, p, stored), pair in zip(
            jnp.split(steps, ends)[:-1], moments, prepared, rates, strict=True
        )
    ]
