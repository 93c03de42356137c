"""The examples' arguments, and the first ones in full."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "JAX_NUM_CPU_DEVICES": "2"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["quickstart.py", "train_pmap.py"])
def test_help_runs_nothing(name):
    result = run(name, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: {name}")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("foo", "--mesh: expected axes and their sizes such as data=4,model=2, found 'foo'"),
        ("data=4,model=2", "--mesh: expected at most 2 devices"),
    ],
)
def test_a_wrong_mesh_is_named(mesh, message):
    result = run("train_fsdp.py", "--mesh", mesh)
    assert result.returncode == 2
    assert message in result.stderr


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
