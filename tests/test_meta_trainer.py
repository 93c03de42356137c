"""The outer loop: it learns, it resumes bitwise, also after kill -9, also over several devices."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import lopt_jax
from lopt_jax.meta import cli
from lopt_jax.meta.config import MetaTrainConfig, from_json, to_json
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.trainer import Report, Result, Trainer

TINY = MetaTrainConfig(
    name="test",
    architecture="learned_adam",
    architecture_config=(),
    tasks=("quadratic",),
    num_pairs=4,
    truncation_length=4,
    measure_every=2,
    min_horizon=8,
    max_horizon=16,
    reparametrise=2.0,
    outer_steps=12,
    outer_learning_rate=0.1,
    outer_warmup=2,
    log_every=3,
    checkpoint_seconds=0.0,
)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole():
    return Trainer(TINY).train()


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, whole):
    first = Trainer(TINY).train(tmp_path, max_steps=7)
    assert first.steps == 7
    assert not first.finished
    second = Trainer(TINY).train(tmp_path, resume=True)
    assert second.finished
    assert_same(second.meta_parameters, whole.meta_parameters)
    assert [r.step for r in second.history] == [3, 6, 7, 9, 12]
    assert second.history[-1].loss == whole.history[-1].loss


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    Trainer(TINY).train(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        Trainer(TINY).train(tmp_path)
    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(ValueError, match="seed"):
        Trainer(other).train(tmp_path, resume=True)


_KILLED = """
import sys
from lopt_jax.meta.config import from_json
from lopt_jax.meta.trainer import Trainer
config = from_json(open(sys.argv[1]).read())
def report(r, total, left):
    print(r.step, flush=True)
