"""The outer loop: it learns, it resumes bitwise, also after kill -9, also over several devices."""

import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest
from killed import killed_run

import lopt_jax
from lopt_jax.meta import cli, compilation, data, trainer
from lopt_jax.meta.config import MetaTrainConfig, from_json, to_json
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.locks import lock
from lopt_jax.meta.reports import Report
from lopt_jax.meta.tasks import Quadratic
from lopt_jax.meta.trainer import Interrupted, Result, Trainer

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


@pytest.mark.slow
def test_checkpoints_hold_stored_states_and_the_expert(tmp_path):
    config = dataclasses.replace(
        TINY, num_pairs=2, resume=0.9, expert="sgdm", expert_steps=(2, 8), outer_steps=9
    )
    first = Trainer(config).train(tmp_path)
    # The newest checkpoint is of the end; one of the way there goes on to the same.
    shutil.rmtree(tmp_path / "checkpoints" / "9")
    second = Trainer(config).train(tmp_path, resume=True)
    assert second.finished
    assert_same(second.meta_parameters, first.meta_parameters)


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    Trainer(TINY).train(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        Trainer(TINY).train(tmp_path)
    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(ValueError, match="seed"):
        Trainer(other).train(tmp_path, resume=True)


def test_killed_run_resumes_to_the_same_weights(tmp_path):
    """Killed anywhere between its 12th step and its 24th: it writes a checkpoint every third."""
    config = dataclasses.replace(TINY, outer_steps=30)
    killed_run(config, tmp_path / "run", "folder", 12, 24)
    resumed = Trainer(config).train(tmp_path / "run", resume=True)
    assert_same(resumed.meta_parameters, Trainer(config).train().meta_parameters)
    assert resumed.steps == 30


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, whole):
    Trainer(TINY).train(tmp_path, max_steps=7)
    newest = tmp_path / "checkpoints" / "7"
    for name in ("record/metadata", "state/_METADATA"):
        path = newest / name
        content = path.read_bytes()
        path.write_bytes(content[:-20])
        with pytest.raises(ValueError, match=r"checkpoints/7: expected a checkpoint of this con"):
            Trainer(TINY).train(tmp_path, resume=True)
        path.write_bytes(content)
    shutil.rmtree(newest)
    resumed = Trainer(TINY).train(tmp_path, resume=True)
    assert [r.step for r in resumed.history] == [3, 6, 9, 12]
    assert_same(resumed.meta_parameters, whole.meta_parameters)


def test_meta_parameters_that_are_not_finite_are_no_start(tmp_path):
    start = Trainer(TINY)._start()
    start["log_learning_rate"] = np.float32(np.nan)
    with pytest.raises(ValueError, match="initial: expected meta-parameters that are finite"):
        Trainer(TINY, initial=start)


@pytest.fixture
def in_the_background():
    """As whoever starts tests in the background or under nohup: Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupts(in_the_background):
    """Ctrl-C is Python's own, however the tests were started."""
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


@pytest.fixture
def clock(monkeypatch):
    """The trainer's clock goes on by ten seconds whenever it is read."""
    ticks = itertools.count(step=10.0)
    for module in (trainer, compilation):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


def test_wall_clock_budget_plans_the_steps(clock):
    config = dataclasses.replace(TINY, outer_steps=10**6, checkpoint_seconds=10**9)
    totals = []
    result = Trainer(config).train(
        max_seconds=2000.0, on_report=lambda report, total, left: totals.append(total)
    )
    # It reads the clock once a step and twice a report, so that three steps take 50 s. After six
    # some 1,800 s are left, less a margin of 20 s and of 3%.
    assert totals[0] == 10**6
    assert set(totals[1:]) == {result.total}
    assert result.steps == result.total
    assert result.ended == "finished"
    assert 6 + 3 / 50 * 1700 * 0.97 < result.total < 6 + 3 / 50 * 1800 * 0.97


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
        ("architecture=mlp_lopt", "config keys of mlp_lopt"),
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

    data: ClassVar = {"wine": "01ab"}

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
    assert record["data"] == {"wine": "01ab"}
    assert record["python"] == platform.python_version()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (row,) = json.loads((tmp_path / "run/history.json").read_text(), parse_constant=refuse)
    assert row["loss"] is row["gradient_norm"] is None
    assert row["task_scores"] == [None]
    assert row["step"] == 20


def test_configs_are_what_made_the_shipped_weights():
    for name in ("small_fc_lopt", "small_fc_lopt_h4", "celo_small", "velo_small", "celo2_small"):
        path = Path(__file__).parents[1] / "checkpoints" / name / "weights.json"
        record = json.loads(path.read_text())["metadata"]["meta_training"]
        assert record["final_loss"] < -1.6
        fields = {field.name for field in dataclasses.fields(MetaTrainConfig)}
        # Settings of later days are as if there were none.
        made_with = from_json(json.dumps({k: v for k, v in record.items() if k in fields}))
        config = CONFIGS[name]
        assert config.outer_steps == record["steps"]  # what its budget had room for
        budget = dataclasses.replace(config, outer_steps=4000, checkpoint_seconds=10_000)
        assert budget == made_with


class _WithData(Quadratic):
    """A bowl that says what its data are."""

    sha256 = "0123456789abcdef"

    def data_hashes(self):
        return {"bowls": self.sha256}


