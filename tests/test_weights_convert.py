"""Conversions of foreign formats, against independent readers of the same files."""

import ast
import json
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from safetensors.numpy import load_file, save_file

from lopt_jax.weights import (
    Weights,
    WeightsError,
    convert_weights,
    export_weights,
    load_weights,
    save_weights,
)
from lopt_jax.weights.gin import parse_gin

FIXTURES = Path(__file__).parent / "fixtures"
# The released Celo weights lie outside the project, where there are any.
REAL = next(
    (p / "shared" / "weights" for p in FIXTURES.parents if (p / "shared" / "weights").is_dir()),
    FIXTURES,
)

THETA = sorted(path.parent.name for path in FIXTURES.glob("*/theta.state"))
ARCHITECTURES = {"small_fc_lopt_h4": "small_fc_lopt", "small_fc_lopt_h32": "small_fc_lopt"}
ARCHITECTURES |= {"celo2": "celo2", "celo2_base": "celo2"}
ARCHITECTURES |= dict.fromkeys(
    (f"adafac_mlp_lopt{variant}" for variant in ("", "_decays", "_separate_weights")),
    "small_fc_lopt",
)
ARCHITECTURES |= {"mlp_lopt": "mlp_lopt", "celo_random": "celo", "celo_adam_random": "celo_adam"}
ARCHITECTURES |= {name: name for name in ("nn_adam", "rnn_mlp_lopt")}
ARCHITECTURES |= {"nn_adam_decay": "nn_adam", "rnn_mlp_lopt_validation": "rnn_mlp_lopt"}
ARCHITECTURES |= {f"learnable_{kind}": f"learnable_{kind}" for kind in ("sgd", "sgdm", "adam")}


def of_scalars(layers):
    """The three layers of 39, 3, 3 and 2 whose every weight is a scalar."""
    tree = {}
    for i, (inputs, outputs) in enumerate(((39, 3), (3, 3), (3, 2))):
        rows = [[layers.pop(f"w{i}_{j}_{k}") for k in range(outputs)] for j in range(inputs)]
        tree[f"w{i}"] = np.stack([np.stack(row) for row in rows])
        tree[f"b{i}"] = np.stack([layers.pop(f"b{i}_{k}") for k in range(outputs)])
    assert not layers
    return tree


def lstm_of(theta):
    state = theta["lstm_init_state"]
    initial = {f"initial_{key}": state[key][0] for key in ("hidden", "cell")}
    return initial | theta["rnn_params"]["rnn/linear"]


def with_hyperparameters(theta):
    """The canonical tree of NNAdam."""
    names = {"learning_rate": "lr", "beta1": "beta1", "beta2": "beta2", "epsilon": "epsilon"}
    return {
        "lstm": lstm_of(theta),
        "controls": theta["rnn_to_controls_params"]["rnn_to_controls"],
        "initial": {ours: theta[f"per_layer_{theirs}"] for ours, theirs in names.items()},
    }


def with_messages(theta):
    """The canonical tree of RNNMLPLOpt."""
    mlp = theta["ffmod_params"]
    return {
        "lstm": lstm_of(theta),
        "mlp": {f"{k}{i}": mlp[f"mlp/~/linear_{i}"][k] for i in range(3) for k in "wb"},
        "to_mlp": theta["rnn_to_ff_params"]["rnn_to_ff"],
        "to_lstm": theta["rnn_to_in_params"]["rnn_to_in"],
        "initial_from_mlp": theta["initial_from_mlp"],
        "initial_from_lstm": theta["initial_from_lstm"],
    }


