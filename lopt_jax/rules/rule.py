"""The per-parameter MLP rule on one tensor, in plain jnp: the specification of every backend.

It knows no device and no compiler. What runs its network otherwise is handed in: `Network`.

A step makes three passes over the tensor, because each needs a statistic of the one before:

  A  `gradient_statistics`: means of the squared gradient over rows and columns;
  B  `mean_squares`: means of the squares of the per-element features, for their normalisers;
  C  `update`'s end: the network, the update and the new accumulators.

Between them only vectors and small matrices are computed. The normaliser of a feature is a factor
of its row of the first layer, so it is folded into the weights (`fold`); features of the row or of
the column alone become two vectors of biases. No (elements x features) array exists.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lopt_jax.accumulators import (
    Accumulators,
    Decays,
    FactoredDims,
    factored_dims,
    row_factor,
    safe_rsqrt,
    update_factored,
    update_momentum,
    update_second_moment,
)
from lopt_jax.features import Feature, FeatureSet, Operands, Varies
from lopt_jax.partition import Partition
from lopt_jax.reductions import mean, means

WIDE_HIDDEN_SIZE = 16  # from which on a layer is worth a product of matrices
_PARAMETER_SCALE_EPSILON = 1e-9


@dataclass(frozen=True)
class Rule:
    """What is fixed of a rule: its inputs and how its outputs become a step.

    Attributes:
      features: the network's inputs.
      exp_mult: the step is direction * exp(magnitude * exp_mult) * scale.
      gradient_clip: gradients are clipped to [-gradient_clip, gradient_clip] first; None: not.
      zero_non_finite: replace NaN gradients by zero and infinite ones by the largest number.
      parameter_scale: multiply the step by the root mean square of the tensor's parameters.
      accumulator_statistics: return means and variances of the new accumulators.
      precision: of the matrix products of wide hidden layers: HIGHEST is float32 throughout, HIGH
        and DEFAULT allow matrix units. HIGH keeps within the bounds that float32 meets.
      applies: a step's results are the new parameters, not what is to be added to the old ones.
      hidden_size: units of the network's hidden layers: it decides which kernels can run it.
    """

    features: FeatureSet
    exp_mult: float = 0.001
    gradient_clip: float | None = None
    zero_non_finite: bool = False
    parameter_scale: bool = False
    accumulator_statistics: bool = False
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST
    applies: bool = False
    hidden_size: int = 4


class MLP(NamedTuple):
    """A tensor's network: one weight and one bias a layer, relu between them.

    Only the first two outputs are read: direction and magnitude.
    """

    weights: tuple[jax.Array, ...]  # (features, H), (H, H) ..., (H, >= 2)
    biases: tuple[jax.Array, ...]  # (H,) ..., (>= 2,)


class GradientStatistics(NamedTuple):
    """Statistics of the first pass over a tensor of shape S."""

    row: Any  # S without d0: mean of g² over d0; None: not factored, or not read
    column: Any  # S without d1: mean of g² over d1
    parameter_mean_square: Any  # (); None where the rule does not need it


class AccumulatorStatistics(NamedTuple):
    """Means and variances of a tensor's accumulators, for the controllers that read them."""

    momentum_mean: jax.Array  # (momenta,)
    momentum_variance: jax.Array  # (momenta,)
    second_moment_mean: jax.Array  # ()
    second_moment_variance: jax.Array  # ()


class Folded(NamedTuple):
    """The network with normalisers, row and column features folded in.

    K is the size-1-kept shape of the normalisers: (1, ..., 1), or (batch, ..., 1, 1) where they
    are taken over matrices.
    """

    weights: tuple[jax.Array, ...]  # one (H, *K) an element feature
    row_bias: jax.Array  # (H, *V), V broadcasts along d0
    column_bias: jax.Array | None  # (H, *V), V broadcasts along d1; None: not factored
    layers: tuple[tuple[jax.Array, jax.Array], ...]  # the following (weight, bias)


class TensorArrays(NamedTuple):
    """What a step reads of one tensor; of several, each array has a leading axis of tensors."""

    gradient: Any
    parameter: Any
    accumulators: Accumulators


class TensorUpdate(NamedTuple):
    """What a step makes of one tensor."""

    update: Any  # to be added to the parameter; where the rule applies it, the new parameter
    accumulators: Accumulators
    statistics: AccumulatorStatistics | None


