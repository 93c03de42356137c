"""The passes of a rule over groups of tensors, on XLA.

`lopt_jax.rules.rule` has them for one tensor. Here is how many tensors take them: large equal ones
in turn, small ones together, and how the network of each runs. What is fastest differs between
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

from lopt_jax.accumulators import Accumulators, Decays, factored_dims
from lopt_jax.batches import Batch, Group
from lopt_jax.compiler.quirks import barrier
from lopt_jax.compiler.slices import opaque_zero, part_taker
from lopt_jax.context import Tracing
from lopt_jax.partition import Partition
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import (
    AccumulatorStatistics,
    GradientStatistics,
    Rule,
    TensorArrays,
    TensorUpdate,
)
from lopt_jax.settings import TensorSettings
from lopt_jax.xla import update as of_tensor
from lopt_jax.xla.network import XlaNetwork, small_tensor_inputs, small_tensor_step
from lopt_jax.xla.turns import in_turn
from lopt_jax.xla.update import Rates

# On a CPU, wide layers of so large groups are unrolled, unless that would take long to compile.
UNROLLED_ELEMENTS, UNROLLED_GROUPS = 1 << 17, 8
# So few leaves of a group are joined by each of the kernels that read them.
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


def networks_of(tracing: Tracing, groups: Sequence[Group]) -> list[XlaNetwork]:
    """How XLA runs the network of each of all groups."""
    platform = tracing.platform
    plain = XlaNetwork(platform, without=tracing.without)
    if platform == "cpu":
        # other weights are read anew for every element, also those that a partitioner hands on
        known = tracing.constant_weights and not tracing.axes
        worth_it = [known and group.size >= UNROLLED_ELEMENTS for group in groups]
        few = sum(worth_it) <= UNROLLED_GROUPS
        return [replace(plain, unrolled=few and worth) for worth in worth_it]
    if platform == "gpu" and tracing.batch > 1 and len(groups) <= FUSED_SMALL_GROUPS:
        return [replace(plain, small_elements=0)] * len(groups)
    return [plain] * len(groups)


def joined_once(tracing: Tracing, x: TensorArrays, leaves: int) -> TensorArrays:
    """The arrays of a group, joined before they are read where its leaves are many."""
    return barrier("many_leaves", x, tracing.without) if leaves > JOINED_BY_READERS else x


def moments_of(rule: Rule, partition: Partition | None, x: TensorArrays) -> GradientStatistics:
    """Pass A over the tensors of a group.

    Args:
      rule: the rule.
      partition: where the arrays are shards of tensors, how these are spread.
      x: the group's arrays.

    Returns:
      Gradient statistics, with a leading axis of tensors.
    """
    return _first_pass(rule, partition)(x.gradient, x.parameter)


# Keys hold no arrays and no transformation: neither weights nor programs of an optimizer that is
# gone are kept.
@functools.lru_cache(maxsize=64)
def _first_pass(rule: Rule, partition: Partition | None) -> Callable[..., GradientStatistics]:
    function = functools.partial(rules.gradient_statistics, rule, partition=partition)
    return jax.jit(functools.partial(over_tensors, function))


def _second_pass(
    rule: Rule, network: XlaNetwork, mlp_per_tensor: bool, partition: Partition | None
) -> Callable[..., TensorUpdate]:
    """Passes B and C over tensors of one shape, or the shards of them."""
    axes = (0 if mlp_per_tensor else None, 0, 0, None, 0)

    def lopt_passes(*arguments: Any) -> TensorUpdate:
        function = functools.partial(of_tensor.update, rule, network, partition)
        return over_tensors(function, *arguments, in_axes=axes)

    return lopt_passes


@functools.lru_cache(maxsize=64)
def _of_whole_tensors(
    rule: Rule, network: XlaNetwork, mlp_per_tensor: bool
) -> Callable[..., TensorUpdate]:
    """The same over whole tensors, traced once for all groups of a shape, of equal optimizers."""
    return jax.jit(_second_pass(rule, network, mlp_per_tensor, None))


def updates(
    rule: Rule,
    tracing: Tracing,
    network: XlaNetwork,
    partition: Partition | None,
    inputs: Sequence[TensorArrays],
    moments: GradientStatistics,
    decays: Decays,
    settings: TensorSettings,
) -> tuple[list[TensorUpdate], AccumulatorStatistics | None]:
    """Passes B and C over groups of equal arrays, where there are several one after another.

    Args:
      rule: the rule.
      tracing: what steers the trace.
      network: how the network runs.
      partition: where the arrays are shards of tensors, how these are spread.
      inputs: the arrays of each group.
      moments: with a leading axis of the tensors of all groups.
      decays: decay rates.
      settings: of these tensors.

    Returns:
      The updates of each group, and the statistics of all tensors.
    """
    per_tensor = settings.mlp_per_tensor
    run = (
        _of_whole_tensors(rule, network, per_tensor)
        if partition is None
        else _second_pass(rule, network, per_tensor, partition)
    )

    def update(
        x: TensorArrays, moments: GradientStatistics, mlp: Any, rates: Rates
    ) -> TensorUpdate:
        return run(mlp, moments, x, decays, rates)

    rates = Rates(settings.scale, settings.weight_decay, settings.statistics)
    if len(inputs) == 1:
        alone = update(inputs[0], moments, settings.mlp, rates)
        return [alone._replace(statistics=None)], alone.statistics

    by_turn = lambda x: x.reshape((len(inputs), -1, *x.shape[1:]))  # noqa: E731
    by_tensor = lambda x: x.reshape((-1, *x.shape[2:]))  # noqa: E731
    vectors = [(x.accumulators.row, x.accumulators.column) for x in inputs]
    own_mlp = settings.mlp if per_tensor else ()
    of_tensors = jax.tree.map(by_turn, (moments, rates, own_mlp))
    small = (jax.tree.map(lambda *xs: jnp.stack(xs), *vectors), of_tensors)

    def turn(read: Any, state: Any, small: Any) -> Any:
        (gradient, parameter), (momentum, second_moment) = read, state
        (row, column), (moments, rates, mlp) = small
        arrays = TensorArrays(
            gradient, parameter, Accumulators(momentum, second_moment, row, column)
        )
        made = update(arrays, moments, mlp if per_tensor else settings.mlp, rates)
        new = made.accumulators
        out = made.update.astype(parameter.dtype)
        return (new.momentum, new.second_moment), out, (new.row, new.column, made.statistics)

    states, steps, (rows, columns, statistics) = in_turn(
        turn,
        [(x.gradient, x.parameter) for x in inputs],
        [(x.accumulators.momentum, x.accumulators.second_moment) for x in inputs],
        [x.parameter for x in inputs],
        small,
    )
    zero = None if tracing.joined_state else opaque_zero(tracing, inputs[0].gradient)
    take = part_taker(zero)

    def own(x: jax.Array, k: int) -> jax.Array:
        return take(x, (k, *(0 for _ in x.shape[1:])), (1, *x.shape[1:]))[0]

    made = []
    for k, ((momentum, second_moment), x) in enumerate(zip(states, steps, strict=True)):
        row, column = jax.tree.map(lambda x, k=k: own(x, k), (rows, columns))
        made.append(TensorUpdate(x, Accumulators(momentum, second_moment, row, column), None))
    return made, jax.tree.map(by_tensor, statistics)


def joined_batches(
    rule: Rule,
    tracing: Tracing,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    networks: Sequence[XlaNetwork],
    settings: TensorSettings,
) -> list[int]:
    """Batches of small tensors whose wide network runs once for all of them, by their positions.

    On a GPU a launch takes longer than the products of a small tensor. Few groups at a time: every
    feature of each of them is code of one kernel.
    """
    joins = tracing.platform == "gpu" and len(groups) <= FUSED_SMALL_GROUPS
    apart = settings.mlp_per_tensor or rule.accumulator_statistics
    hidden = settings.mlp.biases[0].shape[-1]
    if not joins or apart or hidden < rules.WIDE_HIDDEN_SIZE:
        return []

    def is_small(batch: Batch) -> bool:
        group, network = groups[batch.members[0]], networks[batch.members[0]]
        return batch.partition is None and math.prod(group.shape) <= network.small_elements

    return [i for i, x in enumerate(batches) if not x.on_kernels and is_small(x)]


def small_updates(
    rule: Rule,
    platform: str,
    inputs: Sequence[TensorArrays],
    moments: Sequence[GradientStatistics],
    decays: Decays,
    settings: Sequence[TensorSettings],
) -> list[TensorUpdate]:
    """Passes B and C over small tensors of several shapes, whose network runs once for all.

    Args:
      rule: the rule; it keeps no statistics.
      platform: of the device.
      inputs: of each group.
      moments: of each group, with a leading axis of tensors.
      decays: decay rates.
      settings: of each group; they share the network.

    Returns:
      The updates of each group.
    """

    def before(
        moments: GradientStatistics, x: TensorArrays
    ) -> tuple[jax.Array, jax.Array, Accumulators]:
        dims = factored_dims(x.gradient.shape)
        store = XlaNetwork(platform).store
        operands, row, column = rules.operands_after(rule, moments, *x, decays, dims, store=store)
        features = rule.features.for_tensor(dims is not None)
        new = Accumulators(operands.momentum, operands.second_moment, row, column)
        stored = rules.as_stored(new, x.accumulators)
        return small_tensor_inputs(rule, features, operands), operands.parameter, stored

    prepared = [over_tensors(before, *pair) for pair in zip(moments, inputs, strict=True)]
    flat = [jnp.moveaxis(x, 1, 0).reshape((x.shape[1], -1)) for x, *_ in prepared]
    ends = np.cumsum([x.shape[1] for x in flat])
    # rows of a product that are not whole multiples of 64 bytes are read a word at a time
    flat.append(jnp.zeros((flat[0].shape[0], -int(ends[-1]) % 16), flat[0].dtype))
    steps = small_tensor_step(platform, rule, settings[0].mlp, jnp.concatenate(flat, axis=1))
    after = functools.partial(rules.tensor_update, rule)
    return [
        TensorUpdate(
            over_tensors(after, own, x.reshape(p.shape), p, of.scale, of.weight_decay), stored, None
        )
        for x, own, (_, p, stored), of in zip(
            jnp.split(steps, ends)[:-1], moments, prepared, settings, strict=True
        )
    ]
