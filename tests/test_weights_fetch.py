"""Fetching, against a server on localhost that serves the fixtures and misbehaves on request."""

import dataclasses
import datetime
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import weights_server

from lopt_jax.weights import (
    WeightsError,
    convert_weights,
    list_weights,
    load_weights,
    resolve,
    save_weights,
)
from lopt_jax.weights import registry as registry_module
from lopt_jax.weights.catalogue import REGISTRY, Entry, Place
from lopt_jax.weights.fetch import HubAddress, download, http_address
from lopt_jax.weights.registry import cache_folder

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]
VELO = (
    "/gresearch/learned_optimization/pretrained_lopts/"
    "aug12_continue_on_bigger_2xbs_200kstep_bigproblem_v2_5620"
)
HUB_VELO = "/amoudgl/velo-4000/resolve/main/theta.state"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with weights_server.running() as server:
        monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("LOPT_JAX_GCS_ENDPOINT", server.address)
        monkeypatch.setenv("LOPT_JAX_GITHUB_ENDPOINT", server.address)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("no_proxy", "*")
        for name in ("LOPT_JAX_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        folder = FIXTURES / "original_checkpoint"
        server.files[f"{VELO}/params"] = (folder / "params").read_bytes()
        server.files[f"{VELO}/config.gin"] = (folder / "config.gin").read_bytes()
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "weights"


def visible(folder):
    """What is in the cache, but for lock files."""
    if not folder.exists():
        return []
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def expected():
    return convert_weights(FIXTURES / "original_checkpoint")


def assert_same(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_good_case_is_fetched_once(server, cache):
    assert not {info.name: info for info in list_weights()}["velo"].offline
    weights = load_weights("velo")
    assert_same(weights, expected())
    assert weights.metadata["licence"] == "Apache-2.0"
    assert weights.metadata["source"].startswith("gs://gresearch/")
    body = server.files[f"{VELO}/params"]
    assert weights.metadata["sha256"] == hashlib.sha256(body).hexdigest()
    assert visible(cache) == ["velo"]
    requests = list(server.log)
    assert load_weights("velo") == weights
    assert resolve("velo", ("velo",)) == weights
    assert server.log == requests
    assert {info.name: info for info in list_weights()}["velo"].offline


def test_what_was_fetched_is_recorded(server):
    commit, generation = "1f" * 20, "1669852800000001"
    server.headers[f"{VELO}/params"] = {"x-goog-generation": generation}
    server.files["/stored"] = server.files[f"{VELO}/params"]
    server.faults["/owner/repo/resolve/main/params"] = f"{server.address}/stored"
    server.headers["/owner/repo/resolve/main/params"] = {"X-Repo-Commit": commit}
    digest = hashlib.sha256(server.files["/stored"]).hexdigest()
    day = datetime.datetime.now(datetime.UTC).date()
    load_weights("velo")
    named = load_weights("velo").metadata["fetched"]  # from the cache
    by_address = convert_weights("hf://owner/repo/params").metadata["fetched"]
    assert set(named) == {"params", "config.gin"}
    for record, path, revision in (
        (named, f"{VELO}/params", generation),
        (by_address, "/owner/repo/resolve/main/params", commit),
    ):
        assert record["params"]["url"] == server.address + path
        assert record["params"]["revision"] == revision
        assert record["params"]["sha256"] == digest
        assert 0 <= (datetime.date.fromisoformat(record["params"]["date"]) - day).days <= 1


def test_files_of_a_repository_are_of_one_commit(server):
    commit = "2e" * 20
    server.repositories["owner/repo"] = {"params": b"", "config.gin": b""}
    server.commits["owner/repo"] = commit
    for name in ("params", "config.gin"):
        server.files[f"/owner/repo/resolve/{commit}/{name}"] = server.files[f"{VELO}/{name}"]
    weights = load_weights("hf://owner/repo")
    assert_same(weights, expected())
    assert {f["revision"] for f in weights.metadata["fetched"].values()} == {commit}


def test_offline_of_the_hub_alone(server, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for address in ("hf://owner/repo", "hf://owner/repo/theta.state"):
        with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
            load_weights(address)
    assert not server.log
    assert_same(load_weights("velo"), expected())  # a bucket's


def test_next_place_after_404(server, cache):
    server.faults[f"{VELO}/params"] = 404
    server.files[HUB_VELO] = (FIXTURES / "velo" / "theta.state").read_bytes()
    # The real file is known by its name in git, and this is another one: the place is refused.
    with pytest.raises(WeightsError, match=r"404[^$]*git blob 2233e53a"):
        load_weights("velo")
    assert visible(cache) == []


def test_next_place_gives_the_weights(server, cache, monkeypatch):
    config = {"use_bugged_loss_features": False, "step_mult": 0.002}
    places = (REGISTRY["velo"].places[0], Place({"theta.state": "hf://a/b/theta.state"}, config))
    entry = Entry("velo", "velo", "Apache-2.0", places, "a test")
    monkeypatch.setitem(REGISTRY, "velo", entry)
    server.files["/a/b/resolve/main/theta.state"] = server.files[f"{VELO}/params"]
    server.faults[f"{VELO}/config.gin"] = 404  # without its config the first place is no use
    weights = load_weights("velo")
    assert_same(weights, expected())
    assert weights.metadata["source"] == "hf://a/b/theta.state"
    assert visible(cache) == ["velo"]
    assert "Bearer secret" in server.tokens


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (weights_server.truncated, "broke off"),
        (weights_server.truncated_without_length, "a flax msgpack file"),
        (404, "404"),
        (500, "500"),
        ("https://127.0.0.1:1/x", "URLError"),
        ("http://example.invalid/x", "redirected"),
        ("ftp://127.0.0.1/x", "redirected"),
        ("file:///etc/passwd", "redirected|HTTP 302"),
    ],
)
def test_faults_leave_no_trace(server, cache, fault, message):
    server.faults[f"{VELO}/params"] = fault
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights("velo")
    text = str(caught.value)
    assert "gs://gresearch" in text
    assert "hf://amoudgl/velo-4000" in text  # every place is named
    assert "run `lopt show velo`" in text
    assert len(text.splitlines()) == 1
    assert visible(cache) == []
    del server.faults[f"{VELO}/params"]
    assert_same(load_weights("velo"), expected())  # and the next try succeeds


def test_endless_body_is_cut(server, tmp_path, monkeypatch):
    server.files["/big"] = b""
    server.faults["/big"] = weights_server.endless
    with pytest.raises(WeightsError, match="at most 3000000 bytes"):
        download(f"{server.address}/big", tmp_path / "big", limit=3_000_000)
    server.faults.clear()
    server.files["/big"] = bytes(3_000_001)
    with pytest.raises(WeightsError, match="at most 3000000 bytes"):
        download(f"{server.address}/big", tmp_path / "big", limit=3_000_000)
    assert not (tmp_path / "big").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_checksum(server, cache, monkeypatch):
    digest = hashlib.sha256(server.files[f"{VELO}/params"]).hexdigest()
    files = REGISTRY["velo"].places[0].files
    for pinned in ("0" * 64, digest):
        place = Place(files, sha256={"params": pinned})
        monkeypatch.setitem(REGISTRY, "velo", Entry("velo", "velo", "MIT", (place,), "a test"))
        if pinned != digest:
            with pytest.raises(WeightsError, match=f"expected sha256 {pinned}, found {digest}"):
                load_weights("velo")
            assert visible(cache) == []
    assert_same(load_weights("velo"), expected())


def test_name_in_git_is_checked(server, tmp_path):
    server.files["/hello"] = b"hello\n"
    address, target = f"{server.address}/hello", tmp_path / "hello"
    with pytest.raises(WeightsError, match=r"expected git blob 0{40}, found ce013625"):
        download(address, target, git_blob="0" * 40)
    assert not target.exists()
    # as `echo hello | git hash-object --stdin` prints it
    download(address, target, git_blob="ce013625030ba8dba906f756967f9e9ca394464a")
    assert target.read_bytes() == b"hello\n"


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_digests_are_those_of_the_released_files(name):
    file = reference.RELEASED / name / "theta.state"
    if not file.exists():
        pytest.skip("the released weights are not here")
    first, second = REGISTRY[name].places
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert first.sha256 == second.sha256 == {"theta.state": digest}
    assert re.match(r"github://amoudgl/celo@[0-9a-f]{40}/", first.files["theta.state"])


def test_offline_message_and_by_hand(server, cache, monkeypatch, capsys):
    """The error is one line, which names the command that says the rest."""
    from lopt_jax.cli import main

    monkeypatch.setenv("LOPT_JAX_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"LOPT_JAX_OFFLINE is set\.$") as caught:
        load_weights("velo")
    assert len(str(caught.value).splitlines()) == 1
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert not server.log
    (advice,) = re.findall(r"`lopt (.*?)`", str(caught.value))
    assert main(advice.split()) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    downloads = [line[1:] for line in lines if line[0] == "download"]
    assert downloads == [
        [f"{server.address}{VELO}/{file}", "to", f"/path/to/{file}"]
        for file in ("params", "config.gin")
    ]
    (command,) = [line[1:] for line in lines if line[0] == "run"]
    assert command[:2] == ["lopt", "convert"]
    source = str(FIXTURES / "original_checkpoint" / "params")
    assert main([source if word == "/path/to/params" else word for word in command[1:]]) == 0
    assert_same(load_weights("velo"), expected())


def test_no_server_at_all(server, cache, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_GCS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("LOPT_JAX_GITHUB_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(WeightsError, match="URLError"):
        load_weights("velo")


def test_damaged_cache_says_what_to_delete(server, cache):
    load_weights("velo")
    (cache / "velo" / "weights.json").write_text("{")
    with pytest.raises(WeightsError, match=f"delete the folder {cache / 'velo'}"):
        load_weights("velo")


def test_list_names_both_files_of_a_pair(server):
    sources = {info.name: info.source for info in list_weights()}
    (pair,) = sources["velo_pylo"]
    assert pair.count("hf://") == 2
    assert [source.count("://") for source in sources["velo"]] == [1, 1, 1]
    assert sources["mulo"] == ("hf://btherien/mulo/model.safetensors",)


def test_unwritable_cache(server, monkeypatch):
    monkeypatch.setenv("LOPT_JAX_CACHE", "/dev/null/cache")
    with pytest.raises(WeightsError, match="LOPT_JAX_CACHE"):
        load_weights("velo")


def test_unsupported_name_is_not_fetched(server, monkeypatch):
    entry = dataclasses.replace(REGISTRY["rnn_mlp_lopt"], architecture="of_next_year")
    monkeypatch.setitem(REGISTRY, "rnn_mlp_lopt", entry)
    with pytest.raises(WeightsError, match="found 'of_next_year'"):
        load_weights("rnn_mlp_lopt")
    assert not server.log


def test_every_entry_converts_from_its_places(server, monkeypatch, tmp_path):
    """Serves a fixture of the right architecture at each registered address."""
    from lopt_jax.weights import export_weights

    export_weights(expected(), tmp_path / "pair")
    fixtures = {
        "mulo": FIXTURES / "mulo",
        "elo": FIXTURES / "elo",
        "celo2": FIXTURES / "celo2_adamw",
        "elo_celo2": FIXTURES / "elo_celo2",
        "adafac_mlp_lopt": FIXTURES / "small_fc_lopt_h4",
        "rnn_mlp_lopt": FIXTURES / "rnn_mlp_lopt",
        "velo_s": FIXTURES / "velo",
        "velo_pylo": tmp_path / "pair",
    }
    for name, folder in fixtures.items():
        for file, address in REGISTRY[name].places[0].files.items():
            path = http_address(address).removeprefix(server.address)
            source = folder / file
            server.files[path] = source.read_bytes() if source.exists() else b"{}"
        weights = load_weights(name)
        assert weights.architecture == REGISTRY[name].architecture
        assert weights.metadata["name"] == name
    assert load_weights("velo_s").config["ff_mult"] == 1.0  # VeLO: 100


CHILD = (
    "from lopt_jax.weights import load_weights; print('ready', flush=True);"
    "w = load_weights('velo'); print(float(w.params['lstm']['b'].sum()))"
)


def start():
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_fetch_once(server, cache):
    server.faults[f"{VELO}/params"] = weights_server.slow
    children = [start(), start()]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    wait_for(lambda: server.count(f"{VELO}/params") > 0)
    time.sleep(0.2)  # for the other to come to the lock; whenever it does, the outcome is the same
    server.go_on = True
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert server.count(f"{VELO}/params") == 1
    assert visible(cache) == ["velo"]


def test_killed_half_way(server, cache):
    server.faults[f"{VELO}/params"] = weights_server.slow
    child = start()
    wait_for(lambda: list(cache.glob(".velo.tmp-*/.params.part-*")) if cache.exists() else False)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=300)
    leftovers = visible(cache)
    assert leftovers
    assert "velo" not in leftovers
    server.go_on = True
    server.faults.clear()
    assert_same(load_weights("velo"), expected())
    assert visible(cache) == ["velo"]  # the leftovers are gone as well


def wait_for(condition):
    """Waits for what other processes do, as long as a busy machine may need to start them."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within five minutes"
        time.sleep(0.02)


# Addresses


def test_addresses(monkeypatch):
    for name in ("HF_ENDPOINT", "LOPT_JAX_GCS_ENDPOINT", "LOPT_JAX_GITHUB_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert http_address("gs://bucket/a b/c") == "https://storage.googleapis.com/bucket/a%20b/c"
    raw = "https://raw.githubusercontent.com"
    assert http_address("github://owner/repo@v1/a/b") == f"{raw}/owner/repo/v1/a/b"
    hub = "https://huggingface.co/owner/repo/resolve"
    assert http_address("hf://owner/repo/dir/file") == f"{hub}/main/dir/file"
    assert http_address("hf://owner/repo@v1/file") == f"{hub}/v1/file"
    assert HubAddress.parse("hf://owner/repo") == HubAddress("hf", "owner/repo", "main", "")


@pytest.mark.parametrize("value", ["", None])
def test_empty_variables_are_unset(monkeypatch, value):
    for name in ("HF_ENDPOINT", "LOPT_JAX_GCS_ENDPOINT", "LOPT_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert http_address("gs://a/b") == "https://storage.googleapis.com/a/b"
    assert http_address("hf://a/b/c").startswith("https://huggingface.co/a/b/")
    assert cache_folder().name == "lopt_jax"


@pytest.mark.parametrize("folder", ["~no_such_user/x", "gs://bucket/x"])
def test_cache_that_is_no_folder(monkeypatch, folder):
    monkeypatch.setenv("LOPT_JAX_CACHE", folder)
    with pytest.raises(WeightsError, match=folder):
        load_weights("velo")


@pytest.mark.parametrize(
    "address",
    [
        "https://[::1",
        "http://[::1",
        "file://[::1",
        "https://h/\u00e9",
        "https://h:x/y",
        "hf://a\ud800/b",
    ],
)
def test_addresses_that_are_none(server, address):
    with pytest.raises(WeightsError, match=re.escape(ascii(address)[1:8])):
        load_weights(address)


@pytest.mark.parametrize("scheme", ["https-like", "gs", "hf"])
def test_convert_takes_addresses(server, scheme):
    address = {
        "https-like": f"{server.address}{VELO}/params?download=true",
        "gs": f"gs:/{VELO}/params",
        "hf": "hf://owner/repo/params",
    }[scheme]
    for name in ("params", "config.gin"):
        server.files[f"/owner/repo/resolve/main/{name}"] = server.files[f"{VELO}/{name}"]
    weights = convert_weights(address)
    assert_same(weights, expected())  # config.gin was found beside it
    assert weights.metadata["source"] == address


def test_broken_neighbour_is_no_missing_neighbour(server):
    server.faults[f"{VELO}/config.gin"] = 500
    with pytest.raises(WeightsError, match="500"):
        convert_weights(f"gs:/{VELO}/params")
    server.faults[f"{VELO}/config.gin"] = 403  # a bucket says so of files that are not there
    assert convert_weights(f"gs:/{VELO}/params").config["use_bugged_loss_features"] is True


def test_hub_repository_without_a_file_name(server):
    server.repositories["owner/repo"] = {"theta.state": b"", "README.md": b"", "config.gin": b""}
    for name, path in (("theta.state", "params"), ("config.gin", "config.gin")):
        server.files[f"/owner/repo/resolve/main/{name}"] = server.files[f"{VELO}/{path}"]
    assert_same(load_weights("hf://owner/repo"), expected())
    server.repositories["owner/repo"] = {"a.state": b"", "b.state": b""}
    with pytest.raises(WeightsError, match="2 files that may be one"):
        load_weights("hf://owner/repo")
    with pytest.raises(WeightsError, match="404"):
        load_weights("hf://owner/absent")


def test_names_from_a_server_stay_inside(server, tmp_path):
    names = {
        "weights.json": b"",
        "params/../../../../evil": b"",
        "/params/x": b"",
        "params/ok": b"",
    }
    server.repositories["owner/repo"] = names
    for name in names:
        server.files[f"/owner/repo/resolve/main/{name}"] = b"evil"
    with pytest.raises(WeightsError):
        load_weights("hf://owner/repo")
    assert server.count("evil") == 0
    assert server.count("params/ok") == 1


def test_hub_checkpoint_of_ours(server, tmp_path):
    weights = expected()
    save_weights(tmp_path / "ours", weights)
    files = {
        path.relative_to(tmp_path / "ours").as_posix(): path.read_bytes()
        for path in (tmp_path / "ours").rglob("*")
        if path.is_file()
    }
    server.repositories["owner/repo"] = files
    for name, body in files.items():
        server.files[f"/owner/repo/resolve/main/{name}"] = body
    assert load_weights("hf://owner/repo") == weights
    assert convert_weights("hf://owner/repo", config={"step_mult": 3.0}).config["step_mult"] == 3.0


def test_embedded_weights_resolve_offline(server, tmp_path, monkeypatch):
    monkeypatch.setattr(registry_module, "embedded_folder", lambda: tmp_path / "checkpoints")
    weights = convert_weights(FIXTURES / "small_fc_lopt_h4")
    save_weights(tmp_path / "checkpoints" / "small_fc_lopt", weights)
    assert load_weights("small_fc_lopt") == weights
    info = list_weights()[0]
    assert (info.name, info.source, info.offline) == ("small_fc_lopt", ("embedded",), True)
    assert not server.log
