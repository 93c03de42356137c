"""nn_adam: Adam whose hyperparameters an LSTM moves, tensor by tensor, from step to step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax import tensorwise
from lopt_jax.accumulators import Accumulators
from lopt_jax.compiler.products import product
from lopt_jax.context import Tracing
from lopt_jax.lstm import LSTMState, init_lstm, lstm_cell, rows
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings, adam_step
from lopt_jax.partition import Partition
from lopt_jax.partitioned import on_shards
from lopt_jax.rules.adam_hyperparameters import (
    Hyperparameters,
    Statistics,
    logarithms_of,
    lstm_inputs,
    values_of,
)
from lopt_jax.rules.rule import TensorArrays
from lopt_jax.rules.tensor_statistics import tensor_statistics
from lopt_jax.tensors import (
    StackedAxes,
    count_tensors,
    init_accumulators,
    number_of,
    ranks_of_tensors,
)
from lopt_jax.weights import WeightsLike, resolve


class NNAdamState(NamedTuple):
    """State of nn_adam."""

    count: jax.Array  # type: ignore[assignment]  # () int32, updates made so far
    accumulators: Accumulators  # momentum and second moment alone: trees like the params
    lstm: LSTMState
    logarithms: Hyperparameters  # a tenth of the logarithm: of one minus beta where it is a beta


@common.described
def nn_adam(
    weights: WeightsLike,
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Adam, whose learning rate, betas and epsilon an LSTM moves for every tensor by itself.

    Args:
      weights: a path to a checkpoint, or `Weights`. None are published.
      learning_rate: multiplies the learned one; a number or an optax schedule.
      weight_decay: decoupled weight decay, scaled by `learning_rate` as in `optax.adamw`.
      weight_decay_mask: which parameters decay, as `optax.adamw`'s `mask`.
      accumulator_dtype: dtype of momentum and second moment in the state, by the betas that
        meta-training starts from; averages that it cannot hold stay float32.
      stacked_axes: how many leading axes of a leaf hold separate tensors, as `small_fc_lopt`'s.
      backend: "auto" or "xla"; XLA fuses the rule, and "pallas" is refused.
      precision: as `small_fc_lopt`'s; the LSTM's products are float32, so it changes nothing.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      google/learned_optimization, `learned_optimizers/nn_adam.py`, `NNAdam`.
    """
    options = common.Options.of(locals())
    weights = resolve(weights, ("nn_adam",))
    config = weights.config
    dtypes = options.accumulator_dtypes(config)

    def init(params: Any) -> NNAdamState:
        tensors = count_tensors(params, stacked_axes)
        return NNAdamState(
            count=jnp.zeros((), jnp.int32),
            accumulators=init_accumulators(params, dtypes, 0, stacked_axes),
            lstm=init_lstm(weights.params["lstm"], tensors),
            logarithms=jax.tree.map(lambda x: rows(x, tensors), _initial(weights.params)),
        )

    def update(
        tracing: Tracing,
        meta_parameters: Any,
        gradients: Any,
        state: NNAdamState,
        params: Any,
        value: Any,
    ) -> tuple[Any, NNAdamState]:
        del value
        ranks = ranks_of_tensors(params, stacked_axes)
        updates, accumulators, new = on_shards(
            functools.partial(of_shards, ranks),
            tracing,
            gradients,
            params,
            state.accumulators,
            (
                meta_parameters,
                (state.lstm, state.logarithms),
                options.rates(state.count, params),
            ),
            stacked_axes,
            tuple(config.items()),
        )
        return updates, NNAdamState(optax.safe_increment(state.count), accumulators, *new)

    def of_shards(
        ranks: np.ndarray,
        tracing: Tracing,
        gradients: Any,
        params: Any,
        accumulators: Accumulators,
        whole: Any,
    ) -> tuple[Any, Accumulators, tuple[LSTMState, Hyperparameters]]:
        meta_parameters, old, (rate, decay) = whole
        grouped = tensorwise.group(tracing, gradients, params, accumulators, stacked_axes)
        if not grouped.groups:
            return *tensorwise.as_trees(grouped, []), old
        old_lstm, logarithms = tensorwise.taken(grouped, old)
        now = values_of(logarithms)
        decay = jnp.broadcast_to(decay, (number_of(grouped.tensors),))
        scale = rate * now.learning_rate * (1 + now.epsilon)
        own = (now, scale, tensorwise.taken(grouped, decay))
        results = tensorwise.over_tensors(grouped, _step_of_tensor, own, shared=())
        x, own_ranks = tensorwise.numbers(grouped, results), ranks[tensorwise.positions(grouped)]
        lstm = lstm_cell(meta_parameters["lstm"], lstm_inputs(x, logarithms, own_ranks), old_lstm)
        moved = _moved(meta_parameters, config, logarithms, lstm.hidden)
        new = tensorwise.put_back(grouped, old, (lstm, moved))
        return *tensorwise.as_trees(grouped, results), new

    return common.transformation(
        options,
        init,
        update,
        weights.params,
        NNAdamState,
        without_kernels="its rule is Adam, which XLA fuses",
    )


def _initial(meta_parameters: Any) -> Hyperparameters:
    """The learned hyperparameters that every tensor starts with, as in the state."""
    return Hyperparameters(**meta_parameters["initial"])


def _moved(
    meta_parameters: Any, config: Any, logarithms: Hyperparameters, hidden: jax.Array
) -> Hyperparameters:
    """The logarithms after the LSTM's moves, pulled back to the initial ones, within bounds."""
    controls = meta_parameters["controls"]
    moves = config["output_scale"] * (product(hidden, controls["w"]) + controls["b"])
    moved = Hyperparameters(*(x + moves[:, i] for i, x in enumerate(logarithms)))
    back = lambda x, start: x - config["decay_strength"] * (x - start)  # noqa: E731
    return logarithms_of(values_of(jax.tree.map(back, moved, _initial(meta_parameters))))


def _step_of_tensor(
    tracing: Tracing, partition: Partition | None, x: TensorArrays, own: Any, shared: Any
) -> tensorwise.Result:
    """Adam without bias correction on one tensor, and what the LSTM reads of it."""
    del tracing, shared
    (values, scale, decay), old = own, x.accumulators
    settings = AdamSettings(
        betas=(values.beta1, values.beta2),
        epsilon=values.epsilon,
        root_epsilon=1e-10,
        bias_correction=False,
    )
    made = adam_step(settings, x.gradient, old.momentum[0], old.second_moment, jnp.int32(0))
    wide = lambda x: x.astype(made.step.dtype)  # noqa: E731
    parameter = wide(x.parameter)
    gradient = jnp.clip(wide(x.gradient), -common.GRADIENT_CLIP, common.GRADIENT_CLIP)
    pools = ((gradient,), (wide(made.momentum),), (wide(made.second_moment),), (parameter,))
    (g, m, v, p), sizes = tensor_statistics(pools, [jnp.abs(gradient)], partition)
    return tensorwise.Result(
        -(scale * made.step + decay * parameter),
        old._replace(momentum=(made.momentum,), second_moment=made.second_moment),
        Statistics(g, m, v, p, sizes[0]),
    )
