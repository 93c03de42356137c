"""How the tests run the fused kernels: compiled where a GPU can, in the interpreter elsewhere."""

import contextlib
import functools
from typing import Any

import jax
import pytest

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from lopt_jax.context import Tracing  # noqa: E402
from pallas_kernels import supports  # noqa: E402


@functools.cache
def are_compiled() -> bool:
    """Whether kernels are compiled; to be asked outside `running`."""
    return supports.unsupported_reason(Tracing()) is None


def running() -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels run."""
    return contextlib.nullcontext() if are_compiled() else plgpu.force_gpu_interpret_mode()


@pytest.fixture
def one_device() -> None:
    """The interpreter does not run where a partitioner may split what it interprets."""
    if jax.device_count() > 1:
        pytest.skip("needs one device: LOPT_JAX_TEST_DEVICES=1")


@pytest.fixture
def gpu() -> None:
    """For what takes the interpreter too long, or says nothing there."""
    if not are_compiled():
        pytest.skip("needs a GPU that the kernels run on")
