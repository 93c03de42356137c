"""small_fc_lopt: one small MLP for every parameter ("Practical tradeoffs", arXiv 2203.11860)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.accumulators import Decays, SecondMoments
from lopt_jax.features import small_fc_features
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import per_parameter, timed_network
from lopt_jax.rules.rule import Rule
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import Weights, WeightsLike, resolve

ARCHITECTURES = ("small_fc_lopt", "mulo")  # one rule: their weights are of one kind


@common.described
def small_fc_lopt(
    weights: WeightsLike = "small_fc_lopt",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "high",
) -> optax.GradientTransformationExtraArgs:
    """The learned optimizer of "Practical tradeoffs": an MLP with 39 inputs an element.

    Its inputs are the gradient, the parameter, momenta, second moments and factored second moments
    with their reciprocal roots, each normalised over its tensor, and an embedding of the step.

    Args:
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moments in the state; averages that
        it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto", "xla" or "pallas".
      precision: of the products of hidden layers of 16 or more: "highest" is float32 throughout;
        "high" takes a GPU's matrix units for sums of products of 16-bit parts, which on the
        reference trajectory err by a fifth of the bound that float32 must meet; "default" allows
        operands of 10 or even 7 bits where XLA computes the products.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Metz et al., arXiv 2203.11860; google/learned_optimization,
      `learned_optimizers/adafac_mlp_lopt.py`.
    """
    options = common.Options.of(locals())
    return small_fc_rule(
        resolve(weights, ARCHITECTURES), options, lambda rate, decay, _: (rate, decay)
    )


def small_fc_rule(
    weights: Weights,
    options: common.Options,
    scales: Callable[[jax.Array, jax.Array, Any], tuple[Any, Any]],
) -> optax.GradientTransformationExtraArgs:
    """The rule of small_fc_lopt and mulo.

    Args:
      weights: weights of one of `ARCHITECTURES`.
      options: the arguments that all optimizers share.
      scales: as in `per_parameter`; the step is multiplied by the config's step_mult as well.

    Returns:
      The transformation.
    """
    config = weights.config
    rule = Rule(
        features=small_fc_features(
            len(config["initial_momentum_decays"]), len(config["initial_rms_decays"])
        ),
        exp_mult=config["exp_mult"],
        precision=options.precision,
        hidden_size=config["hidden_size"],
    )

    step_mult = config["step_mult"]
    initial = {
        kind: np.asarray(config[f"initial_{kind}"], np.float32)
        for kind in ("momentum_decays", "rms_decays", "adafactor_decays")
    }

    def step_scales(rate: jax.Array, decay: jax.Array, params: Any) -> tuple[Any, Any]:
        scale, decay = scales(rate, decay, params)
        return scale * step_mult, decay

    functions = per_parameter(
        weights,
        rule,
        options,
        network=lambda meta, count: timed_network(meta["mlp"], len(rule.features), count),
        decays=lambda meta: learned_decays(meta, initial),
        scales=step_scales,
    )
    return functions.bound(weights, options)


def learned_decays(meta_parameters: Any, initial: Mapping[str, np.ndarray]) -> Decays:
    """Learned decay rates: offsets in the logarithm of one minus the decay.

    Args:
      meta_parameters: with the offsets "momentum_decays", "rms_decays" and "adafactor_decays".
      initial: what they are offsets from, by the same names.

    Returns:
      The decays; those of second moments clipped to [0, 1].

    Reference:
      google/learned_optimization, `adafac_mlp_lopt.py`, `param_to_decay`.
    """

    def decay(kind: str) -> jax.Array:
        start = jnp.log(1 - jnp.asarray(initial[kind])) / 10
        return 1 - jnp.exp(10 * (start + meta_parameters[kind]))

    rms = jnp.clip(decay("rms_decays"), 0.0, 1.0)
    return Decays(
        momentum=decay("momentum_decays"),
        second_moment=rms[0] if rms.shape == (1,) else SecondMoments(tuple(rms)),
        factored=jnp.clip(decay("adafactor_decays"), 0.0, 1.0),
    )
