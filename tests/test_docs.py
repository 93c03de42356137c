"""The documentation runs, is linked, is complete, and has the figures of the records."""

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import lopt_jax
from lopt_jax import benchmark

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
PAGES += ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
GUIDE = [
    *("index", "install", "choosing", "optimizers", "recipes", "weights", "sharding"),
    *("meta_train", "mup", "coming_from", "troubleshooting", "faq"),
]
# What a title of a Python block may say: the block is then for reading.
REASONS = ("Fragment", "Needs a network", "Takes minutes", "Takes ten minutes")


def code_blocks(text):
    """(title, code) of every Python block that begins at the margin."""
    found = re.findall(r'^```python(?: title="([^"\n]*)")?\n(.*?)^```', text, flags=re.S | re.M)
    assert len(found) == len(re.findall(r"^```python", text, flags=re.M))
    return found


def run_page(name, **names):
    """Runs a page's blocks, one after another, and returns the names that they make."""
    for title, code in code_blocks((ROOT / name).read_text()):
        if title:
            assert title in REASONS, title
        else:
            exec(compile(code, name, "exec"), names)
    return names


def test_example_of_the_readme():
    """It runs as it is printed, is short, trains, and has a matrix, an embedding and a head."""
    ((title, example),) = code_blocks((ROOT / "README.md").read_text())
    assert len([line for line in example.splitlines() if line]) <= 13
    names = run_page("README.md")
    assert not title
    assert names["loss"] < 0.1  # of four classes, log(4) to begin with
    described = lopt_jax.describe(names["tx"], names["params"]).leaves
    assert {leaf.path: leaf.reason.split(":")[0] for leaf in described} == {
        "['embedding']": "embedding",
        "['head']": "head",
        "['hidden']": "matrix",
    }
    ((_, of_the_site),) = code_blocks((DOCS / "index.md").read_text())
    assert of_the_site == example


