"""The outer loop: estimate the meta-gradient on every task, step, report, checkpoint, resume.

Everything random derives from the seed and the step's number, and a checkpoint holds the unrolls
on their way, so a resumed run is bitwise the run that was not interrupted.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopt_jax.meta.augmentation import Reparametrised
from lopt_jax.meta.config import MetaTrainConfig, to_json
from lopt_jax.meta.estimators import ESTIMATORS, Estimate, Estimator
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.rules import MakeOptimizer, MetaParameters, make_rule
from lopt_jax.meta.tasks import Task, training_tasks
from lopt_jax.meta.unroll import Unroll

_PAIRS = "pairs"


class TrainState(NamedTuple):
    """All that a checkpoint has to hold."""

    meta_parameters: MetaParameters  # in units of MetaTrainConfig.scales
    optimizer_state: Any
    estimators: tuple[Any, ...]  # one a task


class Report(NamedTuple):
    """Averages over the outer steps since the last report."""

    step: int
    seconds: float  # training time, without compilation
    loss: float  # mean over tasks of the meta-loss
    final_score: float  # mean over tasks of the score near the horizon; nan if none was near
    diverged: float  # fraction of particles above their initial loss
    rejected: float  # fraction of pairs with a loss that is not finite
    gradient_norm: float
    task_scores: tuple[float, ...]  # final_score of each task


@dataclasses.dataclass
class Result:
    """What a meta-training returns."""

    meta_parameters: MetaParameters
    history: list[Report]
    steps: int
    seconds: float
    finished: bool


def outer_optimizer(config: MetaTrainConfig) -> optax.GradientTransformation:
    """The default outer optimizer: clipping and Adam; the trainer applies the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip), optax.scale_by_adam(b1=0.9, b2=0.99)
    )


def learning_rate(config: MetaTrainConfig, step: jax.Array, total: jax.Array) -> jax.Array:
    """Linear warm-up, then a cosine to a tenth of the peak at `total` steps."""
    warm = jnp.minimum(1.0, (step + 1) / max(config.outer_warmup, 1))
    fraction = jnp.clip(step / total, 0.0, 1.0)
    return config.outer_learning_rate * warm * (0.55 + 0.45 * jnp.cos(jnp.pi * fraction))


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _phase_mask(
    config: MetaTrainConfig, meta_parameters: MetaParameters, step: jax.Array, total: jax.Array
) -> MetaParameters:
    """1 for the meta-parameters that the current phase trains, 0 for the others."""
    end = 0.0
    masks = []
    bounds = []
    for fraction, keys in config.phases:
        end += fraction
        bounds.append(end)
        masks.append({k: float(not keys or k in keys) for k in meta_parameters})
    phase = jnp.searchsorted(jnp.array(bounds[:-1]), step / total, side="right")
    chosen = {k: jnp.array([m[k] for m in masks], jnp.float32)[phase] for k in meta_parameters}
    return {k: jax.tree.map(lambda _, k=k: chosen[k], v) for k, v in meta_parameters.items()}


def _check_keys(config: MetaTrainConfig, meta_parameters: MetaParameters) -> None:
    named = {
        "scales": {key for key, _ in config.scales},
        "phases": {key for _, keys in config.phases for key in keys},
    }
    for field, keys in named.items():
        unknown = sorted(keys - set(meta_parameters))
        if unknown:
            raise ValueError(
                f"{field}: {config.architecture} has no meta-parameters {unknown}; "
                f"known: {sorted(meta_parameters)}"
            )


