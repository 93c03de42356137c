"""Kernels are compiled while the program around them is still being built.

XLA has Mosaic compile a program's kernels one after another, when most of its own work is done.
But all that Mosaic needs of a kernel is there as soon as jax has lowered it, and what it has
compiled it keeps by the kernel's hash. So other threads compile programs of one kernel each, which
nobody runs, while jax lowers what comes after and XLA works on the whole; then the kernels are
there already.
"""

import concurrent.futures
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import mosaic

THREADS = 8  # at most

_started: set[bytes] = set()
_mark = Primitive("lopt_compile_early")
_mark.def_impl(lambda result, name: result)
_mark.def_abstract_eval(lambda result, name: result)


def call(body: Callable[..., None], arguments: Sequence[Any], **options: Any) -> tuple:
    """`mosaic.call` of a kernel that other threads start to compile as soon as it is lowered."""
    first, *others = mosaic.call(body, arguments, **options)
    return _mark.bind(first, name=options["name"]), *others


def _lower(_: mlir.LoweringRuleContext, result: Any, name: str) -> list[Any]:
    if can_start():
        for key, module in list(mosaic.lowered_kernels().items()):
            if key not in _started and name.encode() in module:
                _started.add(key)
                _threads().submit(compile_kernel, key, module)
    return [result]


mlir.register_lowering(_mark, _lower, cacheable=False)  # one rule for every platform


def can_start() -> bool:
    """Whether there is a GPU to compile for, and a core to do it on."""
    return jax.default_backend() == "gpu" and (os.cpu_count() or 1) > 1


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    count = min((os.cpu_count() or 2) - 1, THREADS)
    return concurrent.futures.ThreadPoolExecutor(count, "lopt_jax-compile")


def compile_kernel(key: bytes, module: bytes) -> None:
    """Compiles a program of one kernel.

    Args:
      key: the kernel's hash.
      module: its code, of `mosaic.lowered_kernels`.
    """
    try:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="gpu")[0])
        call = functools.partial(mosaic.call_lowered, key, module)
        jax.jit(call, out_shardings=place).lower().compile()
    except Exception as error:  # whatever it is, the program's own compilation will meet it
        logging.getLogger(__name__).debug("A kernel was not compiled early: %s", error)
