"""What the weights of each architecture look like: config, array shapes, and their checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.base import StaticMapping, Weights, WeightsError, weights_error

# The largest released weights (VeLO) are 10 MB. Everything read from a file is bounded by this
# number before memory is reserved for it, so that a file of a stranger cannot exhaust memory.
MAX_BYTES = 256 * 2**20
MAX_SIZE = 1 << 20  # of one dimension
MAX_LAYERS = 64
MAX_DECAYS = 16  # of a kind
MAX_DEPTH = 16  # of a tree of meta-parameters
MAX_LEAVES = 4096

Shape = tuple[int, ...]
Config = Mapping[str, Any]

# Input features of the per-parameter networks: 28 of the tensor and 11 of the time
# (small_fc_lopt, arXiv 2203.11860), 30 of the tensor (VeLO, arXiv 2211.09760, and Celo).
SMALL_FC_INPUTS = 39
TIME_INPUTS = 11
HYPER_INPUTS = 30
# Input features of the LSTMs over tensors.
VELO_LSTM_INPUTS = 30
CELO_LSTM_INPUTS = 18
NN_ADAM_LSTM_INPUTS = 19
# Of rnn_mlp_lopt: inputs of a tensor and of an element, beside what LSTM and MLP tell each other.
RNN_MLP_TENSOR_INPUTS = 18
RNN_MLP_ELEMENT_INPUTS = 37

_DECAYS: dict[str, Any] = {
    "initial_momentum_decays": (0.9, 0.99, 0.999),
    "initial_rms_decays": (0.999,),
    "initial_adafactor_decays": (0.9, 0.99, 0.999),
}


@dataclasses.dataclass(frozen=True)
class Schema:
    """One architecture's weights.

    Attributes:
      architecture: its name.
      defaults: a complete config; the type and length of each value are its specification.
      shapes: returns the nested dict of array shapes of a complete config.
      sizes: the keys of config that the arrays determine.
      any_decays: whether there may be another number of decays than in defaults.
    """

    architecture: str
    defaults: StaticMapping
    shapes: Callable[[Config], dict[str, Any]]
    sizes: tuple[str, ...]
    any_decays: bool = False


def _mlp(config: Config, inputs: int, outputs: int, banks: Shape = ()) -> dict[str, Shape]:
    hidden, layers = config["hidden_size"], config["hidden_layers"]
    widths = [inputs, *[hidden] * layers, outputs]
    tree: dict[str, Shape] = {}
    for layer in range(layers + 1):
        tree[f"w{layer}"] = (*banks, widths[layer], widths[layer + 1])
        tree[f"b{layer}"] = (*banks, widths[layer + 1])
    return tree


def _linear(inputs: int, outputs: int) -> dict[str, Shape]:
    return {"w": (inputs, outputs), "b": (outputs,)}


def _lstm_cell(inputs: int, size: int) -> dict[str, Shape]:
    state = {"initial_hidden": (size,), "initial_cell": (size,)}
    return state | _linear(inputs + size, 4 * size)


def _lstm(config: Config, inputs: int) -> dict[str, dict[str, Shape]]:
    size = config["lstm_hidden_size"]
    return {
        "lstm": _lstm_cell(size, size),
        "mix": _linear(inputs, size),
        "input": _linear(inputs, size),
        "step_size": _linear(size, 1),
    }


def _small_fc_lopt(config: Config) -> dict[str, Any]:
    kinds = ("momentum", "rms", "adafactor")
    momenta, squares, factored = (len(config[f"initial_{kind}_decays"]) for kind in kinds)
    if momenta != factored or squares not in (1, momenta):
        raise weights_error(
            "config",
            expected="as many momentum as adafactor decays, and one rms decay or as many",
            found=f"{momenta}, {factored} and {squares}",
        )
    inputs = 2 + 2 * momenta + 2 * squares + 6 * factored
    return {
        "mlp": _mlp(config, inputs + TIME_INPUTS, 2),
        "momentum_decays": (momenta,),
        "rms_decays": (squares,),
        "adafactor_decays": (factored,),
    }


def _linear_rule(config: Config) -> dict[str, Any]:
    return {"weights": (1 + len(config["initial_momentum_decays"]),)}


def _mlp_lopt(config: Config) -> dict[str, Any]:
    inputs = 2 + len(config["initial_momentum_decays"]) + TIME_INPUTS
    return {"mlp": _mlp(config, inputs, 2)}


def _elo(config: Config) -> dict[str, Any]:
    return {"mlp": _mlp(config, SMALL_FC_INPUTS, 2)}


def _hyper(lstm_inputs: int) -> Callable[[Config], dict[str, Any]]:
    def shapes(config: Config) -> dict[str, Any]:
        size, banks = config["lstm_hidden_size"], config["param_inits"]
        return {
            "mlp": _mlp(config, HYPER_INPUTS, 3, (banks,)),
            **_lstm(config, lstm_inputs),
            "controls": _linear(size, banks),
        }

    return shapes


def _celo_adam(config: Config) -> dict[str, Any]:
    return dict(_lstm(config, CELO_LSTM_INPUTS))


def _celo2(config: Config) -> dict[str, Any]:
    return {"mlp": _mlp(config, HYPER_INPUTS, 3)}


def _nn_adam(config: Config) -> dict[str, Any]:
    size = config["lstm_hidden_size"]
    return {
        "lstm": _lstm_cell(NN_ADAM_LSTM_INPUTS, size),
        "controls": _linear(size, len(NN_ADAM_INITIAL)),
        "initial": dict.fromkeys(NN_ADAM_INITIAL, ()),
    }


def _rnn_mlp_lopt(config: Config) -> dict[str, Any]:
    momenta, squares = (len(config[f"initial_{kind}_decays"]) for kind in ("momentum", "rms"))
    if momenta != squares:
        raise weights_error(
            "config",
            expected="as many momentum as rms decays",
            found=f"{momenta} and {squares}",
        )
    size, to_lstm = config["lstm_hidden_size"], config["from_mlp_size"]
    from_lstm, to_mlp = config["from_lstm_size"], config["lstm_to_mlp_size"]
    return {
        "mlp": _mlp(config, RNN_MLP_ELEMENT_INPUTS + to_mlp, 2 + to_lstm),
        "lstm": _lstm_cell(RNN_MLP_TENSOR_INPUTS + from_lstm + to_lstm, size),
        "to_mlp": _linear(size, to_mlp),
        "to_lstm": _linear(size, from_lstm),
        "initial_from_mlp": (to_lstm,),
        "initial_from_lstm": (from_lstm,),
    }


def _scalars(*names: str) -> Callable[[Config], dict[str, Any]]:
    return lambda config: dict.fromkeys(names, ())


_SMALL_FC_DEFAULTS = {
    "hidden_size": 32,
    "hidden_layers": 2,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    **_DECAYS,
}
_CELO_DEFAULTS = {
    "hidden_size": 4,
    "hidden_layers": 2,
    "lstm_hidden_size": 64,
    "param_inits": 1,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    **_DECAYS,
}
_VELO_DEFAULTS = {
    **_CELO_DEFAULTS,
    "lstm_hidden_size": 512,
    "param_inits": 256,
    "use_bugged_next_lstm_state": False,
    "use_bugged_loss_features": True,
    "ff_mult": 100.0,  # of the mean over the banks; amoudgl/celo made it an argument
}
_ELO_DEFAULTS = {"hidden_size": 32, "hidden_layers": 2, "exp_mult": 0.001, **_DECAYS}
_CELO_ADAM_DEFAULTS = {
    "lstm_hidden_size": 64,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    "initial_momentum_decays": (0.9,),
    "initial_rms_decays": (0.999,),
    "initial_epsilon": 1e-8,
}
_CELO2_DEFAULTS = {
    "hidden_size": 8,
    "hidden_layers": 2,
    "exp_mult": 0.0,
    **_DECAYS,
    "initial_rms_decays": (0.95,),
}

_MLP_LOPT_DEFAULTS = {
    "hidden_size": 32,
    "hidden_layers": 2,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    "initial_momentum_decays": (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999),  # they are not learned
}
_LINEAR_DEFAULTS = {"initial_momentum_decays": (0.9,)}  # they are not learned
# a tenth of the logarithms that a tensor starts with, of one minus the value where it is a beta
NN_ADAM_INITIAL = ("learning_rate", "beta1", "beta2", "epsilon")
_NN_ADAM_DEFAULTS = {
    "lstm_hidden_size": 32,
    "output_scale": 0.01,
    "decay_strength": 0.0,
    "initial_momentum_decays": (0.9,),  # they decide, as below, about dtypes alone
    "initial_rms_decays": (0.999,),
}
_RNN_MLP_DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)  # they are not learned
_RNN_MLP_DEFAULTS = {
    "hidden_size": 32,
    "hidden_layers": 2,
    "lstm_hidden_size": 64,
    "from_mlp_size": 16,
    "from_lstm_size": 18,
    "lstm_to_mlp_size": 17,
    "exp_mult": 0.001,
    "step_mult": 0.001,
    "initial_momentum_decays": _RNN_MLP_DECAYS,
    "initial_rms_decays": _RNN_MLP_DECAYS,
}
# What the original starts meta-training from; it decides which dtypes can hold the averages.
_LEARNABLE_SGDM_DEFAULTS = {"initial_momentum_decays": (0.9,)}
_LEARNABLE_ADAM_DEFAULTS = {**_LEARNABLE_SGDM_DEFAULTS, "initial_rms_decays": (0.999,)}

_MLP_SIZES = ("hidden_size", "hidden_layers")
_HYPER_SIZES = (*_MLP_SIZES, "lstm_hidden_size", "param_inits")
_MESSAGE_SIZES = ("from_mlp_size", "from_lstm_size", "lstm_to_mlp_size")
_RNN_MLP_SIZES = (*_MLP_SIZES, "lstm_hidden_size", *_MESSAGE_SIZES)

_ANY_DECAYS = ("small_fc_lopt", "linear")

SCHEMAS: dict[str, Schema] = {
    name: Schema(name, StaticMapping(defaults), shapes, sizes, name in _ANY_DECAYS)
    for name, defaults, shapes, sizes in (
        ("small_fc_lopt", _SMALL_FC_DEFAULTS, _small_fc_lopt, _MLP_SIZES),
        ("mulo", _SMALL_FC_DEFAULTS, _small_fc_lopt, _MLP_SIZES),
        ("elo", _ELO_DEFAULTS, _elo, _MLP_SIZES),
        ("velo", _VELO_DEFAULTS, _hyper(VELO_LSTM_INPUTS), _HYPER_SIZES),
        ("celo", _CELO_DEFAULTS, _hyper(CELO_LSTM_INPUTS), _HYPER_SIZES),
        ("celo_adam", _CELO_ADAM_DEFAULTS, _celo_adam, ("lstm_hidden_size",)),
        ("celo2", _CELO2_DEFAULTS, _celo2, _MLP_SIZES),
        ("elo_celo2", _CELO2_DEFAULTS, _celo2, _MLP_SIZES),
        ("linear", _LINEAR_DEFAULTS, _linear_rule, ()),
        ("mlp_lopt", _MLP_LOPT_DEFAULTS, _mlp_lopt, _MLP_SIZES),
        ("nn_adam", _NN_ADAM_DEFAULTS, _nn_adam, ("lstm_hidden_size",)),
        ("rnn_mlp_lopt", _RNN_MLP_DEFAULTS, _rnn_mlp_lopt, _RNN_MLP_SIZES),
        ("learnable_sgd", {}, _scalars("log_lr"), ()),
        (
            "learnable_sgdm",
            _LEARNABLE_SGDM_DEFAULTS,
            _scalars("log_lr", "one_minus_momentum"),
            (),
        ),
        (
            "learnable_adam",
            _LEARNABLE_ADAM_DEFAULTS,
            _scalars("log_lr", "one_minus_beta1", "one_minus_beta2", "log_epsilon"),
            (),
        ),
    )
}


def schema_of(architecture: object, source: object) -> Schema:
    """Returns the schema of an architecture.

    Raises:
      WeightsError: there is no such architecture.
    """
    if isinstance(architecture, str) and architecture in SCHEMAS:
        return SCHEMAS[architecture]
    raise weights_error(
        source,
        expected=f"an architecture out of {', '.join(SCHEMAS)}",
        found=brief(architecture),
        advice="A newer version of lopt_jax may know it.",
    )


def complete_config(architecture: str, config: Config, source: object) -> StaticMapping:
    """Returns `config` with defaults filled in and every value checked.

    Raises:
      WeightsError: an unknown key, or a value of the wrong type, length or range.
    """
    defaults = schema_of(architecture, source).defaults
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        raise weights_error(
            source,
            expected=f"config keys of {architecture} out of {', '.join(defaults)}",
            found=brief(unknown),
        )
    merged = {key: config.get(key, default) for key, default in defaults.items()}
    free = schema_of(architecture, source).any_decays
    return StaticMapping(
        {key: _config_value(key, merged[key], defaults[key], source, free) for key in merged}
    )


def _config_value(key: str, value: Any, default: Any, source: object, any_decays: bool) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        wanted = "True or False"
    elif isinstance(default, int):
        largest = MAX_LAYERS if key == "hidden_layers" else MAX_SIZE
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest:
            return value
        wanted = f"an integer in 1..{largest}"
    elif isinstance(default, float):
        if _is_number(value):
            return float(value)
        wanted = "a finite number"
    else:
        counts = range(1, MAX_DECAYS + 1) if any_decays else (len(default),)
        if (
            isinstance(value, list | tuple)
            and len(value) in counts
            and all(_is_number(item) and 0.0 <= item < 1.0 for item in value)
        ):
            return tuple(float(item) for item in value)
        wanted = f"{f'1 to {MAX_DECAYS}' if any_decays else len(default)} numbers in [0, 1)"
    raise weights_error(source, expected=f"config[{key!r}] to be {wanted}", found=brief(value))


def _is_number(value: Any) -> bool:
    # The bound keeps integers of many digits from overflowing on their way to a float.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e30
        and math.isfinite(value)
    )


def walk(tree: Any, source: object) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, leaf) of a nested dict in sorted order, bounded in depth and in leaves.

    Raises:
      WeightsError: a key is not a string, or the tree is too deep or too large.
    """
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    visited = 0
    while stack:
        path, node = stack.pop()
        visited += 1
        if visited > MAX_LEAVES or len(path) > MAX_DEPTH:
            raise weights_error(
                source,
                expected=f"at most {MAX_LEAVES} arrays, nested at most {MAX_DEPTH} deep",
                found="a larger tree",
            )
        if not isinstance(node, Mapping):
            yield path, node
            continue
        if len(node) > MAX_LEAVES or not all(isinstance(key, str) for key in node):
            raise weights_error(
                source, expected="a tree of few, named arrays", found=f"other keys at {path}"
            )
        stack.extend(((*path, key), node[key]) for key in sorted(node, reverse=True))


