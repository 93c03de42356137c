"""The evaluation's arithmetic, Shampoo's roots, and records of a small run."""

import contextlib
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt_jax.benchmark import random_weights
from lopt_jax.meta import cli, evaluate
from lopt_jax.meta.evaluate import Contender
from lopt_jax.meta.shampoo import inverse_root, shampoo
from lopt_jax.meta.tasks import Quadratic
from lopt_jax.weights import save_weights


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    assert evaluate.interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == 3.5
    scores = np.full((5, 3), 2.0)
    assert evaluate.bootstrap_interval(scores, 50) == (2.0, 2.0)


def test_steps_to_a_level():
    curve = np.array([3.0, 1.0, 2.0, 0.5, 0.4])
    assert evaluate.first_step_below(curve, 1.0, 100) == 40
    assert evaluate.last_step_above(curve, 1.0, 100) == 80
    assert evaluate.first_step_below(curve, 0.1, 100) is None
    assert evaluate.last_step_above(curve, 0.1, 100) is None
    assert evaluate.last_step_above(np.array([1.0, np.nan]), 5.0, 100) is None


def test_speed_up_of_faster_slower_and_broken_runs():
    base = {"horizon": 200, "valid_loss": 1.0, "adamw_steps": 50}
    assert evaluate.speed_up({**base, "steps_to_adamw": 100}) == 2.0
    assert evaluate.speed_up({**base, "steps_to_adamw": None}) == 0.25
    broken = {"horizon": 200, "valid_loss": None, "adamw_steps": None, "steps_to_adamw": None}
    assert evaluate.speed_up(broken) == 1.0 / evaluate.POINTS


@pytest.mark.parametrize("order", [2, 4])
def test_inverse_root_equals_eigendecomposition(order):
    factor = np.random.default_rng(0).normal(size=(12, 20))
    matrix = factor @ factor.T + 0.01 * np.eye(12)
    values, vectors = np.linalg.eigh(matrix)
    wanted = (vectors * values ** (-1 / order)) @ vectors.T
    found = inverse_root(jnp.asarray(matrix, jnp.float32), order)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_first_shampoo_step_equals_numpy():
    gradient = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    optimizer = shampoo(0.5, epsilon=0.1)
    params = {"w": jnp.zeros((4, 3))}
    updates, _ = optimizer.update({"w": jnp.asarray(gradient)}, optimizer.init(params))

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**-0.25) @ vectors.T

    left = root(0.1 * np.eye(4) + gradient @ gradient.T)
    right = root(0.1 * np.eye(3) + gradient.T @ gradient)
    np.testing.assert_allclose(updates["w"], -0.5 * left @ gradient @ right, rtol=1e-3, atol=1e-4)


def test_records_of_gradient_descent_on_a_bowl(tmp_path, capsys):
    sgd = Contender("adamw", lambda rate, steps: optax.sgd(rate), (0.5, 1.0))
    slow = Contender("slow", lambda rate, steps: optax.sgd(rate), (0.1,))
    curves = evaluate.run_curves({"bowl": Quadratic(3)}, [sgd, slow], (40, 80), seeds=2)
    # Gradient descent on a diagonal bowl has a closed form.
    content = Quadratic(3).sample(jax.random.key(0))
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(1), np.uint32(1)))
    start = Quadratic(3).init(key, content)["x"] - content.minimum
    curvature = np.asarray(content.curvature, np.float64)
    left = np.asarray(start, np.float64) * (1 - 0.1 * curvature / 3) ** 40
    wanted = 0.5 * np.mean(curvature * left**2)
    assert curves["bowl", "slow", 40].valid[0, 1, -1] == pytest.approx(wanted, rel=1e-3)
    records = evaluate.make_records(curves, [sgd, slow])
    assert len(records) == 2 * 2 * 2
    assert {r["learning_rate"] for r in records if r["optimizer"] == "adamw"} == {1.0}
    assert not any(r["held_out"] for r in records)
    summaries = {(s.optimizer, s.horizon): s for s in evaluate.summarise(records)}
    assert summaries["slow", 80].wins == 0.0
    assert summaries["slow", 80].speed_up < 1.0
    assert summaries["slow", 80].diverged == 0
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    assert cli.main(["meta-eval", "--merge", str(path), "--plot", str(tmp_path / "p.png")]) == 0
    assert "| 80 | slow | 1 |" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="horizons"):
        evaluate.run_curves({"bowl": Quadratic(3)}, [sgd], (30,))


