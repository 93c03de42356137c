"""Values that hold while something is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


@contextlib.contextmanager
def holding[Value](variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """The variable has this value inside, and its old one after."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
