"""Means and variances of a tensor, whole or in shards, as controllers over tensors read them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.partition import Partition
from lopt_jax.reductions import means


class MeanAndVariance(NamedTuple):
    """Of one tensor, each (), or of all, each (tensors,)."""

    mean: jax.Array
    variance: jax.Array


def tensor_statistics(
    pools: Sequence[Sequence[jax.Array]],
    others: Sequence[jax.Array],
    partition: Partition | None = None,
) -> tuple[list[MeanAndVariance], list[jax.Array]]:
    """Means and variances of a tensor's arrays, in two passes over memory.

    Args:
      pools: arrays of one shape; those of a pool count as one array. Variances are centred before
        squaring.
      others: arrays of that shape of which only the means are wanted.
      partition: where the arrays are shards of a tensor, how it is spread.

    Returns:
      Mean and variance of each pool, and the means of the others, each () and of the whole tensor.
    """
    arrays = [x for pool in pools for x in pool]
    axes = range(arrays[0].ndim)
    of_arrays = means([*arrays, *others], axes, partition)
    remaining = iter(of_arrays)
    centres = [_mean([next(remaining) for _ in pool]) for pool in pools]
    squares = [
        _mean([jnp.square(x - centre) for x in pool])
        for pool, centre in zip(pools, centres, strict=True)
    ]
    variances = means(squares, axes, partition)
    scalar = lambda x: x.reshape(())  # noqa: E731
    pairs = zip(map(scalar, centres), map(scalar, variances), strict=True)
    return [MeanAndVariance(*pair) for pair in pairs], list(map(scalar, remaining))


def _mean(arrays: Sequence[jax.Array]) -> jax.Array:
    return sum(arrays[1:], arrays[0]) / len(arrays)


def log_magnitude(x: jax.Array) -> jax.Array:
    """The logarithm of the absolute value, between -5 and 5."""
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)
