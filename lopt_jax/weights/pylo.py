"""PyLO's Hugging Face layouts (safetensors), in both directions.

References: `MetaMLP`, `CELO2MLP`, `VeLORNN`, `VeLOMLP` in pylo/models of Belilovsky-Lab/pylo, and
the defaults of its optimizers in pylo/optim. `torch.nn.Linear` stores (outputs, inputs); the
canonical layout stores (inputs, outputs).

What these layouts have no place for (decays, multipliers, flags) goes under the key "lopt_jax" of
the `config.json` beside the arrays; PyLO ignores keys that its models do not take.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.arrays import declared_array
from lopt_jax.weights.base import Weights, thaw, weights_error
from lopt_jax.weights.files import write
from lopt_jax.weights.hub import export_card
from lopt_jax.weights.layouts import FEATURE_GROUPS
from lopt_jax.weights.original import Converted, joined, undecided_error
from lopt_jax.weights.pylo_call import DECAYS, pylo_call
from lopt_jax.weights.schema import MAX_BYTES, SCHEMAS, SMALL_FC_INPUTS
from lopt_jax.weights.sources import JSON, MLP_FOLDER, RNN_FOLDER

MODEL = "model.safetensors"
CONFIG = JSON
CARD = "README.md"
KEY = "lopt_jax"
META_MLP = ("small_fc_lopt", "mulo", "elo")
CELO2_MLP = ("celo2", "elo_celo2")

# MetaMLP has no decays: PyLO keeps those of btherien/mulo, and its step_mult, as the defaults of
# its optimizer (AdafacLO_naive.__init__).
_MULO_DECAYS = {
    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
    "rms_decays": (0.01079706,),
    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}
_MULO_CONFIG = {"step_mult": 0.01, "exp_mult": 0.001}
# PyLO's VeLO has neither of the original's bugs.
_VELO_CONFIG = {"use_bugged_next_lstm_state": False, "use_bugged_loss_features": False}

_MAX_HEADER = 1 << 20
_MAX_TENSORS = 4096
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def is_safetensors(data: bytes) -> bool:
    """Tells whether the bytes begin like a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return data[8:9] == b"{" and size <= max(len(data), _MAX_HEADER)  # it may be cut off


def read_safetensors(data: bytes, source: object) -> dict[str, np.ndarray]:
    """Decodes a safetensors file.

    Args:
      data: the whole file.
      source: its name, for the message.

    Returns:
      name -> array; read-only views.

    Raises:
      WeightsError: the file is damaged, too large, or has arrays that are no floats.
    """
    from safetensors import SafetensorError, deserialize

    if len(data) > MAX_BYTES or int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise weights_error(
            source,
            expected=f"at most {MAX_BYTES} bytes with a header of at most {_MAX_HEADER}",
            found="more",
        )
    try:
        tensors = deserialize(data)
    except (SafetensorError, ValueError, TypeError, MemoryError, OverflowError) as error:
        raise weights_error(
            source,
            expected="a safetensors file",
            found=f"{type(error).__name__}: {str(error)[:120]}",
            advice="The file is damaged: fetch it again.",
        ) from error
    if len(tensors) > _MAX_TENSORS:
        raise weights_error(
            source, expected=f"at most {_MAX_TENSORS} arrays", found=str(len(tensors))
        )
    return {
        name: declared_array(
            _DTYPES.get(tensor["dtype"], tensor["dtype"]), tensor["shape"], tensor["data"], source
        )
        for name, tensor in tensors
    }


