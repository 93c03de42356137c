"""Weights of a campaign ranked by trainings: values against plain loops, and where it goes on."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_meta_trainer import TINY

import lopt_jax
from lopt_jax.meta import campaign, cli, ranking, selection
from lopt_jax.meta.locks import lock
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


def test_what_was_trained_with_another_recipe_is_no_record_of_todays(tmp_path, monkeypatch):
    Trainer(LOPT).train(campaign=tmp_path)
    trained, _ = chosen(tmp_path, "tables_mlp_16", checkpoints=1)
    first = {r["weights"]: r for r in trained}  # in the order in which they were compiled
    current = selection.current_records(campaign.read(tmp_path), 50)
    assert {r["weights"] for r in current} == {"lopt", "3"}
    other = dataclasses.replace(lopt_jax.Recipe(), decay=11.0)
    monkeypatch.setattr(selection, "Recipe", lambda: other)
    assert [r["weights"] for r in selection.current_records(campaign.read(tmp_path), 50)] == [
        "lopt",  # its version is no business of this test
    ]
    again, complete = chosen(tmp_path, "tables_mlp_16", checkpoints=1)
    assert complete
    again = {r["weights"]: r for r in again}
    assert again["lopt"] == first["lopt"]
    assert again["3"]["digest"] != first["3"]["digest"]
    assert len(selection.read_records(tmp_path)) == 3


def test_a_selection_beside_another_is_refused(folder):
    with (
        lock(folder / ".selection.lock"),
        pytest.raises(ValueError, match="another selection is at work in"),
    ):
        chosen(folder, "quadratic")


def test_a_campaign_without_weights_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/weights")
    with pytest.raises(ValueError, match=r"campaign: expected weights in .*weights, found none"):
        chosen(tmp_path / "run", "quadratic")


def test_damaged_records_are_named(folder, tmp_path):
    for content in ('[{"task": "quadratic"}]', "{}", '[{"task": '):
        (tmp_path / "selection.json").write_text(content)
        with pytest.raises(ValueError, match=r"selection\.json: expected"):
            selection.read_records(tmp_path)


def record(task, weights, loss, seed=0):
    return {"task": task, "weights": weights, "seed": seed, "validation": [9.0, loss]}


def test_the_ranking_is_by_the_mean_log_ratio():
    losses = {"a": {"lopt": 2.0, "0": 2.0, "5": 1.0}, "b": {"lopt": 1.0, "0": None, "5": 1.5}}
    records = [record(t, w, x) for t, row in losses.items() for w, x in row.items()]
    rows, base = ranking.rank([*records, record("a", "9", 0.1)])
    assert base == "lopt"
    assert [row.label for row in rows] == ["lopt", "0", "5", "9"]
    assert rows[0].score == 0.0
    assert rows[1].score == math.inf
    assert rows[2].score == pytest.approx((math.log(0.5) + math.log(1.5)) / 2)
    assert math.isnan(rows[3].score)  # one task alone
    assert ranking.best_of(rows).label == "5"
    with pytest.raises(ValueError, match="records: expected trainings to rank"):
        ranking.rank([])


def test_only_seeds_that_both_have_are_compared():
    losses = {"lopt": [2.0, 4.0, 60.0], "0": [1.0, 3.0], "5": [2.0]}
    records = [record("a", w, x, i) for w, row in losses.items() for i, x in enumerate(row)]
    rows, _ = ranking.rank(records)
    assert [row.losses["a"] for row in rows] == [22.0, 2.0, 2.0]
    assert [row.score for row in rows] == pytest.approx([0.0, math.log(4 / 6), 0.0])


def test_the_base_is_one_that_did_not_diverge(tmp_path):
    """And a loss of zero is the best, not an error."""
    losses = {"lopt": None, "0": 2.0, "5": 0.0}
    rows, base = ranking.rank([record("a", w, x) for w, x in losses.items()])
    assert base == "0"
    assert [row.score for row in rows] == [math.inf, 0.0, -math.inf]
    assert ranking.best_of(rows).label == "5"
    rows, base = ranking.rank([record("a", "lopt", None), record("a", "5", None)])
    assert base == "lopt"
    assert all(math.isnan(row.score) for row in rows)
    assert ranking.best_of(rows) is None
    kept = campaign.Kept(None, CONFIG, {}, 8, (0, 5), [])
    assert "| 5 |  | inf |  |" in ranking.table(kept, rows, base)
    ranking.plot(kept, rows, base, tmp_path / "plot.png")


def test_meta_losses_are_means_since_the_kept_step_before():
    history = [{"step": step, "loss": loss} for step, loss in ((2, 1.0), (4, 3.0), (6, None))]
    kept = campaign.Kept(None, CONFIG, {}, 8, (0, 4, 6), [*history, {"step": 8, "loss": 9.0}])
    assert ranking.mean_loss(kept, 0) is None
    assert ranking.mean_loss(kept, 4) == 2.0
    assert ranking.mean_loss(kept, 6) is None


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
