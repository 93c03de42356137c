"""The commands `lopt convert`, `lopt list`, `lopt show`."""

from pathlib import Path

import pytest

from lopt_jax.cli import main
from lopt_jax.weights import Weights, convert_weights, load_weights, save_weights

FIXTURES = Path(__file__).parent / "fixtures"


def test_convert(tmp_path, capsys):
    source, target = str(FIXTURES / "velo"), str(tmp_path / "velo")
    arguments = ["convert", source, target, "--config", '{"step_mult": 0.002}']
    assert main([*arguments, "--architecture", "velo"]) == 0
    assert "velo, 40,769 numbers" in capsys.readouterr().out
    assert load_weights(target).config["step_mult"] == 0.002


def test_convert_to_pylo(tmp_path):
    source = str(FIXTURES / "small_fc_lopt_h4")
    assert main(["convert", source, str(tmp_path / "pylo"), "--to", "pylo"]) == 0
    assert convert_weights(tmp_path / "pylo").architecture == "small_fc_lopt"


def test_list(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "gs://gresearch" in lines["velo"]
    assert lines["velo"].split()[1:3] == ["velo", "no"]


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