def test_examples_of_the_weights_page(tmp_path, monkeypatch):
    """What needs no network runs, and the rest says in its first line what it lacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("LOPT_JAX_OFFLINE", "1")
    (_, elsewhere) = code_blocks((DOCS / "weights.md").read_text())
    names = run_page("docs/weights.md")
    assert names["w"].architecture == "velo"
    lacking = {
        'load_weights("velo")': "the weights 'velo' are not in the cache",
        "hf://owner/repo": "hf://owner/repo: .*LOPT_JAX_OFFLINE is set",
        "convert_weights": "global_step5000.pickle: .*No such file",
        "push_to_hub": "hf://owner/repo: .*LOPT_JAX_OFFLINE is set",
    }
    for statement, (part, reason) in zip(elsewhere[1].splitlines(), lacking.items(), strict=True):
        assert part in statement
        with pytest.raises(lopt_jax.WeightsError, match=f"^{reason}"):
            exec(statement, names)


def test_recipes_train_and_go_on():
    names = run_page("docs/recipes.md")
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert names["loss"] < 0.1
    assert (names["curves"][:, -1] < 0.2 * names["curves"][:, 0]).all()
    assert names["physics_losses"][-1] < 0.1 * names["physics_losses"][0]
    # the restored NNX training is where the first one was
    assert int(names["optimizer"].step[...]) == 30
    assert names["step"](names["model"], names["optimizer"]) == pytest.approx(
        float(names["losses"][-1]), rel=0.2
    )
    description = lopt_jax.describe(
        lopt_jax.lopt(1000, stacked_axes=names["stacked"]), names["deep"]
    )
    assert {leaf.tensors for leaf in description.leaves} == {1, 4}
    # and so is the restored linen training
    assert int(names["resumed"].step) == 30
    jax.tree.map(np.testing.assert_array_equal, names["resumed"].params, names["state"].params)
    jax.tree.map(
        np.testing.assert_array_equal, names["resumed"].opt_state, names["state"].opt_state
    )


@pytest.mark.parametrize(
    "name", ["mup", "coming_from", "troubleshooting", "install", "api/optimizers"]
)
def test_examples_of_other_pages(name):
    names = run_page(f"docs/{name}.md")
    if name == "mup":
        widths = names["multipliers"]["params"]
        assert float(np.max(widths["Dense_1"]["kernel"])) == 8.0
    if name == "coming_from":
        original = lopt_jax.load_weights("velo_small").params
        jax.tree.map(np.testing.assert_array_equal, names["weights"].params, original)


def test_every_block_runs_or_says_why_not():
    run_elsewhere = {"README", "index", "weights", "recipes", "mup", "coming_from"}
    run_elsewhere |= {"troubleshooting", "install", "optimizers"}
    run_elsewhere |= {"sharding"}  # in tests/test_sharding_docs.py
    for page in PAGES:
        for title, _ in code_blocks((ROOT / page).read_text()):
            assert title in REASONS or Path(page).stem in run_elsewhere, page


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages(page):
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        if "://" in target:
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), target
        if anchor and linked.suffix == ".md" and "." not in anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)
            assert anchor in {slug(heading) for heading in headings}, (target, anchor)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    folders = "lopt_jax|pallas_kernels|benchmarks|tests|examples|docs"
    named = re.findall(rf"`((?:{folders})/[\w/-]+\.(?:py|json|sh))\b", (ROOT / page).read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_site_lists_every_page():
    """Pages of docs/design are listed by a hook."""
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert listed == {page for page in there if not page.startswith("design/")}


def test_api_has_every_public_name():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", text, flags=re.M))
    for name in documented:  # they exist
        parts = name.split(".")
        modules = [n for n in range(len(parts), 0, -1) if _is_module(".".join(parts[:n]))]
        found = importlib.import_module(".".join(parts[: modules[0]]))
        for part in parts[modules[0] :]:
            found = getattr(found, part)
    modules = {"weights", "meta"}  # name by name
    for name in set(lopt_jax.__all__) - {"__version__"} - modules:
        # a function may have the name of its module
        assert {f"lopt_jax.{name}", f"lopt_jax.{name}.{name}"} & documented, name
    for name in lopt_jax.weights.__all__:
        assert {f"lopt_jax.{name}", f"lopt_jax.weights.{name}"} & documented, name


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_user_pages_are_short():
    """Words of the README and the guide; tables made from records are no words of ours."""
    pages = ["README.md", "docs/performance.md", *(f"docs/{name}.md" for name in GUIDE)]
    text = "\n".join((ROOT / page).read_text() for page in pages)
    text = re.sub(r"<!-- made from records.*?<!-- end -->", "", text, flags=re.S)
    assert len(re.findall(r"\S*\w\S*", text)) <= 9000


def test_pages_have_the_figures_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for page in report.PAGES:
        text = (ROOT / page).read_text()
        assert len(report.PIECE.findall(text)) == text.count("made from records: ")
    assert report.main() == 0
    pieces = {path for path in PAGES if "made from records: " in (ROOT / path).read_text()}
    assert pieces == set(report.PAGES)
    # pictures have the digest of their records
    pictures = sorted((DOCS / "images").glob("gallery_*.png"))
    pictures += sorted((DOCS / "images").glob("first_*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert report.gallery.digest().encode() in picture.read_bytes(), picture.name


def test_table_of_the_evaluation_is_that_of_its_records(capsys):
    from lopt_jax.meta import cli

    records = DOCS / "benchmarks" / "meta_eval.json"
    assert cli.main(["meta-eval", "--merge", str(records)]) == 0
    assert (DOCS / "meta_eval_table.md").read_text().endswith(capsys.readouterr().out)


def test_picture_of_the_scale_suite_is_that_of_its_records():
    from lopt_jax.meta.scale import report, suite

    records = suite.current(suite.read_records(ROOT / suite.RECORDS))
    assert report.digest(records).encode() in (DOCS / "images" / "scale.png").read_bytes()


def test_losses_of_the_searches_are_those_of_their_records():
    """Of language models, whose losses are above two: every one in the tables was measured."""
    records = json.loads((DOCS / "benchmarks" / "recipe_search.json").read_text())
    measured = {f"{record['validation'][-1]:.3f}" for record in records}
    page = (DOCS / "scale.md").read_text()
    searches = page[page.index("## What was tuned on what") : page.index("### The third search")]
    searches += page[page.index("### The fourth search") :]
    rows = "\n".join(line for line in searches.splitlines() if line.startswith("|"))
    shown = re.findall(r"(?<![\d.,])[23]\.\d{3}(?!\d)", rows)
    assert len(shown) > 150
    assert [loss for loss in shown if loss not in measured] == []


def test_pages_ask_no_other_host():
    """What a built site loads is its own; the theme asks GitHub's API where it has a repo_url."""
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert "repo_url" not in config
    hooks = (DOCS / "_hooks.py").read_text()
    assert "config.repo_url" not in hooks
    # the theme fetches the program that draws these
    assert "mermaid" not in config + "".join((ROOT / page).read_text() for page in PAGES)


def test_benchmark_models_are_the_flax_models():
    """The lists that `lopt bench` times hold the shapes of the modules in benchmarks/models.py."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    for name, shapes in benchmark.MODELS.items():
        of_modules = [tuple(x.shape) for x in jax.tree.leaves(models.MODELS[name]())]
        assert sorted(shapes().values()) == sorted(of_modules)


def test_version_is_the_same_everywhere():
    assert f"\nversion: {lopt_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {lopt_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_of_the_package_has_absolute_links():
    """The build's substitutions leave no relative link, and lead to pages that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    urls = project["project"]["urls"]
    targets = re.findall(r"\]\(([^)]+)\)", text)
    pictures = re.findall(r'src="([^"]+)"', text)
    assert all(target.startswith("https://") for target in targets + pictures)
    assert len(pictures) == 2
    for picture in pictures:
        assert (ROOT / picture.partition("/main/")[2]).is_file(), picture
    pages = [t.removeprefix(urls["Documentation"]) for t in targets if urls["Documentation"] in t]
    assert len(pages) > 10
    for page in pages:
        assert (DOCS / f"{page.split('/#')[0].rstrip('/')}.md").exists(), page