def canonical(theta):
    """The canonical tree of an original one, written down once more from the layout's text."""
    tree = dict(theta) if "log_lr" in theta else {}
    if "ffmod_params" in theta or "per_layer_lr" in theta:
        return with_messages(theta) if "ffmod_params" in theta else with_hyperparameters(theta)
    if "mlp/~/linear_0" in theta:
        layers = range(len(theta))
        tree["mlp"] = {f"{k}{i}": theta[f"mlp/~/linear_{i}"][k] for i in layers for k in "wb"}
    if "nn" in theta:
        tree["mlp"] = dict(theta["nn"]["~"])
        if "w0_0_0" in tree["mlp"]:  # make_separate_weights
            tree["mlp"] = of_scalars(tree["mlp"])
    if "ff_mod_stack" in theta:
        stack = theta["ff_mod_stack"]["~"]
        groups = [stack[f"w0__{index}"] for index in range(14)]
        tree["mlp"] = {"w0": np.concatenate(groups, axis=-2)}
        tree["mlp"] |= {key: stack[key] for key in ("b0", "w1", "b1", "w2", "b2")}
    tree |= {key: value for key, value in theta.items() if key.endswith("_decays")}
    if "rnn_params" in theta:
        rnn = theta["rnn_params"]
        tree["lstm"] = {
            "initial_hidden": theta["lstm_init_state"]["hidden"][0],
            "initial_cell": theta["lstm_init_state"]["cell"][0],
            **rnn["rnn/linear"],
        }
        tree["mix"], tree["input"] = rnn["linear_1"], rnn["linear_2"]
        tree["step_size"] = rnn["step_size"]
        if "rnn_to_controls" in rnn:
            tree["controls"] = rnn["rnn_to_controls"]
    return tree


