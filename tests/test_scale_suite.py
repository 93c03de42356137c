"""The scale suite without its data: which runs are wanted, records, tables, splits, resuming."""

import concurrent.futures
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt_jax.meta.scale import contenders, corpora, report, run, suite
from lopt_jax.meta.scale.contenders import Contender
from lopt_jax.meta.scale.tasks import EVIDENCE, TUNING, Split, Task, task_named

RATES = (0.1, 0.2, 0.4)
TUNED = Contender("tuned", None, tuple({"rate": rate} for rate in RATES), "rate")
UNTUNED = Contender("untuned", None, ({"rate": 1.0},), version=lambda: "now")


class Model:
    """A table of logits: what follows each token, whatever came before."""

    def init(self, key, tokens):
        return {"params": {"logits": 0.01 * jax.random.normal(key, (4, 4))}}

    def apply(self, variables, tokens):
        return variables["params"]["logits"][tokens]


def load(folder, cache):
    tokens = np.tile(np.arange(4, dtype=np.int32), 20)
    return Split(jnp.asarray(tokens), jnp.asarray(tokens), "a digest")


def sample(key, tokens, batch, augment):
    starts = jax.random.randint(key, (batch,), 0, len(tokens) - 8)
    return tokens[starts[:, None] + jnp.arange(8)]


TASK = Task(
    name="tiny",
    model=Model(),
    example=lambda tokens: (tokens[:, :-1],),
    loss=lambda logits, tokens: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    ),
    load=load,
    sample=sample,
    batch=2,
    items=7,
    horizons=(50,),
    validation_batches=1,
    lanes=2,
)


@pytest.fixture(autouse=True)
def fake_contenders(monkeypatch):
    known = {**contenders.CONTENDERS, "tuned": TUNED, "untuned": UNTUNED}
    monkeypatch.setattr(suite, "CONTENDERS", known)


def record(optimizer, rate, loss, seed=0, task="tiny", steps=50, **others):
    version = {"version": "now"} if optimizer == "untuned" else {}
    return {
        "task": task, "parameters": 2_500_000, "steps": steps, "optimizer": optimizer, **version,
        "settings": {"rate": rate}, "seed": seed, "validation": [9.0, loss], "at": [25, 50],
        "milliseconds": 1.0, **others,
    }  # fmt: skip


def wanted(contender, records, seeds=2, multiples=False):
    runs = suite.wanted(TASK, 50, contender, records, seeds, multiples)
    return [(pytest.approx(dict(one.settings)["rate"]), one.seed) for one in runs]


# -- which runs are wanted ------------------------------------------------------------------------


def test_settings_come_before_seeds():
    assert wanted(TUNED, []) == [(rate, 0) for rate in RATES]
    records = [record("tuned", 0.1, 3.0), record("tuned", 0.4, 3.0)]
    assert wanted(TUNED, records) == [(0.2, 0)]
    records.append(record("tuned", 0.2, 2.0))
    assert wanted(TUNED, records, seeds=3) == [(0.2, 1), (0.2, 2)]
    records.append(record("tuned", 0.2, 2.0, seed=1))
    assert wanted(TUNED, records, seeds=3) == [(0.2, 2)]
    assert wanted(TUNED, records) == []


@pytest.mark.parametrize(
    ("losses", "grown"),
    [((1.0, 2.0, 3.0), 0.05), ((3.0, 2.0, 1.0), 0.8), ((2.0, float("nan"), 1.0), 0.8)],
)
def test_a_grid_grows_where_its_best_lies_at_an_end(losses, grown):
    records = [record("tuned", rate, loss) for rate, loss in zip(RATES, losses, strict=True)]
    assert wanted(TUNED, records) == [(grown, 0)]
    records.append(record("tuned", grown, 5.0))
    best = RATES[int(np.nanargmin(losses))]
    assert wanted(TUNED, records) == [(best, 1)]


