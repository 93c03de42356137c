"""Truncated unrolls of one inner training: start, advance by one truncation, measure.

A life is one inner training of a random task from its start to its horizon. Horizons are drawn as
multiples of the truncation length, so a life ends at the end of a truncation. The first life of
every particle is cut short at a random place, so that the particles of a batch stand at different
places of their lives (staggered resets).
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax.applying import update_params
from lopt_jax.checks import check_bounds, check_fields
from lopt_jax.meta.rules import MakeOptimizer, MetaParameters, make_schedule
from lopt_jax.meta.tasks import Content, Params, Task


@dataclasses.dataclass(frozen=True)
class Objective:
    """The meta-loss: log((loss / loss at the start) + floor), bounded, or the loss itself.

    Args:
      measure: "held_out", the loss on held-out examples now and then; or "training", the mean of
        all training losses, each before its step.
      logarithm: of the ratio; False: the loss as it is, up to the ceiling.
      floor: below this fraction of the initial loss nothing more is won.
      ceiling: above this multiple of the initial loss (and for a loss that is not finite) nothing
        more is lost.
      final_weight: a measurement at the fraction f of the horizon weighs 1 + final_weight * f**4,
        normalised to a mean of 1 over a life.
    """

    floor: float = 0.01
    ceiling: float = 3.0
    final_weight: float = 4.0
    measure: Literal["held_out", "training"] = "held_out"
    logarithm: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_bounds(self, {"final_weight": 0}, ("floor", "ceiling"))

    def score(self, loss: jax.Array, initial_loss: jax.Array) -> jax.Array:
        """What a loss counts, of the loss and the held-out loss at the start, scalars."""
        if not self.logarithm:
            worst = self.ceiling * initial_loss
            return jnp.where(jnp.isfinite(loss), jnp.minimum(loss, worst), worst)
        ratio = loss / jnp.maximum(initial_loss, 1e-8)
        ratio = jnp.where(jnp.isfinite(ratio), ratio, self.ceiling)
        return jnp.log(jnp.clip(ratio, 0.0, self.ceiling) + self.floor)

    def weight(self, fraction: jax.Array) -> jax.Array:
        """The weight of a measurement at a fraction of the horizon, a scalar."""
        weight = 1.0 + self.final_weight * fraction**4
        return weight / (1.0 + self.final_weight / 5.0)


class Struggle(NamedTuple):
    """Whether a training fails: a one-sided cumulative sum of how much its loss rises.

    Reference: https://arxiv.org/abs/2607.06772 (ELO).
    """

    last_loss: jax.Array  # () float32
    total: jax.Array  # () float32: sum of loss differences, never below 0
    highest: jax.Array  # () float32: of the totals so far

    @classmethod
    def none(cls) -> "Struggle":
        """Of a training that begins."""
        return cls(jnp.float32(jnp.inf), jnp.float32(0), jnp.float32(0))

    def after(self, losses: jax.Array) -> "Struggle":
        """After further losses, (n,)."""

        def add(struggle: Struggle, loss: jax.Array) -> tuple[Struggle, None]:
            total = jnp.maximum(0.0, struggle.total + (loss - struggle.last_loss))
            return Struggle(loss, total, jnp.maximum(struggle.highest, total)), None

        return jax.lax.scan(add, self, losses.astype(jnp.float32))[0]


class Guidance(NamedTuple):
    """How much an expert counts, scalars that fall with the outer steps.

    Parameters move by `weight` times the expert's step and 1 - `weight` times the learned one. Of
    the meta-loss, the parts `direction` and `size` are imitation losses; see `imitation_losses`.
    """

    weight: jax.Array | float
    direction: jax.Array | float
    size: jax.Array | float


def imitation_losses(own: Params, experts: Params, least_rank: int = 0) -> jax.Array:
    """How unlike two steps are.

    Args:
      own: the learned step, a tree of arrays.
      experts: the expert's.
      least_rank: leaves of lower rank are left out.

    Returns:
      (2,): 1 - the cosine between the two, and the absolute difference of their norms, over all
      leaves together.
    """
    leaves = [
        (a, b)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(experts), strict=True)
        if a.ndim >= least_rank
    ]
    dot = sum(jnp.sum(a * b) for a, b in leaves)
    norms = [jnp.sqrt(sum(jnp.sum(jnp.square(x[i])) for x in leaves)) for i in (0, 1)]
    cosine = dot / jnp.maximum(norms[0] * norms[1], 1e-30)
    return jnp.stack([1.0 - cosine, jnp.abs(norms[0] - norms[1])])


class UnrollState(NamedTuple):
    """One inner training on its way."""

    content: Content
    params: Params
    optimizer_state: Any
    step: jax.Array  # () int32: steps taken in this life
    horizon: jax.Array  # () int32: num_steps, what the schedule and the optimizer are told
    end: jax.Array  # () int32: the life ends here; the horizon, but for the first life
    initial_loss: jax.Array  # () float32: held-out loss at the start
    expert_state: Any = ()  # of Unroll.expert
    struggle: Any = ()  # a Struggle where lives may be resumed


class UnrollMetrics(NamedTuple):
    """Scalars of one truncation."""

    final_score: jax.Array  # the objective's score at the end of the truncation
    fraction: jax.Array  # where in its life the truncation ended
    diverged: jax.Array  # 1.0 where the final held-out loss is not finite or above the initial one


@dataclasses.dataclass(frozen=True)
class Unroll:
    """How one task is trained by one optimizer, in truncations.

    Args:
      task: the task.
      make_optimizer: builds the optimizer from meta-parameters.
      truncation_length: inner steps a truncation.
      measure_every: inner steps between measurements of the held-out loss; divides
        truncation_length.
      min_horizon: the shortest life, in steps.
      max_horizon: the longest life, in steps.
      objective: maps losses to the meta-loss.
      horizons: how lives' lengths are distributed.
      schedule: of the learning rate, a name of `rules.SCHEDULES`.
      expert: another optimizer, whose steps guide the learned one's.
      imitated_rank: leaves of lower rank are not compared with the expert's.
      watched: the losses that say whether a training fails: "training", "held_out" or none.
    """

    task: Task
    make_optimizer: MakeOptimizer
    truncation_length: int = 50
    measure_every: int = 10
    min_horizon: int = 100
    max_horizon: int = 1000
    objective: Objective = dataclasses.field(default_factory=Objective)
    horizons: Literal["log_uniform", "uniform"] = "log_uniform"
    schedule: str = "cosine"
    expert: optax.GradientTransformation | None = None
    imitated_rank: int = 0
    watched: Literal["", "training", "held_out"] = ""

    def __post_init__(self) -> None:
        if self.truncation_length % self.measure_every:
            raise ValueError(
                f"measure_every: {self.measure_every} does not divide "
                f"truncation_length={self.truncation_length}"
            )
        if not 0 < self.truncation_length <= self.min_horizon <= self.max_horizon:
            raise ValueError(
                "min_horizon: expected truncation_length <= min_horizon <= max_horizon, found "
                f"{self.truncation_length}, {self.min_horizon}, {self.max_horizon}"
            )

    @property
    def max_truncations(self) -> int:
        """Truncations in the longest life."""
        return max(1, round(self.max_horizon / self.truncation_length))

    def init(
        self, meta_parameters: MetaParameters, key: jax.Array, first: bool = False
    ) -> UnrollState:
        """Starts a life: draws a task, a start and a horizon.

        Args:
          meta_parameters: the optimizer's.
          key: everything random derives from it; an antithetic pair shares it.
          first: cut this life short at a random place.

        Returns:
          The state at step 0.
        """
        keys = jax.random.split(key, 5)
        content = self.task.sample(keys[0])
        params = self.task.init(keys[1], content)
        count = self._draw_truncations(keys[2])
        horizon = count * self.truncation_length
        end = horizon
        if first:
            end = self.truncation_length * jax.random.randint(keys[3], (), 1, count + 1)
        batch = self.task.batch(keys[4], content, "valid")
        initial_loss = self.task.loss(params, content, batch).astype(jnp.float32)
        optimizer_state = self._optimizer(meta_parameters, horizon).init(params)
        step = jnp.zeros((), jnp.int32)
        expert_state = () if self.expert is None else self.expert.init(params)
        return UnrollState(
            content, params, optimizer_state, step, horizon, end, initial_loss, expert_state,
            Struggle.none() if self.watched else (),
        )  # fmt: skip

    def _draw_truncations(self, key: jax.Array) -> jax.Array:
        """The length of a life in truncations, a scalar int32."""
        if self.horizons == "uniform":
            low, high = float(self.min_horizon), float(self.max_horizon)
            length = jax.random.uniform(key, (), minval=low, maxval=high)
        else:
            low, high = math.log(self.min_horizon), math.log(self.max_horizon)
            length = jnp.exp(jax.random.uniform(key, (), minval=low, maxval=high))
        count = jnp.clip(jnp.round(length / self.truncation_length), 1, self.max_truncations)
        return count.astype(jnp.int32)

    def resume(self, state: UnrollState, key: jax.Array) -> UnrollState:
        """A stored state as the start of another life, whose length comes on top of its steps."""
        horizon = state.step + self._draw_truncations(key) * self.truncation_length
        return state._replace(horizon=horizon, end=horizon, struggle=Struggle.none())

    def _optimizer(self, meta_parameters: MetaParameters, horizon: jax.Array) -> Any:
        schedule = make_schedule(self.schedule, horizon)
        return self.make_optimizer(meta_parameters, horizon, schedule)

    def advance(
        self,
        meta_parameters: MetaParameters,
        key: jax.Array,
        state: UnrollState,
        guidance: Guidance | None = None,
    ) -> tuple[UnrollState, jax.Array, UnrollMetrics]:
        """Trains for one truncation.

        Args:
          meta_parameters: the optimizer's.
          key: draws the batches; an antithetic pair shares it.
          state: where the life stands.
          guidance: how much the expert counts, where there is one.

        Returns:
          The state after it, the mean weighted score of its measurements (a scalar), and metrics.
        """
        task = self.task
        optimizer = self._optimizer(meta_parameters, state.horizon)
        content = state.content

        expert = self.expert
        if (expert is None) != (guidance is None):
            raise ValueError("guidance: expected with an expert, and with an expert alone")

        def train(
            carry: tuple[Params, Any, Any], key: jax.Array
        ) -> tuple[tuple[Params, Any, Any], tuple[jax.Array, Any]]:
            params, optimizer_state, expert_state = carry
            batch = task.batch(key, content, "train")
            loss, gradient = jax.value_and_grad(task.loss)(params, content, batch)
            new, optimizer_state = update_params(
                optimizer, gradient, optimizer_state, params, value=loss
            )
            imitation: Any = ()
            if expert is not None and guidance is not None:
                own = jax.tree.map(jnp.subtract, new, params)
                experts, expert_state = expert.update(gradient, expert_state, params)
                imitation = imitation_losses(own, experts, self.imitated_rank)
                part = guidance.weight
                new = jax.tree.map(
                    lambda p, a, b: p + (1.0 - part) * a + part * b, params, own, experts
                )
            return (new, optimizer_state, expert_state), (loss, imitation)

        def measure(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            trained, step, struggle = carry
            key_train, key_valid = jax.random.split(key)
            keys = jax.random.split(key_train, self.measure_every)
            trained, (losses, imitation) = jax.lax.scan(train, trained, keys)
            step = step + self.measure_every
            params = trained[0]
            if "held_out" in (self.objective.measure, self.watched):
                held_out = task.loss(params, content, task.batch(key_valid, content, "valid"))
            loss = held_out if self.objective.measure == "held_out" else jnp.mean(losses)
            score = self.objective.score(loss, state.initial_loss)
            meta_loss = score * self.objective.weight(step / state.horizon)
            if guidance is not None:
                direction, size = jnp.mean(imitation, 0)
                meta_loss *= 1.0 - guidance.direction - guidance.size
                meta_loss += guidance.direction * direction + guidance.size * size
            if self.watched:
                struggle = struggle.after(held_out[None] if self.watched == "held_out" else losses)
            return (trained, step, struggle), (meta_loss, score)

        keys = jax.random.split(key, self.truncation_length // self.measure_every)
        trained = (state.params, state.optimizer_state, state.expert_state)
        carry = (trained, state.step, state.struggle)
        (trained, step, struggle), (meta_losses, scores) = jax.lax.scan(measure, carry, keys)
        params, optimizer_state, expert_state = trained
        state = state._replace(
            params=params, optimizer_state=optimizer_state, step=step,
            expert_state=expert_state, struggle=struggle,
        )  # fmt: skip
        bound = self.objective.score(state.initial_loss, state.initial_loss)
        diverged = (scores[-1] > bound).astype(jnp.float32)
        metrics = UnrollMetrics(scores[-1], state.step / state.horizon, diverged)
        return state, jnp.mean(meta_losses), metrics

    def finished(self, state: UnrollState) -> jax.Array:
        """Whether the life is over, a boolean scalar."""
        return state.step >= state.end
