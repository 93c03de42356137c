"""Weights of a campaign ranked by trainings: values against plain loops, and where it goes on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_meta_trainer import TINY

import lopt_jax
from lopt_jax.meta import campaign, cli, selection
from lopt_jax.meta.scale import run
from lopt_jax.meta.tasks import training_tasks
from lopt_jax.meta.trainer import Trainer

CONFIG = dataclasses.replace(TINY, outer_steps=18, deal_every=3, log_every=3)
LOPT = dataclasses.replace(
    CONFIG,
    name="direction",
    tasks=("tables_mlp_16",),
    num_pairs=2,
    architecture="linear",
    architecture_config=(("initial_momentum_decays", (0.9,)),),
    gains=(("gradient", 1.0), ("momentum_0", 1.0)),
    recipe="lopt",
    schedule="constant",
    weight_decay=1.0,
    outer_steps=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    Trainer(CONFIG).train(campaign=folder)
    return folder


def chosen(folder, *tasks, **options):
    found = selection.select(
        campaign.read(folder), [selection.selection_task(name) for name in tasks], 50,
        data_folder=folder, cache=folder, say=lambda text: None, **options,
    )  # fmt: skip
    return found[:2]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (None, [60, 0, 30, 10, 40, 20, 50]),
        (3, [60, 0, 30]),
        (1, [60]),
    ],
)
def test_the_first_few_are_spread_over_all(count, wanted):
    assert selection.spread(range(0, 70, 10), count) == wanted
    assert selection.spread([5], count) == [5]


def test_a_training_is_what_its_weights_give(folder):
    """Against Adam with the learned rate in a plain loop over the same batches."""
    records, complete = chosen(folder, "quadratic", checkpoints=2, with_reference=False)
    assert complete
    assert [r["weights"] for r in records] == ["18", "0"]
    task = training_tasks()["quadratic"]
    content = task.sample(jax.random.key(0))
    for record in records:
        params = task.init(jax.random.key(0), content)
        theta = campaign.read(folder).weights(int(record["weights"])).params
        gaps = np.exp(theta["log_decay_gaps"])
        tx = optax.chain(
            optax.scale_by_adam(b1=1 - gaps[0], b2=1 - gaps[1]),
            optax.scale_by_schedule(
                lambda i: jnp.minimum(1.0, (i + 1) / 2.5)
                * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((i - 2.5) / 47.5, 0, 1)))
            ),
            optax.scale(-np.exp(theta["log_learning_rate"])),
        )  # fmt: skip
        state = tx.init(params)
        for _ in range(50):
            gradient = jax.grad(task.loss)(params, content, ())
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert record["training"] > record["validation"][-1]  # the mean of steps before the end
        assert record["validation"][-1] == pytest.approx(
            float(task.loss(params, content, ())), rel=1e-4
        )


def test_it_goes_on_where_it_stopped(folder, monkeypatch):
    trained = []
    real = run.train

    def train(*arguments):
        trained.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(run, "train", train)
    (folder / "selection.json").unlink(missing_ok=True)
    first, complete = chosen(folder, "quadratic", checkpoints=2, with_reference=False)
    assert (len(first), complete, len(trained)) == (2, True, 1)
    again, complete = chosen(folder, "quadratic", checkpoints=2, with_reference=False)
    assert (again, complete, len(trained)) == (first, True, 1)
    more, complete = chosen(folder, "quadratic", checkpoints=3, with_reference=False)
    assert (len(more), complete, len(trained)) == (3, True, 2)
    assert json.loads((folder / "selection.json").read_text()) == more
    none, complete = chosen(folder, "quadratic", seeds=2, seconds=1e-3, with_reference=False)
    assert (len(none), complete) == (3, False)


def test_the_ranking_is_by_the_mean_log_ratio():
    def record(task, weights, loss):
        return {"task": task, "weights": weights, "validation": [9.0, loss]}

    losses = {"a": {"lopt": 2.0, "0": 2.0, "5": 1.0}, "b": {"lopt": 1.0, "0": None, "5": 1.5}}
    records = [record(t, w, x) for t, row in losses.items() for w, x in row.items()]
    rows, base = selection.rank([*records, record("a", "9", 0.1)])
    assert base == "lopt"
    assert [row.label for row in rows] == ["lopt", "0", "5", "9"]
    assert rows[0].score == 0.0
    assert rows[1].score == math.inf
    assert rows[2].score == pytest.approx((math.log(0.5) + math.log(1.5)) / 2)
    assert math.isnan(rows[3].score)  # one task alone
    assert selection.best_of(rows).label == "5"
    with pytest.raises(ValueError, match="records: expected trainings to rank"):
        selection.rank([])


def test_meta_losses_are_means_since_the_kept_step_before():
    history = [{"step": step, "loss": loss} for step, loss in ((2, 1.0), (4, 3.0), (6, None))]
    kept = campaign.Kept(None, CONFIG, {}, 8, (0, 4, 6), [*history, {"step": 8, "loss": 9.0}])
    assert selection.mean_loss(kept, 0) is None
    assert selection.mean_loss(kept, 4) == 2.0
    assert selection.mean_loss(kept, 6) is None


def test_a_direction_is_trained_by_lopt_and_can_be_exported(tmp_path, capsys):
    Trainer(LOPT).train(campaign=tmp_path / "run")
    destination = tmp_path / "best"
    command = ["meta-select", str(tmp_path / "run"), "--tasks", "tables_mlp_16", "--steps", "50"]
    assert cli.main([*command, "--export", str(destination)]) == 0
    text = capsys.readouterr().out
    records = {r["weights"]: r for r in selection.read_records(tmp_path / "run")}
    assert set(records) == {"lopt", "0", "3"}
    # The start says what the shipped weights say.
    np.testing.assert_allclose(records["0"]["validation"], records["lopt"]["validation"], rtol=1e-3)
    assert records["0"]["digest"] != records["3"]["digest"]
    best = min(("0", "3"), key=lambda label: records[label]["validation"][-1])
    assert f"The best: step {best}, with losses " in text
    weights = lopt_jax.load_weights(str(destination))
    lopt_jax.lopt(10, weights)
    assert weights.metadata["selection"]["losses"].keys() == {"tables_mlp_16"}
    assert (tmp_path / "run/selection.md").read_text() in text
    assert (tmp_path / "run/selection.png").stat().st_size > 1000
    assert cli.main([*command, "--export", str(destination)]) == 2
    assert f"--export: {destination} already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gpt12m_code"], "--tasks: expected names of tuning_gpt5m, "),
        (["--tasks", "digits_transformer"], "--tasks: expected names of "),
        (["--steps", "70", "--tasks", "quadratic"], "--steps: expected a multiple of 50, found 70"),
        (["--seconds", "0"], "--seconds: expected a number above 0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(folder, arguments, message, capsys):
    assert cli.main(["meta-select", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_campaign_is_an_error(tmp_path, capsys):
    assert cli.main(["meta-select", str(tmp_path)]) == 2
    assert "folder: expected a campaign with campaign.json" in capsys.readouterr().err