def convert_pylo(
    tensors: Mapping[str, np.ndarray],
    second: Mapping[str, np.ndarray] | None,
    config_json: bytes | None,
    given: Mapping[str, Any],
    architecture: str | None,
    source: object,
) -> Converted:
    """Converts a PyLO state dict (VeLO: a pair of them).

    Args:
      tensors: name -> array of the file.
      second: the other file of VeLO's pair, in either order.
      config_json: the `config.json` beside it.
      given: the user's config; may hold the three lists of decays.
      architecture: the user's choice; MetaMLP and CELO2MLP do not say which optimizer they belong
        to.
      source: the file, for the message.

    Raises:
      WeightsError: the arrays belong to no model of PyLO, or a choice is missing.
    """
    stated = _stated(config_json, source)
    named = stated.get("architecture")
    notes = _kept_metadata(stated)
    config = stated.get("config")
    config = dict(config) if isinstance(config, Mapping) else {}
    if "network.input.weight" in tensors:
        chosen = architecture or named
        if chosen not in META_MLP:
            found = [] if chosen is None else [brief(chosen)]
            raise undecided_error(source, META_MLP, *found)
        converted = _convert_meta_mlp(tensors, chosen, config, stated, given, source)
        return dataclasses.replace(converted, notes=notes)
    if "dense_w.0" in tensors:
        chosen = named if named in CELO2_MLP else "celo2"
        other = tuple(name for name in CELO2_MLP if name != chosen)
        params = {"mlp": _celo2_mlp(tensors, source)}
        return Converted(chosen, params, config, other, notes, undecided=chosen != named)
    if "lstm.linear.weight" in tensors or "input_weights_" in tensors:
        rnn, mlp = (tensors, second) if "lstm.linear.weight" in tensors else (second, tensors)
        if rnn is None or mlp is None:
            raise weights_error(
                source,
                expected=f"both parts of VeLO: {RNN_FOLDER}/{MODEL} and {MLP_FOLDER}/{MODEL}",
                found="one part",
                advice="Put both folders into one and convert that folder.",
            )
        params = _convert_velo(rnn, mlp, source)
        return Converted("velo", params, {**_VELO_CONFIG, **config}, notes=notes)
    raise weights_error(
        source,
        expected="the arrays of PyLO's MetaMLP, CELO2MLP, or VeLORNN with VeLOMLP",
        found=brief(sorted(tensors)),
    )


def _stated(config_json: bytes | None, source: object) -> dict[str, Any]:
    """Returns what `export_pylo` wrote into config.json, an empty dict if nothing."""
    if config_json is None:
        return {}
    try:
        document = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise weights_error(
            f"{CONFIG} of {source}", expected="JSON", found=str(error)[:120]
        ) from error
    stated = document.get(KEY) if isinstance(document, dict) else None
    return stated if isinstance(stated, dict) else {}


# What a conversion says of the file that it read, so not what it keeps of the weights before.
_OF_THE_FILE = ("source", "sha256", "sha256_second", "format", "fetched")


def _kept_metadata(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata that `export_pylo` wrote, their old origin as "exported_from"."""
    metadata = stated.get("metadata")
    if not isinstance(metadata, Mapping):
        return {}
    kept = {key: value for key, value in metadata.items() if key not in _OF_THE_FILE}
    before = {key: value for key, value in metadata.items() if key in _OF_THE_FILE}
    return {**kept, "exported_from": before} if before else kept


def _convert_meta_mlp(
    tensors: Mapping[str, np.ndarray],
    architecture: str,
    config: dict[str, Any],
    stated: Mapping[str, Any],
    given: Mapping[str, Any],
    source: object,
) -> Converted:
    hidden = sum(re.fullmatch(r"network\.linear_\d+\.weight", name) is not None for name in tensors)
    names = ["input", *[f"linear_{index}" for index in range(hidden)], "output"]
    mlp: dict[str, Any] = {}
    for layer, name in enumerate(names):
        mlp[f"w{layer}"] = _transposed(_tensor(tensors, f"network.{name}.weight", source))
        mlp[f"b{layer}"] = _tensor(tensors, f"network.{name}.bias", source)
    _reject_others(tensors, {f"network.{n}.{kind}" for n in names for kind in _KINDS}, source)
    if architecture == "elo":
        return Converted("elo", {"mlp": mlp}, config)
    decays = {
        key: _decay_array(key, given.get(key, stated.get(key, default)), source)
        for key, default in _MULO_DECAYS.items()
    }
    other = "mulo" if architecture == "small_fc_lopt" else "small_fc_lopt"
    return Converted(
        architecture,
        {"mlp": mlp, **decays},
        {**_MULO_CONFIG, **config},
        (other,),
        consumed=DECAYS,
    )


_KINDS = ("weight", "bias")


def _decay_array(key: str, values: Any, source: object) -> np.ndarray:
    sequence = isinstance(values, list | tuple) and len(values) <= 16
    if not sequence or not all(type(v) in (int, float) and abs(v) < 1e30 for v in values):
        raise weights_error(source, expected=f"{key}, a list of numbers", found=brief(values))
    return np.asarray(values, np.float32)


def _celo2_mlp(tensors: Mapping[str, np.ndarray], source: object) -> dict[str, Any]:
    groups = [_tensor(tensors, f"w0.{index}", source) for index in range(len(FEATURE_GROUPS))]
    mlp: dict[str, Any] = {"w0": joined(groups, source), "b0": _tensor(tensors, "b0", source)}
    names = {"b0", *[f"w0.{index}" for index in range(len(groups))]}
    layers = sum(re.fullmatch(r"dense_w\.\d+", name) is not None for name in tensors)
    for layer in range(layers):
        mlp[f"w{layer + 1}"] = _tensor(tensors, f"dense_w.{layer}", source)
        mlp[f"b{layer + 1}"] = _tensor(tensors, f"dense_b.{layer}", source)
        names |= {f"dense_w.{layer}", f"dense_b.{layer}"}
    _reject_others(tensors, names, source)
    return mlp


def _convert_velo(
    rnn: Mapping[str, np.ndarray], mlp: Mapping[str, np.ndarray], source: object
) -> dict[str, Any]:
    def linear(name: str) -> dict[str, Any]:
        return {
            "w": _transposed(_tensor(rnn, f"{name}.weight", source)),
            "b": _tensor(rnn, f"{name}.bias", source),
        }

    layers = sum(re.fullmatch(r"hidden_weights_\.\d+", name) is not None for name in mlp)
    names = ["input", *[f"hidden.{index}" for index in range(layers)], "output"]
    banks: dict[str, Any] = {}
    for layer, name in enumerate(names):
        weight, bias = _bank_names(name)
        banks[f"w{layer}"] = _transposed(_tensor(mlp, weight, source))
        banks[f"b{layer}"] = _tensor(mlp, bias, source)
    return {
        "mlp": banks,
        "lstm": {
            # state = (hidden, cell) in VeLORNN.forward
            "initial_hidden": _flat_row(_tensor(rnn, "lstm_init_state.0", source)),
            "initial_cell": _flat_row(_tensor(rnn, "lstm_init_state.1", source)),
            **linear("lstm.linear"),
        },
        "mix": linear("mix_layer2"),
        "input": linear("final_mix_layer"),
        "controls": linear("rnn_to_controls"),
        "step_size": linear("step_size"),
    }


def _bank_names(name: str, stored: str = "_") -> tuple[str, str]:
    """Returns VeLOMLP's names of a layer; `stored` is "_" for the banks, "" for its scratch."""
    if name.startswith("hidden."):
        index = name.split(".")[1]
        return f"hidden_weights{stored}.{index}", f"hidden_bias{stored}.{index}"
    return f"{name}_weights{stored}", f"{name}_bias{stored}"


def _tensor(tensors: Mapping[str, np.ndarray], name: str, source: object) -> np.ndarray:
    if name not in tensors:
        raise weights_error(
            source, expected=f"the array {name}", found=f"only {brief(sorted(tensors))}"
        )
    return tensors[name]


def _reject_others(tensors: Mapping[str, np.ndarray], known: set[str], source: object) -> None:
    extra = sorted(set(tensors) - known)
    if extra:
        raise weights_error(source, expected="no other arrays", found=brief(extra))


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2) if array.ndim >= 2 else array  # rank 1 fails validation