def check_shapes(
    architecture: str, config: Config, shapes: Mapping[tuple[str, ...], Any], source: object
) -> None:
    """Checks the shape of every array against the schema, and the size of the whole.

    Args:
      architecture: the architecture.
      config: its complete config.
      shapes: path -> shape of every array that is there.
      source: the file, for the message.

    Raises:
      WeightsError: an array is missing, unknown, or of another shape; or all are too large.
    """
    expected = dict(_flat_shapes(schema_of(architecture, source).shapes(config)))
    total = 4 * sum(math.prod(shape) for shape in expected.values())
    if total > MAX_BYTES:
        raise weights_error(
            source, expected=f"weights of at most {MAX_BYTES} bytes", found=f"{total} bytes"
        )
    for path, shape in expected.items():
        name = "/".join(path)
        if path not in shapes:
            raise weights_error(
                source,
                expected=f"the array {name} of shape {shape} ({architecture})",
                found=f"only {brief(['/'.join(p) for p in shapes])}",
            )
        if tuple(shapes[path]) != shape:
            raise weights_error(
                source,
                expected=f"{name} of shape {shape} ({architecture})",
                found=f"shape {tuple(shapes[path])}",
            )
    extra = ["/".join(path) for path in shapes if path not in expected]
    if extra:
        raise weights_error(
            source, expected=f"only the arrays of {architecture}", found=f"also {brief(extra)}"
        )


