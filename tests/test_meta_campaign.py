"""A chain of runs gives bitwise what one run gives, whenever a run was stopped or killed."""

import dataclasses
import errno
import itertools
import json
import re

import jax
import numpy as np
import pytest
from killed import killed_run
from test_meta_trainer import TINY, assert_same, clock  # noqa: F401 (a fixture)

from lopt_jax.meta import campaign, cli, files
from lopt_jax.meta.config import to_json
from lopt_jax.meta.locks import lock
from lopt_jax.meta.trainer import Trainer

CONFIG = dataclasses.replace(TINY, outer_steps=20, deal_every=6, log_every=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of one run without a campaign, which deals its inner trainings anew all the same."""
    return Trainer(CONFIG).train(tmp_path_factory.mktemp("whole") / "run")


def test_a_chain_of_stopped_runs_is_bitwise_one_run(tmp_path, whole):
    # The second run loses a step, and the last has the 2 that are left after three times 6.
    for stop, kept in ((6, 6), (13, 12), (None, 20)):
        result = Trainer(CONFIG).train(campaign=tmp_path, max_steps=stop)
        assert result.steps == (stop or 20)
        assert campaign.read(tmp_path).step == kept
    assert_same(result.meta_parameters, whole.meta_parameters)
    assert [r.step for r in result.history] == [3, 6, 9, 12, 15, 18, 20]
    found = campaign.read(tmp_path)
    assert found.steps == (0, 6, 12, 18, 20)
    assert [row["step"] for row in found.history] == [3, 6, 9, 12, 15, 18, 20]
    assert found.history[-1]["loss"] == pytest.approx(whole.history[-1].loss, rel=1e-5)
    assert_same(found.weights(20).params, whole.meta_parameters)
    assert [(run["from"], run["to"]) for run in found.record["runs"]] == [(0, 6), (6, 12), (12, 20)]
    assert found.record["jax"] == jax.__version__
    assert found.weights(12).metadata["meta_training"]["steps"] == 12
    assert len(found.weights(12).metadata["meta_training"]["runs"]) == 2
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 50_000


def test_whole_states_resume_where_trainings_are_dealt_anew(tmp_path, whole):
    Trainer(CONFIG).train(tmp_path, max_steps=12)
    resumed = Trainer(CONFIG).train(tmp_path, resume=True)
    assert_same(resumed.meta_parameters, whole.meta_parameters)


def test_dealing_anew_changes_the_weights(whole):
    other = Trainer(dataclasses.replace(CONFIG, deal_every=0)).train()
    first, second = (jax.tree.leaves(x.meta_parameters)[0] for x in (whole, other))
    assert not np.array_equal(first, second)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    config = dataclasses.replace(CONFIG, outer_steps=60)
    killed_run(config, tmp_path / "run", "campaign", 15, 40)
    assert campaign.read(tmp_path / "run").step in range(12, 60, 6)
    resumed = Trainer(config).train(campaign=tmp_path / "run")
    assert_same(resumed.meta_parameters, Trainer(config).train().meta_parameters)


def test_files_half_written_are_not_gone_on_from(tmp_path, whole):
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=12)
    state = (tmp_path / "state.npz").read_bytes()
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=18)
    # As if killed before the last of the files: what the others have of later steps is left out.
    (tmp_path / "state.npz").write_bytes(state)
    assert campaign.read(tmp_path).steps == (0, 6, 12)
    result = Trainer(CONFIG).train(campaign=tmp_path)
    runs = campaign.read(tmp_path).record["runs"]
    assert [(run["from"], run["to"]) for run in runs] == [(0, 12), (12, 20)]
    assert [r.step for r in result.history] == [3, 6, 9, 12, 15, 18, 20]
    assert_same(result.meta_parameters, whole.meta_parameters)
    (tmp_path / "state.npz").write_bytes(state[:-40])
    with pytest.raises(ValueError, match=r"state\.npz: expected arrays of a campaign"):
        Trainer(CONFIG).train(campaign=tmp_path)


def test_a_full_disk_leaves_the_campaign_as_it_was(tmp_path, whole, monkeypatch):
    """Whichever of the four files of a step it is that has no room."""
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=6)
    for nth in range(4):
        written = itertools.count()

        def full(descriptor, nth=nth, written=written):
            if next(written) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr(files.os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device"):
                Trainer(CONFIG).train(campaign=tmp_path)
        assert campaign.read(tmp_path).step == 6
        assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    result = Trainer(CONFIG).train(campaign=tmp_path)
    assert_same(result.meta_parameters, whole.meta_parameters)
    runs = campaign.read(tmp_path).record["runs"]
    assert [(run["from"], run["to"]) for run in runs] == [(0, 6), (6, 20)]


def test_a_state_that_is_gone_or_not_finite_is_refused(tmp_path):
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=6)
    path = tmp_path / "state.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "00000": np.full_like(arrays["00000"], np.nan)})
    with pytest.raises(ValueError, match=r"state\.npz: expected meta-parameters that are finite"):
        Trainer(CONFIG).train(campaign=tmp_path)
    np.savez(path, **{name: x for name, x in arrays.items() if name != "step"})
    with pytest.raises(ValueError, match=r"state\.npz: .* found none named 'step'"):
        campaign.read(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"holds a campaign without its state\.npz"):
        Trainer(CONFIG).train(campaign=tmp_path)
    assert (tmp_path / "weights/00000006.npz").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": {}, "data": {}}', "\xff", '{"config'])
def test_a_damaged_record_is_named(content, tmp_path):
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=6)
    (tmp_path / "campaign.json").write_text(content, encoding="latin-1")
    for use in (campaign.read, lambda folder: Trainer(CONFIG).train(campaign=folder)):
        with pytest.raises(ValueError, match=r"campaign\.json: expected "):
            use(tmp_path)
    (tmp_path / "campaign.json").unlink()
    with pytest.raises(ValueError, match=r"campaign\.json"):
        Trainer(CONFIG).train(campaign=tmp_path)


def test_a_killed_start_is_begun_anew(tmp_path, whole):
    """Even with other settings: nothing was learned."""
    Trainer(dataclasses.replace(CONFIG, seed=1)).train(campaign=tmp_path, max_steps=1)
    (tmp_path / "state.npz").unlink()  # as if killed before the last of the first files
    result = Trainer(CONFIG).train(campaign=tmp_path)
    assert_same(result.meta_parameters, whole.meta_parameters)


def test_a_campaign_of_something_else_is_refused(tmp_path):
    Trainer(CONFIG).train(campaign=tmp_path, max_steps=6)
    with pytest.raises(ValueError, match=r"other settings of \['seed'\]"):
        Trainer(dataclasses.replace(CONFIG, seed=1)).train(campaign=tmp_path)
    start = Trainer(CONFIG)._start()
    with pytest.raises(ValueError, match=r"--weights: the campaign in .* began with other weights"):
        Trainer(CONFIG, initial=start).train(campaign=tmp_path)
    claim = lock(tmp_path / ".lock")
    with pytest.raises(ValueError, match="is in use by another run"):
        Trainer(CONFIG).train(campaign=tmp_path)
    claim.close()
    with pytest.raises(ValueError, match="deal_every: expected the outer steps"):
        Trainer(TINY).train(campaign=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("clock")
def test_no_steps_are_begun_that_would_be_lost(tmp_path):
    """The clock goes on by ten seconds whenever it is read: six steps take more than 100 s."""
    config = dataclasses.replace(CONFIG, outer_steps=10**5)
    result = Trainer(config).train(campaign=tmp_path, max_seconds=500.0)
    assert result.ended == "budget"
    assert result.total == 10**5
    assert result.steps == campaign.read(tmp_path).step > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--campaign: expected neither --out nor --resume"),
        (["--resume"], "--campaign: expected neither --out nor --resume"),
        ([], "--campaign: the config tiny has no deal_every"),
        (["--seconds", "0"], "--seconds: expected a number above 0"),
        (["--set", "deal_every=30"], "deal_every: expected a multiple of log_every=20"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(arguments, message, tmp_path, capsys):
    folder = tmp_path / "campaign"
    assert cli.main(["meta-train", "tiny", "--campaign", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_the_command_begins_and_goes_on(tmp_path, capsys, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(to_json(CONFIG))
    command = ["meta-train", str(path), "--campaign", str(tmp_path / "run")]
    assert cli.main([*command, "--seconds", "100"]) == 0
    text = capsys.readouterr().out
    assert "step 20 of 20" in text
    assert re.search(r"for 20 outer steps \([\d,]+ inner steps/s\); \d+ sets of weights", text)
    assert json.loads((tmp_path / "run/campaign.json").read_text())["config"]["seed"] == 0
    assert cli.main(command) == 0
    assert "0 s for 0 outer steps" in capsys.readouterr().out
    assert cli.main([*command, "--set", "truncation_length=8", "--set", "log_every=6"]) == 2
    message = "other settings of ['truncation_length', 'log_every']"
    assert message in capsys.readouterr().err
    exits = []
    monkeypatch.setattr(cli.os, "_exit", exits.append)
    assert cli.main([*command, "--seconds", "1e-9"]) == 0
    assert "were over before the programs were compiled; give it more" in capsys.readouterr().out
    assert exits == [0]
