"""Trees of the original code (google/learned_optimization, amoudgl/celo) to the canonical layout.

Where each array lies is in `lopt_jax.weights.layouts`; here is how a file tells what it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.base import WeightsError, weights_error
from lopt_jax.weights.layouts import FIELDS, MODULE, SEPARATE_WEIGHTS, read_fields
from lopt_jax.weights.schema import CELO_LSTM_INPUTS, VELO_LSTM_INPUTS, walk


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a foreign file says.

    Attributes:
      architecture: as far as the file tells.
      alternatives: other architectures whose weights look the same.
      params: the canonical tree, not yet validated.
      config: what the file says about config.
      notes: for the metadata.
      consumed: keys of the user's config that have become arrays.
      undecided: whether the file is as likely one of `alternatives`.
    """

    architecture: str
    params: dict[str, Any]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alternatives: tuple[str, ...] = ()
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    consumed: tuple[str, ...] = ()
    undecided: bool = False


def undecided_error(
    source: object, choices: Sequence[str], found: str = "a file that does not tell"
) -> WeightsError:
    """Returns the error for arrays that serve several architectures."""
    return weights_error(
        source,
        expected=f"architecture= one of {', '.join(choices)}, whose arrays are alike",
        found=found,
        advice="Pass architecture to convert_weights (on the command line --architecture).",
    )


def convert_original(tree: Any, source: object) -> Converted:
    """Converts theta, `{params, gen_id, step}`, or the tuple `(theta, "", 0)`.

    Args:
      tree: nested dicts of arrays, as the file has them.
      source: the file, for the message.

    Raises:
      WeightsError: the tree belongs to none of the architectures.
    """
    notes: dict[str, Any] = {}
    config: dict[str, Any] = {}
    if isinstance(tree, list | tuple) and len(tree) == 3:
        tree = {str(index): item for index, item in enumerate(tree)}
    if isinstance(tree, Mapping) and "params" in tree and isinstance(tree["params"], Mapping):
        for key in ("gen_id", "step"):
            if isinstance(tree.get(key), str | int | float):
                notes[key] = tree[key] if isinstance(tree[key], str) else brief(tree[key])
        tree = tree["params"]
    elif isinstance(tree, Mapping) and set(tree) == {"0", "1", "2"}:
        # The oldest releases: built by their loader with both flags true, whatever the default
        # of today (pretrained_optimizers.py, _pretrained_lopt_load_baseline).
        tree = tree["0"]
        config = {"use_bugged_next_lstm_state": True, "use_bugged_loss_features": True}
    if not isinstance(tree, Mapping):
        raise weights_error(
            source, expected="a dict of meta-parameters", found=f"a {type(tree).__name__}"
        )
    for path, leaf in walk(tree, source):  # bounds depth and size before anything looks at it
        if not isinstance(leaf, np.ndarray | np.generic):
            raise weights_error(
                source,
                expected=f"{'/'.join(path)} to be an array",
                found=f"a {type(leaf).__name__}",
            )
    if "ffmod_params" in tree:
        params = _read_all("rnn_mlp_lopt", tree, ("ffmod_params",), source)
        mlp = _modules(tree["ffmod_params"], source)
        return Converted("rnn_mlp_lopt", {"mlp": mlp, **params}, {}, (), notes)
    if "per_layer_lr" in tree:
        params = _read_all("nn_adam", tree, (), source)
        return Converted("nn_adam", params, {}, (), notes)
    if "rnn_params" in tree:
        return _convert_hyper(tree, config, notes, source)
    if "nn" in tree:
        return _convert_small_fc(tree, notes, source)
    if "ff_mod_stack" in tree:
        mlp = _mlp(tree["ff_mod_stack"], source)
        return Converted("celo2", {"mlp": mlp}, {}, ("elo_celo2",), notes)
    if MODULE + "0" in tree:
        return Converted("mlp_lopt", {"mlp": _modules(tree, source)}, {}, (), notes)
    if "log_lr" in tree:
        return Converted(_learnable_of(tree), dict(tree), {}, (), notes)
    raise weights_error(
        source,
        expected="meta-parameters with 'nn', 'ff_mod_stack', 'rnn_params', 'ffmod_params', "
        f"'per_layer_lr', 'log_lr' or {MODULE + '0'!r}",
        found=f"the keys {brief(sorted(tree))}",
    )


def _read_all(
    architecture: str, tree: Mapping[str, Any], others: tuple[str, ...], source: object
) -> dict[str, Any]:
    """The fields of an architecture, in a tree that holds nothing else but these other subtrees."""
    known = {field.theirs for field in FIELDS[architecture]}
    paths = (path for path, _ in walk(tree, source) if path[0] not in others)
    extra = ["/".join(path) for path in paths if path not in known]
    params = read_fields(FIELDS[architecture], tree, source)
    if extra:
        raise weights_error(
            source, expected=f"only the arrays of {architecture}", found=f"also {brief(extra)}"
        )
    return params


def _learnable_of(tree: Mapping[str, Any]) -> str:
    if "one_minus_momentum" in tree:
        return "learnable_sgdm"
    return "learnable_adam" if "log_epsilon" in tree else "learnable_sgd"


