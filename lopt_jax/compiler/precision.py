"""The precision of XLA's products, where JAX's own words mean less than they say."""

from typing import Any

import jax


def product_precision(precision: jax.lax.Precision, dtype: Any, platform: str) -> Any:
    """The precision of XLA's products.

    With JAX's own HIGH a GPU takes tf32, which errs by 16 times the bound that float32 meets on a
    reference trajectory. Sums of six products of bfloat16 parts err as float32 there (emulated),
    and took an eighth longer on an H200 (docs/kernels.md).

    Args:
      precision: as JAX names it.
      dtype: of the factors.
      platform: of the device: "cpu", "gpu" or "tpu".

    Returns:
      What `jax.lax.dot_general` takes.
    """
    is_high = precision == jax.lax.Precision.HIGH and dtype == jax.numpy.float32
    if is_high and platform == "gpu":
        return jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return precision
