"""The two calls in plain jnp, which is what they are differentiated as.

Kernels have no derivatives. Where one is asked for, `lopt_jax.rules.rule` makes the values too.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lopt_jax.accumulators import Decays
from lopt_jax.partition import Partition
from lopt_jax.rows import in_order, join_trees, take_rows
from lopt_jax.rules import rule as rules
from lopt_jax.rules.rule import MLP, AccumulatorStatistics, GradientStatistics, Rule, TensorUpdate
from lopt_jax.settings import TensorSettings
from lopt_jax.xla.network import XlaNetwork


def differentiated_as[Result](
    plain: Callable[..., Result], function: Callable[..., Result]
) -> Callable[..., Result]:
    """A function with the derivatives, of every order, of another that computes the same."""
    run = jax.custom_jvp(function)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(primals)
        directions = treedef.flatten_up_to(tangents)
        # what is constant stays so: zeros in place of its tangents would be multiplied and added
        varies = [not isinstance(x, SymbolicZero) for x in directions]

        def of_varying(*varying: jax.Array) -> Result:
            given = iter(varying)
            own = [next(given) if v else x for v, x in zip(varies, leaves, strict=True)]
            return plain(*treedef.unflatten(own))

        values, slopes = (tuple(itertools.compress(x, varies)) for x in (leaves, directions))
        return jax.jvp(of_varying, values, slopes)

    return run


def moments(
    rule: Rule,
    parts: Sequence[Any],
    partition: Partition | None,
    lengths: Sequence[int] | np.ndarray | None,
) -> GradientStatistics:
    """Pass A over the tensors of a unit; arguments as in `step.Unit`."""
    function = jax.vmap(lambda g, p: rules.gradient_statistics(rule, g, p, partition))
    out = join_trees([function(part.gradient, part.parameter) for part in parts])
    if lengths is None or out.parameter_mean_square is None:
        return out
    padded = parts[0].gradient.shape[1] / np.asarray(lengths, np.float32)
    return out._replace(parameter_mean_square=padded * out.parameter_mean_square)


def updates(
    rule: Rule,
    platform: str,
    parts: Sequence[Any],
    partition: Partition | None,
    lengths: Sequence[int] | None,
    moments: GradientStatistics,
    settings: TensorSettings,
    decays: Decays,
) -> tuple[list[TensorUpdate], AccumulatorStatistics | None]:
    """Passes B and C over the tensors of a unit; arguments as in `step.Unit`, `step.second_pass`.

    Returns:
      The updates of each part, and the statistics of all tensors.
    """
    whole = join_trees(parts)

    def run(mlp: MLP, rates: tuple[Any, Any], moments: GradientStatistics, x: Any) -> TensorUpdate:
        arrays = (x.gradient, x.parameter, x.accumulators)
        made = rules.update(
            rule, mlp, moments, *arrays, decays, *rates, partition, XlaNetwork(platform)
        )
        return made._replace(update=made.update.astype(x.parameter.dtype))

    def of_tensors(of: TensorSettings, moments: GradientStatistics, x: Any) -> TensorUpdate:
        over = jax.vmap(run, (0 if of.mlp_per_tensor else None, 0, 0, 0))
        return over(of.mlp, (of.scale, of.weight_decay), moments, x)

    if lengths is None:
        made = of_tensors(settings, moments, whole)
    else:
        longest, by_length = whole.gradient.shape[1], []
        for n in dict.fromkeys(lengths):
            members = [i for i, other in enumerate(lengths) if other == n]
            own, x = take_rows((moments, whole), members)
            cut = jax.tree.map(lambda x, n=n: x[..., :n] if x.shape[-1] == longest else x, x)
            of_length = of_tensors(settings.rows(members), own, cut)
            by_length.append((members, _padded(of_length, longest)))
        made = in_order(by_length)
    ends = np.cumsum([part.gradient.shape[0] for part in parts])
    pieces = [
        jax.tree.map(lambda x, k=k: jnp.split(x, ends[:-1])[k], made) for k in range(len(parts))
    ]
    return [piece._replace(statistics=None) for piece in pieces], made.statistics


def _padded(update: TensorUpdate, longest: int) -> TensorUpdate:
    """What was made of vectors, padded again."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])])

    new = update.accumulators
    momentum, second_moment, row = jax.tree.map(pad, (new.momentum, new.second_moment, new.row))
    accumulators = new._replace(momentum=momentum, second_moment=second_moment, row=row)
    return update._replace(update=pad(update.update), accumulators=accumulators)