def _convert_small_fc(tree: Mapping[str, Any], notes: dict[str, Any], source: object) -> Converted:
    mlp = _mlp(tree["nn"], source)
    if any(_SCALAR.fullmatch(str(path[-1])) for path, _ in walk(tree["nn"], source)):
        notes = {**notes, SEPARATE_WEIGHTS: True}
    decays = {
        key: tree[key]
        for key in ("momentum_decays", "rms_decays", "adafactor_decays")
        if key in tree
    }
    if not decays:
        return Converted("elo", {"mlp": mlp}, {}, (), notes)
    return Converted("small_fc_lopt", {"mlp": mlp, **decays}, {}, ("mulo",), notes)


def _convert_hyper(
    tree: Mapping[str, Any], config: dict[str, Any], notes: dict[str, Any], source: object
) -> Converted:
    has_network = "ff_mod_stack" in tree
    params = read_fields(FIELDS["velo" if has_network else "celo_adam"], tree, source)
    inputs = np.shape(params["mix"]["w"])[0] if np.ndim(params["mix"]["w"]) == 2 else None
    if inputs not in (VELO_LSTM_INPUTS, CELO_LSTM_INPUTS):
        raise weights_error(
            source,
            expected=f"{VELO_LSTM_INPUTS} (VeLO) or {CELO_LSTM_INPUTS} (Celo) inputs of the LSTM",
            found=f"linear_1 of shape {np.shape(params['mix']['w'])}",
        )
    if has_network:
        params["mlp"] = _mlp(tree["ff_mod_stack"], source)
        architecture = "velo" if inputs == VELO_LSTM_INPUTS else "celo"
    else:
        architecture = "celo_adam"
    return Converted(architecture, params, config if architecture == "velo" else {}, (), notes)


def _mlp(tree: Any, source: object) -> dict[str, Any]:
    """Returns w0, b0, w1, ... of a Haiku module; joins a first layer that is split in groups."""
    if isinstance(tree, Mapping) and len(tree) == 1:
        (module,) = tree.values()  # the module's own name: '~' in the released files
        tree = module if isinstance(module, Mapping) else tree
    if not isinstance(tree, Mapping):
        raise weights_error(source, expected="the layers of an MLP", found=type(tree).__name__)
    tree = _assembled(tree, source)
    layers = {
        key: value for key, value in tree.items() if not re.fullmatch(r"w0__\d{1,4}", str(key))
    }
    groups = [key for key in tree if key not in layers]
    if groups:
        groups.sort(key=lambda key: int(key[4:]))
        parts = [tree[key] for key in groups]
        if [int(key[4:]) for key in groups] != list(range(len(groups))) or "w0" in layers:
            raise weights_error(
                source, expected="w0__0, w0__1, ... without a gap", found=brief(groups)
            )
        layers["w0"] = joined(parts, source)
    return layers


def _modules(tree: Any, source: object) -> dict[str, Any]:
    """Returns w0, b0, w1, ... of an MLP whose layers are Haiku modules {"w", "b"}."""
    if not isinstance(tree, Mapping):
        raise weights_error(source, expected="the layers of an MLP", found=type(tree).__name__)
    layers: dict[str, Any] = {}
    for name, layer in tree.items():
        match = re.fullmatch(re.escape(MODULE) + r"(\d{1,2})", str(name))
        if match is None or not isinstance(layer, Mapping) or set(layer) != {"w", "b"}:
            raise weights_error(
                source, expected=f"layers {MODULE}0, ... of w and b alone", found=brief(name)
            )
        layers |= {f"{kind}{match[1]}": array for kind, array in layer.items()}
    return layers


_SCALAR = re.compile(r"([wb]\d{1,3})((?:_\d{1,5}){1,2})")


def _assembled(tree: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Joins layers whose weights are scalars of their own: w0_3_1 is w0[3, 1], b0_1 is b0[1]."""
    layers: dict[str, Any] = {}
    scalars: dict[str, dict[tuple[int, ...], Any]] = {}
    for key, value in tree.items():
        match = _SCALAR.fullmatch(str(key))
        if match is None:
            layers[key] = value
        else:
            place = tuple(map(int, match[2][1:].split("_")))
            scalars.setdefault(match[1], {})[place] = value
    for name, by_place in scalars.items():
        rank = 2 if name.startswith("w") else 1
        complete = all(len(place) == rank and np.ndim(x) == 0 for place, x in by_place.items())
        shape = [max(axis) + 1 for axis in zip(*by_place, strict=False)]
        if not complete or len(by_place) != math.prod(shape) or name in layers:
            raise weights_error(
                source,
                expected=f"a scalar for every place of {name}",
                found=f"{len(by_place)} scalars, up to the place {brief(max(by_place))}",
            )
        layers[name] = np.array([by_place[place] for place in sorted(by_place)]).reshape(shape)
    return layers


def joined(parts: list[Any], source: object) -> np.ndarray:
    """Concatenates the parts of a first layer along its input axis (the last but one)."""
    shapes = [np.shape(part) for part in parts]
    rank = len(shapes[0])
    fits = rank >= 2 and all(
        isinstance(part, np.ndarray)
        and part.dtype == parts[0].dtype
        and len(shape) == rank
        and shape[:-2] == shapes[0][:-2]
        and shape[-1] == shapes[0][-1]
        for part, shape in zip(parts, shapes, strict=True)
    )
    if not fits:
        raise weights_error(
            source,
            expected="first-layer weights that fit together",
            found=f"shapes {brief(shapes)}",
        )
    return np.concatenate(parts, axis=-2)
