"""small_fc_lopt: one small MLP for every parameter ("Practical tradeoffs", arXiv 2203.11860)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt_jax import engine
from lopt_jax.accumulators import Accumulators, Decays
from lopt_jax.features import small_fc_features, time_features
from lopt_jax.optimizers import common
from lopt_jax.rule import MLP, Rule
from lopt_jax.weights import Weights, resolve


class SmallFcLoptState(NamedTuple):
    """State of small_fc_lopt."""

    count: jax.Array  # () int32, updates made so far
    accumulators: Accumulators  # trees like the params


def small_fc_lopt(
    weights: str | Weights = "small_fc_lopt",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: engine.StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """The learned optimizer of "Practical tradeoffs": an MLP with 39 inputs an element.

    Its inputs are the gradient, the parameter, momenta, second moments and factored second moments
    with their reciprocal roots, each normalised over its tensor, and an embedding of the step.

    Args:
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto", "xla" or "pallas".
      precision: of the products of hidden layers of 16 or more: "highest" is float32; "high" and
        "default" allow faster matrix units, as `jax.lax.Precision` defines them.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Metz et al., arXiv 2203.11860; google/learned_optimization,
      `learned_optimizers/adafac_mlp_lopt.py`.
    """
    common.check_learning_rate(learning_rate)
    common.check_number("weight_decay", weight_decay)
    common.check_backend(backend)
    dtype = common.check_dtype(accumulator_dtype)
    weights = resolve(weights, ("small_fc_lopt", "mulo"))
    config = weights.config
    momenta = len(config["initial_momentum_decays"])
    rule = Rule(
        features=small_fc_features(momenta),
        exp_mult=config["exp_mult"],
        precision=common.check_precision(precision),
    )
    step_mult = config["step_mult"]

    def init(params: Any) -> SmallFcLoptState:
        accumulators = engine.init_accumulators(params, momenta, momenta, dtype, stacked_axes)
        return SmallFcLoptState(jnp.zeros((), jnp.int32), accumulators)

    def update(
        meta_parameters: Any, gradients: Any, state: SmallFcLoptState, params: Any, value: Any
    ) -> tuple[Any, SmallFcLoptState]:
        del value
        rate = common.learning_rate_at(learning_rate, state.count)
        decay = common.weight_decay_of_tensors(
            weight_decay, weight_decay_mask, params, stacked_axes
        )
        prepared = engine.first_pass(rule, gradients, params, state.accumulators, stacked_axes)
        updates, accumulators, _ = engine.second_pass(
            rule,
            prepared,
            network(meta_parameters["mlp"], len(rule.features), state.count),
            mlp_per_tensor=False,
            decays=decays(meta_parameters, config),
            scale=rate * step_mult,
            weight_decay=rate * decay,
        )
        return updates, SmallFcLoptState(optax.safe_increment(state.count), accumulators)

    return common.transformation(init, update, weights.params)


def decays(meta_parameters: Any, config: Any) -> Decays:
    """Learned decay rates: offsets in the logarithm of one minus the decay.

    Args:
      meta_parameters: with "momentum_decays", "rms_decays" and "adafactor_decays".
      config: with the initial decays.

    Returns:
      The decays; those of second moments clipped to [0, 1].

    Reference:
      google/learned_optimization, `adafac_mlp_lopt.py`, `param_to_decay`.
    """

    def decay(initial: str, offset: str) -> jax.Array:
        start = jnp.log(1 - jnp.asarray(config[initial], jnp.float32)) / 10
        return 1 - jnp.exp(10 * (start + meta_parameters[offset]))

    return Decays(
        momentum=decay("initial_momentum_decays", "momentum_decays"),
        second_moment=jnp.clip(decay("initial_rms_decays", "rms_decays")[0], 0.0, 1.0),
        factored=jnp.clip(decay("initial_adafactor_decays", "adafactor_decays"), 0.0, 1.0),
    )


def network(mlp: Any, tensor_features: int, count: jax.Array) -> MLP:
    """The network at a step: the time features become part of the first bias.

    Args:
      mlp: {"w0": (features + 11, H), "b0": (H,), ...}.
      tensor_features: number of features that vary with the tensor; the time features follow.
      count: () int32, updates made so far.

    Returns:
      The network; its first layer has `tensor_features` rows.
    """
    layers = range(len(mlp) // 2)
    first = mlp["w0"]
    time = jnp.dot(time_features(count), first[tensor_features:], precision="highest")
    return MLP(
        weights=(first[:tensor_features], *(mlp[f"w{i}"] for i in layers[1:])),
        biases=(mlp["b0"] + time, *(mlp[f"b{i}"] for i in layers[1:])),
    )
