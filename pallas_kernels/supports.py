"""Where the kernels can run and why not, and where they are worth it.

Everything of Mosaic is imported here, when a device could run the kernels and not before, so that
what another jax lacks is a reason for XLA and never an error.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lopt_jax import context
from lopt_jax.partition import checked_axes
from lopt_jax.rule import Rule

SMALL = "tensors are small"
WORTHWHILE_ELEMENTS = 1 << 14  # of the tensors of a group; smaller ones XLA updates as fast


def unsupported_reason() -> str | None:
    """Why no kernel runs here, part of a sentence, or None."""
    if is_interpreting():
        reason = import_reason()
    else:
        reason = device_reason() or import_reason() or lowering_reason()
    if reason is None and checked_axes():
        return "jax.shard_map checks types here, which kernels do not pass: give it check_vma=False"
    return reason


def is_interpreting() -> bool:
    """Whether `force_gpu_interpret_mode` is on."""
    try:
        from jax._src import config

        return config.pallas_tpu_interpret_mode_context_manager.value is not None
    except (ImportError, AttributeError):  # a jax that renamed it interprets nothing of ours
        return False


def device_reason() -> str | None:
    """Why the device cannot run kernels, or None: they are built for Hopper GPUs."""
    device = context.device()
    if device.platform not in ("gpu", "cuda"):
        return f"the default device is a {device.platform.upper()}, not an NVIDIA GPU"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return (
            f"{device.device_kind} has compute capability {capability}; the kernels are built for "
            "9.0 (Hopper)"
        )
    return None


@functools.cache
def import_reason() -> str | None:
    """What the kernels' modules miss in this jax, or None."""
    try:
        from pallas_kernels import step  # noqa: F401 (it imports all the others)
    except (
        Exception
    ) as error:  # a name that is gone is an AttributeError, a TypeError if it changed
        return _other_jax(error)
    return None


@functools.cache
def lowering_reason() -> str | None:
    """What stops this jax from lowering a kernel with all that ours use of Mosaic, or None."""
    from pallas_kernels import probe

    errors: list[Exception] = []
    # a thread has neither the caller's trace and meshes nor his settings of jax
    thread = threading.Thread(target=_collect, args=(probe.lower, errors))
    thread.start()
    thread.join()
    return _other_jax(errors[0]) if errors else None


def _collect(function: Callable[[], Any], errors: list[Exception]) -> None:
    try:
        function()
    except Exception as error:
        errors.append(error)


def _other_jax(error: Exception) -> str:
    return (
        f"jax {jax.__version__} is not one that the kernels know "
        f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''})"
    )


def unsupported_group_reason(
    rule: Rule, shape: Sequence[int], dtypes: Sequence[Any], is_asked_for: bool
) -> str | None:
    """Why the kernels do not update tensors of a shape, or None; where kernels run.

    Args:
      rule: the rule.
      shape: (tensors, *shape of each).
      dtypes: of their arrays.
      is_asked_for: the user asked for the kernels by name: then only what is impossible counts.

    Returns:
      The reason, part of a sentence.
    """
    from pallas_kernels.view import view_of

    if rule.features.normalizer_axes != "tensor" and len(shape) > 3:
        return "normalisers are over matrices of tensors of higher rank"
    for dtype in map(jnp.dtype, dtypes):
        if dtype.itemsize not in (2, 4):
            return f"arrays are {dtype.name}"
    if is_asked_for:
        return None
    if math.prod(shape) < WORTHWHILE_ELEMENTS:
        return SMALL
    if view_of(tuple(shape[1:])).is_copied:
        return "sizes are not aligned to 16 bytes"
    return None


def with_company(choices: Sequence[str | None], parts: Sequence[Any]) -> list[str | None]:
    """Has the kernels take small tensors that a launch for others can take along.

    Args:
      choices: of each part, why the kernels do not update it, or None.
      parts: their arrays, as `step.Part` has them.

    Returns:
      The choices.
    """
    from pallas_kernels.launches import launch_kind
    from pallas_kernels.view import view_of

    shapes = [part.gradient.shape[1:] for part in parts]
    kinds = [launch_kind(*pair) for pair in zip(parts, shapes, strict=True)]
    taken = {kind for kind, reason in zip(kinds, choices, strict=True) if reason is None} - {None}
    return [
        None if reason == SMALL and kind in taken and not view_of(shape).is_copied else reason
        for reason, kind, shape in zip(choices, kinds, shapes, strict=True)
    ]
