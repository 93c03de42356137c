"""The outer loop: estimate the meta-gradient on every task, step, report, checkpoint, resume.

Everything random derives from the seed and the step's number. A checkpoint holds the unrolls on
their way; a campaign's has none of them and is written where all are dealt anew. So a resumed run
is bitwise the run that was not interrupted.
"""

import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lopt_jax.meta.augmentation import Reparametrised
from lopt_jax.meta.campaign import Campaign
from lopt_jax.meta.checkpoints import Checkpoints, check_finite
from lopt_jax.meta.compilation import BudgetEndedError, compile_all
from lopt_jax.meta.config import MetaTrainConfig
from lopt_jax.meta.estimators import ESTIMATORS, Estimate, Estimator, Resumption
from lopt_jax.meta.experts import guidance_at, make_expert
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.reports import Report, report_of
from lopt_jax.meta.rules import MakeOptimizer, MetaParameters, make_rule, rescaled
from lopt_jax.meta.tasks import Task, data_hashes, join, training_tasks
from lopt_jax.meta.unroll import Guidance, Unroll

_PAIRS = "pairs"


class TrainState(NamedTuple):
    """All that a checkpoint has to hold."""

    meta_parameters: MetaParameters  # in units of MetaTrainConfig.scales
    optimizer_state: Any
    estimators: Any  # a tuple with one a program; None where they are to be dealt


Ending = Literal["finished", "max_steps", "budget", "interrupted"]


@dataclasses.dataclass
class Result:
    """What a meta-training returns.

    Args:
      meta_parameters: in the architecture's units.
      history: the reports.
      steps: outer steps done.
      seconds: of training, without compilation.
      finished: whether they are all the steps that were planned.
      total: the steps that were planned: the config's, or what the budget has room for.
      ended: by what.
      compiling: programs still compile in the background, since the budget ended before them.
    """

    meta_parameters: MetaParameters
    history: list[Report]
    steps: int
    seconds: float
    finished: bool
    total: int = 0
    ended: Ending = "finished"
    compiling: bool = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step it came in; `result` is what there is."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


def outer_optimizer(config: MetaTrainConfig) -> optax.GradientTransformation:
    """The default outer optimizer: clipping and AdamW; the trainer applies the learning rate."""
    chain = [
        optax.clip_by_global_norm(config.gradient_clip),
        optax.scale_by_adam(b1=0.9, b2=config.outer_second_decay),
    ]
    if config.outer_weight_decay:
        chain.append(optax.add_decayed_weights(config.outer_weight_decay))
    return optax.chain(*chain)


def learning_rate(config: MetaTrainConfig, step: jax.Array, total: jax.Array) -> jax.Array:
    """Linear warm-up; by default also a cosine to a tenth of the peak at `total` steps."""
    warm = jnp.minimum(1.0, (step + 1) / max(config.outer_warmup, 1))
    if config.outer_schedule == "constant":
        return config.outer_learning_rate * warm
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


