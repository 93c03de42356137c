"""Arrays declared by a file: type and shape are checked against the bytes before use."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.base import weights_error
from lopt_jax.weights.schema import MAX_BYTES

MAX_RANK = 8

# Types that a file may name. Looking the name up here, rather than asking numpy, keeps a file
# from naming a structured or an object type.
_NAMES = ("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64")
_UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NAMES + _UNSIGNED} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}


def declared_array(dtype: object, shape: Any, data: Any, source: object) -> np.ndarray:
    """Returns a read-only view of `data` as an array, after checking that it is one.

    Args:
      dtype: the name of the type, as str or bytes.
      shape: the declared dimensions.
      data: the bytes, in C order and little-endian.
      source: the file, for the message.

    Raises:
      WeightsError: a type that is not admitted, or a shape that does not fit the bytes.
    """
    name = dtype.decode("ascii", "replace") if isinstance(dtype, bytes) else dtype
    if not isinstance(name, str) or name not in DTYPES:
        raise weights_error(
            source, expected=f"an array type out of {', '.join(DTYPES)}", found=brief(name)
        )
    if not isinstance(data, bytes | bytearray | memoryview):
        raise weights_error(
            source, expected="the bytes of an array", found=f"a {type(data).__name__}"
        )
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > MAX_RANK
        or not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
    ):
        raise weights_error(
            source,
            expected=f"a shape of at most {MAX_RANK} dimensions",
            found=brief(shape),
        )
    declared = math.prod(shape) * DTYPES[name].itemsize
    if declared != len(data):
        raise weights_error(
            source,
            expected=f"{declared} bytes for an array of shape {tuple(shape)} of {name}",
            found=f"{len(data)} bytes",
            advice="The file is damaged: fetch it again.",
        )
    return np.frombuffer(data, dtype=DTYPES[name]).reshape(shape)
