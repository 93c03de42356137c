"""How `lopt` ends: closed pipes, interruptions, errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from lopt_jax import cli


def test_a_closed_pipe_ends_it_silently():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "lopt_jax.cli", "list"],
        stdout=writer, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 128 + signal.SIGPIPE


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt("after step 3")

    monkeypatch.setattr(cli, "_list", interrupted)
    assert cli.main(["list"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "lopt: interrupted after step 3\n"
