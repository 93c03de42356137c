"""How `lopt` ends: closed pipes, interruptions, errors."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_jax import benchmark, cli


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


def test_names_of_configs_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["meta-train", "--help"])
    text = capsys.readouterr().out
    assert "small_fc_lopt_h4" in text
    assert "--list" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--repetitions 0", "--repetitions: expected an integer of at least 1, found '0'"),
        ("--optimizers nope", "--optimizers: expected one of optax.adamw, .*; found 'nope'"),
        ("--optimizers velo:nope", "velo: expected a backend out of xla, auto, pallas"),
        ("--optimizers optax.adamw:pallas", "optax.adamw: expected a backend out of xla; found"),
        ("--show other.json", "other.json: expected records of .*'colour'"),
        ("--show none.json", "none.json: expected records of .*there are none"),
    ],
)
def test_wrong_arguments_of_the_benchmark(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "measure", None)  # nothing runs
    Path("other.json").write_text('[{"colour": "red"}]')
    Path("none.json").write_text("[]")
    with contextlib.suppress(SystemExit):  # of argparse
        assert cli.main(["bench", *arguments.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_benchmark_takes_every_backend_that_an_optimizer_has(capsys):
    told = []
    optimizers = ["velo:pallas", "optax.adamw"]
    benchmark.measure("mlp", optimizers, ["pallas"], compile_only=True, report=told.append)
    assert [re.findall("mlp: (.*?) on (.*?) ", line) for line in told] == [
        [("velo", "pallas")], [("optax.adamw", "xla")],
    ]  # fmt: skip
