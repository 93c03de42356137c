"""rnn_mlp_lopt: an MLP on every element and an LSTM over tensors, which tell each other.

Metz et al., "Tasks, stability, architecture, and compute", arXiv 2009.11243.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax import tensorwise
from lopt_jax.accumulators import Accumulators
from lopt_jax.compiler.quirks import barrier
from lopt_jax.context import Tracing
from lopt_jax.features import FeatureSet, rnn_mlp_features
from lopt_jax.gradient_clipper import (
    GradientClipper,
    init_clipper,
    largest_element,
    update_clipper,
)
from lopt_jax.lstm import LSTMState, init_lstm, lstm_cell, rows
from lopt_jax.normalized_losses import (
    TRAINING_DECAY,
    VALIDATION_DECAY,
    LossAverage,
    corrected_mean,
    init_loss_average,
    normalized_loss,
    update_loss_average,
)
from lopt_jax.optimizers import common
from lopt_jax.optimizers.per_parameter import fixed_decays, network
from lopt_jax.partition import Partition
from lopt_jax.partitioned import on_shards
from lopt_jax.rules import messages
from lopt_jax.rules.message_inputs import first_biases, linear, lstm_inputs, tensor_sizes
from lopt_jax.rules.rule import TensorArrays
from lopt_jax.tensors import (
    StackedAxes,
    count_tensors,
    init_accumulators,
    number_of,
    ranks_of_tensors,
)
from lopt_jax.weights import WeightsLike, resolve


class RNNMLPLoptState(NamedTuple):
    """State of rnn_mlp_lopt."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates and validation losses so far
    accumulators: Accumulators  # momenta and second moments: trees like the params
    lstm: LSTMState
    from_mlp: jax.Array  # (tensors, messages), what the LSTM reads next of each tensor
    from_lstm: jax.Array  # (messages,), what it reads next of its own
    loss: LossAverage
    validation_loss: LossAverage
    clipper: GradientClipper