def _flat_shapes(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Shape]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat_shapes(value, (*path, key))
        else:
            yield (*path, key), value


def expected_shapes(architecture: str, config: Config) -> dict[str, Any]:
    """Returns the nested dict of array shapes of `architecture` with `config`.

    Raises:
      WeightsError: the architecture or the config is not valid.
    """
    complete = complete_config(architecture, config, "config")
    return schema_of(architecture, "architecture").shapes(complete)


def inferred_sizes(architecture: str, params: Any, source: object) -> dict[str, int]:
    """Reads the sizes of config that the arrays determine.

    Args:
      architecture: the architecture.
      params: nested dict of arrays in the canonical layout.
      source: the file, for the message.

    Returns:
      A value for each of the schema's size keys.

    Raises:
      WeightsError: the arrays to read them from are missing or of another rank.
    """
    schema = schema_of(architecture, source)
    shapes = {path: _shape_of(path, leaf, source) for path, leaf in walk(params, source)}
    found: dict[str, int] = {}
    if "hidden_size" in schema.sizes:
        layers = [p[1] for p in shapes if len(p) == 2 and p[0] == "mlp" and p[1].startswith("w")]
        found["hidden_layers"] = len(layers) - 1
        found["hidden_size"] = _dimension(shapes, ("mlp", "w0"), -1, source)
    if "lstm_hidden_size" in schema.sizes:
        found["lstm_hidden_size"] = _dimension(shapes, ("lstm", "initial_hidden"), 0, source)
    if "param_inits" in schema.sizes:
        found["param_inits"] = _dimension(shapes, ("controls", "b"), 0, source)
    if "from_mlp_size" in schema.sizes:
        arrays = (("initial_from_mlp",), ("initial_from_lstm",), ("to_mlp", "b"))
        for key, path in zip(_MESSAGE_SIZES, arrays, strict=True):
            found[key] = _dimension(shapes, path, 0, source)
    return found


