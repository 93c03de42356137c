"""What meta-training needs of an optimizer: build it from meta-parameters, inside jit and vmap."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax.optimizers.lopt import lopt
from lopt_jax.optimizers.matrices import ARCHITECTURES, LINEAR
from lopt_jax.weights import Weights

MetaParameters = Any
Schedule = Callable[[jax.Array], jax.Array]
# (meta_parameters, num_steps, learning_rate_schedule) -> transformation; num_steps may be traced.
MakeOptimizer = Callable[
    [MetaParameters, jax.Array, Schedule], optax.GradientTransformationExtraArgs
]

_TAKES_LEARNING_RATE = (
    "small_fc_lopt",
    "celo2",
    "elo",
    "elo_celo2",
    "mlp_lopt",
    "rnn_mlp_lopt",
    "nn_adam",
    "learnable_sgd",
    "learnable_sgdm",
    "learnable_adam",
)
_WARMUP = 0.05  # of the horizon
LOPT_TAKES = (*ARCHITECTURES, LINEAR)  # what `lopt` takes as weights
_KNOWS_HORIZON = ("velo", "celo", "celo_adam")


def rescaled(meta_parameters: MetaParameters, scales: Mapping[str, float]) -> MetaParameters:
    """The meta-parameters, those of some top-level keys times a factor."""
    return {
        k: jax.tree.map(lambda x, k=k: x * scales[k], v) if k in scales else v
        for k, v in meta_parameters.items()
    }


def cosine_schedule(num_steps: jax.Array | float, peak: float = 1.0) -> Schedule:
    """The schedule users are told to use: half a cosine from `peak` to 0, without warm-up.

    Args:
      num_steps: the horizon, in steps; may be traced.
      peak: the value at step 0.

    Returns:
      A function from the step to the value, both scalars.
    """

    def schedule(step: jax.Array) -> jax.Array:
        fraction = jnp.clip(step / num_steps, 0.0, 1.0)
        return jnp.float32(peak) * 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))

    return schedule


def make_schedule(name: str, num_steps: jax.Array | int) -> Schedule:
    """The schedule of an inner training.

    Args:
      name: of `SCHEDULES`.
      num_steps: the horizon, in steps; may be traced.

    Returns:
      A function from the step to a multiplier of the learning rate, at most 1.
    """
    warms_up, falls = SCHEDULES[name]
    warmup = _WARMUP * num_steps if warms_up else 0
    fall = cosine_schedule(num_steps - warmup)

    def schedule(step: jax.Array) -> jax.Array:
        level = fall(step - warmup) if falls else jnp.float32(1.0)
        return level * jnp.minimum(1.0, (step + 1) / warmup) if warms_up else level

    return schedule


# Whether each begins with a warm-up of 5%, and whether it ends with half a cosine to zero.
SCHEDULES = {
    "cosine": (False, True),
    "constant": (False, False),
    "warmup_cosine": (True, True),
    "warmup_constant": (True, False),
}


def learned_adam(
    meta_parameters: MetaParameters, num_steps: jax.Array, learning_rate: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Adam whose log learning rate and log (1 - decay)s are the meta-parameters: for tests.

    Args:
      meta_parameters: {"log_learning_rate": (), "log_decay_gaps": (2,)}.
      num_steps: unused.
      learning_rate: multiplies the learned learning rate.

    Returns:
      The transformation.
    """
    del num_steps
    gaps = jnp.exp(meta_parameters["log_decay_gaps"])
    rate = jnp.exp(meta_parameters["log_learning_rate"])
    chain = optax.chain(
        optax.scale_by_adam(b1=1 - gaps[0], b2=1 - gaps[1]),
        optax.scale_by_schedule(learning_rate),
        optax.scale(-rate),
    )
    return optax.with_extra_args_support(chain)


