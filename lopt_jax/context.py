"""What holds while something is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np

LARGEST_INDEX = int(np.iinfo(np.int32).max)  # of what is counted while a program runs

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


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


def running_on(platform: str | None) -> contextlib.AbstractContextManager[None]:
    """Says, while it is traced, which platform runs it; None: what `device` finds."""
    return holding(_platform, platform)


def platform_of(tree: Any) -> str | None:
    """The platform that arrays lie on; None where they have no values yet."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
    return None


def is_traced(tree: Any) -> bool:
    """Whether some of the arrays have no values yet."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def device() -> jax.Device:
    """A device that runs what is traced, as far as that is known: else the default one."""
    named = _named()
    return named if isinstance(named, jax.Device) else jax.local_devices(backend=named)[0]


def platform() -> str:
    """The platform of `device`: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if _named() is None else device().platform


def _named() -> jax.Device | str | None:
    """The device, or only its platform, where one of them was named."""
    return _platform.get() or jax.config.jax_default_device