def _flat_row(array: np.ndarray) -> np.ndarray:
    return array[0] if array.ndim == 2 and array.shape[0] == 1 else array


def export_pylo(weights: Weights, folder: Path) -> None:
    """Writes weights in the layout that PyLO loads from the Hugging Face Hub.

    Args:
      weights: validated weights of small_fc_lopt, mulo, elo, velo, celo2 or elo_celo2.
      folder: the folder to write `model.safetensors`, `config.json` and a card, `README.md`, into;
        for velo, which PyLO keeps in two models, the folders VeLO_RNN and VeLO_MLP inside it.

    Raises:
      ValueError: an architecture or a number of decays that PyLO has not.
    """
    params = weights.params
    record: dict[str, Any] = {
        "architecture": weights.architecture,
        "config": thaw(weights.config),
        "metadata": thaw(weights.metadata),
    }
    names = (*META_MLP, *CELO2_MLP, "velo")
    if weights.architecture not in names:
        raise ValueError(
            f"weights must be of an architecture that PyLO has ({', '.join(names)}), "
            f"found {weights.architecture!r}"
        )
    card = export_card(weights, folder.name, "that PyLO loads", _in_pylo(weights, folder.name))
    sizes = weights.config
    if weights.architecture in META_MLP:
        if int(params["mlp"]["w0"].shape[0]) != SMALL_FC_INPUTS:
            raise ValueError(
                f"weights must have {SMALL_FC_INPUTS} inputs, as PyLO's network has; found "
                f"{params['mlp']['w0'].shape[0]}"
            )
        record |= {key: params[key].tolist() for key in DECAYS if key in params}
        model = {
            "input_size": int(params["mlp"]["w0"].shape[0]),
            "hidden_size": sizes["hidden_size"],
            "hidden_layers": sizes["hidden_layers"] - 1,
        }
        _write_model(folder, _meta_mlp_tensors(params["mlp"]), {**model, KEY: record}, card)
    elif weights.architecture in CELO2_MLP:
        model = {
            "feature_dims": list(FEATURE_GROUPS),
            "hidden_size": sizes["hidden_size"],
            "hidden_layers": sizes["hidden_layers"],
            "output_size": 3,
            "activation": "relu",
        }
        _write_model(folder, _celo2_tensors(params["mlp"]), {**model, KEY: record}, card)
    else:
        # PyLO's network is the mean over the banks times 100, whatever the config here says
        gain = sizes["ff_mult"] / SCHEMAS["velo"].defaults["ff_mult"]
        record["config"] |= {"ff_mult": SCHEMAS["velo"].defaults["ff_mult"]}
        rnn, mlp = _velo_tensors(params, np.float32(gain))
        rnn_model = {
            "input_size": int(params["mix"]["w"].shape[0]),
            "lstm_hidden_size": sizes["lstm_hidden_size"],
            "param_inits": sizes["param_inits"],
            "mix_layers": True,
        }
        mlp_model = {
            "param_inits": sizes["param_inits"],
            "input_size": int(params["mlp"]["w0"].shape[1]),
            "hidden_size": sizes["hidden_size"],
            "hidden_layers": sizes["hidden_layers"] - 1,
            "output_size": 3,
        }
        _write_model(folder / RNN_FOLDER, rnn, {**rnn_model, KEY: record}, card)
        _write_model(folder / MLP_FOLDER, mlp, mlp_model, card)