class Network(Protocol):
    """Passes B and C up to the step: the network on every element of a tensor.

    `network_step` is the specification. Others run it as suits a device; they differ in rounding.
    """

    def step(
        self,
        rule: Rule,
        mlp: MLP,
        features: Sequence[Feature],
        operands: Operands,
        partition: Partition | None,
    ) -> jax.Array:
        """The step of a tensor, or of a shard of one."""

    def store(self, x: jax.Array) -> jax.Array:
        """The array, as something that is stored and not computed anew where it is read."""


@dataclass(frozen=True)
class Plain:
    """The network as the specification has it."""

    def step(
        self,
        rule: Rule,
        mlp: MLP,
        features: Sequence[Feature],
        operands: Operands,
        partition: Partition | None,
    ) -> jax.Array:
        """The step: normalise, fold, and the network element by element."""
        normalizers = normalize(rule, features, operands, partition)
        return network_step(rule, features, fold(mlp, features, normalizers, operands), operands)

    def store(self, x: jax.Array) -> jax.Array:
        """The array as it is."""
        return x


PLAIN = Plain()


def prepare_gradient(rule: Rule, gradient: jax.Array) -> jax.Array:
    """The gradient as the rule reads it: float32 at least, clipped, made finite if asked for."""
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    if rule.zero_non_finite:
        gradient = jnp.nan_to_num(gradient)
    if rule.gradient_clip is not None:
        gradient = jnp.clip(gradient, -rule.gradient_clip, rule.gradient_clip)
    return gradient


def gradient_statistics(
    rule: Rule, gradient: jax.Array, parameter: jax.Array, partition: Partition | None = None
) -> GradientStatistics:
    """Pass A: means of the squared gradient over rows and columns, mean square of the parameter.

    Args:
      rule: the rule.
      gradient: S, any float dtype.
      parameter: S, any float dtype.
      partition: where the arrays are shards of a tensor, how it is spread.

    Returns:
      Gradient statistics in float32, of the whole tensor; row and column are those of the shard.
    """
    dims = factored_dims(gradient.shape if partition is None else partition.shape)
    row = column = mean_square = None
    if dims is not None and rule.features.reads_factors:
        squared = jnp.square(prepare_gradient(rule, gradient))
        row, column = mean(squared, dims.d0, partition), mean(squared, dims.d1, partition)
    if rule.parameter_scale or rule.accumulator_statistics:
        wide = parameter.astype(jnp.promote_types(parameter.dtype, jnp.float32))
        (mean_square,) = means([jnp.square(wide)], range(wide.ndim), partition)
        mean_square = mean_square.reshape(())
    return GradientStatistics(row, column, mean_square)


def update(
    rule: Rule,
    mlp: MLP,
    moments: GradientStatistics,
    gradient: jax.Array,
    parameter: jax.Array,
    accumulators: Accumulators,
    decays: Decays,
    scale: jax.Array,
    weight_decay: jax.Array,
    partition: Partition | None = None,
    network: Network = PLAIN,
) -> TensorUpdate:
    """Passes B and C: the update and the new accumulators of one tensor.

    Args:
      rule: the rule.
      mlp: the tensor's network; its first layer has a row for each tensor feature (features of the
        step alone are part of the first bias by then).
      moments: of `gradient_statistics`.
      gradient: S, any float dtype.
      parameter: S, any float dtype.
      accumulators: before this step.
      decays: decay rates.
      scale: (), multiplies the step (learning rate included).
      weight_decay: (), multiplies the parameter (learning rate included).
      partition: where the arrays are shards of a tensor, how it is spread.
      network: how the network runs.

    Returns:
      The update, -(scale * step + weight_decay * parameter), or its sum with the parameter, in
      float32 (float64 where the accumulators are); the accumulators in their dtype; statistics if
      the rule asks for them.
    """
    dims = factored_dims(gradient.shape if partition is None else partition.shape)
    operands, row, column = operands_after(
        rule, moments, gradient, parameter, accumulators, decays, dims, partition, network.store
    )
    features = rule.features.for_tensor(dims is not None)
    step = network.step(rule, mlp, features, operands, partition)
    new = Accumulators(operands.momentum, operands.second_moment, row, column)
    return TensorUpdate(
        update=tensor_update(rule, moments, step, operands.parameter, scale, weight_decay),
        accumulators=as_stored(new, accumulators),
        statistics=accumulator_statistics(new, partition) if rule.accumulator_statistics else None,
    )


def tensor_update(
    rule: Rule,
    moments: GradientStatistics,
    step: jax.Array,
    parameter: jax.Array,
    scale: jax.Array,
    weight_decay: jax.Array,
) -> jax.Array:
    """What is added to the parameter of one tensor; arguments as in `update`.

    Or, where the rule applies it, their sum.
    """
    if rule.parameter_scale:
        scale = scale * parameter_scale(moments.parameter_mean_square)
    return parameter_update(rule, step, parameter, scale, weight_decay)


