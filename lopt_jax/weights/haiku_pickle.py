"""Reads pickles of Haiku parameters (mu_learned_optimization) without unpickling them.

Python's unpickler runs what a file tells it to. This interpreter of the pickle protocol imports
nothing and calls nothing: a global is only a pair of strings, and the few calls that numpy, JAX
and Haiku arrays need are carried out here, on bytes whose size has been checked. Everything else
is refused. All objects are bounded in number, so bombs end early.

References: Lib/pickletools.py of CPython (the protocol); `ndarray.__reduce__` and `__reduce_ex__`
of numpy; `Array.__reduce__` in jax/_src/array.py; `FlatMap.__reduce__` in
haiku/_src/data_structures.py; `save_checkpoint` in src/helpers.py of
bentherien/mu_learned_optimization (the layout).
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from typing import Any

import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.arrays import declared_array
from lopt_jax.weights.base import WeightsError, weights_error
from lopt_jax.weights.schema import MAX_BYTES

_MAX_OPCODES = 100_000
_MAX_ITEMS = 20_000  # put into all containers together
_MAX_TEXT = 4096


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in the file; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass
class _Type:
    """A numpy dtype under construction: `numpy.dtype("f4")`, then its state."""

    code: str
    order: str = "="


@dataclasses.dataclass
class _Array:
    """A numpy array under construction: `_reconstruct(...)`, then its state."""

    value: np.ndarray | None = None


_MARK = object()

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_RECONSTRUCT = frozenset(_Global(module, "_reconstruct") for module in _NUMPY)
_SCALAR = frozenset(_Global(module, "scalar") for module in _NUMPY)
_FROM_BUFFER = frozenset(_Global(module, "_frombuffer") for module in _NUMERIC)
_NDARRAY = _Global("numpy", "ndarray")
_DTYPE = _Global("numpy", "dtype")
_BFLOAT16 = _Global("ml_dtypes", "bfloat16")
_ENCODE = _Global("_codecs", "encode")
_JAX_ARRAY = frozenset(
    {
        _Global("jax._src.array", "_reconstruct_array"),
        _Global("jax._src.device_array", "reconstruct_device_array"),
        _Global("jax._src.device_array", "_reconstruct_device_array"),
    }
)
_MAPPINGS = frozenset(
    {
        _Global("collections", "OrderedDict"),
        _Global("haiku._src.data_structures", "FlatMapping"),
        _Global("haiku._src.data_structures", "FlatMap"),
        _Global("haiku._src.data_structures", "frozendict"),
    }
)
_KNOWN = (
    _RECONSTRUCT
    | _SCALAR
    | _FROM_BUFFER
    | _JAX_ARRAY
    | _MAPPINGS
    | {_NDARRAY, _DTYPE, _BFLOAT16, _ENCODE}
)
# numpy's codes -> the names that `declared_array` knows
_CODES = {"f2": "float16", "f4": "float32", "f8": "float64", "bfloat16": "bfloat16", "b1": "bool"}
_CODES |= {f"i{size}": f"int{8 * size}" for size in (1, 2, 4, 8)}
_CODES |= {f"u{size}": f"uint{8 * size}" for size in (1, 2, 4, 8)}


def is_pickle(data: bytes) -> bool:
    """Tells whether the bytes begin as pickles of protocol 2 to 5 do."""
    return len(data) > 2 and data[0] == 0x80 and 2 <= data[1] <= 5


def read_pickle(data: bytes, source: object) -> Any:
    """Decodes a pickle of nested dicts of arrays.

    Args:
      data: the whole file.
      source: its name, for the message.

    Returns:
      Nested dicts, lists and tuples of None, bool, int, float, str, bytes and numpy arrays.

    Raises:
      WeightsError: the pickle is damaged, holds anything else, or is too large.
    """
    if len(data) > MAX_BYTES:
        raise weights_error(
            source, expected=f"a file of at most {MAX_BYTES} bytes", found=f"{len(data)} bytes"
        )
    try:
        return _Interpreter(source).run(data)
    except WeightsError:
        raise
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise weights_error(
            source,
            expected="a pickle of dicts of numpy arrays",
            found=f"a damaged one ({type(error).__name__}: {str(error)[:120]})",
        ) from error


class _Interpreter:
    """The stack machine of the pickle protocol, with the harmless opcodes alone."""

    def __init__(self, source: object):
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.items = 0

    def refuse(self, found: object) -> WeightsError:
        return weights_error(
            self.source,
            expected="a pickle that holds numpy arrays and plain containers alone",
            found=found if isinstance(found, str) else brief(found),
            advice="Nothing of it was executed. Do not open the file with pickle.",
        )

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        for _ in range(_MAX_OPCODES):
            code = stream.read(1).decode("latin1")
            opcode = _OPCODES.get(code)
            name = "no end" if opcode is None else opcode.name
            action = getattr(self, f"op_{name.lower()}", None)
            if opcode is None or (action is None and name not in _PUSHES | _IGNORED):
                raise self.refuse(f"the opcode {name}" if code else "no end")
            # Only now: even reading the argument of another opcode can do work.
            if name == "GLOBAL":
                argument: Any = (self.line(stream), self.line(stream))
            else:
                argument = opcode.arg.reader(stream) if opcode.arg is not None else None
            if name == "STOP":
                result = self.pop()
                if self.stack:
                    raise self.refuse("objects left over")
                return self.plain(result)
            if action is not None:
                action(argument)
            elif name in _PUSHES:
                self.stack.append(argument)
        raise self.refuse(f"more than {_MAX_OPCODES} opcodes")

    def line(self, stream: io.BytesIO) -> str:
        text = stream.readline(_MAX_TEXT)
        if not text.endswith(b"\n"):
            raise self.refuse("a name without end")
        return text[:-1].decode("utf-8")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.refuse("an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.refuse("an empty stack")
        return self.stack[-1]

    def popped_to_mark(self) -> list[Any]:
        taken: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                taken.reverse()
                return taken
            taken.append(item)
        raise self.refuse("no mark")

    def count(self, items: int) -> None:
        self.items += items
        if self.items > _MAX_ITEMS:
            raise self.refuse(f"more than {_MAX_ITEMS} objects in containers")

    def plain(self, value: Any) -> Any:
        """Unwraps an array that has been built; refuses what is no plain value."""
        if isinstance(value, _Array):
            if value.value is None:
                raise self.refuse("an array without contents")
            return value.value
        if isinstance(value, _Global | _Type):
            raise self.refuse(value)
        return value

    # Constants.

    def op_none(self, _: Any) -> None:
        self.stack.append(None)

    def op_newtrue(self, _: Any) -> None:
        self.stack.append(True)

    def op_newfalse(self, _: Any) -> None:
        self.stack.append(False)

    # Containers.

    def op_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _: Any) -> None:
        if not self.stack:
            raise self.refuse("an empty stack")
        self.stack.pop()

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def op_append(self, _: Any) -> None:
        self.extend([self.pop()])

    def op_appends(self, _: Any) -> None:
        self.extend(self.popped_to_mark())

    def extend(self, items: list[Any]) -> None:
        self.count(len(items))
        target = self.top()
        if type(target) is not list:
            raise self.refuse(f"items for a {type(target).__name__}")
        target.extend(self.late(item) for item in items)

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.assign([key, value])

    def op_setitems(self, _: Any) -> None:
        self.assign(self.popped_to_mark())

    def assign(self, items: list[Any]) -> None:
        self.count(len(items))
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise self.refuse(f"keys for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                # Also keeps the hash of deeply shared tuples from being computed.
                raise self.refuse(f"a key that is a {type(key).__name__}")
            target[key] = self.late(value)

    def late(self, value: Any) -> Any:
        """What goes into a container; an array is put there when its state has arrived."""
        return value if isinstance(value, _Type | _Global) else self.plain(value)

    def op_tuple(self, _: Any) -> None:
        self.push_tuple(self.popped_to_mark())

    def op_tuple1(self, _: Any) -> None:
        self.push_tuple([self.pop()])

    def op_tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self.push_tuple([first, second])

    def op_tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.push_tuple([first, second, third])

    def push_tuple(self, items: list[Any]) -> None:
        self.count(len(items))
        self.stack.append(tuple(self.late(item) for item in items))

    # The memo: a dict, so that a huge index costs nothing.

    def op_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def op_binput(self, index: Any) -> None:
        self.memo[index] = self.top()

    op_long_binput = op_binput

    def op_binget(self, index: Any) -> None:
        if index not in self.memo:
            raise self.refuse(f"no object {index} in the memo")
        self.stack.append(self.memo[index])

    op_long_binget = op_binget

    # Names and calls.

    def op_global(self, argument: Any) -> None:
        self.push_global(*argument)

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.refuse("a name that is no text")
        named = _Global(module[:_MAX_TEXT], name[:_MAX_TEXT])
        if named not in _KNOWN:
            raise self.refuse(f"the name {named}")
        self.stack.append(named)

    def op_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Global or type(arguments) is not tuple:
            raise self.refuse("a call of something else than a name")
        self.stack.append(self.call(function, arguments))

    op_newobj = op_reduce

    def call(self, function: _Global, arguments: tuple[Any, ...]) -> Any:
        count = len(arguments)
        if function in _RECONSTRUCT and count == 3 and arguments[0] == _NDARRAY:
            return _Array()
        if function == _DTYPE and 1 <= count <= 3:
            return self.new_type(arguments[0])
        if function in _FROM_BUFFER and count == 4:
            buffer, dtype, shape, order = arguments
            return _Array(self.array(dtype, shape, buffer, fortran=order == "F"))
        if function in _SCALAR and count == 2:
            return _Array(self.array(arguments[0], (), arguments[1], fortran=False))
        if function in _JAX_ARRAY and count >= 3:
            # (reconstruct, its arguments, the numpy state, the abstract value)
            if type(arguments[0]) is not _Global or arguments[0] not in _RECONSTRUCT:
                raise self.refuse(f"a JAX array made by {brief(arguments[0])}")
            return _Array(self.array_of_state(arguments[2]))
        if function == _ENCODE and arguments[1:] == ("latin1",) and type(arguments[0]) is str:
            return arguments[0].encode("latin1")
        if function in _MAPPINGS and count <= 1:
            return self.mapping(arguments[0] if count else {})
        raise self.refuse(f"the call of {function} with {count} arguments")

    def mapping(self, items: Any) -> dict[Any, Any]:
        if type(items) is dict:
            self.count(len(items))
            return dict(items)
        if type(items) is list and all(type(i) in (list, tuple) and len(i) == 2 for i in items):
            self.count(len(items))
            if all(type(pair[0]) in (str, int) for pair in items):
                return {pair[0]: pair[1] for pair in items}
        raise self.refuse("a mapping made of something else than items")

    def op_build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if type(target) is _Type and type(state) is tuple and len(state) >= 2:
            # (version, byte order, subtype, names, fields, ...): only the order matters here.
            if any(part is not None for part in state[2:5]):
                raise self.refuse("a structured type")
            if state[1] not in ("<", "|", "="):
                raise self.refuse(f"the byte order {brief(state[1])}")
        elif type(target) is _Array and target.value is None:
            target.value = self.array_of_state(state)
        else:
            raise self.refuse(f"a state for a {type(target).__name__}")

    def new_type(self, code: Any) -> _Type:
        if code == _BFLOAT16:
            return _Type("bfloat16")
        if type(code) is not str or code.lstrip("<|=") not in _CODES:
            raise self.refuse(f"the array type {brief(code)}")
        return _Type(code.lstrip("<|="))

    def array_of_state(self, state: Any) -> np.ndarray:
        # ndarray.__setstate__: (version, shape, dtype, is_fortran, bytes), version optional
        if type(state) is not tuple or len(state) not in (4, 5):
            raise self.refuse("an array whose state is no tuple of 5")
        shape, dtype, fortran, buffer = state[-4:]
        return self.array(dtype, shape, buffer, fortran=bool(fortran))

    def array(self, dtype: Any, shape: Any, buffer: Any, *, fortran: bool) -> np.ndarray:
        if type(dtype) is not _Type:
            raise self.refuse("an array without a plain type")
        if type(shape) is int:
            shape = (shape,)
        if not fortran:
            return declared_array(_CODES[dtype.code], shape, buffer, self.source)
        reverse = tuple(reversed(shape)) if type(shape) is tuple else shape
        return declared_array(_CODES[dtype.code], reverse, buffer, self.source).T


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
# Opcodes whose argument is the object itself; those of protocols 0 and 1, which are text, are
# not among them.
_INTEGERS = {"LONG1", "LONG4", "BININT", "BININT1", "BININT2"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_PUSHES = frozenset(_INTEGERS | _TEXTS | _BYTES | {"BINFLOAT"})
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
