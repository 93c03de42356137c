"""Where the kernels can run, and why not.

Everything of Mosaic is imported here, when a device could run the kernels and not before, so that
what another jax lacks is a reason for XLA and never an error.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax

from lopt_jax.context import Tracing
from lopt_jax.partition import checked_axes


def unsupported_reason(tracing: Tracing) -> str | None:
    """Why no kernel runs where it is traced for, part of a sentence, or None."""
    if is_interpreting():
        reason = import_reason()
    else:
        reason = device_reason(tracing.runs_on) or import_reason() or lowering_reason()
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


def device_reason(device: jax.Device) -> str | None:
    """Why a device cannot run kernels, or None: they are built for Hopper GPUs."""
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
        from pallas_kernels import choice, step  # noqa: F401 (they import all the others)
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