Trainer(config).train(sys.argv[2], on_report=report)
"""


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    config = dataclasses.replace(TINY, outer_steps=60, tasks=("quadratic",))
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 12:
                break
        # Somewhere in the loop: it writes a checkpoint after every report.
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = Trainer(config).train(tmp_path / "run", resume=True)
    assert_same(resumed.meta_parameters, Trainer(config).train().meta_parameters)
    assert resumed.steps == 60


@pytest.fixture
def interrupts():
    """Ctrl-C is Python's own also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_run_saves_its_step_and_goes_on_from_it(tmp_path, whole):
    config = dataclasses.replace(TINY, checkpoint_seconds=1000.0)

    def interrupt(report, total, left):
        if report.step == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="after step 6, saved"):
        Trainer(config).train(tmp_path, on_report=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Trainer(config).train(tmp_path, resume=True)
    assert [r.step for r in resumed.history] == [3, 6, 9, 12]
    assert_same(resumed.meta_parameters, whole.meta_parameters)


_MESH = """
import os, sys
count = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
import jax, numpy as np
from lopt_jax.meta.config import from_json
from lopt_jax.meta.trainer import Trainer
config = from_json(open(sys.argv[1]).read())
assert len(jax.devices()) == 4
trainer = Trainer(config)
state = trainer.init()
shards = {len(x.sharding.device_set) for x in jax.tree.leaves(state.estimators)}
assert shards == {4}, shards
theta = trainer.train().meta_parameters
print(",".join(repr(float(x)) for leaf in jax.tree.leaves(theta) for x in np.ravel(leaf)))
"""


def test_four_devices_give_what_one_gives(tmp_path, whole):
    path = tmp_path / "config.json"
    path.write_text(to_json(TINY))
    out = subprocess.run(
        [sys.executable, "-c", _MESH, str(path)],
        check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    found = np.array([float(x) for x in out.stdout.strip().split(",")])
    wanted = np.concatenate([np.ravel(x) for x in jax.tree.leaves(whole.meta_parameters)])
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


def test_learned_adam_finds_a_larger_learning_rate():
    config = dataclasses.replace(
        TINY, tasks=("tables_mlp_16",), num_pairs=8, truncation_length=10, measure_every=5,
        min_horizon=20, max_horizon=40, outer_steps=60, outer_learning_rate=0.3, log_every=10,
        standard_deviation=0.03, reparametrise=1.0,
    )  # fmt: skip
    result = Trainer(config).train()
    # It starts at 1e-4, where nothing is learned in 40 steps.
    assert float(np.exp(result.meta_parameters["log_learning_rate"])) > 2e-3
    assert result.history[-1].loss < result.history[0].loss - 0.5


def test_phases_train_one_part_after_the_other():
    config = dataclasses.replace(
        TINY,
        tasks=("quadratic",),
        phases=((0.5, ("log_learning_rate",)), (0.5, ("log_decay_gaps",))),
    )
    start = initial_parameters("learned_adam", jax.random.key(0), {}, {})
    half = Trainer(config).train(max_steps=6).meta_parameters
    whole = Trainer(config).train().meta_parameters
    np.testing.assert_array_equal(half["log_decay_gaps"], start["log_decay_gaps"])
    assert float(half["log_learning_rate"]) != float(start["log_learning_rate"])
    assert float(whole["log_learning_rate"]) == float(half["log_learning_rate"])
    assert np.all(np.asarray(whole["log_decay_gaps"]) != np.asarray(start["log_decay_gaps"]))


def test_wall_clock_budget_plans_the_steps():
    config = dataclasses.replace(TINY, tasks=("quadratic",), outer_steps=10**6)
    totals = []
    result = Trainer(config).train(
        max_seconds=14.0, on_report=lambda report, total, left: totals.append(total)
    )
    assert totals[0] == 10**6
    assert totals[-1] < 10**6
    assert result.steps <= totals[-1]


def test_config_survives_json():
    for config in CONFIGS.values():
        assert from_json(to_json(config)) == config
    with pytest.raises(ValueError, match="unknown settings"):
        from_json('{"learning": 1}')
    with pytest.raises(ValueError, match="sum to 1"):
        dataclasses.replace(TINY, phases=((0.5, ()),))
    with pytest.raises(ValueError, match="unknown names"):
        Trainer(dataclasses.replace(TINY, tasks=("mnist",)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective=3", "objective: expected a JSON object, found 3"),
        ('objective={"bad":1}', "objective: unknown settings"),
        ('objective={"floor":"x"}', "objective: floor: expected a number, found 'x'"),
        ('objective={"floor":0}', "objective: floor: expected a number above 0"),
        ("estimator=nope", "estimator: expected one of full_es, "),
        ("reparametrise_level=x", "reparametrise_level: expected one of global, "),
        ("backend=pallas", "backend: expected one of xla, auto"),
        ("num_pairs=abc", "num_pairs: expected an integer, found 'abc'"),
        ("num_pairs=true", "num_pairs: expected an integer, found True"),
        ("num_pairs=0", "num_pairs: expected at least 1, found 0"),
        ("seed=abc", "seed: expected an integer"),
        ("seed=4294967296", "seed: expected less than"),
        ("outer_learning_rate=abc", "outer_learning_rate: expected a number"),
        ("outer_learning_rate=NaN", "outer_learning_rate: expected a finite number"),
        ("standard_deviation=0", "standard_deviation: expected a number above 0"),
        ("reparametrise=0.5", "reparametrise: expected at least 1"),
        ("log_every=0", "log_every: expected at least 1"),
        ("measure_every=0", "measure_every: expected at least 1"),
        ("outer_steps=0", "outer_steps: expected at least 1"),
        ("architecture_config=3", "architecture_config: expected a list"),
        ("architecture_config=[]", "architecture_config: expected the sizes of a small_fc_lopt"),
        ('architecture_config=[["hidden_size", 4.5], ["hidden_layers", 2]]', "architecture_config"),
        ("architecture=velo", "architecture_config: .*missing: .'lstm_hidden_size'"),
        ("architecture=nope", "architecture: 'nope'"),
        ("architecture=celo_adam", "architecture: no meta-training start"),
        ("gains=[[1, 2]]", r"gains\[0\]\[0\]: expected a text, found 1"),
        ('gains=[["zzz", 2]]', "gains: unknown features"),
        ('scales=[["zzz", 2]]', "scales: .* no meta-parameters .'zzz'"),
        ('scales=[["mlp", 0]]', "scales: expected factors above 0"),
        ("phases=3", "phases: expected a list"),
        ("phases=[[1.0]]", r"phases\[0\]: expected 2 values"),
        ('phases=[[1.0, ["zzz"]]]', "phases: .* no meta-parameters .'zzz'"),
        ("phases=[[2.0, []], [-1.0, []]]", "phases: expected fractions of at least 0"),
        ("tasks=tables_mlp_32x2", "tasks: expected a list in brackets, found 'tables_mlp_32x2'"),
        ("tasks=[]", "tasks: expected at least one"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(setting, message, capsys, monkeypatch):
    def fail(*unused, **also_unused):
        raise AssertionError("it ran")

    monkeypatch.setattr(Trainer, "train", fail)
    assert cli.main(["meta-train", "small_fc_lopt_h4", "--set", setting]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_wrong_settings_are_errors_of_their_type():
    with pytest.raises(TypeError, match=r"num_pairs: expected an integer, found 1\.5"):
        dataclasses.replace(TINY, num_pairs=1.5)
    with pytest.raises(ValueError, match="max_horizon: expected at least 1"):
        dataclasses.replace(TINY, max_horizon=-1)
    dataclasses.replace(TINY, tasks=["quadratic"], gradient_clip=1)


class _Diverged:
    """In place of a Trainer: a run whose last losses are not finite."""

    def __init__(self, config, initial):
        arguments = config.architecture, jax.random.key(0), dict(config.architecture_config)
        self.theta = initial_parameters(*arguments, dict(config.gains))

    def train(self, *unused, **also_unused):
        report = Report(20, 1.0, math.nan, math.nan, 1.0, 1.0, math.inf, (math.nan,))
        return Result(self.theta, [report], 20, 1.0, True)


def test_weights_are_saved_whatever_the_last_loss_was(tmp_path, monkeypatch):
    monkeypatch.setattr("lopt_jax.meta.trainer.Trainer", _Diverged)
    tmp_path.joinpath("run").mkdir()
    assert cli.main(["meta-train", "tiny", "--out", str(tmp_path / "run")]) == 0
    record = lopt_jax.load_weights(str(tmp_path / "run/weights")).metadata["meta_training"]
    assert record["final_loss"] is None
    assert record["steps"] == 20

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (row,) = json.loads((tmp_path / "run/history.json").read_text(), parse_constant=refuse)
    assert row["loss"] is row["gradient_norm"] is None
    assert row["task_scores"] == [None]
    assert row["step"] == 20


@pytest.mark.slow
def test_smallest_config_improves_its_meta_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["meta-train", "tiny", "--out", "run"]) == 0
    history = json.loads(Path("run/history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert Path("run/weights").is_dir()
    assert Path("run/curves.png").stat().st_size > 1000
    arguments = ["meta-eval", "run/weights", "--tasks", "cancer_mlp_32x2", "--horizons", "80"]
    assert cli.main([*arguments, "--baselines", "adamw", "--seeds", "2", "--json", "r.json"]) == 0
    records = json.loads(Path("r.json").read_text())
    assert {r["optimizer"] for r in records} == {"adamw", "weights"}
    assert all(r["held_out"] for r in records)


@pytest.mark.slow
def test_documented_continuation_on_ones_own_task(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/meta_training.md").read_text()
    section = page.split("## Continue on your own tasks")[1]
    code = section.split("```python")[1].split("```")[0]
    # As it is documented, but for its size.
    small = code.replace("max_seconds=600", "max_steps=2").replace(
        "outer_learning_rate=3e-4,", "outer_learning_rate=3e-4, num_pairs=2,"
    )
    assert small.count("max_steps=2") == small.count("num_pairs=2") == 1
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(small, "docs/meta_training.md", "exec"), scope)
    assert scope["result"].steps == 2
    made = lopt_jax.load_weights("outputs/mine/weights")
    start = lopt_jax.load_weights("small_fc_lopt")
    assert made.config == start.config
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), made.params, start.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01
