"""The examples' arguments, and the first ones in full."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lopt_jax

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_here(monkeypatch, name, *arguments):
    """Runs an example in this process, and returns the names that it makes."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["quickstart.py", "train_pmap.py", "train_lm.py"])
def test_help_runs_nothing(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, name, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("foo", "--mesh: expected axes and their sizes such as data=4,model=2, found 'foo'"),
        ("data=64,model=64", f"--mesh: expected at most {jax.device_count()} devices"),
    ],
)
def test_a_wrong_mesh_is_named(mesh, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "train_fsdp.py", "--mesh", mesh)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["first_nnx.py", "first_linen.py"])
def test_first_files_train(name, monkeypatch, capsys):
    """Of fifteen lines; at a tiny size, in this process."""
    path = EXAMPLES / name
    lines = path.read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in lines if line]) == 15
    losses = []
    for steps in (1, 12):
        monkeypatch.setattr(sys, "argv", [name, str(steps)])
        runpy.run_path(str(path))
        losses.append(float(capsys.readouterr().out.split()[-1]))
    assert losses[1] < 0.9 * losses[0]


def test_vision_transformer_trains_and_resumes(monkeypatch, capsys, tmp_path):
    """On scikit-learn's digits, as there is no prepared data; the message says how to get it."""
    arguments = ["--folder", tmp_path / "run", "--data", tmp_path, "--width", "16", "--layers", "1"]
    arguments += ["--batch", "32"]
    run_here(monkeypatch, "train_nnx.py", *arguments, "--steps", "40")
    printed = capsys.readouterr().out
    assert f"python -m lopt_jax.meta.prepare {tmp_path} fashion_mnist" in printed
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.7 * losses[0]
    run_here(monkeypatch, "train_nnx.py", *arguments, "--steps", "40")
    again = capsys.readouterr().out
    assert "resumed after step 40" in again
    assert again.splitlines()[-1] == printed.splitlines()[-1]  # the accuracy


def test_language_model_resumes_where_it_was(monkeypatch, capsys, tmp_path):
    """Interrupted and resumed, the losses are those of the run in one go."""
    tokens = np.random.default_rng(0).integers(0, 8, 4096).cumsum() % 16
    np.save(tmp_path / "tokens.npy", tokens.astype(np.uint16))
    arguments = ["--size", "tiny", "--tokens", tmp_path / "tokens.npy", "--vocabulary", "16"]
    arguments += ["--batch", "8", "--length", "16", "--save-every", "6", "--steps", "12"]
    run_here(monkeypatch, "train_lm.py", *arguments, "--folder", tmp_path / "whole")
    whole = read_losses(tmp_path / "whole")
    assert whole[-1] < whole[0]
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / "checkpoints" / "12")
    (parts / "losses.jsonl").write_text("")
    run_here(monkeypatch, "train_lm.py", *arguments, "--folder", parts)
    assert "resumed after step 6" in capsys.readouterr().out
    assert read_losses(parts) == whole[6:]


def read_losses(folder):
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_sharded_transformer_goes_on_from_its_checkpoint(monkeypatch, capsys, tmp_path):
    """A log that is ahead of the checkpoint loses the steps that run again."""
    arguments = "--steps 12 --layers 1 --width 16 --length 8 --batch 8 --text 10000 --save-every 6"
    arguments = [*arguments.split(), "--folder", tmp_path]
    run_here(monkeypatch, "train_fsdp.py", *arguments)
    whole = read_losses(tmp_path)
    assert len(whole) == 12
    assert whole[-1] < whole[0]
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    capsys.readouterr()
    run_here(monkeypatch, "train_fsdp.py", *arguments)
    assert "resumed after step 6" in capsys.readouterr().out
    assert read_losses(tmp_path) == whole


def test_pmap_trains(capsys):
    names = runpy.run_path(str(EXAMPLES / "train_pmap.py"))
    end = names["main"]("small_fc_lopt_h4", steps=41)
    begin = float(re.findall(r"loss ([\d.]+)", capsys.readouterr().out)[0])
    assert end < 0.9 * begin


def test_quickstart_compares():
    """A row a rate, and a column a measurement."""
    names = runpy.run_path(str(EXAMPLES / "quickstart.py"))
    training = names["digits"](40)
    for name in ("lopt", "muon"):
        optimizer, rates = names["OPTIMIZERS"][name]
        losses = names["run"](training, optimizer, rates[:2])
        assert losses.shape == (len(rates[:2]), 20)
        assert losses[:, -1].min() < 0.7 * losses[0, 0]


def test_widths_are_compared(monkeypatch, capsys):
    run_here(monkeypatch, "mup_widths.py", "--widths", "8", "16", "--steps", "40")
    printed = capsys.readouterr().out
    assert printed.count("losses of the two widths differ by at most") == 2


def test_examples_fit_on_a_few_screens():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 200, path.name


def test_numpyro_takes_an_optimizer_of_ours():
    pytest.importorskip("numpyro")
    names = runpy.run_path(str(EXAMPLES / "numpyro_svi.py"))
    losses, _ = names["infer"](lopt_jax.lopt(60), 60)
    assert losses[-10:].mean() < 0.6 * losses[0]
