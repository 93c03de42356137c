"""Momentum, second moment and factored second moment of one tensor.

The factored second moment keeps, instead of one value an element, the mean of the squared gradient
over each of the two largest dimensions (Adafactor, arXiv 1804.04235). Its conventions are those of
google/learned_optimization, `learned_optimizers/common.py`: `d1, d0` are the second largest and the
largest dimension, "row" is the mean over `d0`, "column" the mean over `d1`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FACTORED_EPSILON = 1e-30
_SAFE_RSQRT_FLOOR = 1e-9
_ROW_MEAN_EPSILON = 1e-9


class FactoredDims(NamedTuple):
    """The two dimensions that the factored second moment reduces over."""

    d1: int  # second largest; "column" is the mean over it
    d0: int  # largest; "row" is the mean over it


class SecondMoments(NamedTuple):
    """Several second moments, or none, in place of the one that most rules have."""

    averages: tuple


class Decays(NamedTuple):
    """Decay rates of the accumulators, each an array of float32."""

    momentum: jax.Array | np.ndarray  # (momenta,)
    second_moment: Any  # (), or `SecondMoments` of them
    factored: jax.Array | np.ndarray  # (factored second moments,)


class Accumulators(NamedTuple):
    """Accumulators: of one tensor (arrays), or of a tree of parameters (trees like the params).

    For a tensor of shape S with factored dims d1, d0 and n factored decays:
    """

    momentum: tuple  # one array of shape S a decay
    second_moment: Any  # S, or `SecondMoments` of them
    row: Any  # (n, *S without d0); (n, *S) where the tensor is not factored
    column: Any  # (n, *S without d1); (1,) where the tensor is not factored
    # a rule without factored second moments has empty trees of both, and None of a tensor's


def each_second_moment(function: Callable[[Any], Any], second_moment: Any) -> Any:
    """A function of the one second moment, or of each in `SecondMoments`."""
    if isinstance(second_moment, SecondMoments):
        return SecondMoments(tuple(map(function, second_moment.averages)))
    return function(second_moment)


def second_moments(second_moment: Any) -> tuple:
    """The one second moment, or all in `SecondMoments`."""
    is_several = isinstance(second_moment, SecondMoments)
    return second_moment.averages if is_several else (second_moment,)


def factored_dims(shape: Sequence[int]) -> FactoredDims | None:
    """Dimensions over which the second moment of a tensor is factored.

    Args:
      shape: the tensor's shape.

    Returns:
      The positions of the second largest and the largest dimension, or None for tensors of rank
      below two. Of equal dimensions the later one counts as the larger.

    Reference:
      google/learned_optimization, `learned_optimizers/common.py`, `factored_dims`.
    """
    if len(shape) < 2:
        return None
    # Python's sort is stable. The reference's `numpy.argsort` is so only on processors for which
    # numpy has no vectorised sort, and row and column would swap between two hosts.
    *_, d1, d0 = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return FactoredDims(d1, d0)


def factored_shapes(
    shape: Sequence[int], decays: int, dims: FactoredDims | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the row and column accumulators of a tensor.

    Args:
      shape: the tensor's shape.
      decays: number of factored decays.
      dims: its factored dimensions, positions in `shape`, or None.

    Returns:
      The row's and the column's shape.
    """
    if dims is None:
        return (decays, *shape), (1,)
    without = lambda axis: (decays, *(n for i, n in enumerate(shape) if i != axis))  # noqa: E731
    return without(dims.d0), without(dims.d1)


def init_accumulators(
    shape: Sequence[int],
    momenta: int,
    factored: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Accumulators:
    """Zero accumulators of one tensor.

    Args:
      shape: the tensor's shape.
      momenta: number of momentum decays.
      factored: number of factored decays.
      dtype: dtype of every accumulator.

    Returns:
      Accumulators of zeros, shapes as `Accumulators` says.
    """
    row, column = factored_shapes(shape, factored, factored_dims(shape))
    return Accumulators(
        momentum=tuple(jnp.zeros(shape, dtype) for _ in range(momenta)),
        second_moment=jnp.zeros(shape, dtype),
        row=jnp.zeros(row, dtype),
        column=jnp.zeros(column, dtype),
    )


def update_momentum(momentum: jax.Array, gradient: jax.Array, decay: jax.Array) -> jax.Array:
    """One step of an exponential moving average of the gradient; all shapes broadcast."""
    return decay * momentum + (1 - decay) * gradient


def update_second_moment(
    second_moment: jax.Array, gradient: jax.Array, decay: jax.Array | np.float32
) -> jax.Array:
    """One step of an exponential moving average of the squared gradient; all shapes broadcast."""
    return decay * second_moment + (1 - decay) * (gradient * gradient)


def update_factored(
    average: jax.Array, mean_square: jax.Array, decays: jax.Array | np.ndarray
) -> jax.Array:
    """One step of the row or column accumulator.

    Args:
      average: (n, *V), the accumulator.
      mean_square: (*V), this step's mean of the squared gradient along the reduced dimension.
      decays: (n,).

    Returns:
      The new accumulator, (n, *V).
    """
    return update_average(average, mean_square, decays.reshape((-1,) + (1,) * mean_square.ndim))


def update_average(average: jax.Array, mean_square: jax.Array, decay: Any) -> jax.Array:
    """One step of the row or column accumulator of one decay; all shapes broadcast."""
    return decay * average + (1 - decay) * (mean_square + FACTORED_EPSILON)


def safe_rsqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(max(x, 1e-9)), elementwise."""
    return jax.lax.rsqrt(jnp.maximum(x, _SAFE_RSQRT_FLOOR))


def row_factor(row: jax.Array, d1: int, mean: Callable[..., jax.Array] = jnp.mean) -> jax.Array:
    """Preconditioner of the row: rsqrt of the row over its mean along `d1`.

    Args:
      row: one decay's row accumulator, rank of the tensor (size 1 along d0).
      d1: the dimension to average over.
      mean: takes the average; called as `jnp.mean`, with keepdims.

    Returns:
      The factor, shape of `row`.
    """
    return safe_rsqrt(row / (mean(row, d1, keepdims=True) + _ROW_MEAN_EPSILON))
