"""How much code one update runs through, of ours and of optax's own optimizers.

python benchmarks/path_of_an_update.py

For each optimizer one update of a matrix and a vector is traced, and the calls of named functions
of its own package are counted: how many, of how many functions in how many files, and how often a
call is in another file than the call before it. With the kernels the update is lowered for CUDA as
well, which needs no GPU: that is when the code of a kernel runs.
"""

import contextlib
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import lopt_jax
import pallas_kernels
from pallas_kernels import supports

SHAPES = {"w": (40, 256), "b": (256,)}
OURS = (lopt_jax, pallas_kernels)


class UpdatePath(NamedTuple):
    """What was counted."""

    files: int
    functions: int
    calls: int
    changes_of_file: int


class Counter:
    """Counts calls of named functions of packages while it is sys.setprofile's function."""

    def __init__(self, packages: tuple[types.ModuleType, ...]):
        self._folders = tuple(str(Path(str(package.__file__)).parent) for package in packages)
        self._functions: set[types.CodeType] = set()
        self._calls = self._changes = 0
        self._last: str | None = None

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        """Takes in one event of the profiler."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._folders):
            return
        if code.co_name.startswith("<"):  # lambdas, comprehensions, modules
            return
        self._functions.add(code)
        self._calls += 1
        self._changes += self._last not in (None, code.co_filename)
        self._last = code.co_filename

    @property
    def path(self) -> UpdatePath:
        """What was counted so far."""
        files = {code.co_filename for code in self._functions}
        return UpdatePath(len(files), len(self._functions), self._calls, self._changes)


@contextlib.contextmanager
def profiled(counter: Counter) -> Iterator[None]:
    """What runs inside is counted."""
    sys.setprofile(counter)
    try:
        yield
    finally:
        sys.setprofile(None)


def path_of(
    tx: optax.GradientTransformation, packages: tuple[types.ModuleType, ...], for_cuda: bool = False
) -> UpdatePath:
    """Traces one update.

    Args:
      tx: the optimizer.
      packages: whose functions are counted.
      for_cuda: whether the update is lowered for CUDA, too.

    Returns:
      The counts.
    """
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, params)
    update = optax.with_extra_args_support(tx).update
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    step: Callable[..., Any] = lambda g, s, p, value: update(g, s, p, value=value)  # noqa: E731
    counter = Counter(packages)
    with profiled(counter):
        traced = jax.jit(step).trace(params, state, params, loss)
        if for_cuda:
            traced.lower(lowering_platforms=("cuda",))
    return counter.path


def main() -> None:
    """Prints the table."""
    rows = [
        ("optax.adamw", path_of(optax.adamw(1e-3), (optax,))),
        ("optax.contrib.muon", path_of(optax.contrib.muon(1e-3), (optax,))),
        ("small_fc_lopt, XLA", path_of(lopt_jax.small_fc_lopt(backend="xla"), OURS)),
        ("velo, XLA", path_of(lopt_jax.velo(1000, "velo_small", backend="xla"), OURS)),
    ]
    with unittest.mock.patch.object(supports, "unsupported_reason", return_value=None):
        for name, tx in (
            ("small_fc_lopt, kernels", lopt_jax.small_fc_lopt(backend="pallas")),
            ("velo, kernels", lopt_jax.velo(1000, "velo_small", backend="pallas")),
        ):
            rows.append((name, path_of(tx, OURS, for_cuda=True)))
    print(
        f"{'one update of':<24} {'files':>6} {'functions':>10} {'calls':>6} {'changes of file':>16}"
    )
    for name, path in rows:
        print(
            f"{name:<24} {path.files:>6} {path.functions:>10} {path.calls:>6} "
            f"{path.changes_of_file:>16}"
        )


if __name__ == "__main__":
    main()
