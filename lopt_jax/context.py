"""Values that hold while something is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax


@contextlib.contextmanager
def holding[Value](variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """The variable has this value inside, and its old one after."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Shapes and dtypes promote as they do by default, whatever the caller asks of his own code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
