"""How `lopt` ends: closed pipes, interruptions, errors."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
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


def test_an_output_that_was_closed_before_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["list"]) == 0


def test_an_output_of_ascii_takes_every_path(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["convert", "lopt", str(tmp_path / "größe")]) == 0
    assert written.getvalue().endswith(b"/gr\\xf6\\xdfe: linear, 2 numbers\n")


def test_a_platform_that_jax_does_not_find_is_one_line(monkeypatch, capsys):
    def unknown(options):
        raise RuntimeError("Unable to initialize backend 'nope': no such\nmore")

    monkeypatch.setattr(cli, "_list", unknown)
    assert cli.main(["list"]) == 2
    assert capsys.readouterr().err == "lopt: Unable to initialize backend 'nope': no such\n"


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


@pytest.mark.parametrize("model", benchmark.MODELS)
def test_benchmark_runs_what_it_lists(model):
    """Every optimizer takes the leaves of every model that `lopt bench` names."""
    shapes = benchmark.MODELS[model]()
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for name in benchmark.DEFAULT_OPTIMIZERS:
        optimizer = benchmark.OPTIMIZERS[name]
        jax.eval_shape(optimizer.make("xla").init, params)


def test_benchmark_of_matrices():
    """Each has a row; embeddings and heads are AdamW's, and Muon has the other matrices."""
    updated = {"wte": (20, 8), "qkv_w": (8, 24), "patches_w": (2, 2, 3, 8), "norm": (8,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in updated.items()}
    for name in ("celo2", "celo2_base", "elo_celo2", "optax.contrib.muon"):
        tx = benchmark.OPTIMIZERS[name].make("xla")
        state = jax.eval_shape(tx.init, params)
        updates, _ = jax.eval_shape(
            lambda g, s, p, tx=tx: tx.update(g, s, p), params, state, params
        )
        assert {k: x.shape for k, x in updates.items()} == updated
    momentum = state.inner_states["muon"].inner_state[0].mu
    assert {k for k, x in momentum.items() if hasattr(x, "shape")} == {"qkv_w", "patches_w"}
    by_adamw = lambda model: {  # noqa: E731
        name
        for name in benchmark.MODELS[model]()
        if benchmark.label((jax.tree_util.DictKey(name),), None) == "adamw"
    }
    assert by_adamw("gpt2_355m") == {"wte", "wpe"}
    assert by_adamw("vit_b16") == {"cls", "positions", "head_w", "head_b"}


@pytest.mark.parametrize(
    "arguments",
    ["meta-eval --merge records.json", "bench --show records.json"],
)
def test_a_missing_file_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err == "lopt: records.json: No such file or directory\n"