@common.described
def rnn_mlp_lopt(
    weights: WeightsLike = "rnn_mlp_lopt",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """An MLP with 54 inputs an element, 17 of them what an LSTM says of its tensor.

    Args:
      weights: a registered name, a path to a checkpoint, or `Weights`.
      learning_rate: multiplies the step; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by the learning rate as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momenta and second moments in the state; those that it cannot
        hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `small_fc_lopt`'s.
      backend: "auto" or "xla"; the kernels do not know the rule, and "pallas" is refused.
      precision: of the products of the MLP, as `small_fc_lopt`'s.

    Returns:
      An optax transformation. Its update needs the loss, as `velo`'s does:
      `update(grads, state, params, value=loss)`. Losses of validation, where there are any, are
      told with `observe_validation_loss`.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      Metz et al., arXiv 2009.11243; google/learned_optimization,
      `learned_optimizers/rnn_mlp_lopt.py`, `RNNMLPLOpt`.
    """
    options = common.Options.of(locals())
    weights = resolve(weights, ("rnn_mlp_lopt",))
    config = weights.config
    features = rnn_mlp_features(len(config["initial_momentum_decays"]))
    decays, dtypes = fixed_decays(config), options.accumulator_dtypes(config)

    def init(params: Any) -> RNNMLPLoptState:
        tensors = count_tensors(params, stacked_axes)
        theta = weights.params
        return RNNMLPLoptState(
            count=jnp.zeros((), jnp.int32),
            accumulators=init_accumulators(params, dtypes, 0, stacked_axes),
            lstm=init_lstm(theta["lstm"], tensors),
            from_mlp=rows(theta["initial_from_mlp"], tensors),
            from_lstm=rows(theta["initial_from_lstm"], 1)[0],
            loss=init_loss_average(),
            validation_loss=init_loss_average(),
            clipper=init_clipper(),
        )

    def update(
        tracing: Tracing,
        theta: Any,
        gradients: Any,
        state: RNNMLPLoptState,
        params: Any,
        value: Any,
    ) -> tuple[Any, RNNMLPLoptState]:
        loss = common.require_value("rnn_mlp_lopt", value)
        common.check_alike_on_devices(loss, (gradients, params))
        training = update_loss_average(state.loss, loss, TRAINING_DECAY)
        state = state._replace(loss=training)
        updates, accumulators, new = on_shards(
            functools.partial(of_shards, ranks_of_tensors(params, stacked_axes)),
            tracing,
            gradients,
            params,
            state.accumulators,
            (
                theta,
                state._replace(accumulators=Accumulators((), (), (), ())),
                _loss_features(state, loss),
                options.rates(state.count, params),
            ),
            stacked_axes,
            (tuple(config.items()), options.precision),
        )
        return updates, new._replace(
            count=optax.safe_increment(state.count), accumulators=accumulators
        )

    def of_shards(
        ranks: np.ndarray,
        tracing: Tracing,
        gradients: Any,
        params: Any,
        accumulators: Accumulators,
        whole: Any,
    ) -> tuple[Any, Accumulators, RNNMLPLoptState]:
        theta, state, losses, (rate, decay) = whole
        grouped = tensorwise.group(tracing, gradients, params, accumulators, stacked_axes)
        if not grouped.groups:
            return *tensorwise.as_trees(grouped, []), state
        chosen = tensorwise.positions(grouped)
        old = (state.lstm, state.from_mlp)
        old_lstm, from_mlp = tensorwise.taken(grouped, old)
        unknown_decays = barrier("known_decays", decays, tracing.without)
        shared = (unknown_decays, largest_element(state.clipper))
        made = tensorwise.over_tensors(
            grouped, functools.partial(_statistics_of_tensor, features), (), shared
        )
        x = tensorwise.numbers(grouped, made)
        sizes = tensor_sizes(grouped.tensors, chosen)
        inputs = lstm_inputs(x, from_mlp, state.from_lstm, losses, sizes, ranks[chosen])
        lstm = lstm_cell(theta["lstm"], inputs, old_lstm)
        decay = jnp.broadcast_to(decay, (number_of(grouped.tensors),))
        own = (
            first_biases(theta, len(features), x, lstm.hidden, state.count, sizes),
            x.normalizers,
            tensorwise.taken(grouped, decay),
        )
        step = functools.partial(_step_of_tensor, features, config["exp_mult"], options.precision)
        with_network = (*shared, network(theta["mlp"]), rate * config["step_mult"])
        results = tensorwise.over_tensors(grouped, step, own, with_network)
        new = (lstm, tensorwise.numbers(grouped, results))
        lstm_state, answers = tensorwise.put_back(grouped, old, new)
        said = jnp.mean(linear(theta["to_lstm"], lstm.hidden), axis=0)
        return *tensorwise.as_trees(grouped, results), state._replace(
            lstm=lstm_state,
            from_mlp=answers,
            from_lstm=said,
            clipper=update_clipper(state.clipper, x.gradient_mean_square),
        )

    return common.transformation(
        options,
        init,
        update,
        weights.params,
        RNNMLPLoptState,
        without_kernels="they know no network that answers an LSTM",
    )


def observe_validation_loss(state: Any, loss: Any) -> Any:
    """Tells `rnn_mlp_lopt` a loss on validation data, between two updates.

    Args:
      state: of any optax transformation that contains `rnn_mlp_lopt`.
      loss: (), the loss.

    Returns:
      The state: its average of these losses has the loss, and the step count, which an input of the
      rule is, counts it like an update.

    Raises:
      ValueError: the state holds none of `rnn_mlp_lopt`, or the loss is no scalar.
    """
    is_ours = lambda x: isinstance(x, RNNMLPLoptState)  # noqa: E731
    if not any(map(is_ours, jax.tree.leaves(state, is_leaf=is_ours))):
        raise ValueError("state: expected one with a RNNMLPLoptState, of rnn_mlp_lopt; found none.")
    loss = common.scalar("loss", loss, "a scalar")

    def observed(x: Any) -> Any:
        if not is_ours(x):
            return x
        losses = update_loss_average(x.validation_loss, loss, VALIDATION_DECAY)
        return x._replace(count=optax.safe_increment(x.count), validation_loss=losses)

    return jax.tree.map(observed, state, is_leaf=is_ours)


def _statistics_of_tensor(
    features: FeatureSet,
    tracing: Tracing,
    partition: Partition | None,
    x: TensorArrays,
    own: Any,
    shared: Any,
) -> tensorwise.Result:
    del tracing, own
    operands = messages.operands_of(*x, *shared)
    return tensorwise.Result(None, None, messages.statistics_of(features, operands, partition))


def _step_of_tensor(
    features: FeatureSet,
    exp_mult: float,
    precision: jax.lax.Precision,
    tracing: Tracing,
    partition: Partition | None,
    x: TensorArrays,
    own: Any,
    shared: Any,
) -> tensorwise.Result:
    (first_bias, normalizers, decay), (decays, clip, mlp, scale) = own, shared
    operands = messages.operands_of(*x, decays, clip)
    new = x.accumulators._replace(momentum=operands.momentum, second_moment=operands.second_moment)
    step, answer = messages.step_and_answer(
        features,
        mlp._replace(
            weights=(mlp.weights[0][: len(features)], *mlp.weights[1:]),
            biases=(first_bias, *mlp.biases[1:]),
        ),
        normalizers,
        x.gradient,
        operands,
        clip,
        exp_mult,
        precision,
        tracing.platform,
        partition,
    )
    stored = jax.tree.map(lambda x, old: x.astype(old.dtype), new, x.accumulators)
    update = -(scale * step + decay * operands.parameter)
    return tensorwise.Result(update, stored, answer)


def _loss_features(state: RNNMLPLoptState, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    """This loss and the mean validation loss among the training losses, this one included."""
    normalized = lambda x: normalized_loss(state.loss, x, TRAINING_DECAY)  # noqa: E731
    return normalized(loss), normalized(corrected_mean(state.validation_loss, VALIDATION_DECAY))
