"""Truncated unrolls of one inner training: start, advance by one truncation, measure.

A life is one inner training of a random task from its start to its horizon. Horizons are drawn
log-uniformly as multiples of the truncation length, so a life ends at the end of a truncation. The
first life of every particle is cut short at a random place, so that the particles of a batch stand
at different places of their lives (staggered resets).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lopt_jax.applying import update_params
from lopt_jax.checks import check_bounds, check_fields
from lopt_jax.meta.rules import MakeOptimizer, MetaParameters, cosine_schedule
from lopt_jax.meta.tasks import Content, Params, Task


@dataclasses.dataclass(frozen=True)
class Objective:
    """The meta-loss of a held-out loss: log((loss / loss at the start) + floor), bounded.

    Args:
      floor: below this fraction of the initial loss nothing more is won.
      ceiling: above this multiple of the initial loss (and for a loss that is not finite) nothing
        more is lost.
      final_weight: a measurement at the fraction f of the horizon weighs 1 + final_weight * f**4,
        normalised to a mean of 1 over a life.
    """

    floor: float = 0.01
    ceiling: float = 3.0
    final_weight: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_bounds(self, {"final_weight": 0}, ("floor", "ceiling"))

    def score(self, loss: jax.Array, initial_loss: jax.Array) -> jax.Array:
        """The bounded log ratio of a held-out loss to the one at the start, scalars."""
        ratio = loss / jnp.maximum(initial_loss, 1e-8)
        ratio = jnp.where(jnp.isfinite(ratio), ratio, self.ceiling)
        return jnp.log(jnp.clip(ratio, 0.0, self.ceiling) + self.floor)

    def weight(self, fraction: jax.Array) -> jax.Array:
        """The weight of a measurement at a fraction of the horizon, a scalar."""
        weight = 1.0 + self.final_weight * fraction**4
        return weight / (1.0 + self.final_weight / 5.0)


class UnrollState(NamedTuple):
    """One inner training on its way."""

    content: Content
    params: Params
    optimizer_state: Any
    step: jax.Array  # () int32: steps taken in this life
    horizon: jax.Array  # () int32: num_steps, what the schedule and the optimizer are told
    end: jax.Array  # () int32: the life ends here; the horizon, but for the first life
    initial_loss: jax.Array  # () float32: held-out loss at the start


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
      objective: maps held-out losses to the meta-loss.
    """

    task: Task
    make_optimizer: MakeOptimizer
    truncation_length: int = 50
    measure_every: int = 10
    min_horizon: int = 100
    max_horizon: int = 1000
    objective: Objective = dataclasses.field(default_factory=Objective)

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
        low, high = math.log(self.min_horizon), math.log(self.max_horizon)
        length = jnp.exp(jax.random.uniform(keys[2], (), minval=low, maxval=high))
        count = jnp.clip(jnp.round(length / self.truncation_length), 1, self.max_truncations)
        count = count.astype(jnp.int32)
        horizon = count * self.truncation_length
        end = horizon
        if first:
            end = self.truncation_length * jax.random.randint(keys[3], (), 1, count + 1)
        batch = self.task.batch(keys[4], content, "valid")
        initial_loss = self.task.loss(params, content, batch).astype(jnp.float32)
        optimizer_state = self._optimizer(meta_parameters, horizon).init(params)
        step = jnp.zeros((), jnp.int32)
        return UnrollState(content, params, optimizer_state, step, horizon, end, initial_loss)

    def _optimizer(self, meta_parameters: MetaParameters, horizon: jax.Array) -> Any:
        return self.make_optimizer(meta_parameters, horizon, cosine_schedule(horizon))

    def advance(
        self, meta_parameters: MetaParameters, key: jax.Array, state: UnrollState
    ) -> tuple[UnrollState, jax.Array, UnrollMetrics]:
        """Trains for one truncation.

        Args:
          meta_parameters: the optimizer's.
          key: draws the batches; an antithetic pair shares it.
          state: where the life stands.

        Returns:
          The state after it, the mean weighted score of its measurements (a scalar), and metrics.
        """
        task = self.task
        optimizer = self._optimizer(meta_parameters, state.horizon)
        content = state.content

        def train(carry: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
            params, optimizer_state = carry
            batch = task.batch(key, content, "train")
            loss, gradient = jax.value_and_grad(task.loss)(params, content, batch)
            return update_params(optimizer, gradient, optimizer_state, params, value=loss), None

        def measure(
            carry: tuple[Params, Any, jax.Array], key: jax.Array
        ) -> tuple[tuple[Params, Any, jax.Array], tuple[jax.Array, jax.Array]]:
            params, optimizer_state, step = carry
            key_train, key_valid = jax.random.split(key)
            keys = jax.random.split(key_train, self.measure_every)
            (params, optimizer_state), _ = jax.lax.scan(train, (params, optimizer_state), keys)
            step = step + self.measure_every
            loss = task.loss(params, content, task.batch(key_valid, content, "valid"))
            score = self.objective.score(loss, state.initial_loss)
            weight = self.objective.weight(step / state.horizon)
            return (params, optimizer_state, step), (score * weight, score)

        keys = jax.random.split(key, self.truncation_length // self.measure_every)
        carry = (state.params, state.optimizer_state, state.step)
        (params, optimizer_state, step), (weighted, scores) = jax.lax.scan(measure, carry, keys)
        state = state._replace(params=params, optimizer_state=optimizer_state, step=step)
        diverged = (scores[-1] > 0.0).astype(jnp.float32)
        metrics = UnrollMetrics(scores[-1], step / state.horizon, diverged)
        return state, jnp.mean(weighted), metrics

    def finished(self, state: UnrollState) -> jax.Array:
        """Whether the life is over, a boolean scalar."""
        return state.step >= state.end