def _shape_of(path: tuple[str, ...], leaf: Any, source: object) -> Shape:
    """Returns an array's shape; only of arrays, as numpy would make one of anything."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise weights_error(
            source,
            expected=f"{'/'.join(path) or 'the tree'} to be an array",
            found=f"a {type(leaf).__name__}",
        )
    return tuple(leaf.shape)


def _dimension(
    shapes: Mapping[tuple[str, ...], Shape], path: tuple[str, ...], axis: int, source: object
) -> int:
    shape = shapes.get(path, ())
    if not shape:
        raise weights_error(
            source,
            expected=f"an array {'/'.join(path)} with dimensions",
            found=f"arrays {brief(['/'.join(p) for p in shapes])}",
        )
    return shape[axis]


def checked_params(
    architecture: str, config: Config, params: Any, source: object
) -> dict[str, Any]:
    """Returns `params` as nested dicts of float32 numpy arrays, after every check.

    Args:
      architecture: the architecture.
      config: its complete config.
      params: nested dict of numeric arrays.
      source: the file, for the message.

    Raises:
      WeightsError: wrong structure, shape or type, or a value that is not finite in float32.
    """
    leaves = dict(walk(params, source))
    shapes = {path: _shape_of(path, leaf, source) for path, leaf in leaves.items()}
    check_shapes(architecture, config, shapes, source)
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _float32(leaf, "/".join(path), source)
    return tree


def _check_floating(leaf: Any, name: str, source: object) -> None:
    if not jax.dtypes.issubdtype(leaf.dtype, np.floating):
        raise weights_error(
            source, expected=f"{name} to hold floating-point numbers", found=str(leaf.dtype)
        )


def _float32(leaf: Any, name: str, source: object) -> np.ndarray:
    _check_floating(leaf, name, source)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below, for every type at once
        # A copy, in C order: the result does not keep a whole file's bytes alive.
        array = np.array(leaf, dtype=np.float32, order="C", copy=True)
    finite = np.isfinite(array)
    if not finite.all():
        raise weights_error(
            source,
            expected=f"finite numbers in {name}",
            found=f"{array.size - int(finite.sum())} of {array.size} NaN or infinite",
            advice="The file is damaged, or its meta-training diverged: take another one.",
        )
    return array


def validate(weights: Weights, source: object = "weights") -> Weights:
    """Checks a `Weights` completely and completes its config.

    Args:
      weights: concrete weights; arrays of any float type.
      source: the file, for the message.

    Returns:
      The same weights with a complete config, and float32 numpy arrays as leaves.

    Raises:
      TypeError: it is no `Weights`.
      WeightsError: anything about it is wrong.
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights: expected lopt_jax.Weights, found {type(weights).__name__}.")
    config = complete_config(weights.architecture, weights.config, source)
    params = checked_params(weights.architecture, config, weights.params, source)
    return Weights(weights.architecture, config, params, weights.metadata)


def check_structure(weights: Weights, source: object = "weights") -> Weights:
    """Checks architecture, config, shapes and types alone: allowed on traced weights as well.

    Returns:
      The same weights with a complete config.

    Raises:
      WeightsError: an array is missing, unknown, of another shape or not of floats, or config is
        not valid.
    """
    config = complete_config(weights.architecture, weights.config, source)
    leaves = dict(walk(weights.params, source))
    shapes = {path: _shape_of(path, leaf, source) for path, leaf in leaves.items()}
    check_shapes(weights.architecture, config, shapes, source)
    for path, leaf in leaves.items():
        _check_floating(leaf, "/".join(path), source)
    if config == weights.config:
        return weights
    return Weights(weights.architecture, config, weights.params, weights.metadata)


__all__ = [
    "MAX_BYTES",
    "SCHEMAS",
    "Schema",
    "WeightsError",
    "check_shapes",
    "check_structure",
    "checked_params",
    "complete_config",
    "expected_shapes",
    "inferred_sizes",
    "schema_of",
    "validate",
    "walk",
]