def as_stored(new: Accumulators, old: Accumulators) -> Accumulators:
    """The new accumulators in the dtypes of the old ones."""
    return jax.tree.map(lambda x, before: x.astype(before.dtype), new, old)


def parameter_update(
    rule: Rule,
    step: jax.Array,
    parameter: jax.Array,
    scale: jax.Array,
    weight_decay: jax.Array,
) -> jax.Array:
    """What is added to the parameter, or their sum; all shapes broadcast."""
    update = -(scale * step + weight_decay * parameter)
    return parameter + update if rule.applies else update


def parameter_scale(mean_square: jax.Array) -> jax.Array:
    """Root mean square of a tensor's parameters from their mean square, shape kept."""
    return jnp.sqrt(mean_square + _PARAMETER_SCALE_EPSILON)


def operands_after(
    rule: Rule,
    moments: GradientStatistics,
    gradient: jax.Array,
    parameter: jax.Array,
    accumulators: Accumulators,
    decays: Decays,
    dims: FactoredDims | None,
    partition: Partition | None = None,
    store: Callable[[jax.Array], jax.Array] = PLAIN.store,
) -> tuple[Operands, Any, Any]:
    """The operands of the features after this step's update of the accumulators.

    Args:
      rule: the rule.
      moments: of `gradient_statistics`.
      gradient: S.
      parameter: S.
      accumulators: before this step.
      decays: decay rates.
      dims: factored dims of the tensor.
      partition: where S is a shard of a tensor, how it is spread.
      store: as `Network.store`.

    Returns:
      The operands (float32), and the new row and column accumulators, None where there are none.
    """
    gradient = prepare_gradient(rule, gradient)
    wide = lambda x: x.astype(gradient.dtype)  # noqa: E731
    averages = (accumulators.second_moment, accumulators.momentum)
    if jax.tree.leaves(averages)[0].dtype == jnp.float64:
        gradient = gradient.astype(jnp.float64)
    if accumulators.row is None:  # the rule reads no factored second moments
        row = column = None
        vectors = FactoredVectors((), (), (), ())
    elif dims is None:
        row = update_factored(wide(accumulators.row), jnp.square(gradient), decays.factored)
        column = accumulators.column
        vectors = FactoredVectors(tuple(row), (), (), ())
    else:
        row = update_factored(wide(accumulators.row), moments.row, decays.factored)
        column = update_factored(wide(accumulators.column), moments.column, decays.factored)
        vectors = factored_vectors(row, column, dims, partition, store)
    operands = element_operands(
        gradient,
        wide(parameter),
        tuple(map(wide, accumulators.momentum)),
        jax.tree.map(wide, accumulators.second_moment),
        decays,
        vectors,
    )
    return operands, row, column


def element_operands(
    gradient: jax.Array,
    parameter: jax.Array,
    momentum: Sequence[jax.Array],
    second_moment: Any,
    decays: Decays,
    vectors: "FactoredVectors",
) -> Operands:
    """The operands of the features, from one tensor's arrays or from blocks of them.

    Args:
      gradient: S, of `prepare_gradient`.
      parameter: S, in the gradient's dtype, as the following two.
      momentum: S each, before this step.
      second_moment: S, or `SecondMoments` of them, before this step.
      decays: decay rates.
      vectors: after this step; they broadcast against S.

    Returns:
      The operands.
    """
    return Operands(
        gradient=gradient,
        parameter=parameter,
        momentum=tuple(
            update_momentum(m, gradient, decay)
            for m, decay in zip(momentum, decays.momentum, strict=True)
        ),
        second_moment=jax.tree.map(
            lambda v, decay: update_second_moment(v, gradient, decay),
            second_moment,
            decays.second_moment,
        ),
        row=vectors.row,
        column=vectors.column,
        row_factor=vectors.row_factor,
        column_factor=vectors.column_factor,
    )


class FactoredVectors(NamedTuple):
    """Row and column vectors, one a decay, with the rank of their tensor."""

    row: tuple[jax.Array, ...]
    column: tuple[jax.Array, ...]
    row_factor: tuple[jax.Array, ...]
    column_factor: tuple[jax.Array, ...]