def test_kept_curves_are_not_run_again(tmp_path, monkeypatch):
    tasks, rates = {"bowl": Quadratic(3)}, (0.5, 1.0)
    sgd = Contender("adamw", lambda rate, steps: optax.sgd(rate), rates)
    first = evaluate.run_curves(tasks, [sgd], (40,), seeds=2, folder=tmp_path)

    def fail(rate, steps):
        raise AssertionError("run again")

    kept = evaluate.run_curves(
        tasks, [Contender("adamw", fail, rates)], (40,), seeds=2, folder=tmp_path
    )
    np.testing.assert_array_equal(kept["bowl", "adamw", 40].valid, first["bowl", "adamw", 40].valid)
    # Another horizon is added to them; other rates or other weights are run anew.
    evaluate.run_curves(tasks, [sgd], (80,), seeds=2, folder=tmp_path)
    both = evaluate.run_curves(
        tasks, [Contender("adamw", fail, rates)], (40, 80), seeds=2, folder=tmp_path
    )
    assert set(both) == {("bowl", "adamw", 40), ("bowl", "adamw", 80)}
    part = evaluate.run_curves(tasks, [sgd], (80, 120), seeds=2, folder=tmp_path, kept_only=True)
    assert set(part) == {("bowl", "adamw", 80)}
    monkeypatch.setattr(Quadratic, "data_hashes", lambda self: {"b": "new"}, raising=False)
    with pytest.raises(AssertionError, match="run again"):
        evaluate.run_curves(tasks, [Contender("adamw", fail, rates)], (40,), 2, folder=tmp_path)
    assert evaluate.run_curves(tasks, [sgd], (80,), 2, folder=tmp_path, kept_only=True)
    monkeypatch.undo()
    for changed in (Contender("adamw", fail, (0.5,)), Contender("adamw", fail, rates, None, "new")):
        with pytest.raises(AssertionError, match="run again"):
            evaluate.run_curves(tasks, [changed], (40,), seeds=2, folder=tmp_path)


def test_an_evaluation_says_what_it_will_do_and_how_far_it_is(monkeypatch):
    still = np.zeros((2, 3, evaluate.POINTS))
    monkeypatch.setattr(
        evaluate, "_compile",
        lambda *unused: lambda horizon: evaluate.Curves(still, still, still[..., 0]),
    )  # fmt: skip
    contenders = [Contender(name, optax.sgd, (0.5, 1.0)) for name in ("a", "b")]
    lines = []
    evaluate.run_curves({"bowl": Quadratic(3)}, contenders, (40, 80), 3, lines.append)
    # 2 optimizers, 2 rates and 3 seeds at 40 and 80 steps.
    assert lines[0].startswith("to run: 24 trainings of 1,440 steps in all, by 2 programs; very ")
    assert re.search(r"s\); 1 of 2, about .* left$", lines[1])
    assert lines[2].endswith("; 2 of 2")
    assert len(lines) == 3
    assert [evaluate.describe_duration(s) for s in (40, 700, 12_600)] == ["40 s", "12 min", "3.5 h"]


def test_fewer_rates_are_spread_evenly():
    contender = Contender("a", optax.sgd, tuple(range(12)))
    assert evaluate.with_fewer_rates(contender, 3).learning_rates == (0, 6, 11)
    assert evaluate.with_fewer_rates(contender, 1).learning_rates == (6,)
    assert evaluate.with_fewer_rates(contender, 12) is contender