def test_a_grid_stops_growing():
    """After three rates, though each was better than the one before."""
    rates = [*RATES, 0.8, 1.6, 3.2]
    records = [record("tuned", rate, 1 / rate) for rate in rates]
    assert wanted(TUNED, records) == [(3.2, 1)]


def test_runs_of_what_had_the_name_before_are_made_anew():
    old = [record("untuned", 1.0, 2.0, version="before"), record("nobody", 1.0, 2.0)]
    assert suite.current(old) == []
    assert wanted(UNTUNED, old) == [(1.0, 0)]
    assert wanted(UNTUNED, [record("untuned", 1.0, 2.0)], seeds=1) == []


def test_multiples_of_what_is_untuned_are_tried_on_demand():
    tried = [(rate, 0) for rate in (1.0, 0.5, 0.7, 1.4, 2.0)]
    assert wanted(UNTUNED, [], multiples=True) == tried
    assert wanted(TUNED, [], multiples=True) == [(rate, 0) for rate in RATES]
    # a task of one lane makes its runs one after the other: what is left is still wanted
    assert wanted(UNTUNED, [record("untuned", 1.0, 2.0)], multiples=True) == tried[1:]


def test_versions_follow_recipe_and_weights():
    digests = {contenders.LOPT.version(), contenders.LOPT_CELO2.version()}
    assert len(digests) == 2
    assert contenders.ADAMW.version() == ""


# -- records --------------------------------------------------------------------------------------


def test_keys_and_files_of_records(tmp_path):
    one = suite.run_of("tiny", 50, "tuned", {"rate": 0.2 * 1.8, "a": 1}, 3)
    assert one.key == "tiny/50/tuned/a=1,rate=0.36/3"
    curve = run.Curve([50], [2.0], [1.23456789], 0.5)
    made = suite.record_of_run(one, TASK, load(None, None), curve, 16)
    assert suite.key_of(json.loads(json.dumps(made))) == one.key
    assert made["validation"] == [1.23457]
    assert made["items"] == 50 * 2 * 7
    path = tmp_path / "folder" / "records.json"
    assert suite.read_records(path) == []
    records = [made, record("tuned", 0.1, 2.0)]
    suite.write_records(path, records)
    assert suite.read_records(path) == sorted(records, key=suite.key_of)
    assert [p.name for p in path.parent.iterdir()] == ["records.json"]
    lost = {"validation": [1.0, float("nan")]}
    assert suite.final_loss(lost) == float("inf")


def test_table():
    """A tuned optimizer has its best rate; an untuned one its own, though another was better."""
    of = lambda name, rate, loss, seed=0: record(name, rate, loss, seed, "gpt", 1000)  # noqa: E731
    records = [
        of("lopt", 1.0, 2.0), of("lopt", 1.0, 2.2, 1), of("lopt", 1.4, 1.5),
        of("adamw", 0.1, 4.0), of("adamw", 0.2, 3.0), of("adamw", 0.4, float("nan")),
        record("adamw", 0.1, 1.0, task="vit"),
    ]  # fmt: skip
    assert report.table(records).splitlines() == [
        "| task | parameters | steps | lopt | adamw | lopt / adamw |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| gpt | 2.5M | 1,000 | 2.1 ±0.100 | 3 (0.2 of 3) | -30.0% |",
        "| vit | 2.5M | 50 |  | 1 (0.1 of 1) |  |",
    ]


def test_table_of_multiples():
    """Of cells in which more than one was run, and of the first seed alone."""
    of = lambda rate, loss, seed=0, task="gpt": record("lopt", rate, loss, seed, task, 1000)  # noqa: E731
    records = [
        of(1.0, 2.2), of(0.7, 2.0), of(2.0, float("nan")), of(0.7, 1.0, 1), of(1.0, 3.0, 0, "vit"),
        record("adamw", 0.1, 1.0, task="gpt"),
    ]  # fmt: skip
    assert report.multiples(records).splitlines() == [
        "| task | steps | 0.7 | 1 | 2 | 1 / best |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| gpt | 1,000 | **2** | 2.2 | inf | +10.0% |",
    ]


