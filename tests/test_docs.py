"""What the documentation says runs."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import lopt_jax
from lopt_jax import benchmark

ROOT = Path(__file__).parents[1]


def code_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_example_of_the_readme():
    """It runs as it is printed, is short, and trains."""
    (example,) = code_blocks((ROOT / "README.md").read_text())
    assert len([line for line in example.splitlines() if line]) <= 10
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    start = names["loss_fn"]({"w": jnp.ones((8, 4)), "b": jnp.zeros((4,))}, jnp.ones((2, 8)))
    assert names["loss"] < 0.9 * start


def test_examples_of_the_weights_page(tmp_path, monkeypatch):
    """What needs no network runs, and the rest says in its first line what it lacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LOPT_JAX_OFFLINE", "1")
    here, elsewhere = code_blocks((ROOT / "docs" / "weights.md").read_text())
    names = {}
    exec(compile(here, "weights.md", "exec"), names)
    assert names["w"].architecture == "velo"
    lacking = {
        'load_weights("velo")': "the weights 'velo' are not in the cache",
        "hf://owner/repo": "hf://owner/repo: .*LOPT_JAX_OFFLINE is set",
        "convert_weights": "global_step5000.pickle: .*No such file",
        "push_to_hub": "hf://owner/repo: .*LOPT_JAX_OFFLINE is set",
    }
    for statement, (part, reason) in zip(elsewhere.splitlines(), lacking.items(), strict=True):
        assert part in statement
        with pytest.raises(lopt_jax.WeightsError, match=f"^{reason}"):
            exec(statement, names)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_table_of_the_evaluation_is_that_of_its_records(capsys):
    from lopt_jax.meta import cli

    records = ROOT / "docs" / "benchmarks" / "meta_eval.json"
    assert cli.main(["meta-eval", "--merge", str(records)]) == 0
    assert (ROOT / "docs" / "meta_eval_table.md").read_text().endswith(capsys.readouterr().out)


def test_table_of_the_scale_suite_is_that_of_its_records():
    from lopt_jax.meta.scale import report, suite

    records = suite.read_records(ROOT / suite.RECORDS)
    assert report.table(suite.current(records)) in (ROOT / "docs" / "scale.md").read_text()


def test_benchmark_models_are_the_flax_models():
    """The lists that `lopt bench` times hold the shapes of the modules in benchmarks/models.py."""
    import importlib.util

    import jax

    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    for name, shapes in benchmark.MODELS.items():
        of_modules = [tuple(x.shape) for x in jax.tree.leaves(models.MODELS[name]())]
        assert sorted(shapes().values()) == sorted(of_modules)