def test_processes_share_a_folder(tmp_path):
    tasks = {"bowl": Quadratic(3)}
    there = Contender("adamw", lambda rate, steps: optax.sgd(rate), (0.5, 1.0))
    here = Contender("slow", lambda rate, steps: optax.sgd(rate), (0.1,))
    elsewhere = evaluate.run_curves(tasks, [there], (40,), 2, folder=tmp_path / "there")
    claim = evaluate._claim(tmp_path, "bowl", there, wait=False)
    assert evaluate._claim(tmp_path, "bowl", there, wait=False) is None

    def fail(rate, steps):
        raise AssertionError("run again")

    said = []

    def other_process_ends(text):
        if text.startswith("to run"):
            return
        said.append(text)
        (tmp_path / "there" / "bowl.adamw.npz").rename(tmp_path / "bowl.adamw.npz")
        evaluate._release(claim)

    contenders = [dataclasses.replace(there, build=fail), here]
    curves = evaluate.run_curves(tasks, contenders, (40,), 2, other_process_ends, tmp_path, ahead=1)
    assert [text.split(":")[0] for text in said] == ["bowl slow"]
    np.testing.assert_array_equal(
        curves["bowl", "adamw", 40].train, elsewhere["bowl", "adamw", 40].train
    )
    assert ("bowl", "slow", 40) in curves


def test_items_run_contender_by_contender_and_past_failures(tmp_path):
    def fail(rate, steps):
        raise RuntimeError("out of memory")

    tasks = {"a": Quadratic(2), "b": Quadratic(3)}
    first = Contender("first", lambda rate, steps: optax.sgd(rate), (0.1,))
    broken = Contender("broken", fail, (0.1,))
    last = dataclasses.replace(first, name="last")
    said = []
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate.run_curves(tasks, [first, broken, last], (40,), 1, said.append, tmp_path, ahead=2)
    order = ["a first", "b first", "a broken", "b broken", "a last", "b last"]
    assert [text.split(":")[0] for text in said[1:]] == order
    kept = evaluate.run_curves(tasks, [first, broken, last], (40,), 1, None, tmp_path, False, True)
    assert set(kept) == {(task, name, 40) for task in tasks for name in ("first", "last")}


def test_seeds_share_a_problem_or_have_their_own():
    still = Contender("still", lambda rate, steps: optax.sgd(rate), (0.0,))
    for vary in (False, True):
        curves = evaluate.run_curves({"b": Quadratic(3)}, [still], (40,), 3, vary_content=vary)
        content = [Quadratic(3).sample(jax.random.fold_in(jax.random.key(0), i)) for i in range(3)]
        if not vary:
            content = [Quadratic(3).sample(jax.random.key(0))] * 3
        for seed in range(3):
            key = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))[0]
            start = Quadratic(3).init(key, content[seed])
            wanted = float(Quadratic(3).loss(start, content[seed], ()))
            found = float(curves["b", "still", 40].valid[0, seed, -1])
            assert found == pytest.approx(wanted, rel=1e-5)


def test_table_against_tuned_optimizers():
    losses = {"adamw": (1.0, 3.0), "adam": (2.0, 4.0), "lion": (1.0, None), "ours": (1.0, 2.0),
              "theirs": (2.0, 3.0)}  # fmt: skip
    records = [
        {"task": "bowl", "horizon": 40, "optimizer": name, "valid_loss": loss}
        for name, pair in losses.items()
        for loss in pair
    ]
    table = cli.format_against_tuned(records, ("adamw", "adam", "lion"))
    assert table.splitlines()[-1] == "| bowl | 40 | 2 | 3 (adam, of 2) | **1.5** | 2.5 |"


def test_tables_of_tasks():
    def row(task, horizon, optimizer, valid, train):
        return {"task": task, "horizon": horizon, "optimizer": optimizer,
                "valid_loss": valid, "train_loss": train}  # fmt: skip

    records = [
        row("b", 80, "adamw", 2.0, 1.0), row("b", 80, "adamw", 4.0, 2.0),
        row("b", 80, "ours", 3.0, 1.0), row("b", 80, "ours", 2.0, 0.5),
        row("a", 80, "adamw", 1.0, 0.1), row("b", 40, "adamw", 5.0, 6.0),
        row("b", 40, "ours", None, None),
    ]  # fmt: skip
    short, long = cli.format_tasks(records).split("\n\n")
    assert short.splitlines()[0] == "| 40 steps | a | b |"
    assert short.splitlines()[2:] == ["| adamw | not run | 5 (6) |",
                                      "| ours | not run | inf (inf) |"]  # fmt: skip
    assert long.splitlines()[2:] == ["| adamw | 1 (0.1) | 3 (1.5) |",
                                     "| ours | not run | **2.5** (0.75) |"]  # fmt: skip