def factored_vectors(
    row: jax.Array,
    column: jax.Array,
    dims: FactoredDims,
    partition: Partition | None = None,
    store: Callable[[jax.Array], jax.Array] = PLAIN.store,
) -> FactoredVectors:
    """Row and column vectors and their preconditioners, broadcastable against the tensor.

    Args:
      row: (n, *S without d0).
      column: (n, *S without d1).
      dims: factored dims of the tensor.
      partition: where S is a shard of a tensor, how it is spread.
      store: as `Network.store`.

    Returns:
      Vectors with size 1 along the reduced dimension.
    """
    row_partition = None if partition is None else partition.reduced(dims.d0)
    row_mean = functools.partial(mean, partition=row_partition)
    rows, columns = jnp.expand_dims(row, dims.d0 + 1), jnp.expand_dims(column, dims.d1 + 1)
    # all decays at once, which is fewer operations
    row_factors = store(jax.vmap(lambda x: row_factor(x, dims.d1, row_mean))(rows))
    return FactoredVectors(*map(tuple, (rows, columns, row_factors, safe_rsqrt(columns))))


def normalizer_axes(rule: Rule, rank: int) -> tuple[int, ...]:
    """The axes over which features are normalised, for a tensor of this rank."""
    axes = rule.features.normalizer_axes
    if isinstance(axes, tuple):
        return tuple(sorted(axis % rank for axis in axes))
    return tuple(range(0 if axes == "tensor" else max(rank - 2, 0), rank))


def normalize(
    rule: Rule,
    features: Sequence[Feature],
    operands: Operands,
    partition: Partition | None = None,
    means_of: Callable[..., Sequence[jax.Array]] = means,
) -> jax.Array:
    """Pass B: the normaliser of every feature.

    Args:
      rule: the rule.
      features: the features of this tensor.
      operands: their operands.
      partition: where the operands are shards of a tensor, how it is spread.
      means_of: takes the means of the squares of the element features, as `means` does.

    Returns:
      1 / sqrt(mean of squares + epsilon), (features, *K): reduced axes kept with size 1.
    """
    axes = normalizer_axes(rule, operands.gradient.ndim)
    shape = operands.gradient.shape
    squares = [
        jnp.broadcast_to(jnp.square(feature.formula(operands)), shape)
        for feature in features
        if feature.varies == "element"
    ]
    mean_squares = means_of(squares, axes, partition)
    along: dict[Varies, Partition | None] = {"row": None, "column": None}
    dims = None if partition is None else factored_dims(partition.shape)
    if partition is not None and dims is not None:
        along = {"row": partition.reduced(dims.d0), "column": partition.reduced(dims.d1)}

    def mean_of(varies: Varies, x: jax.Array) -> jax.Array:
        average = functools.partial(mean, axes=axes, partition=along[varies], keepdims=True)
        return jax.vmap(average)(x)

    return normalizers(rule, features, mean_squares, operands, mean_of)


def normalizers(
    rule: Rule,
    features: Sequence[Feature],
    element_mean_squares: Sequence[jax.Array],
    operands: Operands,
    mean_of: Callable[[Varies, jax.Array], jax.Array],
) -> jax.Array:
    """The normalisers from the mean squares of the features that vary with the element.

    Args:
      rule: the rule.
      features: the features of this tensor.
      element_mean_squares: one array K an element feature.
      operands: the operands; only their row and column vectors are read.
      mean_of: takes the means of arrays, stacked, that vary with the row or the column: of a
        vector it is the tensor's. Returns them with shapes K.

    Returns:
      1 / sqrt(mean of squares + epsilon), (features, *K).
    """

    def of_vectors(varies: Varies) -> Iterator[jax.Array]:
        """Mean squares of the features of a kind, at once."""
        squares = [jnp.square(f.formula(operands)) for f in features if f.varies == varies]
        if not squares:
            return iter(())
        return iter(mean_of(varies, jnp.stack(squares)))

    known = {
        "element": iter(element_mean_squares),
        "row": of_vectors("row"),
        "column": of_vectors("column"),
    }
    mean_squares = [next(known[feature.varies]) for feature in features]
    stacked = jnp.stack(jnp.broadcast_arrays(*mean_squares))
    return jax.lax.rsqrt(stacked + rule.features.normalizer_epsilon)


