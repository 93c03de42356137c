"""Kernels are compiled while the program around them is still being built, where that is asked for.

XLA has Mosaic compile a program's kernels one after another, when most of its own work is done.
But all that Mosaic needs of a kernel is there as soon as jax has lowered it, and what it has
compiled it keeps by the kernel's hash. So other threads compile programs of one kernel each, which
nobody runs, while jax lowers what comes after and XLA works on the whole; then the kernels are
there already.

Threads that a library starts are a surprise, so there are none unless the environment variable
`LOPT_JAX_COMPILE_AHEAD` says how many.
"""

import atexit
import functools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import mosaic

SETTING = "LOPT_JAX_COMPILE_AHEAD"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_seen: set[bytes] = set()  # hashes of kernels, others' among them


def threads() -> int:
    """How many threads compile kernels ahead: what the environment asks for, or none.

    Raises:
      ValueError: the environment variable is no whole number.
    """
    setting = os.environ.get(SETTING, "").strip() or "0"
    if not setting.isdecimal():
        raise ValueError(
            f"{SETTING}: expected the number of threads that compile kernels ahead, such as 4, "
            f"or 0 for none; found {setting!r}."
        )
    return int(setting)


def call(body: Callable[..., None], arguments: Sequence[Any], **options: Any) -> tuple:
    """`mosaic.call` of a kernel that other threads may compile as soon as it is lowered."""
    results = mosaic.call(body, arguments, **options)
    if not threads():
        return results
    first, *others = results
    return _mark().bind(first), *others


@functools.cache
def _mark() -> Any:
    """An operation that does nothing; lowered, it starts the compilation of what came before."""
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    mark = Primitive("lopt_compile_early")
    mark.def_impl(lambda result: result)
    mark.def_abstract_eval(lambda result: result)
    mlir.register_lowering(mark, _lower, cacheable=False)  # one rule for every platform
    return mark


def _lower(lowering: Any, result: Any) -> list[Any]:
    module = lowering.module_context
    is_for_others = module.lowering_parameters.for_export or len(module.platforms) > 1
    if can_start() and not is_for_others:
        for key, code in list(mosaic.lowered_kernels().items()):
            if _is_new(key) and b"lopt_" in code:
                start(compile_kernel, key, code)
    return [result]


def can_start() -> bool:
    """Whether there is a GPU to compile for."""
    return jax.default_backend() == "gpu"


def _is_new(key: bytes) -> bool:
    with _lock:
        is_new = key not in _seen
        _seen.add(key)
    return is_new


def start(function: Callable[..., None], *arguments: Any) -> None:
    """Has one of the threads call a function. A process that ends does not wait for it."""
    _tasks().put((function, arguments))


@functools.cache
def _tasks() -> queue.SimpleQueue:
    tasks: queue.SimpleQueue = queue.SimpleQueue()
    is_over = threading.Event()
    atexit.register(is_over.set)  # a task that began is left alone, no other begins

    def work() -> None:
        while True:
            function, arguments = tasks.get()
            if is_over.is_set():
                return
            function(*arguments)

    for i in range(threads()):
        threading.Thread(target=work, name=f"lopt_jax-compile-{i}", daemon=True).start()
    return tasks


def compile_kernel(key: bytes, code: bytes) -> None:
    """Compiles a program of one kernel, which is not written to the compilation cache.

    Args:
      key: the kernel's hash.
      code: its code, of `mosaic.lowered_kernels`.
    """
    try:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        call = functools.partial(mosaic.call_lowered, key, code)
        with _not_cached():
            jax.jit(call, out_shardings=place).lower().compile()
    except Exception as error:  # whatever it is, the program's own compilation will meet it
        _say_once(f"{SETTING}: kernels are not compiled ahead: {error}")


def _not_cached() -> Any:
    """A context whose compilations, of this thread alone, jax does not write to its cache.

    jax has such a context for every option, but no public name for this one's.
    """
    from jax._src import config

    return config.persistent_cache_min_compile_time_secs(math.inf)


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)
