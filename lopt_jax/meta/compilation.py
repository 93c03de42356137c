"""Programs compiled side by side, within a budget of wall-clock time."""

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from typing import Any


class BudgetEndedError(Exception):
    """The wall-clock budget ended before the programs were compiled."""


def compile_all(lowers: list[Callable[[], Any]], deadline: float | None) -> list[Any]:
    """Lowers programs one after the other, and compiles them side by side.

    Compilation releases the interpreter's lock, and nothing can stop it. So it runs in threads that
    do not keep the process from ending.

    Args:
      lowers: functions that lower a program each.
      deadline: of `time.monotonic()`; None: without.

    Returns:
      The compiled programs, in the same order.

    Raises:
      BudgetEndedError: at the deadline.
    """
    slots = threading.Semaphore(os.cpu_count() or 1)
    futures: list[concurrent.futures.Future[Any]] = []

    def late() -> bool:
        return deadline is not None and time.monotonic() > deadline

    def compile_one(lowered: Any, future: concurrent.futures.Future[Any]) -> None:
        with slots:
            if late():
                return
            try:
                future.set_result(lowered.compile())
            except BaseException as error:
                future.set_exception(error)

    for lower in lowers:
        lowered = lower()
        if late():
            raise BudgetEndedError
        futures.append(concurrent.futures.Future())
        threading.Thread(target=compile_one, args=(lowered, futures[-1]), daemon=True).start()
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    if concurrent.futures.wait(futures, left, concurrent.futures.FIRST_EXCEPTION).not_done:
        for future in futures:
            if future.done():
                future.result()  # raises what went wrong
        raise BudgetEndedError
    return [future.result() for future in futures]
