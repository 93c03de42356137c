"""Where meta-training starts: a rule that already is an Adam, under the cosine schedule.

A learned rule's MLP has relu units, so a feature passes through a pair of them, one for each sign:
x = relu(x) - relu(-x). The first hidden units pass chosen features through both hidden layers, and
the direction at the start is a sum of these features with given gains: the rms-normalised momentum
alone is a kind of Adam. The remaining hidden units are random and have no output weight yet.

Every feature is divided by the root of (1e-5 + its mean square over the tensor). So the
rms-normalised momentum takes steps of one size however small the gradient has become, unlike
Adam's, while the plain momentum shrinks with the gradient once that is below 3e-3.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax import controller
from lopt_jax.lstm import LSTMState, init_lstm
from lopt_jax.meta.original_starts import STARTS
from lopt_jax.optimizers.matrices import LINEAR
from lopt_jax.weights.schema import complete_config, schema_of

# The passed features, most useful first, and their index among the 28 of small_fc_lopt and the 30
# of VeLO and Celo: momenta of decays 0.9, 0.99, 0.999 over the root of the second moment ("rms"),
# over that of the factored one ("factored"), and plain; and the gradient.
FEATURES = {
    "rms_0": (6, 7),
    "parameter": (1, 2),
    "momentum_0": (2, 3),
    "factored_0": (25, 27),
    "rms_1": (7, 8),
    "momentum_1": (3, 4),
    "factored_1": (26, 28),
    "rms_2": (8, 9),
    "gradient": (0, 0),
}
Gains = Mapping[str, float]
_TIME_FEATURES = 11


def passing_mlp(
    key: jax.Array,
    num_features: int,
    num_inputs: int,
    hidden_size: int,
    hidden_layers: int,
    num_outputs: int,
    gains: Gains,
) -> dict[str, jax.Array]:
    """An MLP whose first output is a weighted sum of features, its others zero.

    Args:
      key: for the random units.
      num_features: tensor features, 28 or 30.
      num_inputs: inputs of the first layer: the features and what follows them.
      hidden_size: width of a hidden layer, at least 2.
      hidden_layers: number of hidden layers.
      num_outputs: outputs.
      gains: weights by name of `FEATURES`; they are passed first. None: all layers are random.

    Returns:
      {"w0": (num_inputs, hidden_size), "b0": (hidden_size,), ...} in float32.

    Raises:
      ValueError: if the hidden layer cannot hold the features, or one is unknown.
    """
    unknown = sorted(set(gains) - set(FEATURES))
    if unknown:
        raise ValueError(f"gains: unknown features {unknown}; known: {sorted(FEATURES)}")
    if hidden_size < 2 * len(gains):
        raise ValueError(
            f"hidden_size: expected at least {2 * len(gains)} for {sorted(gains)}, "
            f"found {hidden_size}"
        )
    keys = jax.random.split(key, hidden_layers + 1 if not gains else hidden_layers)
    sizes = [num_inputs] + [hidden_size] * hidden_layers
    if not gains:
        sizes.append(num_outputs)
        return {
            name: value
            for i, (m, n) in enumerate(itertools.pairwise(sizes))
            for name, value in (
                (f"w{i}", jax.random.truncated_normal(keys[i], -2, 2, (m, n)) / math.sqrt(m)),
                (f"b{i}", jnp.zeros((n,), jnp.float32)),
            )
        }
    # At most half of the units pass features through, so that there are others to learn with; but
    # those with a gain always do.
    order = [*gains, *(name for name in FEATURES if name not in gains)]
    names = order[: max(len(gains), min(8, hidden_size // 4))]
    passed = [FEATURES[name][0 if num_features == 28 else 1] for name in names]
    count = 2 * len(passed)
    params: dict[str, jax.Array] = {}
    for i in range(hidden_layers):
        scale = 1.0 / math.sqrt(sizes[i])
        weights = scale * jax.random.truncated_normal(keys[i], -2, 2, (sizes[i], sizes[i + 1]))
        if i == 0:
            block = jnp.zeros((num_inputs, count))
            for j, feature in enumerate(passed):
                block = block.at[feature, 2 * j].set(1.0).at[feature, 2 * j + 1].set(-1.0)
            weights = weights.at[:, :count].set(block)
        else:
            weights = weights.at[:, :count].set(jnp.eye(hidden_size, count))
        params[f"w{i}"] = weights.astype(jnp.float32)
        params[f"b{i}"] = jnp.zeros((hidden_size,), jnp.float32)
    output = jnp.zeros((hidden_size, num_outputs), jnp.float32)
    for j, name in enumerate(gains):
        output = output.at[2 * j, 0].set(gains[name]).at[2 * j + 1, 0].set(-gains[name])
    params[f"w{hidden_layers}"] = output
    params[f"b{hidden_layers}"] = jnp.zeros((num_outputs,), jnp.float32)
    return params


def _lstm(key: jax.Array, inputs: int, size: int) -> dict[str, Any]:
    keys = jax.random.split(key, 4)

    def linear(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        draw = jax.random.truncated_normal(key, -2, 2, (fan_in, fan_out))
        return {"w": draw / math.sqrt(fan_in), "b": jnp.zeros((fan_out,))}

    return {
        "lstm": {
            "initial_hidden": jnp.zeros((size,)),
            "initial_cell": jnp.zeros((size,)),
            **linear(keys[0], 2 * size, 4 * size),
        },
        "mix": linear(keys[1], inputs, size),
        "input": linear(keys[2], inputs, size),
        "step_size": {
            "w": linear(keys[3], size, 1)["w"],
            "b": jnp.full((1,), 0.5 if inputs == 30 else 1.6),
        },
    }


def imagined_inputs(
    architecture: str, key: jax.Array, fractions: jax.Array, tensors: int
) -> jax.Array:
    """LSTM inputs of an imagined run: the true fraction trained, everything else random.

    VeLO's inputs are fraction (9), loss (9), log mean second moment (1), rank (5), log variances of
    momentum and second moment (3 + 3); Celo's are the first two.

    Args:
      architecture: "velo" or "celo".
      key: for what is random; loss features move at random, the others stay for the whole run.
      fractions: (length,) step / num_steps.
      tensors: number of tensors.

    Returns:
      (length, tensors, F) float32.
    """
    keys = jax.random.split(key, 4)
    length = fractions.shape[0]
    embedded = jax.vmap(lambda fraction: controller.fraction_features(fraction, 1.0))(fractions)
    steady = jax.random.uniform(keys[0], (1, 9), minval=-1.0, maxval=1.0)
    losses = jnp.clip(steady + 0.4 * jax.random.normal(keys[1], (length, 9)), -1.0, 1.0)
    shared = jnp.concatenate([embedded, losses], -1)
    parts = [jnp.broadcast_to(shared[:, None], (length, tensors, 18))]
    if architecture == "velo":
        logs = jax.random.uniform(keys[2], (tensors, 7), minval=-2.5, maxval=2.5)
        rank = jax.nn.one_hot(jax.random.randint(keys[3], (tensors,), 0, 5), 5)
        steady = jnp.concatenate([logs[:, :1], rank, logs[:, 1:]], -1)
        parts.append(jnp.broadcast_to(steady, (length, tensors, 12)))
    return jnp.concatenate(parts, -1)


def imagined_multipliers(architecture: str, params: dict[str, Any], inputs: jax.Array) -> jax.Array:
    """The multipliers of each tensor's step: the LSTM's output for VeLO, 0.1 * exp of it for Celo.

    Args:
      architecture: "velo" or "celo".
      params: with "lstm", "mix", "input" and "step_size".
      inputs: (length, tensors, F).

    Returns:
      (length, tensors).
    """

    def step(state: LSTMState, x: jax.Array) -> tuple[LSTMState, jax.Array]:
        controls = controller.run_lstm(params, x, state)
        raw = controls.step_size
        return controls.state, raw if architecture == "velo" else 0.1 * jnp.exp(raw)

    return jax.lax.scan(step, init_lstm(params["lstm"], inputs.shape[1]), inputs)[1]


def fit_schedule(
    architecture: str, params: dict[str, Any], key: jax.Array, steps: int = 1200
) -> dict[str, Any]:
    """Trains the LSTM until its learning rate multiplier is half a cosine of the fraction trained.

    Args:
      architecture: "velo" or "celo".
      params: the meta-parameters.
      key: for the imagined runs.
      steps: of Adam, by backpropagation through 24 steps of the LSTM.

    Returns:
      The meta-parameters with "lstm", "mix", "input" and "step_size" replaced.
    """
    names = ("lstm", "mix", "input", "step_size")
    length, tensors, runs = 24, 3, 32

    def loss(part: dict[str, Any], key: jax.Array) -> jax.Array:
        key_inputs, key_pace, key_start = jax.random.split(key, 3)
        # A stretch of a short or of a long run, from a random place of it: the LSTM's first steps
        # are a transient from its initial state, so a third of the stretches begin at 0.
        pace = jnp.exp(jax.random.uniform(key_pace, (), minval=-9.0, maxval=-3.2))
        place = jnp.maximum(jax.random.uniform(key_start, (), minval=-0.5, maxval=1.0), 0.0)
        fractions = place * (1 - pace * length) + pace * jnp.arange(length)
        inputs = imagined_inputs(architecture, key_inputs, fractions, tensors)
        rates = imagined_multipliers(architecture, part, inputs)
        wanted = 0.5 * (1 + jnp.cos(jnp.pi * fractions))[:, None]
        # Relative where the rate is large, absolute where it vanishes at the end.
        return jnp.mean(jnp.square((rates - wanted) / (wanted + 0.05)))

    part = {name: params[name] for name in names}
    schedule = optax.cosine_decay_schedule(5e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def fit(part: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
            part, state = carry
            keys = jax.random.split(key, runs)
            gradient = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, keys)))(part)
            updates, state = optimizer.update(gradient, state, part)
            return (optax.apply_updates(part, updates), state), None

        carry = (part, optimizer.init(part))
        return jax.lax.scan(body, carry, jax.random.split(key, steps))[0][0]

    return {**params, **fit(part, key)}


def _linear_start(config: Mapping[str, Any], gains: Gains) -> jax.Array:
    """The weights of the linear rule: of the gradient, then of each momentum."""
    if "initial_momentum_decays" not in config:
        raise ValueError("architecture_config: expected initial_momentum_decays, found none")
    count = len(config["initial_momentum_decays"])
    names = ["gradient", *(f"momentum_{i}" for i in range(count))]
    unknown = sorted(set(gains) - set(names))
    if unknown:
        raise ValueError(f"gains: the linear rule has no {unknown}; known: {names}")
    return jnp.array([gains.get(name, 0.0) for name in names], jnp.float32)


def initial_parameters(
    architecture: str, key: jax.Array, config: Mapping[str, Any], gains: Gains
) -> dict[str, Any]:
    """The meta-parameters that meta-training starts from.

    Args:
      architecture: a name of `lopt_jax.Weights.architecture`, "learned_adam" or "learned_sgd".
      key: for what is random.
      config: the architecture's config.
      gains: of the features whose sum is the direction at the start, by name of `FEATURES`; none
        for the rules of `original_starts`, which start as the original does; with
        {"rms_0": 1.0} every step has the root mean square step_mult (times the tensor's for VeLO
        and Celo).

    Returns:
      Nested dictionaries of float32 arrays, laid out as `lopt_jax.Weights.params`.

    Raises:
      ValueError: for an unknown architecture, or a config that is not one of its.
    """
    if architecture == "learned_adam":
        return {
            "log_learning_rate": jnp.log(jnp.float32(1e-4)),
            "log_decay_gaps": jnp.log(jnp.array([0.1, 0.001], jnp.float32)),
        }
    if architecture == "learned_sgd":
        return {"log_learning_rate": jnp.log(jnp.float32(0.03))}
    if architecture == LINEAR:
        return {"weights": _linear_start(config, gains)}
    passes = ("small_fc_lopt", "elo", "celo2", "elo_celo2", "celo", "velo")
    if architecture not in (*passes, *STARTS):
        raise ValueError(f"architecture: no meta-training start is known for {architecture!r}")
    sizes = schema_of(architecture, "architecture").sizes
    missing = [key for key in sizes if key not in config]
    if missing:
        raise ValueError(
            f"architecture_config: expected the sizes of a {architecture}, "
            f"{', '.join(sizes)}; missing: {missing}"
        )
    config = complete_config(architecture, config, "architecture_config")
    if architecture in STARTS:
        if gains:
            raise ValueError(
                f"gains: expected none, as {architecture} passes no features; found {dict(gains)}"
            )
        return STARTS[architecture](key, config)
    hidden, layers = config["hidden_size"], config["hidden_layers"]
    if architecture in ("small_fc_lopt", "elo"):
        mlp = passing_mlp(key, 28, 28 + _TIME_FEATURES, hidden, layers, 2, gains)
        if architecture == "elo":
            return {"mlp": mlp}
        return {
            "mlp": mlp,
            "momentum_decays": jnp.zeros((3,)),
            "rms_decays": jnp.zeros((1,)),
            "adafactor_decays": jnp.zeros((3,)),
        }
    if architecture in ("celo2", "elo_celo2"):
        return {"mlp": passing_mlp(key, 30, 30, hidden, layers, 3, gains)}
    size, banks = config["lstm_hidden_size"], config["param_inits"]
    features = 18 if architecture == "celo" else 30
    spread = 0.0 if banks == 1 else (0.3 if architecture == "celo" else 0.003)
    key_mlp, key_lstm, key_fit, key_controls = jax.random.split(key, 4)
    keys = jax.random.split(key_mlp, banks)
    mlps = [passing_mlp(k, 30, 30, hidden, layers, 3, gains) for k in keys]
    params: dict[str, Any] = {
        "mlp": jax.tree.map(lambda *x: jnp.stack(x), *mlps),
        **_lstm(key_lstm, features, size),
        # A tensor's rule is the mean over banks of control * bank, times 100 for VeLO. With one
        # bank the controls start constant; with several, small weights tell tensors apart.
        "controls": {
            "w": spread * jax.random.normal(key_controls, (size, banks)) / math.sqrt(size),
            "b": jnp.full((banks,), 1.0 if architecture == "celo" else 0.01),
        },
    }
    return fit_schedule(architecture, params, key_fit)