def test_plot(tmp_path):
    report.plot([record("lopt", 1.0, 2.0), record("adamw", 0.1, 3.0)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# -- splits, tasks --------------------------------------------------------------------------------


def test_packages_have_one_split_each():
    names = [f"package{i}" for i in range(400)]
    splits = [corpora.package_split(name) for name in names]
    assert [splits.count(s) for s in ("validation", "tuning_validation", "tuning", "train")] == [
        pytest.approx(n, abs=30) for n in (40, 40, 120, 200)
    ]
    assert corpora.package_split("numpy") == "train"
    assert corpora.package_split("jax") == "tuning"


def test_sources_of_a_split(tmp_path, monkeypatch):
    """Of its own packages alone, without tiny files, and no more than was asked for."""
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("numpy", "jax", "numpy-2.dist-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(f"# {name}\n" * 100)
        (tmp_path / name / "tiny.py").write_text("tiny")
    text = corpora.python_sources(corpora.package_split("numpy"), 10_000)
    assert text == "# numpy\n" * 100
    assert corpora.python_sources(corpora.package_split("numpy"), 20) == text[:20]


def test_tuning_tasks_are_not_evidence():
    assert not {task.name for task in EVIDENCE} & {task.name for task in TUNING}
    assert all(task_named(task.name) is task for task in (*EVIDENCE, *TUNING))
    with pytest.raises(ValueError, match=r"task: expected one of gpt12m_code, .*; found 'gpt3'"):
        task_named("gpt3")


# -- running --------------------------------------------------------------------------------------


def test_the_suite_goes_on_where_it_stopped(monkeypatch):
    build = lambda settings, horizon: optax.sgd(settings["rate"])  # noqa: E731
    contender = Contender("tuned", build, ({"rate": 1.0}, {"rate": 2.0}, {"rate": 0.5}))
    monkeypatch.setitem(suite.CONTENDERS, "tuned", contender)
    records, saved, said = [], [], []
    go_on = lambda seconds: suite.run_suite(  # noqa: E731
        [TASK], ["tuned"], records, horizons=None, seeds=2, multiples=False, seconds=seconds,
        save=lambda kept: saved.append(len(kept)), say=said.append,
    )  # fmt: skip
    monkeypatch.setattr(suite, "_milliseconds", lambda *_: 1e9)
    assert not go_on(0)
    assert records == []
    assert "no time for tiny/50/tuned/rate=1/0" in said[-1]
    monkeypatch.setattr(suite, "_milliseconds", lambda *_: 0.0)
    assert go_on(1e9)
    keys = [suite.key_of(r) for r in records]
    assert keys[:3] == [f"tiny/50/tuned/rate={rate}/0" for rate in ("1", "2", "0.5")]
    assert keys[-1] == "tiny/50/tuned/rate=2/1"
    assert saved[0] == 2  # as many as there are lanes
    assert saved[-1] == len(records)
    first, second = (r["validation"][-1] for r in records[:2])
    assert np.log(4) > first > second > 0  # each token says which is next
    monkeypatch.setattr(run, "compile_all", lambda jobs, threads: dict.fromkeys(jobs))
    assert go_on(1e9)
    assert len(records) == len(keys)


def test_compilations_are_in_the_order_given():
    futures = run.compile_all({"b": lambda: 1, "a": lambda: 2}, 1)
    assert list(futures) == ["b", "a"]
    assert [f.result() for f in futures.values()] == [1, 2]
    assert isinstance(futures["a"], concurrent.futures.Future)


# -- as a command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks gpt12m_code", "tokenizers, which is not installed: pip install 'lopt_jax.scale"),
        ("--show --records none.json", "--records: expected records .*found none in none.json"),
        ("--optimizers nope", "--optimizers: expected names of .*; found 'nope'"),
    ],
)
def test_what_is_missing_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr(corpora, "python_sources", lambda split, limit: "text")
    assert suite.command(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^scale: .*{message}", line)
