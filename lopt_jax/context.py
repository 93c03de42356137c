"""What steers a trace beside its arrays: one frozen value, handed down as an argument.

Wrappers of this library tell it to the optimizers inside of other transformations with the states
of these: whatever a wrapper of optax's does with its extra arguments, it hands on the state.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

LARGEST_INDEX = int(np.iinfo(np.int32).max)  # of what is counted while a program runs

Shards = tuple[tuple[str, Any], ...]  # a `Partition` for each leaf's path: hashable

_KINDS = {"cuda": "gpu", "rocm": "gpu"}  # names of platforms that jax knows beside its own


@dataclass(frozen=True)
class AbsentDevice:
    """A device that programs are compiled for and that this host does not have."""

    platform: str
    device_kind: str = "unknown"


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tracing:
    """What steers a trace beside the types of its arrays: part of the key of what is compiled.

    Attributes:
      device: the device that runs it, or its platform, whether this host has one or not; None:
        jax's default device.
      batch: trainings that `jax.vmap` makes of one: whether the kernels are worth it, "auto"
        decides by the tensors of all trainings.
      constant_weights: whether the weights are constants of the program.
      joined_state: whether the new state's arrays are joined again, see `lopt_jax.packing`.
      shards: of what the leaves of the params are shards, by their paths as `jax.tree_util.keystr`
        writes them; None: they are whole.
      is_shard: whether it is the code of a shard, which no partitioner will split.
      axes: the mesh axes of the devices that run the code of a shard, where the types of arrays do
        not tell them.
      without: names of `lopt_jax.compiler.quirks` that nothing is done about.
    """

    device: jax.Device | str | None = None
    batch: int = 1
    constant_weights: bool = False
    joined_state: bool = False
    shards: Shards | None = None
    is_shard: bool = False
    axes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def with_device(self) -> "Tracing":
        """The same, where jax's default device may be another by the time that it is asked for."""
        return replace(self, device=self._named())

    @property
    def runs_on(self) -> jax.Device | AbsentDevice:
        """A device that runs what is traced, as far as that is known: else the default one."""
        named = self._named()
        if isinstance(named, jax.Device):
            return named
        try:
            return jax.local_devices(backend=named)[0]
        except RuntimeError:
            if named is None:
                raise
            return AbsentDevice(self.platform)

    @property
    def platform(self) -> str:
        """The platform of the device: "cpu", "gpu" or "tpu"."""
        named = self._named()
        name = named.platform if isinstance(named, jax.Device) else named or jax.default_backend()
        return _KINDS.get(name, name)

    @property
    def is_local(self) -> bool:
        """Whether no partitioner will split what is traced.

        There is one device, or it is the code of a shard: in `shard_map`, or in a function that
        `lopt_jax.partition.spread` runs.
        """
        mesh = jax.sharding.get_abstract_mesh()
        is_manual = not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types)
        return is_manual or self.is_shard or jax.device_count() == 1

    def _named(self) -> jax.Device | str | None:
        """The device, or only its platform, where one of them was named."""
        return self.device or jax.config.jax_default_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steered:
    """The state of an optimizer of this library, and what steers the trace of its update."""

    state: Any
    tracing: Tracing = field(metadata={"static": True})


def steer(states: Any, **changes: Any) -> Any:
    """The states with `Steered` around those of this library's optimizers.

    Args:
      states: the state of any transformation.
      **changes: attributes of `Tracing`.

    Returns:
      The states. What was steered before keeps its other attributes.
    """

    def steered(x: Any) -> Any:
        if isinstance(x, Steered):
            return Steered(x.state, replace(x.tracing, **changes))
        return Steered(x, Tracing(**changes)) if _is_own(x) else x

    return jax.tree.map(steered, states, is_leaf=lambda x: isinstance(x, Steered) or _is_own(x))


def steered_as(states: Any, like: Any) -> Any:
    """The states that an update made of `steer(like)`, as `like` is."""

    def restored(x: Any, old: Any) -> Any:
        if not isinstance(x, Steered):
            return x
        return Steered(x.state, old.tracing) if isinstance(old, Steered) else x.state

    return jax.tree.map(restored, states, like, is_leaf=lambda x: isinstance(x, Steered))


def _is_own(x: Any) -> bool:
    """Whether it is the state of an optimizer of this library."""
    return "accumulators" in getattr(type(x), "_fields", ())


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Shapes and dtypes promote as they do by default, whatever the caller asks of his own code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def settings_now() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """How jax is set now, for what is traced later.

    XLA asks for the code of a shard while it compiles: the caller's settings may be others by then,
    and so may the thread.

    Returns:
      A function that returns a context, inside which jax is set as it is now.
    """
    is_wide, precision = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision

    @contextlib.contextmanager
    def as_now() -> Iterator[None]:
        with (
            usual_promotion(),
            jax.enable_x64(is_wide),
            jax.default_matmul_precision(precision),
        ):
            yield

    return as_now


def platform_of(tree: Any) -> str | None:
    """The platform that arrays lie on; None where they have no values yet."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
    return None


def platform_of_mesh(tree: Any) -> str | None:
    """The platform of the mesh that the types of traced arrays name; None where none does."""
    for x in jax.tree.leaves(tree):
        if isinstance(x, jax.core.Tracer):
            sharding = getattr(jax.typeof(x), "sharding", None)
            device = getattr(getattr(sharding, "mesh", None), "abstract_device", None)
            if device is not None:
                return device.platform
    return None


def is_traced(tree: Any) -> bool:
    """Whether some of the arrays have no values yet."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
