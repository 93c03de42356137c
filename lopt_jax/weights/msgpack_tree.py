"""Reads flax's msgpack files (nested dicts of arrays) without trusting them.

`flax.serialization.msgpack_restore` reads the same bytes; it believes what they declare. Here the
number, the depth and the sizes of all objects are bounded while decoding.

Reference for the format: `_msgpack_ext_pack` in flax/serialization.py (extension 1: an array as
the triple shape, type name, bytes; extension 3: the same for a scalar).
"""

from __future__ import annotations

from typing import Any

import msgpack

from lopt_jax.weights.arrays import declared_array
from lopt_jax.weights.base import WeightsError, weights_error
from lopt_jax.weights.schema import MAX_BYTES

_MAX_ITEMS = 4096  # of one list or map
_MAX_TOTAL = 20_000  # of the whole file
_MAX_TEXT = 1 << 16
_ARRAY, _SCALAR = 1, 3


def read_msgpack(data: bytes, source: object) -> Any:
    """Decodes a flax msgpack file.

    Args:
      data: the whole file.
      source: its name, for the message.

    Returns:
      Nested dicts and lists of str, int, float, bool, None and numpy arrays. The arrays are
      read-only views of `data`.

    Raises:
      WeightsError: the bytes are not such a file, or declare more than the limits.
    """
    if len(data) > MAX_BYTES:
        raise weights_error(
            source, expected=f"a file of at most {MAX_BYTES} bytes", found=f"{len(data)} bytes"
        )
    seen = 0

    def count(items: int) -> None:
        nonlocal seen
        seen += items + 1
        if seen > _MAX_TOTAL:
            raise weights_error(
                source, expected=f"at most {_MAX_TOTAL} objects", found="more in the file"
            )

    def pairs(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
        count(len(items))
        result = dict(items)
        if len(result) != len(items):
            raise weights_error(source, expected="distinct keys", found="a key twice")
        return result

    def listed(items: list[Any]) -> list[Any]:
        count(len(items))
        return items

    def extension(code: int, payload: bytes) -> Any:
        count(1)
        if code not in (_ARRAY, _SCALAR):
            raise weights_error(
                source, expected="arrays as msgpack extension 1 or 3", found=f"extension {code}"
            )
        triple = _unpack(
            payload, raw=True, max_array_len=64, max_map_len=0, max_bin_len=len(payload)
        )
        if not isinstance(triple, list) or len(triple) != 3:
            raise weights_error(
                source, expected="an array as (shape, type, bytes)", found=type(triple).__name__
            )
        shape, dtype, buffer = triple
        array = declared_array(dtype, shape, buffer, source)
        return array if code == _ARRAY else array.reshape(array.shape)[()]

    try:
        return _unpack(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=pairs,
            list_hook=listed,
            ext_hook=extension,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_bin_len=_MAX_TEXT,
        )
    except WeightsError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise weights_error(
            source,
            expected="a flax msgpack file, safetensors, or a pickle of protocol 2 to 5",
            found=f"bytes that are none of them ({type(error).__name__}: {str(error)[:120]})",
            advice="The file is damaged or of another format: fetch it again.",
        ) from error


def _unpack(data: bytes, **options: Any) -> Any:
    return msgpack.unpackb(
        data, max_str_len=min(len(data), _MAX_TEXT), max_ext_len=len(data), **options
    )
