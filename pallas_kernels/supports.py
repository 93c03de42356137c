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
from lopt_jax.rules.rule import WIDE_HIDDEN_SIZE

HOPPER = (9, 0)  # the compute capability that the kernels were made for

# Kernels differ in how pass C runs the network: on CUDA cores, or on the matrix units.
CUDA_CORES, MATRIX_UNITS = "cuda_cores", "matrix_units"
KERNELS = (CUDA_CORES, MATRIX_UNITS)


def kernels_of(precision: jax.lax.Precision, hidden_size: int) -> str:
    """Which of `KERNELS` run a network of this size."""
    is_wide = hidden_size >= WIDE_HIDDEN_SIZE
    return MATRIX_UNITS if is_wide and precision != jax.lax.Precision.HIGHEST else CUDA_CORES


def unsupported_reason(
    tracing: Tracing, kernels: str = CUDA_CORES, is_asked_for: bool = False
) -> str | None:
    """Why these kernels do not run where it is traced for, part of a sentence, or None.

    Args:
      tracing: what steers the trace.
      kernels: which: of `KERNELS`.
      is_asked_for: the user asked for the kernels by name: then only what is impossible counts.
    """
    if is_interpreting():
        reason = import_reason()
    else:
        device = tracing.runs_on
        reason = device_reason(device) or import_reason() or lowering_reason()
        reason = reason or kernels_reason(kernels, device, is_asked_for)
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
    """Why a device can run no kernel, or None: they need what Hopper GPUs brought."""
    if device.platform not in ("gpu", "cuda"):
        return f"the default device is a {device.platform.upper()}, not an NVIDIA GPU"
    if _capability(device) < HOPPER:
        return (
            f"{device.device_kind} has compute capability {_capability_name(device)}; the kernels "
            "need 9.0 (Hopper) or newer"
        )
    return None


def kernels_reason(kernels: str, device: jax.Device, is_asked_for: bool) -> str | None:
    """Why a device that can run some kernels does not run these; see `unsupported_reason`."""
    if _capability(device) == HOPPER:
        return None
    kind = f"{device.device_kind} (compute capability {_capability_name(device)})"
    if kernels == MATRIX_UNITS:
        return f"{kind} lacks Hopper's instruction for wide hidden layers (wgmma)"
    from pallas_kernels import checked

    if is_asked_for or kernels in checked.kernels_checked(device):
        return None
    return f"the kernels have not been checked on {kind} with these versions: run `lopt check`"


def _capability(device: jax.Device) -> tuple[int, ...]:
    """Such as (9, 0); empty where the device does not tell."""
    major, _, minor = _capability_name(device).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else ()


def _capability_name(device: jax.Device) -> str:
    return str(getattr(device, "compute_capability", "unknown"))


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
