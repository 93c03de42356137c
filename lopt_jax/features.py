"""The input features of each rule, declared as data.

A feature is a name, what it varies with, and a formula over arrays. A formula is elementwise jnp on
operands that broadcast against the tensor, so the same function serves the XLA path (whole arrays),
the Pallas kernels (blocks in registers) and their interpreter. What a feature varies with decides
where it is computed: features of the row or of the column alone are computed on their vectors and
reach the network as part of the first layer's bias.

Formulas: google/learned_optimization, `learned_optimizers/adafac_mlp_lopt.py` (small_fc_lopt) and
`research/general_lopt/hyper_v2.py` (VeLO); amoudgl/celo, `optimizers/celo2_optax.py` (Celo2).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import safe_rsqrt

Varies = Literal["element", "row", "column"]
NormalizerAxes = Literal["tensor", "matrix"] | tuple[int, ...]

TIME_SCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


class Operands(NamedTuple):
    """What the formulas read; every array broadcasts against the tensor.

    Momentum and second moments are those after this step's update. Where the tensor is not
    factored, `row` holds the (unfactored) second moments and the other three are empty. Formulas of
    features that vary with the element read of the factors their product alone: the kernels do not
    know which of the two is the row's.
    """

    gradient: jax.Array
    parameter: jax.Array
    momentum: tuple[jax.Array, ...]
    second_moment: Any  # of one decay; `SecondMoments` of several
    row: tuple[jax.Array, ...]
    column: tuple[jax.Array, ...]
    row_factor: tuple[jax.Array, ...]
    column_factor: tuple[jax.Array, ...]


Formula = Callable[[Operands], jax.Array]


@dataclass(frozen=True)
class Feature:
    """One input of a rule's network, before normalisation."""

    name: str
    varies: Varies
    formula: Formula


@dataclass(frozen=True)
class FeatureSet:
    """The inputs of a rule, in the order of its first layer's rows.

    Attributes:
      factored: features of tensors whose second moment is factored.
      unfactored: the same, for tensors of rank below two: all vary with the element.
      normalizer_epsilon: added to each feature's mean square before the reciprocal root.
      normalizer_axes: "tensor" normalises over the whole tensor, "matrix" over its last two axes,
        axes, counted from the end, over these.
    """

    factored: tuple[Feature, ...]
    unfactored: tuple[Feature, ...]
    normalizer_epsilon: float = 1e-5
    normalizer_axes: NormalizerAxes = "tensor"

    def __len__(self) -> int:
        """Number of features."""
        return len(self.factored)

    @property
    def reads_factors(self) -> bool:
        """Whether there are features of factored second moments."""
        return any(feature.varies != "element" for feature in self.factored)

    def for_tensor(self, is_factored: bool) -> tuple[Feature, ...]:
        """The features of a tensor, by whether its second moment is factored."""
        return self.factored if is_factored else self.unfactored


def time_features(count: jax.Array) -> jax.Array:
    """Embedding of the step count: tanh(count / scale - 1) at eleven time scales.

    Args:
      count: (), number of updates made before this one.

    Returns:
      (11,) float32.

    Reference:
      google/learned_optimization, `adafac_mlp_lopt.py`, `tanh_embedding`.
    """
    return jnp.tanh(count.astype(jnp.float32) / jnp.asarray(TIME_SCALES, jnp.float32) - 1.0)


def sine_features(count: jax.Array) -> jax.Array:
    """Embedding of the step count: sin(count / (scale * pi)) at the same time scales.

    Args:
      count: (), number of updates made before this one.

    Returns:
      (11,) float32.

    Reference:
      google/learned_optimization, `rnn_mlp_lopt.py`, `_sin_embedding`.
    """
    scales = jnp.asarray(TIME_SCALES, jnp.float32) * jnp.pi
    return jnp.sin(count.astype(jnp.float32) / scales)


def _each(
    name: str, decays: int, varies: Varies, formula: Callable[[Operands, int], jax.Array]
) -> tuple[Feature, ...]:
    bind = lambda i: lambda x: formula(x, i)  # noqa: E731
    return tuple(Feature(f"{name}_{i}", varies, bind(i)) for i in range(decays))


def _one(name: str, formula: Formula) -> tuple[Feature, ...]:
    return (Feature(name, "element", formula),)


_GRADIENT = _one("gradient", lambda x: x.gradient)
_CLIPPED_GRADIENT = _one(
    "clipped_gradient", lambda x: jnp.minimum(jnp.maximum(x.gradient, -0.1), 0.1)
)
_PARAMETER = _one("parameter", lambda x: x.parameter)
_SECOND_MOMENT = _one("second_moment", lambda x: x.second_moment)


def _rsqrt_second_moment(epsilon: float) -> Formula:
    return lambda x: jax.lax.rsqrt(x.second_moment + epsilon)


def _factored_tail(decays: int) -> tuple[Feature, ...]:
    """Row, column, their reciprocal roots, and the momentum preconditioned by both."""
    return (
        *_each("row", decays, "row", lambda x, i: x.row[i]),
        *_each("column", decays, "column", lambda x, i: x.column[i]),
        *_each("rsqrt_row", decays, "row", lambda x, i: jax.lax.rsqrt(x.row[i] + 1e-8)),
        *_each("rsqrt_column", decays, "column", lambda x, i: jax.lax.rsqrt(x.column[i] + 1e-8)),
        *_each(
            "factored_momentum",
            decays,
            "element",
            lambda x, i: x.momentum[i] * x.row_factor[i] * x.column_factor[i],
        ),
    )


