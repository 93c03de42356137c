"""The commands `lopt convert`, `lopt list`, `lopt show`."""

from pathlib import Path

import jax
import numpy as np
import pytest

import lopt_jax
from lopt_jax.cli import main
from lopt_jax.weights import (
    Weights,
    WeightsError,
    convert_weights,
    load_weights,
    save_weights,
)
from lopt_jax.weights.catalogue import REGISTRY
from lopt_jax.weights.registry import embedded_folder

FIXTURES = Path(__file__).parent / "fixtures"


def test_convert(tmp_path, capsys):
    source, target = str(FIXTURES / "velo"), str(tmp_path / "velo")
    arguments = ["convert", source, target, "--config", '{"step_mult": 0.002}']
    assert main([*arguments, "--architecture", "velo"]) == 0
    assert "velo, 40,769 numbers" in capsys.readouterr().out
    assert load_weights(target).config["step_mult"] == 0.002


@pytest.mark.parametrize(
    ("form", "file"), [("pylo", "model.safetensors"), ("original", "theta.state")]
)
def test_convert_to_other_formats(form, file, tmp_path):
    source = str(FIXTURES / "small_fc_lopt_h4")
    assert main(["convert", source, str(tmp_path / form), "--to", form]) == 0
    assert (tmp_path / form / file).is_file()
    assert convert_weights(tmp_path / form).architecture == "small_fc_lopt"


@pytest.mark.parametrize("by", ["name", "folder"])
def test_convert_takes_what_show_takes(by, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = "celo2_small" if by == "name" else str(embedded_folder() / "celo2_small")
    for command in (["show", source], ["convert", source, "pylo", "--to", "pylo"]):
        assert main(command) == 0
    back = convert_weights("pylo")
    expected = load_weights("celo2_small")
    assert back.metadata["recommended"] == expected.metadata["recommended"]
    np.testing.assert_array_equal(back.params["mlp"]["w0"], expected.params["mlp"]["w0"])
    relabelled = [source, "ours", "--architecture", "elo_celo2", "--config", '{"exp_mult": 0.5}']
    assert main(["convert", *relabelled]) == 0
    ours = load_weights("ours")
    assert (ours.architecture, ours.config["exp_mult"]) == ("elo_celo2", 0.5)
    capsys.readouterr()
    assert main(["convert", source, "no", "--architecture", "velo"]) == 2
    assert "expected weights of velo, found weights of celo2" in capsys.readouterr().err


def test_a_name_is_no_folder_of_the_working_directory(tmp_path, monkeypatch, capsys):
    """A clone of this repository, or what one made of an optimizer, has its name."""
    monkeypatch.chdir(tmp_path)
    Path("lopt").mkdir()
    save_weights("velo_small", load_weights("celo2_small"))
    for name, architecture in (("lopt", "linear"), ("velo_small", "velo")):
        assert main(["show", name]) == 0
        assert capsys.readouterr().out.startswith(f"architecture: {architecture}\n")
        assert load_weights(name).architecture == architecture
    assert main(["show", "./velo_small"]) == 0
    assert capsys.readouterr().out.startswith("architecture: celo2\n")


def test_names_in_capitals_are_close(capsys):
    assert main(["show", "Velo_Small"]) == 2
    assert "Did you mean 'velo_small'?" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert f"lopt_jax {lopt_jax.__version__} (jax {jax.__version__}, " in capsys.readouterr().out


def test_show_without_a_network(tmp_path, capsys, monkeypatch):
    """What the catalogue knows is known offline."""
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LOPT_JAX_OFFLINE", "1")
    for name in ("velo", "rnn_mlp_lopt"):
        assert main(["show", name]) == 0
        lines = capsys.readouterr().out.splitlines()
        entry = REGISTRY[name]
        assert lines[0] == f"architecture: {entry.architecture}"
        assert f"  licence: {entry.licence}" in lines
        shown = "\n".join(lines)
        for place in entry.places:
            assert all(address in shown for address in place.files.values())
            assert all(pin in shown for pin in place.git_blob.values())
        assert lines[-1].startswith("arrays: not on this machine")
        assert "LOPT_JAX_OFFLINE is set" in lines[-1]
    assert main(["show", "no_such_name"]) == 2


def test_errors_for_missing_weights_name_those_that_ship(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LOPT_JAX_OFFLINE", "1")
    for constructor, shipped in ((lopt_jax.velo, "velo_small"), (lopt_jax.celo2, "celo2_small")):
        advice = rf": take '{shipped}' \(no network needed\), or run "
        with pytest.raises(WeightsError, match=advice):
            constructor(100)


def test_list(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "gs://gresearch" in lines["velo"]
    assert lines["velo"].split()[1:3] == ["velo", "no"]
    assert lines["lopt"].split()[1:3] == ["lopt", "yes"]  # its weights are of the linear rule


def test_show(tmp_path, capsys):
    main(["convert", str(FIXTURES / "small_fc_lopt_h4"), str(tmp_path / "w")])
    capsys.readouterr()
    assert main(["show", str(tmp_path / "w")]) == 0
    text = capsys.readouterr().out
    assert "architecture: small_fc_lopt" in text
    assert "mlp/w0: float32 (39, 4)" in text
    assert "sha256: " in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "no_such_name"],
        ["convert", "/no/such/file", "target"],
        ["convert", str(FIXTURES / "celo2"), "target", "--architecture", "velo"],
        ["convert", str(FIXTURES / "elo"), "target"],
    ],
)
def test_errors_are_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lopt: ")
    assert len(captured.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["no_such"], ["convert", "a"], ["convert", "a", "b", "--config", "[1]"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("convert", "list", "show", "meta-train", "meta-eval", "bench"):
        assert command in text


def test_show_escapes_what_a_file_says(tmp_path, capsys):
    weights = convert_weights(FIXTURES / "small_fc_lopt_h4")
    metadata = {"gen_id": "\x1b[2J\nlicence: mine", "half": "\ud800", "new\nkey": ["\x1b"]}
    forged = Weights(weights.architecture, weights.config, weights.params, metadata)
    save_weights(tmp_path / "w", forged)
    assert main(["show", str(tmp_path / "w")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"  gen_id: \x1b[2J\nlicence: mine" in lines
    assert r"  half: \ud800" in lines
    assert r'  new\nkey: ["\u001b"]' in lines
