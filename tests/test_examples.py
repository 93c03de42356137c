"""The examples' arguments."""

import os
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