def fold(
    mlp: MLP,
    features: Sequence[Feature],
    normalizers: jax.Array,
    operands: Operands,
    along: Callable[[Varies, jax.Array], jax.Array] = lambda _, x: x,
) -> Folded:
    """Folds normalisers into the first layer, and row and column features into biases.

    Args:
      mlp: the tensor's network.
      features: the features of this tensor.
      normalizers: of `normalize`, (features, *K).
      operands: the operands; only their row and column vectors are read.
      along: brings arrays (n, *K) to where they broadcast against row or column vectors.

    Returns:
      The folded network.
    """
    first, bias = mlp.weights[0], mlp.biases[0]
    rows = _expand(first, normalizers.ndim + 1) * normalizers[:, None]

    def vector_bias(varies: Varies) -> jax.Array:
        """Contribution of the features of this kind: (H, *vector's shape)."""
        parts = (
            along(varies, rows[k]) * feature.formula(operands)
            for k, feature in enumerate(features)
            if feature.varies == varies
        )
        return functools.reduce(jnp.add, parts)

    is_factored = any(feature.varies != "element" for feature in features)
    return Folded(
        weights=tuple(rows[k] for k, feature in enumerate(features) if feature.varies == "element"),
        row_bias=along("row", _expand(bias, normalizers.ndim))
        + (vector_bias("row") if is_factored else 0),
        column_bias=vector_bias("column") if is_factored else None,
        layers=tuple(zip(mlp.weights[1:], mlp.biases[1:], strict=True)),
    )


def _expand(x: jax.Array, rank: int) -> jax.Array:
    """The array with axes of size one at its end."""
    return x.reshape(x.shape + (1,) * (rank - x.ndim))


def network_step(
    rule: Rule, features: Sequence[Feature], folded: Folded, operands: Operands
) -> jax.Array:
    """Pass C: the network on every element.

    Args:
      rule: the rule.
      features: the features of this tensor.
      folded: the folded network.
      operands: the features' operands, shape S.

    Returns:
      direction * exp(magnitude * exp_mult), shape S.
    """
    inputs = [feature.formula(operands) for feature in features if feature.varies == "element"]
    return output_step(*network_outputs(inputs, folded), rule.exp_mult)


def output_step(direction: jax.Array, magnitude: jax.Array, exp_mult: float) -> jax.Array:
    """The step from the network's two outputs."""
    return direction * jnp.exp(magnitude * exp_mult)


def network_outputs(inputs: Sequence[jax.Array], folded: Folded) -> tuple[jax.Array, jax.Array]:
    """The folded network, written out as elementwise operations: exact, and fuses into its inputs.

    Args:
      inputs: the element features, arrays of one shape S.
      folded: the folded network.

    Returns:
      Direction and magnitude, each S.
    """
    hidden: Iterable[jax.Array] = _first_layer(inputs, folded)
    for weight, bias in folded.layers[:-1]:
        hidden = _layer(hidden, weight, bias)
    weight, bias = folded.layers[-1]
    direction, magnitude = bias[0], bias[1]
    for k, h in enumerate(hidden):
        h = jnp.maximum(h, 0)
        direction, magnitude = direction + h * weight[k, 0], magnitude + h * weight[k, 1]
    return direction, magnitude


def _first_layer(inputs: Sequence[jax.Array], folded: Folded) -> list[jax.Array]:
    hidden = [folded.row_bias[j] for j in range(folded.row_bias.shape[0])]
    if folded.column_bias is not None:
        hidden = [h + folded.column_bias[j] for j, h in enumerate(hidden)]
    for x, weight in zip(inputs, folded.weights, strict=True):
        hidden = [h + x * weight[j] for j, h in enumerate(hidden)]
    return hidden


def _layer(inputs: Iterable[jax.Array], weight: jax.Array, bias: jax.Array) -> Iterator[jax.Array]:
    # One output at a time: the last layer takes it up at once, so that few values are alive.
    inputs = [jnp.maximum(h, 0) for h in inputs]
    for j in range(bias.shape[0]):
        yield sum((h * weight[k, j] for k, h in enumerate(inputs)), bias[j])


def accumulator_statistics(
    accumulators: Accumulators, partition: Partition | None = None
) -> AccumulatorStatistics:
    """Means and variances of a tensor's momentum and second moment.

    Args:
      accumulators: of one tensor.
      partition: where they are shards of it, how it is spread.

    Returns:
      Statistics in the accumulators' dtype. Variances are centred before squaring.
    """
    arrays = (*accumulators.momentum, accumulators.second_moment)
    axes = range(arrays[0].ndim)
    centres = means(arrays, axes, partition)
    squares = [jnp.square(x - c) for x, c in zip(arrays, centres, strict=True)]
    variances = means(squares, axes, partition)
    mean = jnp.stack([x.reshape(()) for x in centres])
    variance = jnp.stack([x.reshape(()) for x in variances])
    return AccumulatorStatistics(mean[:-1], variance[:-1], mean[-1], variance[-1])