def test_labels_of_weights():
    reserved = ["adamw", "adam"]
    assert cli.label_weights(["celo_small", "x/velo/"], reserved) == {
        "celo_small": "celo_small", "velo": "x/velo/",
    }  # fmt: skip
    # Where last parts collide, with one another or with a tuned optimizer, the whole path.
    assert cli.label_weights(["a/weights", "mine=c/weights", "b/weights", "d/adam"], reserved) == {
        "a/weights": "a/weights", "mine": "c/weights", "b/weights": "b/weights", "d/adam": "d/adam",
    }  # fmt: skip
    assert cli.label_weights(["weights=a", "b/weights"], reserved) == {
        "weights": "a", "b/weights": "b/weights",
    }  # fmt: skip
    for items in (["a/w", "a/w"], ["x=a", "x=b"], ["adamw=a"], ["adam"], ["=a"]):
        with pytest.raises(ValueError, match="weights: expected labels that differ"):
            cli.label_weights(items, reserved)


def test_contenders_of_one_name_are_refused_and_a_name_may_be_a_path(tmp_path):
    still = Contender("a/b", lambda rate, steps: optax.sgd(rate), (0.0,))
    tasks = {"bowl": Quadratic(3)}
    with pytest.raises(ValueError, match=r"contenders: .*'a/b'"):
        evaluate.run_curves(tasks, [still, still], (40,))
    evaluate.run_curves(tasks, [still], (40,), seeds=1, folder=tmp_path)
    kept = evaluate.run_curves(tasks, [still], (40,), 1, folder=tmp_path, kept_only=True)
    assert set(kept) == {("bowl", "a/b", 40)}


