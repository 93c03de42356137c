"""Every setting of one meta-training, in one dataclass that its checkpoints record."""

import dataclasses
import json
from typing import Any, Literal

from lopt_jax.brief import brief
from lopt_jax.checks import check_bounds, check_fields
from lopt_jax.meta.estimators import EstimatorName
from lopt_jax.meta.unroll import Objective

_LEAST = {
    "learning_rate_peak": 0,
    "weight_decay": 0,
    "num_pairs": 1,
    "truncation_length": 1,
    "measure_every": 1,
    "min_horizon": 1,
    "max_horizon": 1,
    "reparametrise": 1,
    "outer_steps": 1,
    "outer_learning_rate": 0,
    "outer_warmup": 0,
    "outer_weight_decay": 0,
    "outer_second_decay": 0,
    "resume": 0,
    "resume_slots": 1,
    "expert_learning_rate": 0,
    "seed": 0,
    "deal_every": 0,
    "log_every": 1,
    "checkpoint_seconds": 0,
}
_ABOVE_ZERO = ("standard_deviation", "gradient_clip")


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """Settings of one meta-training.

    Args:
      name: of the weights it makes.
      architecture: of `lopt_jax.Weights`.
      architecture_config: (name, value) pairs of `lopt_jax.Weights.config`, all sizes among them.
      tasks: names of `tasks.training_tasks`; every outer step unrolls each of them.
      join: run tasks that differ in their examples alone in one program, each life with one of them
        drawn at random, and with as many pairs as they have together. A GPU is quicker so.
      gains: (feature, weight) pairs: the direction at the start, see `initial.FEATURES`. None: all
        layers are random.
      learning_rate_peak: peak of the schedule that rules with a learning rate are given.
      schedule: of the inner learning rate, a name of `rules.SCHEDULES`.
      recipe: what is around the direction: "own", the architecture's constructor, or "lopt", the
        recipe of `lopt_jax.lopt`. The latter has a schedule and a decay: learning_rate_peak,
        schedule and weight_decay multiply them, and 1.0, "constant" and 1.0 leave them alone.
      rule_options: (name, value) pairs: further arguments of the optimizer's constructor.
      weight_decay: that the rule is given: decoupled, times the learning rate.
      estimator: a name of `estimators.ESTIMATORS`.
      num_pairs: antithetic pairs a task and outer step.
      standard_deviation: of the perturbations.
      truncation_length: inner steps a truncation.
      measure_every: inner steps between measurements of the held-out loss.
      min_horizon: the shortest inner training, in steps.
      max_horizon: the longest inner training, in steps.
      horizons: whether lives are log-uniform or uniform between these.
      resume: the probability that a life goes on from a stored state, see `estimators.Resumption`.
      resume_slots: stored states a pair.
      resume_by: the losses whose rise says that a training fails.
      expert: a name of `experts.EXPERTS` that guides the rule, or none.
      expert_learning_rate: its rate at the first inner step.
      expert_steps: (until, gone): outer steps up to which it has the whole weight, and from which
        it has none.
      imitation_direction: the part of the meta-loss that is 1 - the cosine between the two steps,
        at the first and from the second of expert_steps.
      imitation_size: the same, of the difference between their norms.
      objective: how losses become the meta-loss.
      reparametrise: scales of the reparametrisation are in [1 / reparametrise, reparametrise];
        1.0 turns it off.
      outer_steps: steps of the outer optimizer.
      outer_learning_rate: its peak.
      outer_schedule: "cosine", which falls to a tenth, or "constant".
      outer_weight_decay: decoupled, times the learning rate.
      outer_second_decay: Adam's b2.
      outer_warmup: its warm-up steps.
      gradient_clip: global norm that the meta-gradient is clipped to.
      phases: ((fraction of the outer steps, top-level keys of the meta-parameters that are
        trained), ...); no keys means all. The fractions are of the whole and sum to 1.
      scales: (top-level key, factor) pairs: these meta-parameters are trained in units of the
        factor, so that a perturbation of them is that much smaller or larger.
      backend: of the updates: "xla", or "auto": on one Hopper GPU the fused kernels take the large
        tensors of all inner trainings at once, for evolution strategies alone; else it is XLA too.
      precision: of the updates' matrix products, as the optimizers', "own" for their default. On
        GPUs "default" is tf32, exact enough for celo2's Newton-Schulz, whose singular values end
        between 0.7 and 1.2 anyway, and faster.
      seed: of everything random.
      deal_every: after this many outer steps all inner trainings are dealt anew, by seed and step
        alone; 0: never. A campaign goes on from these steps, without the trainings on their way.
        Lives end there, and trainings all begin at once: so give it hundreds of steps.
      log_every: outer steps between reports; a wall-clock limit is checked as often.
      checkpoint_seconds: time between checkpoints.
      notes: what the model card says the weights are not good for.

    Raises:
      TypeError: for a setting of another type, named.
      ValueError: for a setting that is out of bounds or no choice, named.
    """

    name: str
    architecture: str
    architecture_config: tuple[tuple[str, Any], ...]
    tasks: tuple[str, ...]
    join: bool = False
    gains: tuple[tuple[str, float], ...] = (("rms_0", 1.0),)
    learning_rate_peak: float = 1.0
    schedule: Literal["cosine", "constant", "warmup_cosine", "warmup_constant"] = "cosine"
    recipe: Literal["own", "lopt"] = "own"
    rule_options: tuple[tuple[str, Any], ...] = ()
    weight_decay: float = 0.0
    estimator: EstimatorName = "truncated_pes"
    num_pairs: int = 128
    standard_deviation: float = 0.01
    truncation_length: int = 50
    measure_every: int = 10
    min_horizon: int = 100
    max_horizon: int = 2000
    horizons: Literal["log_uniform", "uniform"] = "log_uniform"
    resume: float = 0.0
    resume_slots: int = 2
    resume_by: Literal["training", "held_out"] = "training"
    expert: Literal["", "adamw", "muon", "sgdm"] = ""
    expert_learning_rate: float = 0.01
    expert_steps: tuple[int, int] = (5_000, 50_000)
    imitation_direction: tuple[float, float] = (0.7, 0.21)
    imitation_size: tuple[float, float] = (0.3, 0.0)
    objective: Objective = dataclasses.field(default_factory=Objective)
    reparametrise: float = 1.0
    reparametrise_level: Literal["global", "tensor", "mixed"] = "mixed"
    outer_steps: int = 4000
    outer_learning_rate: float = 1e-3
    outer_schedule: Literal["cosine", "constant"] = "cosine"
    outer_weight_decay: float = 0.0
    outer_second_decay: float = 0.99
    outer_warmup: int = 50
    gradient_clip: float = 1.0
    phases: tuple[tuple[float, tuple[str, ...]], ...] = ((1.0, ()),)
    scales: tuple[tuple[str, float], ...] = ()
    backend: Literal["xla", "auto"] = "xla"
    precision: Literal["own", "highest", "high", "default"] = "own"
    seed: int = 0
    deal_every: int = 0
    log_every: int = 20
    checkpoint_seconds: float = 180.0
    notes: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_bounds(self, _LEAST, _ABOVE_ZERO)
        if self.resume and self.estimator not in ("truncated_pes", "truncated_es"):
            raise ValueError(f"resume: {self.estimator} has no stored states; expected 0")
        for name in ("resume", "outer_second_decay"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: expected at most 1, found {getattr(self, name)}")
        for parts in zip(self.imitation_direction, self.imitation_size, strict=True):
            if min(parts) < 0 or sum(parts) > 1:
                raise ValueError(
                    "imitation_direction: expected parts that, with those of imitation_size, are "
                    f"at least 0 and sum to at most 1, found {parts}"
                )
        if not 0 <= self.expert_steps[0] <= self.expert_steps[1]:
            raise ValueError(
                f"expert_steps: expected numbers that rise from 0, found {self.expert_steps}"
            )
        if self.seed >= 2**32:  # JAX would take its last 32 bits
            raise ValueError(f"seed: expected less than 2**32, found {self.seed}")
        if self.deal_every % self.log_every:
            raise ValueError(
                f"deal_every: expected a multiple of log_every={self.log_every}, "
                f"found {self.deal_every}"
            )
        if not self.tasks:
            raise ValueError("tasks: expected at least one name, found none")
        if any(factor <= 0 for _, factor in self.scales):
            raise ValueError(f"scales: expected factors above 0, found {self.scales}")
        if any(fraction < 0 for fraction, _ in self.phases):
            raise ValueError(f"phases: expected fractions of at least 0, found {self.phases}")
        total = sum(fraction for fraction, _ in self.phases)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"phases: expected fractions that sum to 1, found a sum of {total}")


def to_json(config: MetaTrainConfig) -> str:
    """The config as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def from_json(text: str) -> MetaTrainConfig:
    """Reads what `to_json` wrote; missing fields have their defaults.

    Raises:
      ValueError: for text that is not such a config, naming what is wrong.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config: not JSON: {error}") from error
    if isinstance(fields, dict) and "objective" in fields:
        fields["objective"] = _read(Objective, fields["objective"], "objective")
    return _read(MetaTrainConfig, fields, "config")


def _read[Settings](kind: type[Settings], fields: Any, name: str) -> Settings:
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: expected a JSON object, found {brief(fields)}")
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{name}: unknown settings {unknown}; known: {sorted(known)}")
    try:
        return kind(**{key: _tuples(value) for key, value in fields.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
