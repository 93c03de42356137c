"""push_to_hub, against a server on localhost that speaks the used part of the Hub's protocol."""

import sys
from pathlib import Path

import pytest
import weights_server

from lopt_jax.weights import Weights, WeightsError, convert_weights, load_weights, push_to_hub
from lopt_jax.weights.hub import model_card

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with weights_server.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setenv("no_proxy", "*")
        yield server


def described():
    weights = convert_weights(FIXTURES / "small_fc_lopt_h4")
    metadata = {
        "about": "a test",
        "licence": "Apache-2.0",
        "tasks": ["digits", "a\nb"],
        "meta_training": {"steps": 100, "seed": 0},
    }
    return Weights(weights.architecture, weights.config, weights.params, metadata)


def test_push_and_load(server):
    pytest.importorskip("huggingface_hub")
    weights = described()
    address = push_to_hub(weights, "owner/repo", token="hf_test")
    assert address.endswith("/owner/repo/commit/" + "0" * 40)
    files = server.repositories["owner/repo"]
    assert {"README.md", "weights.json", "params/_METADATA"} <= set(files)
    assert files["README.md"].decode() == model_card(weights, "owner/repo")
    assert load_weights("hf://owner/repo") == weights
    push_to_hub(weights, "owner/repo", token="hf_test")  # once more into the same repository


def test_card_is_made_of_the_metadata():
    card = model_card(described(), "owner/my-lopt")
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "license: apache-2.0" in head.splitlines()
    assert "library_name: lopt_jax" in head.splitlines()
    assert '- meta_training: {"steps": 100, "seed": 0}' in body
    assert '- tasks: ["digits", "a\\nb"]' in body
    assert 'load_weights("hf://owner/my-lopt")' in body
    half = model_card(Weights("velo", {}, {}, {"gen_id": "\ud800", "a\nb": 1}), "a/b")
    assert "- gen_id: \\ud800" in half.encode().decode().splitlines()
    assert "- a\\nb: 1" in half.splitlines()
    strange = Weights("velo", {}, {}, {"licence": "mine\n---\nevil: true"})
    assert "evil" not in model_card(strange, "a/b").partition("---\n\n")[0]


def test_wrong_arguments(server):
    with pytest.raises(ValueError, match="repo_id"):
        push_to_hub(described(), "no-owner")
    empty = Weights("velo", {}, {})
    with pytest.raises(WeightsError):
        push_to_hub(empty, "owner/repo", token="hf_test")
    assert not server.log


@pytest.mark.parametrize("variable", ["LOPT_JAX_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(WeightsError, match=rf"hf://owner/repo.*{variable}"):
        push_to_hub(described(), "owner/repo", token="hf_test")
    assert not server.log


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"lopt_jax\[hub\]"):
        push_to_hub(described(), "owner/repo")
