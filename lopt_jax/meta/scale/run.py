"""Trains one model by one optimizer, for several settings side by side."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.meta.scale.tasks import Split, Task

CHUNK = 50  # steps of one compiled loop
POINTS = 20  # measurements of a run
_VALIDATION_SEED = 7

# From a setting's numbers and the number of steps, all of them perhaps traced.
Build = Callable[[Mapping[str, jax.Array], jax.Array], optax.GradientTransformation]


class Curve(NamedTuple):
    """What one run measured.

    Fields:
      steps: (points,) int, steps made at each measurement.
      training: (points,) float, mean training loss of the steps since the one before.
      validation: (points,) float, mean loss over fixed batches.
      milliseconds: of a step, the others of the batch and measurements included.
    """

    steps: list[int]
    training: list[float]
    validation: list[float]
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions of one task and one optimizer, for `lanes` runs at once.

    Attributes:
      init: (settings, horizon, keys, data) -> (params, state).
      chunk: (params, state, settings, horizon, keys, first step, data) -> the same two and losses.
      measure: (params, data) -> validation losses.
      lanes: runs at once.
    """

    init: Callable[..., Any]
    chunk: Callable[..., Any]
    measure: Callable[..., Any]
    lanes: int


def _over_lanes(lanes: int, function: Callable[..., Any], axes: Any) -> Callable[..., Any]:
    """vmap, or plain calls of a single lane: a batch of one is compiled as if it were none."""
    if lanes > 1:
        return jax.vmap(function, axes)
    drop = lambda tree, axis: tree if axis is None else jax.tree.map(lambda x: x[0], tree)  # noqa: E731

    def single(*arguments: Any) -> Any:
        result = function(*map(drop, arguments, axes))
        return jax.tree.map(lambda x: x[None], result)

    return single


def program(task: Task, build: Build, data: Split, names: Sequence[str], lanes: int) -> Program:
    """Compiles the training of a task.

    Args:
      task: the training.
      build: makes the optimizer.
      data: of the task; its shapes are compiled in.
      names: of a setting's numbers.
      lanes: settings side by side.

    Returns:
      The compiled program.
    """

    def init(settings: Any, horizon: jax.Array, key: jax.Array, train: Any) -> Any:
        params = task.init(key, Split(train, None, ""))
        return params, build(settings, horizon).init(params)

    def chunk(
        params: Any, state: Any, settings: Any, horizon: Any, key: Any, first: Any, train: Any
    ) -> Any:
        tx = optax.with_extra_args_support(build(settings, horizon))

        def step(carry: Any, number: jax.Array) -> Any:
            params, state = carry
            batch = task.sample(jax.random.fold_in(key, number), train, task.batch, True)
            loss, gradients = jax.value_and_grad(task.training_loss)(params, batch)
            updates, state = tx.update(gradients, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(step, (params, state), first + jnp.arange(CHUNK))
        return *carry, jnp.mean(losses)

    def measure(params: Any, validation: Any) -> jax.Array:
        def loss(number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(_VALIDATION_SEED), number)
            batch = task.sample(key, validation, 2 * task.batch, False)
            return task.training_loss(params, batch)

        return jnp.mean(jax.lax.map(loss, jnp.arange(task.validation_batches)))

    settings = {name: jnp.zeros((lanes,)) for name in names}
    horizon, first = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    keys = jax.random.split(jax.random.key(0), lanes)
    init = _over_lanes(lanes, init, (0, None, 0, None))
    chunk = _over_lanes(lanes, chunk, (0, 0, 0, None, 0, None, None))
    measure = _over_lanes(lanes, measure, (0, None))
    started = jax.eval_shape(init, settings, horizon, keys, data.train)
    arguments = (*started, settings, horizon, keys, first, data.train)
    return Program(
        init=jax.jit(init).lower(settings, horizon, keys, data.train).compile(),
        chunk=jax.jit(chunk, donate_argnums=(0, 1)).lower(*arguments).compile(),
        measure=jax.jit(measure).lower(started[0], data.validation).compile(),
        lanes=lanes,
    )


def compile_all(jobs: Mapping[Any, Callable[[], Program]], threads: int) -> Mapping[Any, Any]:
    """Starts compilations in the background: a future for each key, in the order given."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    futures = {key: pool.submit(job) for key, job in jobs.items()}
    pool.shutdown(wait=False)
    return futures


def train(
    compiled: Program,
    task: Task,
    data: Split,
    settings: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    horizon: int,
    points: int = POINTS,
) -> list[Curve]:
    """Trains with several settings or seeds side by side.

    Args:
      compiled: of `program`, with as many lanes.
      task: the training.
      data: its data.
      settings: one mapping of numbers a run; at most `compiled.lanes`.
      seeds: of the parameters and of the order of the data, one a run.
      horizon: steps; a multiple of `CHUNK`.
      points: measurements.

    Returns:
      A curve for every run.
    """
    lanes = [min(lane, len(settings) - 1) for lane in range(compiled.lanes)]
    numbers = {
        name: jnp.asarray([settings[lane][name] for lane in lanes], jnp.float32)
        for name in settings[0]
    }
    keys = jnp.stack([jax.random.key(seeds[lane]) for lane in lanes])
    steps = jnp.asarray(horizon, jnp.int32)
    params, state = compiled.init(numbers, steps, keys, data.train)
    every = max(horizon // points // CHUNK, 1) * CHUNK
    jax.block_until_ready(params)
    begin = time.perf_counter()
    measured, losses, at = [], [], []
    recent: list[Any] = []
    for first in range(0, horizon, CHUNK):
        params, state, loss = compiled.chunk(
            params, state, numbers, steps, keys, jnp.asarray(first, jnp.int32), data.train
        )
        recent.append(loss)
        done = first + CHUNK
        if done % every == 0 or done == horizon:
            measured.append(compiled.measure(params, data.validation))
            losses.append(functools.reduce(jnp.add, recent) / len(recent))
            at.append(done)
            recent = []
    validation, training = np.asarray(jax.device_get(measured)), np.asarray(jax.device_get(losses))
    milliseconds = 1e3 * (time.perf_counter() - begin) / horizon
    return [
        Curve(at, training[:, lane].tolist(), validation[:, lane].tolist(), milliseconds)
        for lane in range(len(settings))
    ]