def _in_pylo(weights: Weights, folder: str) -> str:
    """The card's section for users of PyLO."""
    lines = [
        "## In PyLO",
        "",
        "PyLO's files hold the network alone. Its optimizers take multipliers and decays as",
        "arguments, and their defaults belong to other weights:",
        "",
        "```python",
        pylo_call(weights, folder),
        "```",
    ]
    if weights.config.get("use_bugged_loss_features"):
        lines += ["", "PyLO's VeLO computes its loss features otherwise than these weights know."]
    return "\n".join(lines)


def _meta_mlp_tensors(mlp: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    layers = len(mlp) // 2
    names = ["input", *[f"linear_{index}" for index in range(layers - 2)], "output"]
    tensors = {}
    for layer, name in enumerate(names):
        tensors[f"network.{name}.weight"] = mlp[f"w{layer}"].T
        tensors[f"network.{name}.bias"] = mlp[f"b{layer}"]
    return tensors


def _celo2_tensors(mlp: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    splits = np.cumsum(FEATURE_GROUPS)[:-1]
    parts = np.split(mlp["w0"], splits, axis=0)
    tensors = {f"w0.{index}": part for index, part in enumerate(parts)}
    tensors["b0"] = mlp["b0"]
    for layer in range(1, len(mlp) // 2):
        tensors[f"dense_w.{layer - 1}"] = mlp[f"w{layer}"]
        tensors[f"dense_b.{layer - 1}"] = mlp[f"b{layer}"]
    return tensors


def _velo_tensors(
    params: Mapping[str, Any], gain: np.float32
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rnn: dict[str, np.ndarray] = {
        "lstm_init_state.0": params["lstm"]["initial_hidden"][None],
        "lstm_init_state.1": params["lstm"]["initial_cell"][None],
    }
    unused = {key: np.zeros_like(value) for key, value in params["mix"].items()}
    layers = {
        "mix_layer1": unused,  # computed and discarded by both codes
        "mix_layer2": params["mix"],
        "final_mix_layer": params["input"],
        "lstm.linear": params["lstm"],
        "rnn_to_controls": params["controls"],
        "step_size": params["step_size"],
    }
    for name, layer in layers.items():
        rnn[f"{name}.weight"] = layer["w"].T
        rnn[f"{name}.bias"] = layer["b"]
    mlp: dict[str, np.ndarray] = {}
    count = len(params["mlp"]) // 2
    names = ["input", *[f"hidden.{index}" for index in range(count - 2)], "output"]
    for layer_index, name in enumerate(names):
        w = gain * np.swapaxes(params["mlp"][f"w{layer_index}"], -1, -2)
        b = gain * params["mlp"][f"b{layer_index}"]
        for stored, pair in (("_", (w, b)), ("", (np.zeros_like(w[0]), np.zeros_like(b[0])))):
            # Without "_" are the current MLP's arrays: PyLO overwrites them before their use.
            weight_name, bias_name = _bank_names(name, stored)
            mlp[weight_name], mlp[bias_name] = pair
    return rnn, mlp


def _write_model(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], card: str
) -> None:
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write(folder / MODEL, save(arrays, metadata={"format": "pt"}))
    text = json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write(folder / CONFIG, text.encode())
    write(folder / CARD, card.encode())