def assert_bitwise(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        assert a.dtype == b.dtype == np.float32
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", THETA)
def test_theta_state(name):
    file = FIXTURES / name / "theta.state"
    kwargs = json.loads((FIXTURES / name / "config.json").read_text())["kwargs"]
    decays = {key: kwargs[key] for key in kwargs if key.endswith("_decays")}
    weights = convert_weights(file, config=decays or None)
    assert weights.architecture == ARCHITECTURES.get(name, "velo")
    assert_bitwise(weights.params, canonical(msgpack_restore(file.read_bytes())))
    assert isinstance(jax.tree.leaves(weights)[0], jax.Array)
    for key in ("lstm_hidden_size", "param_inits", "hidden_size"):
        if key in kwargs:
            assert weights.config[key] == kwargs[key]


def test_checkpoint_with_gin():
    folder = FIXTURES / "original_checkpoint"
    weights = convert_weights(folder / "params")
    restored = msgpack_restore((folder / "params").read_bytes())
    assert_bitwise(weights.params, canonical(restored["params"]))
    assert weights.config["step_mult"] == 0.002
    assert weights.config["use_bugged_loss_features"] is False
    assert weights.config["use_bugged_next_lstm_state"] is False
    assert weights.metadata["gen_id"] == "f3a1c9d2"
    assert weights.metadata["step"] == "61204"
    assert re.fullmatch("[0-9a-f]{64}", weights.metadata["sha256"])
    assert weights == convert_weights(folder)
    assert weights == convert_weights(str(folder / "params"), architecture="velo")
    assert_bitwise(convert_weights((folder / "params").resolve().as_uri()).params, weights.params)


def test_tuple_without_config_has_both_flags():
    file = FIXTURES / "original_checkpoint_no_config" / "params.checkpoint"
    weights = convert_weights(file)
    assert_bitwise(weights.params, canonical(msgpack_restore(file.read_bytes())["0"]))
    assert weights.config["use_bugged_loss_features"] is True
    assert weights.config["use_bugged_next_lstm_state"] is True
    assert weights.config["lstm_hidden_size"] == 32


def test_explicit_config_wins():
    folder = FIXTURES / "original_checkpoint"
    config = {"step_mult": 0.5, "use_bugged_loss_features": True, "param_inits": 16}
    weights = convert_weights(folder, config=config)
    assert (weights.config["step_mult"], weights.config["param_inits"]) == (0.5, 16)
    assert weights.config["use_bugged_loss_features"] is True
    with pytest.raises(WeightsError, match=r"param_inits = 8.*param_inits = 16"):
        convert_weights(folder, config={"param_inits": 8})
    with pytest.raises(WeightsError, match="no_such"):
        convert_weights(folder, config={"no_such": 8})


@pytest.mark.parametrize("key", ["w0_38_2", "b1_0", "w1_0_0"])
def test_a_weight_that_is_missing_among_scalars_is_noticed(key, tmp_path):
    file = FIXTURES / "adafac_mlp_lopt_separate_weights" / "theta.state"
    theta = msgpack_restore(file.read_bytes())
    del theta["nn"]["~"][key]
    (tmp_path / "theta.state").write_bytes(msgpack_serialize(theta))
    with pytest.raises(WeightsError, match=f"a scalar for every place of {key[:2]}"):
        convert_weights(tmp_path)


def test_pylo_has_three_decays(tmp_path):
    decays = {f"initial_{kind}_decays": (0.9, 0.99) for kind in ("momentum", "rms", "adafactor")}
    weights = convert_weights(FIXTURES / "adafac_mlp_lopt_decays", config=decays)
    with pytest.raises(ValueError, match=r"39 inputs.*found 33"):
        export_weights(weights, tmp_path)


def test_interpolation_multiplier_is_folded_into_the_banks_for_pylo(tmp_path):
    # VeLO's network is 100 * mean(controls * bank), PyLO's too; that of amoudgl/velo-s has 1.
    file = FIXTURES / "velo" / "theta.state"
    plain, scaled = convert_weights(file), convert_weights(file, config={"ff_mult": 1.0})
    assert_bitwise(scaled.params, plain.params)
    assert (plain.config["ff_mult"], scaled.config["ff_mult"]) == (100.0, 1.0)
    export_weights(scaled, tmp_path)
    back = convert_weights(tmp_path)
    assert back.config["ff_mult"] == 100.0
    np.testing.assert_allclose(100 * back.params["mlp"]["w0"], plain.params["mlp"]["w0"], rtol=1e-6)
    assert_bitwise(back.params["lstm"], plain.params["lstm"])
    with pytest.raises(WeightsError, match="ff_mult"):
        convert_weights(FIXTURES / "celo2" / "theta.state", config={"ff_mult": 1.0})


@pytest.mark.parametrize(
    ("file", "architecture"),
    [("small_fc_lopt_h4", "velo"), ("velo", "celo"), ("celo2", "elo"), ("velo", "no_such")],
)
def test_wrong_architecture(file, architecture):
    with pytest.raises(WeightsError, match=architecture):
        convert_weights(FIXTURES / file / "theta.state", architecture)


def test_same_layout_serves_both_optimizers():
    assert convert_weights(FIXTURES / "small_fc_lopt_h4", "mulo").architecture == "mulo"
    assert convert_weights(FIXTURES / "celo2", "elo_celo2").architecture == "elo_celo2"


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_real_weights(name):
    file = REAL / name / "theta.state"
    if REAL == FIXTURES or not file.exists():
        pytest.skip("the released weights are not on this machine")
    weights = convert_weights(file)
    assert weights.architecture == name
    assert_bitwise(weights.params, canonical(msgpack_restore(file.read_bytes())))


def test_missing_file_and_wrong_scheme(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        convert_weights(tmp_path / "absent")
    with pytest.raises(WeightsError, match="a weights file"):
        convert_weights(tmp_path)
    with pytest.raises(WeightsError, match="scheme"):
        convert_weights("ftp://example.org/params")
    with pytest.raises(WeightsError, match="scheme"):
        convert_weights("http://example.org/params")
    with pytest.raises(WeightsError, match="owner"):
        convert_weights("hf://only-owner")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(WeightsError, match="zip"):
        convert_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["nn_adam", "rnn_mlp_lopt", "mlp_lopt", "learnable_adam"])
def test_arrays_of_no_use_are_refused(name, tmp_path):
    theta = msgpack_restore((FIXTURES / name / "theta.state").read_bytes())
    theta["more"] = np.zeros(3, np.float32)
    (tmp_path / "theta.state").write_bytes(msgpack_serialize(theta))
    with pytest.raises(WeightsError, match="more"):
        convert_weights(tmp_path)


@pytest.mark.parametrize("key", ["lstm_init_state", "rnn_params", "per_layer_beta2"])
def test_what_is_missing_is_named(key, tmp_path):
    theta = msgpack_restore((FIXTURES / "nn_adam" / "theta.state").read_bytes())
    del theta[key]
    (tmp_path / "theta.state").write_bytes(msgpack_serialize(theta))
    with pytest.raises(WeightsError, match=f"the meta-parameters with '{key}'"):
        convert_weights(tmp_path)


# gin


def test_gin_values():
    text = """
# a comment with = in it
import some.module
MACRO = 3
HyperV2.a = (0.9,  # first
             0.99)
scope/module.HyperV2.b = 'x # no comment'
HyperV2.c = %MACRO
HyperV2.d = @some.function()
HyperV2.e = __import__('os').system('echo no')
HyperV2.f = \\
    -1.5e-3
run_train.lopt = @learned.HyperV2()
"""
    assert parse_gin(text, "test") == {
        ("HyperV2", "a"): (0.9, 0.99),
        ("HyperV2", "b"): "x # no comment",
        ("HyperV2", "d"): "@function",
        ("HyperV2", "f"): -1.5e-3,
        ("run_train", "lopt"): "@HyperV2",
    }


def test_gin_argument_that_is_not_implemented(tmp_path):
    source = FIXTURES / "original_checkpoint"
    (tmp_path / "params").write_bytes((source / "params").read_bytes())
    gin = (source / "config.gin").read_text() + "\nHyperV2.param_scale_mult = False\n"
    (tmp_path / "config.gin").write_text(gin)
    with pytest.raises(WeightsError, match=r"HyperV2\.param_scale_mult = True"):
        convert_weights(tmp_path / "params")
    (tmp_path / "config.gin").write_text("HyperV2.step_mult = 'much'")
    with pytest.raises(WeightsError, match="step_mult"):
        convert_weights(tmp_path / "params")
    (tmp_path / "config.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match="UTF-8"):
        convert_weights(tmp_path / "params")


# PyLO


def test_meta_mlp_needs_a_choice():
    with pytest.raises(WeightsError, match="architecture="):
        convert_weights(FIXTURES / "elo")


def test_arrays_that_serve_several_optimizers_need_a_choice(tmp_path):
    for fixture in ("celo2_adamw", "elo_celo2"):
        file = FIXTURES / fixture / "model.safetensors"
        with pytest.raises(WeightsError, match=r"architecture= one of celo2, elo_celo2.*--arch"):
            convert_weights(file)
        assert convert_weights(file, "elo_celo2").architecture == "elo_celo2"
    theta = msgpack_restore((FIXTURES / "small_fc_lopt_h4" / "theta.state").read_bytes())
    (tmp_path / "global_step5000.pickle").write_bytes(pickle.dumps(theta))
    with pytest.raises(WeightsError, match="architecture= one of small_fc_lopt, mulo"):
        convert_weights(tmp_path)
    (tmp_path / "config.gin").write_text("MuAdafacMLPLOpt.step_mult = 0.01")
    assert convert_weights(tmp_path).architecture == "mulo"  # what is beside the file tells
    exported = convert_weights(FIXTURES / "elo_celo2", "elo_celo2")
    export_weights(exported, tmp_path / "ours")
    assert convert_weights(tmp_path / "ours").architecture == "elo_celo2"


@pytest.mark.parametrize("architecture", ["elo", "mulo", "small_fc_lopt"])
def test_meta_mlp(architecture):
    weights = convert_weights(FIXTURES / "mulo", architecture)
    tensors = load_file(FIXTURES / "mulo" / "model.safetensors")
    expected = {
        "mlp": {
            "w0": tensors["network.input.weight"].T,
            "b0": tensors["network.input.bias"],
            "w1": tensors["network.linear_0.weight"].T,
            "b1": tensors["network.linear_0.bias"],
            "w2": tensors["network.output.weight"].T,
            "b2": tensors["network.output.bias"],
        }
    }
    if architecture != "elo":
        text = (FIXTURES / "mulo" / "config.json").read_text()
        for key in ("momentum_decays", "rms_decays", "adafactor_decays"):
            values = json.loads(re.search(rf"{key}=(\[[^\]]*\])", text).group(1))
            expected[key] = np.asarray(values, np.float32)
        assert weights.config["step_mult"] == 0.01
    assert_bitwise(weights.params, expected)
    assert weights.config["exp_mult"] == 0.001


def test_meta_mlp_takes_decays():
    decays = {"momentum_decays": [0.1, 0.2, 0.3], "step_mult": 0.5}
    weights = convert_weights(FIXTURES / "mulo", "mulo", config=decays)
    np.testing.assert_array_equal(weights.params["momentum_decays"], np.float32([0.1, 0.2, 0.3]))
    assert weights.config["step_mult"] == 0.5
    with pytest.raises(WeightsError, match="momentum_decays"):
        convert_weights(FIXTURES / "mulo", "mulo", config={"momentum_decays": "many"})


def test_celo2_mlp():
    weights = convert_weights(FIXTURES / "celo2_adamw", "celo2")
    tensors = load_file(FIXTURES / "celo2_adamw" / "model.safetensors")
    assert weights.architecture == "celo2"
    assert weights.params["mlp"]["w0"].shape == (30, 8)
    np.testing.assert_array_equal(weights.params["mlp"]["w0"][3:6], tensors["w0.3"])
    np.testing.assert_array_equal(weights.params["mlp"]["w2"], tensors["dense_w.1"])
    assert weights.config["exp_mult"] == 0.0


ROUND_TRIPS = {
    "small_fc_lopt_h4": "small_fc_lopt",
    "small_fc_lopt_h32": "mulo",
    "velo": "velo",
    "original_checkpoint": "velo",
    "original_checkpoint_no_config": "velo",
    "celo2": "celo2",
    "celo2_base": "elo_celo2",
    "elo": "elo",
    "mulo": "mulo",
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_original_to_ours_to_pylo_to_ours(name, tmp_path):
    original = convert_weights(FIXTURES / name, ROUND_TRIPS[name])
    save_weights(tmp_path / "ours", original)
    ours = load_weights(tmp_path / "ours")
    assert ours == original
    export_weights(ours, tmp_path / "pylo")
    back = convert_weights(tmp_path / "pylo")
    assert (back.architecture, back.config) == (original.architecture, original.config)
    assert_bitwise(back.params, original.params)


@pytest.mark.parametrize(
    ("name", "architecture", "call"),
    [
        ("small_fc_lopt_h4", "small_fc_lopt", "AdafacLO_naive"),
        ("elo", "elo", "ELO_naive"),
        ("velo", "velo", "VeLO"),
        ("elo_celo2", "elo_celo2", "ELO_CELO2_naive"),
    ],
)
def test_card_calls_pylo_with_what_its_files_lack(name, architecture, call, tmp_path):
    config = {"exp_mult": 0.25}
    weights = convert_weights(FIXTURES / name, architecture, config=config)
    export_weights(weights, tmp_path / "w")
    card = next((tmp_path / "w").rglob("README.md")).read_text()
    code = card[card.index("## In PyLO") :].split("```python\n")[1].split("```")[0]
    (used,) = [x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.Call)]
    given = {x.arg: x.value for x in used.keywords}
    assert used.func.id == call
    assert ast.literal_eval(given["exp_mult"]) == 0.25
    assert ast.literal_eval(given["initial_rms_decays"]) == weights.config["initial_rms_decays"]
    for key in ("momentum_decays", "rms_decays", "adafactor_decays"):
        if key in weights.params:
            np.testing.assert_array_equal(
                np.float32(ast.literal_eval(given[key])), weights.params[key]
            )
        else:
            assert key not in given


def test_exports_of_two_layouts_do_not_share_a_folder(tmp_path):
    velo = convert_weights(FIXTURES / "velo", "velo")
    other = convert_weights(FIXTURES / "elo", "elo")
    export_weights(velo, tmp_path)
    with pytest.raises(FileExistsError, match=r"VeLO_RNN, VeLO_MLP"):
        export_weights(other, tmp_path, format="original")
    with pytest.raises(FileExistsError, match=r"VeLO_RNN, VeLO_MLP"):
        export_weights(other, tmp_path)
    export_weights(velo, tmp_path)  # the same again is replaced
    assert convert_weights(tmp_path).architecture == "velo"


def test_settings_that_a_file_does_not_tell_are_said(caplog, tmp_path):
    file = FIXTURES / "small_fc_lopt_h4" / "theta.state"
    convert_weights(file, "small_fc_lopt", config={"step_mult": 0.5})
    (record,) = caplog.records
    assert "exp_mult=0.001" in record.message
    assert "step_mult" not in record.message
    caplog.clear()
    told = convert_weights(file, "small_fc_lopt")
    caplog.clear()
    export_weights(told, tmp_path)
    assert convert_weights(tmp_path) is not None
    assert not caplog.records


def settings_of(name):
    """What the constructor of a recorded run was given, as config here."""
    kwargs = json.loads((FIXTURES / name / "config.json").read_text())["kwargs"]
    renamed = {"step_multiplier": "step_mult", "magnitude_rate": "exp_mult"}
    known = ("exp_mult", "step_mult", "output_scale", "decay_strength", "ff_mult")
    config = {renamed.get(key, key): value for key, value in kwargs.items()}
    is_known = lambda key: key in known or key.startswith(("initial_", "use_bugged"))  # noqa: E731
    if ARCHITECTURES.get(name) == "nn_adam":  # there these are for meta-training's start alone
        known = ("output_scale", "decay_strength")
        is_known = known.__contains__
    if name.startswith("learnable"):
        return {}
    return {key: value for key, value in config.items() if is_known(key)}


@pytest.mark.parametrize("name", THETA)
def test_original_to_ours_to_original(name, tmp_path):
    """The identity, bit for bit, and config.gin says how it is configured."""
    theta = msgpack_restore((FIXTURES / name / "theta.state").read_bytes())
    weights = convert_weights(FIXTURES / name / "theta.state", config=settings_of(name))
    save_weights(tmp_path / "ours", weights)
    export_weights(load_weights(tmp_path / "ours"), tmp_path / "theirs", format="original")
    written = msgpack_restore((tmp_path / "theirs" / "theta.state").read_bytes())
    if "linear" in theta.get("rnn_params", {}):  # computed and discarded there
        assert not any(written["rnn_params"]["linear"][key].any() for key in "wb")
        written["rnn_params"]["linear"] = theta["rnn_params"]["linear"]
    assert_bitwise(written, theta)
    back = convert_weights(tmp_path / "theirs")
    assert (back.architecture, back.config) == (weights.architecture, weights.config)
    assert (tmp_path / "theirs" / "README.md").read_text().startswith("---")


def test_original_export_says_what_the_original_has_fixed(tmp_path):
    gin = {}
    for name in ("rnn_mlp_lopt", "adafac_mlp_lopt_separate_weights"):
        weights = convert_weights(FIXTURES / name, config=settings_of(name))
        export_weights(weights, tmp_path / name, format="original")
        gin[name] = (tmp_path / name / "config.gin").read_text().splitlines()
    assert "RNNMLPLOpt.decays = (0.5, 0.9, 0.99, 0.999, 0.9999)" in gin["rnn_mlp_lopt"]
    assert "RNNMLPLOpt.step_multiplier = 0.01" in gin["rnn_mlp_lopt"]
    assert "run_train.lopt = @RNNMLPLOpt()" in gin["rnn_mlp_lopt"]
    separate = gin["adafac_mlp_lopt_separate_weights"]
    assert "AdafacMLPLOpt.make_separate_weights = True" in separate
    decays = (0.1, 0.5, 0.9, 0.99, 0.999, 0.99)
    weights = convert_weights(FIXTURES / "mlp_lopt", config={"initial_momentum_decays": decays})
    with pytest.raises(ValueError, match="MLPLOpt has initial_momentum_decays"):
        export_weights(weights, tmp_path / "mlp_lopt", format="original")
    uneven = {"initial_rms_decays": (0.5, 0.9, 0.99, 0.999, 0.9998)}
    weights = convert_weights(FIXTURES / "rnn_mlp_lopt", config=uneven)
    with pytest.raises(ValueError, match="RNNMLPLOpt has one decays"):
        export_weights(weights, tmp_path / "uneven", format="original")
    assert not (tmp_path / "uneven").exists()


def test_original_export_refuses_a_rule_of_our_own(tmp_path):
    with pytest.raises(ValueError, match=r"the original code has .*found 'linear'"):
        export_weights(load_weights("lopt"), tmp_path / "lopt", format="original")
    assert not (tmp_path / "lopt").exists()


def test_export_has_the_names_and_shapes_of_pylo(tmp_path):
    export_weights(convert_weights(FIXTURES / "elo", "elo"), tmp_path / "elo")
    assert_same_tensors(tmp_path / "elo", FIXTURES / "elo")
    config = json.loads((tmp_path / "elo" / "config.json").read_text())
    assert (config["input_size"], config["hidden_size"], config["hidden_layers"]) == (39, 32, 1)
    export_weights(convert_weights(FIXTURES / "celo2_adamw", "celo2"), tmp_path / "celo2")
    assert_same_tensors(tmp_path / "celo2", FIXTURES / "celo2_adamw")
    export_weights(convert_weights(FIXTURES / "velo"), tmp_path / "velo")
    rnn = load_file(tmp_path / "velo" / "VeLO_RNN" / "model.safetensors")
    theta = msgpack_restore((FIXTURES / "velo" / "theta.state").read_bytes())
    np.testing.assert_array_equal(
        rnn["lstm.linear.weight"], theta["rnn_params"]["rnn/linear"]["w"].T
    )
    np.testing.assert_array_equal(rnn["mix_layer2.bias"], theta["rnn_params"]["linear_1"]["b"])
    assert not rnn["mix_layer1.weight"].any()  # computed and discarded there
    mlp = load_file(tmp_path / "velo" / "VeLO_MLP" / "model.safetensors")
    assert mlp["input_weights_"].shape == (16, 4, 30)
    assert mlp["input_weights"].shape == (4, 30)
    np.testing.assert_array_equal(
        mlp["hidden_weights_.0"], theta["ff_mod_stack"]["~"]["w1"].swapaxes(1, 2)
    )


def assert_same_tensors(ours, theirs):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


@pytest.mark.parametrize("name", ["elo_celo2", "mulo", "velo"])
def test_export_keeps_licence_card_and_recommended_settings(name, tmp_path):
    converted = convert_weights(FIXTURES / name, name)
    recommended = {"learning_rate": 0.01, "schedule": "cosine"}
    metadata = {**converted.metadata, "licence": "MIT", "recommended": recommended}
    weights = Weights(name, converted.config, converted.params, metadata)
    export_weights(weights, tmp_path / "pylo")
    back = convert_weights(tmp_path / "pylo")
    assert back.metadata["licence"] == "MIT"
    assert back.metadata["recommended"] == recommended
    assert back.metadata["source"].startswith(str(tmp_path))
    assert back.metadata["exported_from"]["sha256"] == converted.metadata["sha256"]
    (card, *others) = [path.read_text() for path in (tmp_path / "pylo").rglob("README.md")]
    assert len(others) == (name == "velo")
    assert "license: mit" in card.splitlines()
    assert '- recommended: {"learning_rate": 0.01, "schedule": "cosine"}' in card.splitlines()


def test_metadata_beside_a_file_are_bounded(tmp_path):
    export_weights(convert_weights(FIXTURES / "elo", "elo"), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    deep = nested = {}
    for _ in range(100):
        nested["a"] = nested = {}
    document["lopt_jax"]["metadata"] = deep
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(WeightsError, match="nested at most 64 deep"):
        convert_weights(tmp_path)


def test_export_refuses_what_pylo_has_not(tmp_path):
    weights = convert_weights(FIXTURES / "velo")
    with pytest.raises(ValueError, match="format"):
        export_weights(weights, tmp_path, format="torch")
    celo = type(weights)("celo_adam", {}, {})
    with pytest.raises(WeightsError):
        export_weights(celo, tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_of_velo_pair(tmp_path):
    export_weights(convert_weights(FIXTURES / "velo"), tmp_path)
    with pytest.raises(WeightsError, match="both parts"):
        convert_weights(tmp_path / "VeLO_RNN")


def test_bfloat16_safetensors(tmp_path):
    import ml_dtypes

    tensors = load_file(FIXTURES / "elo" / "model.safetensors")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    weights = convert_weights(tmp_path / "model.safetensors", "elo")
    expected = half["network.input.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(weights.params["mlp"]["w0"], expected)


# Haiku pickles


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["numpy", "fortran", "jax"])
def test_haiku_pickle(protocol, kind, tmp_path):
    make = {"numpy": np.asarray, "fortran": np.asfortranarray, "jax": jnp.asarray}[kind]
    theta = msgpack_restore((FIXTURES / "small_fc_lopt_h32" / "theta.state").read_bytes())
    file = tmp_path / "global_step5000.pickle"
    file.write_bytes(pickle.dumps(jax.tree.map(make, theta), protocol=protocol))
    weights = convert_weights(file, "small_fc_lopt", config={"step_mult": 0.01})
    assert weights.architecture == "small_fc_lopt"
    assert_bitwise(weights.params, canonical(theta))
    assert convert_weights(file, "mulo").architecture == "mulo"


def test_haiku_pickle_of_velo_and_elo(tmp_path):
    theta = msgpack_restore((FIXTURES / "velo" / "theta.state").read_bytes())
    file = tmp_path / "theta.pickle"
    file.write_bytes(pickle.dumps(theta))
    assert_bitwise(convert_weights(file).params, canonical(theta))
    small = msgpack_restore((FIXTURES / "small_fc_lopt_h4" / "theta.state").read_bytes())
    file.write_bytes(pickle.dumps({"nn": {"any_name": small["nn"]["~"]}}))
    assert convert_weights(file).architecture == "elo"