@dataclasses.dataclass
class _Run:
    """Where a run stands.

    Attributes:
      step: outer steps done.
      total: outer steps that are planned.
      planned: whether they stay so many, whatever the budget.
      spent: seconds of training of the runs before.
      history: the reports.
    """

    step: int
    total: int
    planned: bool
    spent: float
    history: list[Report]

    def end(self, max_steps: int | None) -> int:
        """The step to stop at."""
        return self.total if max_steps is None else min(self.total, max_steps)

    def plan(self, left: float, rate: float, budget: float) -> None:
        """Plans so many steps as fit into the seconds left, unless that was done."""
        if self.planned:
            return
        # For checkpoints on the way and at the end; little of a small budget.
        margin = min(20.0, 0.1 * budget)
        self.total = min(self.total, self.step + max(1, int(rate * (left - margin) * 0.97)))
        self.planned = True

    def record(self, seconds: float) -> dict[str, Any]:
        """What is saved of it, after so many seconds of training."""
        return {
            "total": self.total,
            "planned": self.planned,
            "seconds": seconds,
            "fields": Report._fields,
            "history": [list(row) for row in self.history],
        }


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
      expert: any optax transformation that guides the rule, instead of the config's expert.
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
        expert: optax.GradientTransformation | None = None,
    ):
        self.config = config
        self.expert = expert
        if expert is None and config.expert:
            self.expert = make_expert(config.expert, config.expert_learning_rate)
        self.optimizer = optimizer or outer_optimizer(config)
        rule = make_optimizer or make_rule(
            config.architecture,
            dict(config.architecture_config),
            config.learning_rate_peak,
            config.weight_decay,
            config.backend if jax.device_count() == 1 else "xla",
            config.precision,
            dict(config.rule_options),
            config.recipe,
        )
        scales = dict(config.scales)

        def scaled_rule(meta_parameters: MetaParameters, *rest: Any) -> Any:
            return rule(rescaled(meta_parameters, scales), *rest)

        known = dict(tasks) if tasks is not None else training_tasks()
        missing = [name for name in config.tasks if name not in known]
        if missing:
            raise ValueError(f"tasks: unknown names {missing}; known: {sorted(known)}")
        chosen: list[tuple[Task, int]] = [(known[name], 1) for name in config.tasks]
        if config.join:
            chosen = join(task for task, _ in chosen)
        # How many of the config's tasks each program stands for.
        self.counts = [count for _, count in chosen]
        self.tasks = [self._augment(task) for task, _ in chosen]
        self.data = data_hashes(self.tasks)
        self.estimators = [
            self._estimator(task, scaled_rule, config.num_pairs * count)
            for task, count in zip(self.tasks, self.counts, strict=True)
        ]
        if initial is not None:
            check_finite("initial", initial)
        self._initial = initial
        _check_keys(config, jax.eval_shape(self._start))
        devices = devices or jax.devices()
        count = math.gcd(len(devices), config.num_pairs)
        self.mesh = Mesh(np.array(devices[:count]), (_PAIRS,))
        self._replicated = NamedSharding(self.mesh, PartitionSpec())
        self._by_pair = NamedSharding(self.mesh, PartitionSpec(_PAIRS))
        self._deal: list[Any] | None = None  # programs

    def _augment(self, task: Task) -> Task:
        if self.config.reparametrise == 1.0:
            return task
        return Reparametrised(task, self.config.reparametrise, self.config.reparametrise_level)

    def _estimator(self, task: Task, rule: MakeOptimizer, num_pairs: int) -> Estimator:
        config = self.config
        unroll = Unroll(
            task,
            rule,
            config.truncation_length,
            config.measure_every,
            config.min_horizon,
            config.max_horizon,
            config.objective,
            config.horizons,
            config.schedule,
            self.expert,
            2 if config.architecture in ("celo2", "elo_celo2") else 0,  # lower ones have Adam
            config.resume_by if config.resume else "",
        )
        make = ESTIMATORS[config.estimator]
        options: dict[str, Any] = {}
        if config.resume:
            options["resumption"] = Resumption(config.resume, config.resume_slots)
        return make(unroll, num_pairs, config.standard_deviation, **options)

    def _mean(self, *values: Any) -> Any:
        """The mean over the config's tasks of what each program found."""
        if max(self.counts) == 1:
            return sum(values) / len(values)
        pairs = zip(self.counts, values, strict=True)
        return sum(count * value for count, value in pairs) / sum(self.counts)

    def _guidance(self, step: jax.Array) -> Guidance | None:
        config = self.config
        if self.expert is None:
            return None
        return guidance_at(
            step, *config.expert_steps, config.imitation_direction, config.imitation_size
        )

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

    def _scaled_start(self) -> MetaParameters:
        """Where the outer optimizer starts, in units of config.scales."""
        start = rescaled(self._start(), {k: 1.0 / v for k, v in self.config.scales})
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), start)

    def init(self, deadline: float | None = None) -> TrainState:
        """The state before the first step.

        Args:
          deadline: of `time.monotonic()`.

        Raises:
          BudgetEndedError: if compilation takes longer.
        """
        start = jax.device_put(self._scaled_start(), self._replicated)
        optimizer_state = jax.device_put(self.optimizer.init(start), self._replicated)
        return self.deal(TrainState(start, optimizer_state, None), 0, deadline)

    def deal(self, state: TrainState, step: int, deadline: float | None = None) -> TrainState:
        """The state with inner trainings that begin now, drawn by seed and step alone.

        Args:
          state: before this step; its own inner trainings are dropped.
          step: the outer step.
          deadline: as `init`'s.

        Raises:
          BudgetEndedError: if compilation takes longer.
        """
        start = state.meta_parameters
        keys = [self._key(2**31 + 1, i) for i in range(len(self.estimators))]
        if step:
            keys = [jax.random.fold_in(key, step) for key in keys]
        if self._deal is None:
            jitted = [jax.jit(e.init, out_shardings=self._by_pair) for e in self.estimators]
            self._deal = compile_all(
                [functools.partial(f.lower, start, k) for f, k in zip(jitted, keys, strict=True)],
                deadline,
            )
        state = state._replace(estimators=None)
        dealt = [program(start, key) for program, key in zip(self._deal, keys, strict=True)]
        return state._replace(estimators=tuple(dealt))

    def shapes(self) -> TrainState:
        """The state's shapes, types and shardings, without compiling or computing anything."""

        def placed(tree: Any, sharding: NamedSharding) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )

        start = jax.eval_shape(self._scaled_start)
        states = [jax.eval_shape(e.init, start, self._key(0, 0)) for e in self.estimators]
        optimizer_state = jax.eval_shape(self.optimizer.init, start)
        return TrainState(
            placed(start, self._replicated),
            placed(optimizer_state, self._replicated),
            tuple(placed(state, self._by_pair) for state in states),
        )

    def _compile(self, state: TrainState, deadline: float | None) -> tuple[list[Any], Any]:
        """Compiles the program of each task, and the outer step, at the same time."""
        config = self.config
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)

        def lower_estimate(i: int) -> Any:
            def run(theta: Any, estimator_state: Any, step: jax.Array, total: jax.Array) -> Any:
                mask = _phase_mask(config, theta, step, total)
                key = self._key(step, i)
                guidance = self._guidance(step)
                return self.estimators[i].estimate(theta, key, estimator_state, mask, guidance)

            return jax.jit(
                run,
                donate_argnums=1,
                out_shardings=(self._replicated, self._by_pair),
            ).lower(state.meta_parameters, state.estimators[i], scalar, scalar)

        def outer(
            theta: Any, optimizer_state: Any, gradients: list[Any], step: Any, total: Any
        ) -> tuple[Any, Any, jax.Array]:
            gradient = jax.tree.map(self._mean, *gradients)
            gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
            updates, optimizer_state = self.optimizer.update(gradient, optimizer_state, theta)
            mask = _phase_mask(config, theta, step, total)
            rate = learning_rate(config, step, total)
            theta = jax.tree.map(lambda t, u, m: t - rate * m * u, theta, updates, mask)
            return theta, optimizer_state, _norm(gradient)

        gradients = [state.meta_parameters] * len(self.tasks)
        lower_outer = functools.partial(
            jax.jit(outer, out_shardings=self._replicated).lower,
            state.meta_parameters, state.optimizer_state, gradients, scalar, scalar,
        )  # fmt: skip
        lowers = [functools.partial(lower_estimate, i) for i in range(len(self.tasks))]
        compiled = compile_all([*lowers, lower_outer], deadline)
        return compiled[:-1], compiled[-1]

    def train(
        self,
        folder: str | Path | None = None,
        resume: bool = False,
        max_seconds: float | None = None,
        max_steps: int | None = None,
        on_report: Callable[[Report, int, float], None] | None = None,
        campaign: str | Path | None = None,
    ) -> Result:
        """Runs the outer loop.

        Args:
          folder: where checkpoints go; none are written without it.
          resume: continue from the newest checkpoint in `folder`.
          max_seconds: wall-clock budget of this call, compilation included. After the first
            reports the number of outer steps is planned to fit (never above config.outer_steps),
            so that the learning rate and the phases reach their ends; the plan is part of the
            checkpoint. Where the budget ends sooner than the plan, or during compilation, the run
            ends there.
          max_steps: stop after this step (for tests and for training in portions).
          on_report: called with each report, the planned total of steps and the seconds left.
          campaign: a folder of small files to begin or to go on with, instead of `folder`: see
            `campaign.Campaign`. With `max_seconds` the steps are not planned to fit; a run ends
            where `config.deal_every` further steps would take longer.

        Returns:
          The meta-parameters (in the architecture's units) and the history.

        Raises:
          Interrupted: after Ctrl-C, when the step it came in is done and saved.
          ValueError: for a folder that holds another run's checkpoints or is in use, or, with
            `resume`, one without checkpoints, or whose checkpoints are of other settings or data;
            for a campaign of a config without `deal_every`.
        """
        began = time.monotonic()
        if campaign is not None:
            if folder is not None or resume:
                raise ValueError("campaign: expected no folder and no resume beside it")
            place = Path(campaign).absolute()
            with Campaign(place, self.config, self.data, self._initial) as kept:
                return self._train(kept, began, True, max_seconds, max_steps, on_report)
        if folder is None:
            if resume:
                raise ValueError("resume: expected a folder of checkpoints, found none given")
            return self._train(None, began, False, max_seconds, max_steps, on_report)
        with Checkpoints(Path(folder).absolute(), self.config, self.data, resume) as store:
            return self._train(store, began, resume, max_seconds, max_steps, on_report)

    def _train(
        self,
        store: Checkpoints | Campaign | None,
        began: float,
        resume: bool,
        max_seconds: float | None,
        max_steps: int | None,
        on_report: Callable[[Report, int, float], None] | None,
    ) -> Result:
        deadline = None if max_seconds is None else began + max_seconds
        restored, run = self._where_it_stands(store, resume)
        try:
            dealt = None if restored else 0  # the step at which inner trainings were dealt
            state = restored or self.init(deadline)
            if state.estimators is None:
                state, dealt = self.deal(state, run.step, deadline), run.step
            programs, outer = self._compile(state, deadline)
        except BudgetEndedError:
            theta = self._scaled_start() if restored is None else restored.meta_parameters
            return self._result(run, theta, run.spent, "budget", compiling=True)
        loop_began = time.monotonic()
        saved = last = loop_began
        pending: list[tuple[list[Estimate], jax.Array]] = []

        def seconds() -> float:
            return run.spent + time.monotonic() - loop_began

        def save() -> None:
            if store is not None:
                store.save(run.step, state, run.record(seconds()))

        over = False
        every = self.config.deal_every
        if isinstance(store, Campaign) and store.is_new:
            save()
        with _Interruption() as interruption:
            while run.step < run.end(max_steps) and not interruption.asked and not over:
                if every and run.step % every == 0 and run.step != dealt:
                    state, dealt = self.deal(state, run.step), run.step
                state, made = self._outer_step(programs, outer, state, run)
                pending.append(made)
                run.step += 1
                if deadline is not None:
                    # One step behind, so that the device always has one to do.
                    if len(pending) > 1:
                        jax.block_until_ready(pending[-2])
                    over = time.monotonic() > deadline
                is_last = run.step == run.end(max_steps) or over
                if run.step % self.config.log_every and not is_last:
                    continue
                report = report_of(run.step, seconds(), pending, self.counts)
                run.history.append(report)
                now = time.monotonic()  # the report waited for the device
                rate = len(pending) / max(now - last, 1e-6)
                last, pending = now, []
                if max_seconds is not None:
                    left = max_seconds - (now - began)
                    over = left <= 0
                    if not over and run.step >= 2 * self.config.log_every:
                        run.plan(left, rate, max_seconds)
                if on_report is not None:
                    on_report(report, run.total, (run.total - run.step) / rate)
                if store is not None and store.due(run.step, now - saved):
                    save()
                    saved = time.monotonic()
                    if isinstance(store, Campaign) and deadline is not None:
                        # Steps that would not reach the next save are not begun.
                        over |= run.step < run.end(max_steps) and saved + every / rate > deadline
            if pending:  # interrupted between two reports
                run.history.append(report_of(run.step, seconds(), pending, self.counts))
            save()
        spent, theta = seconds(), state.meta_parameters
        if interruption.asked:
            raise Interrupted(
                f"after step {run.step}"
                + ("" if store is None else ", " + store.saved_up_to(run.step)),
                self._result(run, theta, spent, "interrupted"),
            )
        is_done = run.step >= run.total
        return self._result(
            run, theta, spent, "finished" if is_done else "budget" if over else "max_steps"
        )

    def _where_it_stands(
        self, store: Checkpoints | Campaign | None, resume: bool
    ) -> tuple[TrainState | None, _Run]:
        """The state to go on from, None at the start, and what was done."""
        is_campaign = isinstance(store, Campaign)
        if store is None or not resume or (isinstance(store, Campaign) and store.is_new):
            return None, _Run(0, self.config.outer_steps, is_campaign, 0.0, [])
        state, step, record = store.restore(self.shapes())
        history = [
            Report._make(row)._replace(task_scores=tuple(row[-1])) for row in record["history"]
        ]
        return state, _Run(step, record["total"], record["planned"], record["seconds"], history)

    def _outer_step(
        self, programs: Sequence[Any], outer: Any, state: TrainState, run: _Run
    ) -> tuple[TrainState, tuple[list[Estimate], jax.Array]]:
        """One outer step: the state after it, and what its report is made of."""
        at, of = (
            jax.device_put(np.int32(value), self._replicated) for value in (run.step, run.total)
        )
        estimates, states = [], []
        for program, estimator_state in zip(programs, state.estimators, strict=True):
            estimate, estimator_state = program(state.meta_parameters, estimator_state, at, of)
            estimates.append(estimate)
            states.append(estimator_state)
        gradients = [estimate.gradient for estimate in estimates]
        theta, optimizer_state, norm = outer(
            state.meta_parameters, state.optimizer_state, gradients, at, of
        )
        made = [estimate._replace(gradient=None) for estimate in estimates], norm
        return TrainState(theta, optimizer_state, tuple(states)), made

    def _result(
        self,
        run: _Run,
        theta: MetaParameters,
        seconds: float,
        ended: Ending,
        compiling: bool = False,
    ) -> Result:
        theta = jax.tree.map(np.asarray, rescaled(theta, dict(self.config.scales)))
        is_done = run.step >= run.total
        return Result(theta, run.history, run.step, seconds, is_done, run.total, ended, compiling)