class _Interruption:
    """Lets a first Ctrl-C wait: the block sees `asked` and ends in order; a second acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._waits = usual and threading.current_thread() is threading.main_thread()
        if self._waits:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *unused: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *unused: Any) -> None:
        if self._waits:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Trainer:
    """Meta-trains one optimizer.

    Args:
      config: all settings.
      initial: meta-parameters to start from; by default `initial.initial_parameters`.
      tasks: overrides the tasks that the config names.
      make_optimizer: overrides the rule that the config names.
      optimizer: overrides `outer_optimizer(config)`; its updates are multiplied by minus the
        learning rate.
      devices: the devices that share the pairs; by default all.
    """

    def __init__(
        self,
        config: MetaTrainConfig,
        initial: MetaParameters | None = None,
        tasks: Mapping[str, Task] | None = None,
        make_optimizer: MakeOptimizer | None = None,
        optimizer: optax.GradientTransformation | None = None,
        devices: list[jax.Device] | None = None,
    ):
        self.config = config
        self.optimizer = optimizer or outer_optimizer(config)
        rule = make_optimizer or make_rule(
            config.architecture,
            dict(config.architecture_config),
            config.learning_rate_peak,
            config.weight_decay,
            config.backend if jax.device_count() == 1 else "xla",
        )
        scales = dict(config.scales)

        def scaled_rule(meta_parameters: MetaParameters, *rest: Any) -> Any:
            return rule(self._rescale(meta_parameters, scales), *rest)

        known = dict(tasks) if tasks is not None else training_tasks()
        missing = [name for name in config.tasks if name not in known]
        if missing:
            raise ValueError(f"tasks: unknown names {missing}; known: {sorted(known)}")
        self.tasks = [self._augment(known[name]) for name in config.tasks]
        self.estimators = [self._estimator(task, scaled_rule) for task in self.tasks]
        self._initial = initial
        _check_keys(config, jax.eval_shape(self._start))
        devices = devices or jax.devices()
        count = math.gcd(len(devices), config.num_pairs)
        self.mesh = Mesh(np.array(devices[:count]), (_PAIRS,))
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._by_pair = NamedSharding(self.mesh, PartitionSpec(_PAIRS))

    @staticmethod
    def _rescale(meta_parameters: MetaParameters, scales: Mapping[str, float]) -> MetaParameters:
        return {
            k: jax.tree.map(lambda x, k=k: x * scales[k], v) if k in scales else v
            for k, v in meta_parameters.items()
        }

    def _augment(self, task: Task) -> Task:
        if self.config.reparametrise == 1.0:
            return task
        return Reparametrised(task, self.config.reparametrise, self.config.reparametrise_level)

    def _estimator(self, task: Task, rule: MakeOptimizer) -> Estimator:
        config = self.config
        unroll = Unroll(
            task,
            rule,
            config.truncation_length,
            config.measure_every,
            config.min_horizon,
            config.max_horizon,
            config.objective,
        )
        make = ESTIMATORS[config.estimator]
        return make(unroll, config.num_pairs, config.standard_deviation)

    def _key(self, step: jax.Array | int, task: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        return jax.random.fold_in(key, task)

    def _start(self) -> MetaParameters:
        if self._initial is not None:
            return self._initial
        config = self.config
        key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
        return initial_parameters(
            config.architecture, key, dict(config.architecture_config), dict(config.gains)
        )

    def init(self) -> TrainState:
        """The state before the first step."""
        start = self._rescale(self._start(), {k: 1.0 / v for k, v in self.config.scales})
        start = jax.tree.map(lambda x: jnp.array(x, jnp.float32), start)
        start = jax.device_put(start, self._replicated)
        lowered = [
            jax.jit(estimator.init, out_shardings=self._by_pair).lower(
                start, self._key(2**31 + 1, i)
            )
            for i, estimator in enumerate(self.estimators)
        ]
        programs = _compile_all(lowered)
        states = [program(start, self._key(2**31 + 1, i)) for i, program in enumerate(programs)]
        optimizer_state = jax.device_put(self.optimizer.init(start), self._replicated)
        return TrainState(start, optimizer_state, tuple(states))

    def _compile(self, state: TrainState) -> tuple[list[Any], Any]:
        """Compiles the program of each task, and the outer step, at the same time."""
        config = self.config
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)

        def estimate(i: int) -> Any:
            def run(theta: Any, estimator_state: Any, step: jax.Array, total: jax.Array) -> Any:
                mask = _phase_mask(config, theta, step, total)
                key = self._key(step, i)
                return self.estimators[i].estimate(theta, key, estimator_state, mask)

            return jax.jit(
                run,
                donate_argnums=1,
                out_shardings=(self._replicated, self._by_pair),
            ).lower(state.meta_parameters, state.estimators[i], scalar, scalar)

        def outer(
            theta: Any, optimizer_state: Any, gradients: list[Any], step: Any, total: Any
        ) -> tuple[Any, Any, jax.Array]:
            gradient = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
            gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
            updates, optimizer_state = self.optimizer.update(gradient, optimizer_state, theta)
            mask = _phase_mask(config, theta, step, total)
            rate = learning_rate(config, step, total)
            theta = jax.tree.map(lambda t, u, m: t - rate * m * u, theta, updates, mask)
            return theta, optimizer_state, _norm(gradient)

        gradients = [state.meta_parameters] * len(self.tasks)
        lowered = [estimate(i) for i in range(len(self.tasks))]
        lowered.append(
            jax.jit(outer, out_shardings=self._replicated).lower(
                state.meta_parameters, state.optimizer_state, gradients, scalar, scalar
            )
        )
        compiled = _compile_all(lowered)
        return compiled[:-1], compiled[-1]

    def train(
        self,
        folder: str | Path | None = None,
        resume: bool = False,
        max_seconds: float | None = None,
        max_steps: int | None = None,
        on_report: Callable[[Report, int, float], None] | None = None,
    ) -> Result:
        """Runs the outer loop.

        Args:
          folder: where checkpoints go; none are written without it.
          resume: continue from the newest checkpoint in `folder`, if there is one.
          max_seconds: wall-clock budget of this call, compilation included. After the first
            reports the number of outer steps is planned to fit (never above config.outer_steps),
            so that the learning rate and the phases reach their ends; the plan is part of the
            checkpoint.
          max_steps: stop after this step (for tests and for training in portions).
          on_report: called with each report, the planned total of steps and the seconds left.

        Returns:
          The meta-parameters (in the architecture's units) and the history.

        Raises:
          KeyboardInterrupt: after Ctrl-C, when the step it came in is done and saved.
        """
        config = self.config
        began = time.monotonic()
        store = _Store(Path(folder).absolute(), config) if folder is not None else None
        if store is not None and not resume:
            store.require_empty()
        state = self.init()
        step, total, history = 0, config.outer_steps, list[Report]()
        planned = False
        spent = 0.0
        if store is not None and resume:
            restored = store.restore(state)
            if restored is not None:
                state, step, record = restored
                total, planned = record["total"], record["planned"]
                spent = record["seconds"]
                history = [
                    Report._make(row)._replace(task_scores=tuple(row[-1]))
                    for row in record["history"]
                ]
        programs, outer = self._compile(state)
        loop_began = time.monotonic()
        saved = last = loop_began
        pending: list[tuple[list[Estimate], jax.Array]] = []
        end = total if max_steps is None else min(total, max_steps)

        def put(value: int) -> jax.Array:
            return jax.device_put(np.int32(value), self._replicated)

        def save() -> None:
            if store is not None:
                seconds = spent + time.monotonic() - loop_began
                record = {"total": total, "planned": planned, "seconds": seconds}
                store.save(step, state, {**record, "history": [list(row) for row in history]})

        with _Interruption() as interruption:
            while step < end and not interruption.asked:
                theta, optimizer_state, estimator_states = state
                at, of = put(step), put(total)
                estimates, new_states = [], []
                for program, estimator_state in zip(programs, estimator_states, strict=True):
                    estimate, estimator_state = program(theta, estimator_state, at, of)
                    estimates.append(estimate)
                    new_states.append(estimator_state)
                gradients = [estimate.gradient for estimate in estimates]
                theta, optimizer_state, norm = outer(theta, optimizer_state, gradients, at, of)
                state = TrainState(theta, optimizer_state, tuple(new_states))
                pending.append(([e._replace(gradient=None) for e in estimates], norm))
                step += 1
                if step % config.log_every and step != end:
                    continue
                now_spent = spent + time.monotonic() - loop_began
                report = _report(step, now_spent, pending)
                history.append(report)
                now = time.monotonic()  # the report waited for the device
                rate = len(pending) / max(now - last, 1e-6)
                last, pending = now, []
                if max_seconds is not None:
                    left = max_seconds - (now - began)
                    # For checkpoints on the way and at the end; little of a small budget.
                    margin = min(20.0, 0.1 * max_seconds)
                    if not planned and step >= 2 * config.log_every:
                        total = min(total, step + max(1, int(rate * (left - margin) * 0.97)))
                        end = total if max_steps is None else min(total, max_steps)
                        planned = True
                    if left <= 0:
                        break
                if on_report is not None:
                    on_report(report, total, (total - step) / rate)
                if now - saved > config.checkpoint_seconds:
                    save()
                    saved = time.monotonic()
            save()
        if interruption.asked:
            raise KeyboardInterrupt(f"after step {step}" + ("" if store is None else ", saved"))
        meta_parameters = self._rescale(state.meta_parameters, dict(config.scales))
        meta_parameters = jax.tree.map(np.asarray, meta_parameters)
        seconds = spent + time.monotonic() - loop_began
        return Result(meta_parameters, history, step, seconds, step >= total)


def _compile_all(lowered: list[Any]) -> list[Any]:
    # Compilation releases the interpreter's lock: the programs compile in parallel.
    with concurrent.futures.ThreadPoolExecutor(min(len(lowered), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


def _report(step: int, seconds: float, pending: list[tuple[list[Estimate], jax.Array]]) -> Report:
    values = jax.device_get(pending)
    scores = np.array([[e.final_score for e in estimates] for estimates, _ in values])

    def mean(name: str) -> float:
        return float(np.mean([[getattr(e, name) for e in row] for row, _ in values]))

    known = np.isfinite(scores)
    totals = np.where(known, scores, 0.0).sum(0)
    counts = known.sum(0)
    tasks = np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
    final = float(np.mean(tasks[counts > 0])) if counts.any() else math.nan
    norm = float(np.mean([norm for _, norm in values]))
    return Report(
        step, seconds, mean("loss"), final, mean("diverged"), mean("rejected"), norm,
        tuple(float(x) for x in tasks),
    )  # fmt: skip


class _Store:
    """Checkpoints of a run: Orbax writes under a temporary name and renames, so kill -9 is safe."""

    def __init__(self, folder: Path, config: MetaTrainConfig):
        self._config = config
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._folder = folder / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def require_empty(self) -> None:
        """Refuses to mix two runs in one folder."""
        if self._manager.latest_step() is not None:
            raise ValueError(
                f"folder: {self._folder} already holds checkpoints; resume, or choose another"
            )

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Writes a checkpoint of this step unless there is one."""
        if step in self._manager.all_steps():
            return
        leaves = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state)) if leaf.size}
        settings = json.loads(to_json(self._config))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                record=ocp.args.JsonSave({"config": settings, **record}),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, int, dict[str, Any]] | None:
        """Reads the newest checkpoint into the shape of `like`.

        Raises:
          ValueError: if it was written with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        record = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]
        wanted = json.loads(to_json(self._config))
        found = record["config"]
        # These say when to stop and report, not what is computed.
        free = ("checkpoint_seconds", "notes")
        differing = [k for k in wanted if k not in free and wanted[k] != found.get(k)]
        if differing:
            raise ValueError(
                f"resume: the checkpoint in {self._folder} was made with other settings of "
                f"{differing}; use its settings or another folder"
            )
        leaves, structure = jax.tree.flatten(like)
        template = {
            f"{i:05d}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for i, leaf in enumerate(leaves)
            if leaf.size  # Orbax does not store empty arrays
        }
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
        )["state"]
        state = structure.unflatten(
            [restored.get(f"{i:05d}", leaf) for i, leaf in enumerate(leaves)]
        )
        return state, step, record