def learned_sgd(
    meta_parameters: MetaParameters, num_steps: jax.Array, learning_rate: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Gradient descent whose log learning rate is the meta-parameter, with no schedule: for tests.

    Args:
      meta_parameters: {"log_learning_rate": ()}.
      num_steps: unused.
      learning_rate: unused.

    Returns:
      The transformation.
    """
    del num_steps, learning_rate
    return optax.with_extra_args_support(
        optax.scale(-jnp.exp(meta_parameters["log_learning_rate"]))
    )


def decays_at_rank_two(params: Any) -> Any:
    """The mask of celo2's decay: matrices alone.

    A decay that is right for them shrinks the scales of normalisation layers to nothing, and the
    kernels of convolutions, orthogonalised place by place, to too little.
    """
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _lopt_rule(
    architecture: str,
    config: Mapping[str, Any],
    learning_rate: float,
    weight_decay: float | jax.Array,
    backend: str,
    precision: str,
    options: Mapping[str, Any] | None,
) -> MakeOptimizer:
    """`lopt` as a function of the meta-parameters of its direction; arguments as `make_rule`'s."""
    if architecture not in LOPT_TAKES:
        raise ValueError(
            f"recipe: lopt takes weights of {', '.join(LOPT_TAKES)}; found {architecture!r}"
        )
    arguments: dict[str, Any] = {"weight_decay": weight_decay, "backend": backend}
    if precision != "own":
        arguments["precision"] = precision
    arguments.update(options or {})

    def make(theta: MetaParameters, num_steps: jax.Array, schedule: Schedule) -> Any:
        weights = Weights(architecture, config, theta, {})
        rate = lambda step: learning_rate * schedule(step)  # noqa: E731
        return lopt(num_steps, weights, learning_rate=rate, **arguments)

    return make


def make_rule(
    architecture: str,
    config: Mapping[str, Any],
    learning_rate: float = 1.0,
    weight_decay: float | jax.Array = 0.0,
    backend: str = "xla",
    precision: str = "own",
    options: Mapping[str, Any] | None = None,
    recipe: str = "own",
) -> MakeOptimizer:
    """The optimizer of an architecture as a function of its meta-parameters.

    Args:
      architecture: a name of `lopt_jax.Weights.architecture`, or "learned_adam", "learned_sgd".
      config: the architecture's config, as in `lopt_jax.Weights.config`.
      learning_rate: the peak of the schedule, for rules that are given one.
      weight_decay: times the learning rate, decoupled; celo2's is for leaves of rank two alone.
      backend: as the optimizers'.
      precision: of matrix products, as the optimizers'; "own" for each one's default.
      options: further arguments of the optimizer.
      recipe: "own", the architecture's constructor; or "lopt", the recipe of `lopt_jax.lopt` around
        the architecture's direction. Then learning rate and weight decay are multipliers.

    Returns:
      A function that builds the optimizer.

    Raises:
      ValueError: for an architecture that is neither meta-trained nor evaluated here, or one that
        `lopt` does not take.
    """
    if recipe == "lopt":
        return _lopt_rule(
            architecture, config, learning_rate, weight_decay, backend, precision, options
        )
    if architecture == "learned_adam":
        return learned_adam
    if architecture == "learned_sgd":
        return learned_sgd
    if architecture not in (*_TAKES_LEARNING_RATE, *_KNOWS_HORIZON):
        raise ValueError(
            f"architecture: {architecture!r} can be neither meta-trained nor evaluated here; "
            f"choose one of {sorted([*_TAKES_LEARNING_RATE, *_KNOWS_HORIZON])}"
        )
    constructor = getattr(importlib.import_module("lopt_jax"), architecture)

    def weights(meta_parameters: MetaParameters) -> Weights:
        return Weights(architecture, config, meta_parameters, {})

    def scaled(schedule: Schedule) -> Schedule:
        return lambda step: learning_rate * schedule(step)

    arguments: dict[str, Any] = {"weight_decay": weight_decay, "backend": backend}
    if precision != "own":
        arguments["precision"] = precision
    if architecture == "celo2":
        arguments["weight_decay_mask"] = decays_at_rank_two
    arguments.update(options or {})
    if architecture in _KNOWS_HORIZON:
        return lambda theta, num_steps, schedule: constructor(
            num_steps, weights=weights(theta), **arguments
        )
    return lambda theta, num_steps, schedule: constructor(
        learning_rate=scaled(schedule), weights=weights(theta), **arguments
    )
