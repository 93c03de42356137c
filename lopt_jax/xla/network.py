"""How the rule's network runs on XLA: small tensors at once, wide layers as products or unrolled.

The specification is `lopt_jax.rules.rule.network_step`. What is fastest differs between devices,
sizes and widths; all forms compute the same up to rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax.compiler.precision import product_precision
from lopt_jax.compiler.quirks import barrier
from lopt_jax.features import Feature, Operands
from lopt_jax.partition import Partition
from lopt_jax.rules.rule import (
    MLP,
    WIDE_HIDDEN_SIZE,
    Folded,
    Rule,
    fold,
    network_step,
    normalize,
    normalizer_axes,
    output_step,
)
from lopt_jax.xla.blocks import elements_for, map_blocks


@dataclass(frozen=True)
class XlaNetwork:
    """A `lopt_jax.rules.rule.Network` of XLA's.

    Attributes:
      platform: of the device: "cpu", "gpu" or "tpu".
      unrolled: whether wide hidden layers are elementwise operations, as narrow ones are: on CPUs
        half the time of matrix products, but a tensor takes seconds to compile.
      small_elements: tensors up to this size are updated by `small_tensor_step`.
      block_elements: elements that a hidden layer that is an array takes at a time; None: what
        suits the platform.
      without: as in `lopt_jax.context.Tracing`.
    """

    platform: str
    unrolled: bool = False
    small_elements: int = 1 << 13
    block_elements: int | None = None
    without: tuple[str, ...] = ()

    def step(
        self,
        rule: Rule,
        mlp: MLP,
        features: Sequence[Feature],
        operands: Operands,
        partition: Partition | None,
    ) -> jax.Array:
        """Passes B and C up to the step, as `rule.network_step` on normalised features."""
        if self.takes_at_once(operands.gradient, partition):
            inputs = small_tensor_inputs(rule, features, operands)
            return small_tensor_step(self.platform, rule, mlp, inputs)
        normalizers = normalize(rule, features, operands, partition)
        folded = self.prepared(fold(mlp, features, normalizers, operands))
        return self.by_blocks(rule, features, folded, self.apart(operands))

    def takes_at_once(self, gradient: jax.Array, partition: Partition | None) -> bool:
        """Whether a tensor is so small that it is updated by `small_tensor_step`."""
        # a shard's means need the other shards, which only the longer way knows how to ask
        return partition is None and gradient.size <= self.small_elements

    def prepared(self, folded: Folded) -> Folded:
        """The folded network as `outputs` takes it."""
        if not self.unrolled:
            return folded
        weights = [barrier("unrolled_weights", w, self.without) for w in folded.weights]
        return folded._replace(weights=tuple(weights))

    def elements_at_once(self, folded: Folded) -> int | None:
        """Elements that a hidden layer takes at a time; None: it is no array, all of them."""
        one_per_tensor = all(math.prod(w.shape[1:]) == 1 for w in folded.weights)
        is_wide = folded.row_bias.shape[0] >= WIDE_HIDDEN_SIZE
        if not is_wide or not one_per_tensor or self.unrolled:
            return None
        return self.block_elements or elements_for(self.platform)

    def outputs(
        self, rule: Rule, features: Sequence[Feature], folded: Folded, operands: Operands
    ) -> jax.Array:
        """Pass C up to the step, of a tensor or of a block of `elements_at_once`."""
        if self.elements_at_once(folded) is None:
            return network_step(rule, features, folded, operands)
        return _step_by_products(self.platform, rule, features, folded, operands)

    def by_blocks(
        self, rule: Rule, features: Sequence[Feature], folded: Folded, operands: Operands
    ) -> jax.Array:
        """Pass C up to the step, of a tensor."""
        elements = self.elements_at_once(folded)
        if elements is None:
            return self.outputs(rule, features, folded, operands)
        return map_blocks(
            lambda operands, *biases: self.outputs(
                rule, features, with_biases(folded, *biases), operands
            ),
            (operands, folded.row_bias, folded.column_bias),
            operands.gradient.shape,
            elements,
        )

    def stores_accumulators(self, folded: Folded) -> bool:
        """Whether pass C reads new accumulators that are stored before it.

        XLA's GPU loops over blocks move more where they replace five arrays than where they make
        the step alone: 2,600 bytes a parameter in place of 1,000, compiled for an H200.
        """
        is_gpu_loop = self.platform == "gpu" and self.elements_at_once(folded) is not None
        return self.platform == "cpu" or is_gpu_loop

    def apart(self, operands: Operands) -> Operands:
        """The operands, whose elementwise expressions XLA will not share with those before."""
        tensors = (operands.gradient, operands.momentum, operands.second_moment)
        gradient, momentum, second = self.read_anew(tensors)
        return operands._replace(gradient=gradient, momentum=momentum, second_moment=second)

    def read_anew(self, arrays: Any) -> Any:
        """Arrays behind a barrier: XLA shares no expression of them with those before."""
        return barrier("shared_expressions", arrays, self.without)

    def store(self, x: jax.Array) -> jax.Array:
        """The array behind a barrier."""
        return barrier("row_factors", x, self.without)


def with_biases(folded: Folded, row_bias: jax.Array, column_bias: jax.Array | None) -> Folded:
    """The folded network of a block of the tensor."""
    return folded._replace(row_bias=row_bias, column_bias=column_bias)


def small_tensor_inputs(rule: Rule, features: Sequence[Feature], operands: Operands) -> jax.Array:
    """Pass B of a small tensor: its normalised features in one array.

    Args:
      rule: the rule.
      features: the features of this tensor.
      operands: the features' operands, shape S.

    Returns:
      (features + 1, *S); the last is one everywhere, for the bias.
    """
    shape = operands.gradient.shape
    axes = [axis + 1 for axis in normalizer_axes(rule, len(shape))]
    values = jnp.stack([jnp.broadcast_to(f.formula(operands), shape) for f in features])
    mean_squares = jnp.mean(jnp.square(values), axes, keepdims=True)
    values = values * jax.lax.rsqrt(mean_squares + rule.features.normalizer_epsilon)
    return jnp.concatenate([values, jnp.ones((1, *shape), values.dtype)])


def small_tensor_step(platform: str, rule: Rule, mlp: MLP, inputs: jax.Array) -> jax.Array:
    """Pass C of small tensors.

    Unrolled as `network_outputs` is, a rule is thousands of operations, which take long to
    compile and, on a small tensor, longer to launch than to run. Here they are a few dozen.

    Args:
      platform: of the device.
      rule: the rule.
      mlp: the network.
      inputs: (features + 1, *S), of `small_tensor_inputs`; of one tensor, or of several that share
        the network.

    Returns:
      direction * exp(magnitude * exp_mult), shape S.
    """
    ones = (1,) * (inputs.ndim - 1)
    is_wide = mlp.biases[0].shape[0] >= WIDE_HIDDEN_SIZE
    precision = jax.lax.Precision.HIGHEST  # a narrow network is not worth matrix units
    # of a product with a vector XLA takes one of the six products on a GPU, not their sum
    if is_wide and math.prod(inputs.shape[1:]) > 1:
        precision = product_precision(rule.precision, inputs.dtype, platform)
    # as a product's last row the first bias takes no pass over memory of its own
    first = jnp.concatenate([mlp.weights[0], mlp.biases[0][None]])
    hidden = jnp.einsum("kh,k...->h...", first, inputs, precision=precision)
    for weight, bias in zip(mlp.weights[1:], mlp.biases[1:], strict=True):
        hidden = jnp.einsum("kh,k...->h...", weight, jnp.maximum(hidden, 0), precision=precision)
        hidden = hidden + bias.reshape((-1, *ones))
    return output_step(hidden[0], hidden[1], rule.exp_mult)


def _product(
    precision: Any, weight: jax.Array, values: Sequence[jax.Array] | jax.Array
) -> jax.Array:
    """A layer without its bias, as a matrix product: (outputs, inputs) by (inputs, *S)."""
    x = values if isinstance(values, jax.Array) else jnp.stack(values)
    return jnp.tensordot(weight, x, axes=1, precision=precision)


def _step_by_products(
    platform: str,
    rule: Rule,
    features: Sequence[Feature],
    folded: Folded,
    operands: Operands,
) -> jax.Array:
    """Pass C with hidden layers as matrix products, (H, *S).

    Args:
      platform: of the device.
      rule: the rule.
      features: the features of this tensor.
      folded: the folded network, one for the whole tensor.
      operands: the features' operands, shape S.

    Returns:
      The step, S.
    """
    shape = operands.gradient.shape
    precision = product_precision(rule.precision, operands.gradient.dtype, platform)
    element = [feature for feature in features if feature.varies == "element"]
    inputs = [jnp.broadcast_to(feature.formula(operands), shape) for feature in element]
    # (outputs, inputs): a product with rows along memory, faster by a tenth on CPUs
    first = jnp.stack([w.reshape(w.shape[0]) for w in folded.weights], axis=1)
    hidden = _product(precision, first, inputs) + folded.row_bias
    if folded.column_bias is not None:
        hidden = hidden + folded.column_bias
    for weight, bias in folded.layers:
        hidden = _product(precision, weight.T, jnp.maximum(hidden, 0))
        hidden = hidden + bias.reshape((-1,) + (1,) * len(shape))
    return output_step(hidden[0], hidden[1], rule.exp_mult)