def _unfactored_tail(decays: int, epsilon: float) -> tuple[Feature, ...]:
    """The same inputs where one second moment stands for both row and column."""
    value = lambda x, i: x.row[i]  # noqa: E731
    root = lambda x, i: jax.lax.rsqrt(x.row[i] + 1e-8)  # noqa: E731
    return (
        *_each("row", decays, "element", value),
        *_each("column", decays, "element", value),
        *_each("rsqrt_row", decays, "element", root),
        *_each("rsqrt_column", decays, "element", root),
        *_each(
            "factored_momentum",
            decays,
            "element",
            lambda x, i: x.momentum[i] * jax.lax.rsqrt(x.row[i] + epsilon),
        ),
    )


def _factored_gradient(decays: int, is_factored: bool) -> tuple[Feature, ...]:
    if is_factored:
        formula = lambda x, i: x.gradient * x.row_factor[i] * x.column_factor[i]  # noqa: E731
    else:
        formula = lambda x, i: x.gradient * safe_rsqrt(x.row[i] + 1e-9)  # noqa: E731
    return _each("factored_gradient", decays, "element", formula)


def _normalised_momentum(decays: int, rsqrt: Formula) -> tuple[Feature, ...]:
    return _each("normalised_momentum", decays, "element", lambda x, i: x.momentum[i] * rsqrt(x))


def _several_second_moments(decays: int, epsilon: float) -> tuple[Feature, ...]:
    """Second moments, the momenta times their reciprocal roots, and these: one each a decay."""
    value = lambda x, i: x.second_moment.averages[i]  # noqa: E731
    root = lambda x, i: jax.lax.rsqrt(value(x, i) + epsilon)  # noqa: E731
    return (
        *_each("second_moment", decays, "element", value),
        *_each("normalised_momentum", decays, "element", lambda x, i: x.momentum[i] * root(x, i)),
        *_each("rsqrt_second_moment", decays, "element", root),
    )


def _momentum(decays: int) -> tuple[Feature, ...]:
    return _each("momentum", decays, "element", lambda x, i: x.momentum[i])


@functools.cache  # equal optimizers have one set: formulas are compared by identity
def small_fc_features(decays: int = 3, second_moments: int = 1) -> FeatureSet:
    """The 28 tensor features of small_fc_lopt (for three decays).

    Args:
      decays: number of momentum decays, and of factored decays.
      second_moments: 1, or as many.

    Returns:
      The features, in the order of the first layer's rows; the time features follow them.
    """
    rsqrt = _rsqrt_second_moment(1e-6)
    of_squares = (
        *_SECOND_MOMENT,
        *_normalised_momentum(decays, rsqrt),
        *_one("rsqrt_second_moment", rsqrt),
    )
    if second_moments > 1:
        of_squares = _several_second_moments(decays, 1e-6)

    def head(is_factored: bool) -> tuple[Feature, ...]:
        return (
            *_GRADIENT,
            *_PARAMETER,
            *_momentum(decays),
            *of_squares,
            *_factored_gradient(decays, is_factored),
        )

    return FeatureSet(
        factored=head(True) + _factored_tail(decays),
        unfactored=head(False) + _unfactored_tail(decays, epsilon=1e-6),
    )


@functools.cache
def mlp_lopt_features(decays: int = 6) -> FeatureSet:
    """The 8 tensor features of mlp_lopt (for six decays): none is of second moments.

    Args:
      decays: number of momentum decays.

    Returns:
      The features, in the order of the first layer's rows; the time features follow them.

    Reference:
      google/learned_optimization, `learned_optimizers/mlp_lopt.py`.
    """
    features = (*_GRADIENT, *_PARAMETER, *_momentum(decays))
    return FeatureSet(factored=features, unfactored=features)


@functools.cache
def rnn_mlp_features(decays: int = 5) -> FeatureSet:
    """The 23 features of an element of rnn_mlp_lopt (for five decays).

    Args:
      decays: number of momentum decays, and of decays of second moments.

    Returns:
      The features, in the order of the first layer's rows.

    Reference:
      google/learned_optimization, `learned_optimizers/rnn_mlp_lopt.py`.
    """
    features = (
        *_GRADIENT,
        *_PARAMETER,
        *_one("log_parameter", lambda x: jnp.log(jnp.abs(x.parameter) + 1e-8)),
        *_momentum(decays),
        *_several_second_moments(decays, 1e-6),
    )
    return FeatureSet(factored=features, unfactored=features)


@functools.cache
def velo_features(
    decays: int = 3,
    *,
    rsqrt_epsilon: float = 1e-6,
    normalizer_epsilon: float = 1e-5,
    normalizer_axes: NormalizerAxes = "tensor",
) -> FeatureSet:
    """The 30 features of VeLO, Celo and Celo2 (for three decays).

    Args:
      decays: number of momentum decays, and of factored decays.
      rsqrt_epsilon: added to the second moment before its reciprocal root (Celo2: 1e-8).
      normalizer_epsilon: as in `FeatureSet` (Celo2: 1e-9).
      normalizer_axes: as in `FeatureSet` (Celo2: "matrix").

    Returns:
      The features, in the order of the first layer's rows.
    """
    rsqrt = _rsqrt_second_moment(rsqrt_epsilon)

    def head(is_factored: bool) -> tuple[Feature, ...]:
        return (
            *_GRADIENT,
            *_CLIPPED_GRADIENT,
            *_PARAMETER,
            *_momentum(decays),
            *_SECOND_MOMENT,
            *_normalised_momentum(decays, rsqrt),
            *_one("rsqrt_second_moment", rsqrt),
            *_factored_gradient(decays, is_factored),
            *_one("normalised_gradient", lambda x: x.gradient * rsqrt(x)),
        )

    return FeatureSet(
        factored=head(True) + _factored_tail(decays),
        unfactored=head(False) + _unfactored_tail(decays, epsilon=0.0),
        normalizer_epsilon=normalizer_epsilon,
        normalizer_axes=normalizer_axes,
    )