def test_resume_on_other_data_is_refused(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, outer_steps=3)
    tasks = {"quadratic": _WithData()}
    Trainer(config, tasks=tasks).train(tmp_path, max_steps=2)
    monkeypatch.setattr(_WithData, "sha256", "fedcba")
    with pytest.raises(ValueError, match=r"resume: .*bowls had sha256 0123456789ab under Python 3"):
        Trainer(config, tasks=tasks).train(tmp_path, resume=True)
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "_compile", None)  # and nothing was compiled for that
    with pytest.raises(TypeError, match="NoneType"):
        Trainer(config, tasks=tasks).train(tmp_path, resume=True)


def test_resume_of_nothing_is_an_error(tmp_path, capsys):
    arguments = ["meta-train", "tiny", "--out", str(tmp_path / "none"), "--resume"]
    assert cli.main(arguments) == 2
    assert "resume: expected checkpoints in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="resume: expected a folder"):
        Trainer(TINY).train(resume=True)


def test_a_folder_in_use_is_refused_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lopt_jax.meta.trainer.compile_all", None)
    run = tmp_path / "run"
    claim = lock(run / ".lock")
    assert cli.main(["meta-train", "tiny", "--out", str(run)]) == 2
    assert f"folder: {run} is in use by another run" in capsys.readouterr().err
    claim.close()
    (run / "weights").mkdir()
    assert cli.main(["meta-train", "tiny", "--out", str(run)]) == 2
    assert f"--out: {run} already holds weights" in capsys.readouterr().err


class _Slow:
    """In place of a lowered program: its compilation takes longer than any budget."""

    def compile(self):
        threading.Event().wait(60)


def test_the_budget_bounds_compilation_and_weights_are_written(tmp_path, monkeypatch, capsys):
    real = trainer.compile_all
    monkeypatch.setattr(
        trainer, "compile_all", lambda lowers, deadline: real([_Slow] * len(lowers), deadline)
    )
    exits = []
    monkeypatch.setattr(cli.os, "_exit", exits.append)
    out = tmp_path / "run"
    assert cli.main(["meta-train", "tiny", "--out", str(out), "--seconds", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "budget of 0.2 s ended the run before its programs were compiled, after 0 of 200" in text
    assert exits == [0]
    weights = lopt_jax.load_weights(str(out / "weights"))
    config = CONFIGS["tiny"]
    start = initial_parameters(
        config.architecture, jax.random.fold_in(jax.random.key(0), 2**31),
        dict(config.architecture_config), dict(config.gains),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, weights.params, start)


def test_the_budget_ends_a_run_between_reports(clock):
    config = dataclasses.replace(TINY, log_every=1000, outer_steps=10**6)
    result = Trainer(config).train(max_seconds=1000)
    assert result.ended == "budget"
    assert (result.finished, result.total) == (False, 10**6)
    assert 2 < result.steps == result.history[-1].step < 100


def test_an_interrupted_run_writes_its_weights(tmp_path, monkeypatch):
    def interrupted(self, *unused, **also_unused):
        result = _Diverged(self.config, None).train()
        raise Interrupted("after step 20, saved", result)

    monkeypatch.setattr(Trainer, "train", interrupted)
    assert cli.main(["meta-train", "tiny", "--out", str(tmp_path)]) == 130
    assert lopt_jax.load_weights(str(tmp_path / "weights")).architecture == "small_fc_lopt"


@pytest.mark.parametrize(
    "command", ["meta-train tiny --out run", "meta-eval --tasks digits_mlp_128"]
)
def test_without_scikit_learn_a_message_before_any_work(command, tmp_path, monkeypatch, capsys):
    for load in (data.load_tabular, data.load_patches):
        load.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("lopt_jax.meta.trainer.compile_all", None)
    monkeypatch.setattr("lopt_jax.meta.evaluate.run_curves", None)
    assert cli.main(command.split()) == 2
    printed = capsys.readouterr()
    assert "pip install 'lopt_jax[meta]'" in printed.err
    assert printed.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("config", ["tiny", "nn_adam_tiny"])
def test_smallest_config_improves_its_meta_loss(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["meta-train", config, "--out", "run"]) == 0
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
    page = (Path(__file__).parents[1] / "docs/meta_train.md").read_text()
    training, evaluation = re.findall(r"^```python title=.*?\n(.*?)^```", page, flags=re.S | re.M)
    # As it is documented, but for its size.
    small = training.replace("max_seconds=600", "max_steps=2").replace(
        "num_pairs=16", "num_pairs=2"
    )
    assert small.count("max_steps=2") == small.count("num_pairs=2") == 1
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(small, "docs/meta_train.md", "exec"), scope)
    assert scope["result"].steps == 2
    made = lopt_jax.load_weights("outputs/mine/weights")
    start = lopt_jax.load_weights("small_fc_lopt_h4")
    assert made.config == start.config
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), made.params, start.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01
    short = evaluation.replace("[200]", "[40]").replace("seeds=3", "seeds=1")
    exec(compile(short, "docs/meta_train.md", "exec"), scope)
    assert set(scope["curves"]) == {("mine", name, 40) for name in ("mine", "start", "adamw")}
