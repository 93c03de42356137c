"""What holds while something is traced."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

LARGEST_INDEX = int(np.iinfo(np.int32).max)  # of what is counted while a program runs


@dataclass(frozen=True)
class Tracing:
    """What steers a trace beside the types of its arrays: part of the key of what is compiled.

    Attributes:
      device: the device that runs it, or its platform; None: jax's default device.
      batch: trainings that `jax.vmap` makes of one, see `lopt_jax.backends.batch`.
      constant_weights: whether the weights are constants of the program.
      joined_state: whether the new state's arrays are joined again, see `lopt_jax.packing`.
      shards: of what the leaves of the params are shards, see `lopt_jax.partition.shards`.
      is_shard: whether it is the code of a shard, which no partitioner will split.
    """

    device: jax.Device | str | None = None
    batch: int = 1
    constant_weights: bool = False
    joined_state: bool = False
    shards: Any = None
    is_shard: bool = False


_tracing: ContextVar[Tracing] = ContextVar("tracing", default=Tracing())  # noqa: B039 (frozen)


def tracing() -> Tracing:
    """What holds now."""
    return _tracing.get()


@contextlib.contextmanager
def holding(how: Tracing) -> Iterator[None]:
    """This holds inside, and what held before after."""
    token = _tracing.set(how)
    try:
        yield
    finally:
        _tracing.reset(token)


def steering(**changes: Any) -> contextlib.AbstractContextManager[None]:
    """What holds now holds inside, but for these attributes of `Tracing`."""
    return holding(replace(tracing(), **changes))


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Shapes and dtypes promote as they do by default, whatever the caller asks of his own code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def remembered() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """How something is traced now, for what is traced later.

    XLA asks for the code of a shard while it compiles: the caller's settings may be others by then,
    and so may the thread.

    Returns:
      A function that returns a context: inside, it is traced as it would be now, but for attributes
      of `Tracing` that it is given.
    """
    how = replace(tracing(), device=_named())
    config = jax.config
    is_wide, precision = config.jax_enable_x64, config.jax_default_matmul_precision

    @contextlib.contextmanager
    def as_now(**changes: Any) -> Iterator[None]:
        with (
            usual_promotion(),
            jax.enable_x64(is_wide),
            jax.default_matmul_precision(precision),
            holding(replace(how, **changes)),
        ):
            yield

    return as_now


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
    return tracing().device or jax.config.jax_default_device