def test_wrong_arguments_are_named(capsys):
    assert cli.main(["meta-train", "no_such"]) == 2
    assert "no_such" in capsys.readouterr().err
    assert cli.main(["meta-train", "tiny", "--set", "pears=3"]) == 2
    assert "pears" in capsys.readouterr().err
    assert cli.main(["meta-eval", "--tasks", "mnist"]) == 2
    assert "mnist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds: expected an integer of at least 1, found '0'"),
        ("--seeds -1", "--seeds: expected"),
        ("--ahead 0", "--ahead: expected"),
        ("--horizons abc", "--horizons: expected an integer of at least 1, found 'abc'"),
        ("--horizons 200,", "--horizons: expected"),
        ("--merge", "--merge: expected at least one argument"),
        ("--kept-only", "--kept-only: expected --curves"),
        ("--curves empty --kept-only", "--curves: expected records of runs, found none"),
        ("--plot x.xyz", "--plot: expected a file of a type out of .*png.*, found x.xyz"),
        ("--json .", "--json: expected a file, found the folder"),
        ("--merge none.json", "--merge: expected records of runs, found none"),
        ("--merge bad.json", "bad.json: expected records of .*no .*'adamw_steps'"),
        ("--merge worse.json", "worse.json: expected records of .*found {}"),
        ("--merge worst.json", "worst.json: expected records of .*: Expecting value"),
        ("--curves kept --tasks cancer_mlp_32x2", "curves: kept/cancer_mlp_32x2.adamw.npz does"),
        ("mulo_weights", "'mulo' can be neither meta-trained nor evaluated here"),
    ],
)
def test_wrong_arguments_of_an_evaluation(arguments, message, tmp_path, monkeypatch, capsys):
    def fail(*unused, **also_unused):
        raise AssertionError("it ran")

    monkeypatch.setattr(evaluate, "_compile", fail)
    monkeypatch.chdir(tmp_path)
    Path("none.json").write_text("[]")
    Path("bad.json").write_text('[{"task": "bowl"}]')
    Path("worse.json").write_text("{}")
    Path("worst.json").write_text("")
    Path("kept").mkdir()
    Path("kept/cancer_mlp_32x2.adamw.npz").touch()
    if arguments == "mulo_weights":
        save_weights("mulo_weights", random_weights("mulo"))
    with contextlib.suppress(SystemExit):  # of argparse
        assert cli.main(["meta-eval", *arguments.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_broken_curves_are_named(content, tmp_path):
    (tmp_path / "bowl.still.npz").write_bytes(content)
    still = Contender("still", lambda rate, steps: optax.sgd(rate), (0.0,))
    with pytest.raises(ValueError, match=r"curves: .*bowl\.still\.npz does not hold .*remove it"):
        evaluate.run_curves({"bowl": Quadratic(3)}, [still], (40,), 1, folder=tmp_path)


def test_folders_of_outputs_are_made(tmp_path):
    record = {"task": "bowl", "horizon": 40, "optimizer": "adamw", "learning_rate": 0.1, "seed": 0,
              "train_loss": 1.0, "valid_loss": None, "initial_loss": 2.0, "steps_to_adamw": None,
              "steps_to_adamw_for_good": None, "adamw_steps": None}  # fmt: skip
    (tmp_path / "in.json").write_text(json.dumps([record]))
    out = tmp_path / "new" / "out.json"
    arguments = ["meta-eval", "--merge", str(tmp_path / "in.json"), "--json", str(out)]
    assert cli.main([*arguments, "--plot", str(tmp_path / "other" / "p.png")]) == 0
    assert evaluate.read_records(out) == [record]
    assert (tmp_path / "other" / "p.png").exists()


def test_benchmark_beside_released_celo_trains_as_a_plain_loop():
    path = Path(__file__).parents[1] / "benchmarks" / "released_celo.py"
    spec = importlib.util.spec_from_file_location("released_celo", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    steps, rates = 5, (3e-3, 3e-2)
    data = [part[:300] for part in benchmark.load_data("random")]
    images, test_images, labels, test_labels = data
    adam = Contender("adam", lambda rate, steps: optax.adam(rate), rates)
    results = benchmark.train(adam, steps, data)
    for rate, seed in ((rates[0], 0), (rates[1], 2)):
        params, batches = benchmark.start(seed, steps, 300)
        assert len(np.unique(batches[:2])) == 2 * benchmark.BATCH  # a pass repeats nothing
        tx = optax.adam(rate)
        state = tx.init(params)
        for batch in batches:
            gradient, _ = jax.grad(benchmark.measure, has_aux=True)(
                params, images[batch], labels[batch]
            )
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        expected = [benchmark.measure(params, images, labels)[0]]
        expected += benchmark.measure(params, test_images, test_labels)
        np.testing.assert_allclose(results[rates.index(rate), seed], expected, rtol=1e-4)
    rows = benchmark.rows_of(adam, steps, np.array([[[2.0, 1, 0.5]], [[1.0, 2, 0.25]]]))
    assert [row.split("|")[2:4] for row in rows] == [
        [" adam 0.003, best test loss ", " 2.0e+00 (2.0e+00..2.0e+00) "],
        [" adam 0.03, best train loss ", " 1.0e+00 (1.0e+00..1.0e+00) "],
    ]


def test_weights_are_evaluated_with_the_arguments_they_were_made_with():
    weights = random_weights("celo2")
    record = {"rule_options": [["adam_learning_rate_mult", 20.0]]}
    made_with = dataclasses.replace(weights, metadata={"meta_training": record})
    params = {"b": jnp.ones(3)}  # a vector: Adam's

    def step(weights):
        optimizer = evaluate.learned("a", weights).build(jnp.float32(0.1), jnp.float32(10))
        return optimizer.update(params, optimizer.init(params), params)[0]["b"]

    np.testing.assert_allclose(step(made_with), 20.0 * step(weights), rtol=1e-5)
    digests = {evaluate.learned("a", w).digest for w in (weights, made_with)}
    assert len(digests) == 2
