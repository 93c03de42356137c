"""Our Orbax checkpoints: whole or not there, readable anywhere, cheap to import."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

import lopt_jax
from lopt_jax.weights import (
    Weights,
    WeightsError,
    convert_weights,
    export_weights,
    list_weights,
    load_weights,
    save_weights,
)
from lopt_jax.weights import store as store_module

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights():
    return convert_weights(FIXTURES / "velo_bugged_flags")


@pytest.fixture
def saved(weights, tmp_path):
    save_weights(tmp_path / "w", weights)
    return tmp_path / "w"


def test_round_trip(weights, saved):
    loaded = load_weights(saved)
    assert loaded == weights
    assert loaded.metadata["sha256"] == weights.metadata["sha256"]
    assert load_weights(str(saved)) == weights
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_is_a_plain_orbax_checkpoint(weights, saved):
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(saved / "params")
    np.testing.assert_array_equal(restored["mlp"]["w0"], weights.params["mlp"]["w0"])


def test_loads_while_tracing(weights, saved):
    # A constructor that is called inside jit loads its default weights there.
    @jax.jit
    def first():
        loaded = load_weights(saved)
        assert not isinstance(loaded.params["lstm"]["b"], jax.core.Tracer)
        return loaded.params["lstm"]["b"]

    np.testing.assert_array_equal(first(), weights.params["lstm"]["b"])


def test_saving_replaces_weights_and_nothing_else(weights, saved, tmp_path):
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    save_weights(saved, other)
    assert load_weights(saved) == other
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="mine"):
        save_weights(tmp_path / "mine", weights)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "empty", weights)
    assert load_weights(tmp_path / "empty") == weights


def test_failed_save_leaves_what_was_there(weights, saved, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(store_module, "_replace_folder", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(saved, jax.tree.map(lambda leaf: leaf + 1, weights))
    assert load_weights(saved) == weights
    assert [path.name for path in saved.parent.iterdir()] == ["w"]


def test_invalid_weights_are_not_saved(weights, tmp_path):
    bad = jax.tree.map(lambda leaf: leaf * np.nan, weights)
    with pytest.raises(WeightsError, match="NaN"):
        save_weights(tmp_path / "bad", bad)
    wrong = Weights(weights.architecture, weights.config, weights.params, {"x": float("nan")})
    with pytest.raises(WeightsError, match="JSON"):
        save_weights(tmp_path / "bad", wrong)
    large = Weights(weights.architecture, weights.config, weights.params, {"x": "y" * 2**20})
    with pytest.raises(WeightsError, match="1048576"):  # which load_weights would refuse
        save_weights(tmp_path / "bad", large)
    assert not list(tmp_path.iterdir())


def edit(path, **changes):
    file = path / "weights.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"format": "other"}, "format"),
        ({"architecture": "no_such"}, "an architecture out of"),
        ({"architecture": "small_fc_lopt"}, "config keys"),
        ({"config": {"lstm_hidden_size": 64, "param_inits": 8}}, "initial_hidden of shape"),
        ({"config": {"lstm_hidden_size": 32, "param_inits": 2**20}}, "bytes"),
        ({"config": []}, "config"),
        ({"metadata": None}, "metadata"),
        ({"metadata": json.loads('{"a":' * 100 + "1" + "}" * 100)}, "w: .*nested at most 64 deep"),
    ],
)
def test_wrong_descriptions(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(WeightsError, match=message):
        load_weights(saved)


def test_missing_parts(saved, tmp_path):
    with pytest.raises(WeightsError, match="no such folder"):
        load_weights(tmp_path / "absent")
    with pytest.raises(WeightsError, match="convert_weights"):
        load_weights(FIXTURES / "velo" / "theta.state")
    with pytest.raises(WeightsError, match="neither"):
        load_weights("no_such_name")
    (saved / "weights.json").write_text("{")
    with pytest.raises(WeightsError, match="a JSON file"):
        load_weights(saved)
    (saved / "weights.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match="a JSON file"):
        load_weights(saved)
    (saved / "weights.json").unlink()
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(saved)


def test_arrays_of_another_type_or_shape(weights, saved, tmp_path):
    edit(saved, files={})

    def replace_params(params):
        shutil.rmtree(saved / "params")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(saved / "params", args=ocp.args.PyTreeSave(params))

    params = jax.tree.map(np.asarray, weights.params)
    replace_params({**params, "mix": {**params["mix"], "b": np.zeros(32, np.int32)}})
    with pytest.raises(WeightsError, match="mix/b to be a float32 array"):
        load_weights(saved)
    replace_params({**params, "mix": {**params["mix"], "b": np.zeros(33, np.float32)}})
    with pytest.raises(WeightsError, match=r"mix/b of shape \(32,\)"):
        load_weights(saved)
    replace_params({key: value for key, value in params.items() if key != "mix"})
    with pytest.raises(WeightsError, match="mix/"):
        load_weights(saved)
    replace_params({**params, "mix": {**params["mix"], "b": np.full(32, np.inf, np.float32)}})
    with pytest.raises(WeightsError, match="finite"):
        load_weights(saved)
    shutil.rmtree(saved / "params")
    with pytest.raises(WeightsError, match="an Orbax PyTree checkpoint"):
        load_weights(saved)


def test_damaged_file_is_named(saved):
    manifest = saved / "params" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"manifest\.ocdbt.*sha256.*damaged"):
        load_weights(saved)
    edit(saved, files={"../../x": "0"})
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(saved)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_loads_on_another_number_of_devices(weights, saved):
    code = (
        "import jax, lopt_jax.weights as w;"
        f"x = w.load_weights({str(saved)!r});"
        "print(jax.device_count(), float(x.params['lstm']['w'].sum()))"
    )
    count, total = run(code, XLA_FLAGS="--xla_force_host_platform_device_count=4").split()
    assert int(count) == 4
    assert float(total) == pytest.approx(float(weights.params["lstm"]["w"].sum()), rel=1e-5)


def test_import_is_light():
    code = (
        "import sys, lopt_jax.weights, lopt_jax.cli;"
        "heavy = {'orbax', 'tensorstore', 'fsspec', 'huggingface_hub', 'rich', 'safetensors'};"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    assert run(code).strip() == "[]"


def rewrite_header(folder, **changes):
    """Changes what the .zarray of one array declares, as somebody hostile would."""
    edit(folder, files={})
    database = {"driver": "ocdbt", "base": f"file://{folder}/params/"}
    values = ts.KvStore.open(database).result()
    header = json.loads(values.read("mix.b/.zarray").result().value)
    values.write("mix.b/.zarray", json.dumps({**header, **changes}).encode()).result()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # TensorStore reserves an element as soon as such an array is opened: 16 GB here.
        ({"dtype": [["a", "<f4", [2**32]]]}, "mix/b to be a float32 array"),
        ({"dtype": "<f8"}, "mix/b to be a float32 array"),
        ({"shape": [2**40], "chunks": [2**40]}, "mix/b of at most"),
        ({"shape": [2**20], "chunks": [2**20]}, r"mix/b of shape \(32,\)"),
        ({"shape": "long"}, "mix/b of at most"),
        ({"chunks": [2**40]}, "mix/b in one chunk"),
        ({"compressor": {"id": "blosc"}}, "mix/b with zstd"),
        ({"filters": [{"id": "delta"}]}, "mix/b with zstd"),
        ({"fill_value": [1] * 9}, "mix/b with zstd"),
    ],
)
def test_headers_are_checked_before_arrays_are_opened(saved, monkeypatch, changes, message):
    rewrite_header(saved, **changes)
    monkeypatch.setattr(ts, "open", None)
    with pytest.raises(WeightsError, match=message):
        load_weights(saved)


def test_arrays_of_no_chunk_are_not_zero(saved):
    edit(saved, files={})
    ts.KvStore.open({"driver": "ocdbt", "base": f"file://{saved}/params/"}).result().delete_range(
        ts.KvStore.KeyRange("mix.b/0", "mix.b/1")
    ).result()
    with pytest.raises(WeightsError, match="Orbax checkpoint"):
        load_weights(saved)


def test_orbax_that_says_nothing_of_ocdbt(weights, saved):
    """Releases 0.11.17 to 0.11.30 leave the word out: the manifest tells."""
    edit(saved, files={})
    tree = saved / "params" / "_METADATA"
    document = json.loads(tree.read_text())
    document.pop("use_ocdbt", None)
    tree.write_text(json.dumps(document))
    assert load_weights(saved) == weights
    (saved / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(WeightsError, match="zarr 2 in OCDBT"):
        load_weights(saved)


def test_what_cannot_be_read_back_is_not_saved(weights, saved, monkeypatch):
    other = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
    monkeypatch.setattr(store_module, "_checkpointer", lambda: other)  # as another release may be
    with pytest.raises(WeightsError, match=r"read back.*zarr 2.*orbax-checkpoint \d.*install"):
        save_weights(saved, jax.tree.map(lambda leaf: leaf + 1, weights))
    assert load_weights(saved) == weights
    assert [path.name for path in saved.parent.iterdir()] == ["w"]


@pytest.mark.parametrize("changes", [{"use_zarr3": True}, {"use_ocdbt": False}])
def test_other_layouts_of_orbax_are_named(saved, changes):
    edit(saved, files={})
    tree = saved / "params" / "_METADATA"
    tree.write_text(json.dumps({**json.loads(tree.read_text()), **changes}))
    with pytest.raises(WeightsError, match=r"zarr 2 in OCDBT.*save_weights"):
        load_weights(saved)


@pytest.mark.parametrize(
    "name", ["params/_METADATA", "params/manifest.ocdbt", "params/more", "weights.json"]
)
def test_only_regular_files_are_opened(saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)  # opening one to read waits until somebody writes
    with pytest.raises(WeightsError, match="something else of that name"):
        load_weights(saved)


def test_many_or_large_files_are_refused(saved, monkeypatch):
    with (saved / "params" / "large").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(WeightsError, match=r"large.*at most"):
        load_weights(saved)
    (saved / "params" / "large").unlink()
    monkeypatch.setattr(store_module, "MAX_LEAVES", 5)
    with pytest.raises(WeightsError, match="at most 5 files"):
        load_weights(saved)


def test_loading_while_others_save(weights, saved):
    versions = [weights, jax.tree.map(lambda leaf: leaf + 1, weights)]
    done = threading.Event()
    failures = []

    def save(version):
        try:
            while not done.is_set():
                save_weights(saved, version)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            assert load_weights(saved) in versions
            assert convert_weights(saved) in versions
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert [path.name for path in saved.parent.iterdir()] == ["w"]


def test_reader_between_two_renames_of_a_writer(saved, monkeypatch):
    aside = saved.with_name("aside")
    saved.rename(aside)
    look = store_module._is_being_replaced

    def writer_ends(folder):
        if aside.exists():
            aside.rename(folder)
        return look(folder)

    monkeypatch.setattr(store_module, "_is_being_replaced", writer_ends)
    assert store_module.is_checkpoint(saved)


def test_saving_through_a_link(weights, saved, tmp_path):
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(saved)
    dangling.symlink_to("new")
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    for place in (link, dangling):
        save_weights(place, other)
        assert place.is_symlink()
    assert load_weights(saved) == load_weights(tmp_path / "new") == other
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"):
        save_weights(loop, other)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["dangling", "link", "loop", "new", "w"]


def test_home_is_expanded_everywhere(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    small = convert_weights(FIXTURES / "small_fc_lopt_h4")
    for index, kind in enumerate((str, Path)):
        save_weights(kind(f"~/ours{index}"), weights)
        assert load_weights(kind(f"~/ours{index}")) == weights
        assert convert_weights(kind(f"~/ours{index}")) == weights
        export_weights(small, kind(f"~/pylo{index}"))
        assert convert_weights(kind(f"~/pylo{index}")).architecture == "small_fc_lopt"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def functions_of_paths(weights):
    """What takes a path, from the path alone."""
    return (
        load_weights,
        convert_weights,
        lambda path: save_weights(path, weights),
        lambda path: export_weights(weights, path),
    )


@pytest.mark.parametrize(
    "path", ["", "~no_such_user/x", "a\0b", "a\ud800", Path("~no_such_user/x")]
)
def test_paths_that_name_nothing(weights, path):
    for function in functions_of_paths(weights):
        with pytest.raises(WeightsError, match="expected a path or an address, found"):
            function(path)


@pytest.mark.parametrize("path", [None, 3, b"velo_small", ["velo_small"]])
def test_what_is_no_path_is_named(weights, path):
    for function in functions_of_paths(weights):
        with pytest.raises(TypeError, match="expected a name, a path or an address of weights"):
            function(path)


def test_other_arguments_of_another_type_are_named(weights, tmp_path):
    for function in (
        lambda: save_weights(tmp_path / "x", weights.params),
        lambda: export_weights(None, tmp_path / "x"),
    ):
        with pytest.raises(TypeError, match=r"^weights: expected lopt_jax.Weights, found "):
            function()
    with pytest.raises(TypeError, match=r"^config: expected a mapping of names"):
        convert_weights(tmp_path, config=[1])
    with pytest.raises(
        ValueError, match=r"^format: expected 'pylo' or 'original', found \['pylo'\]"
    ):
        export_weights(weights, tmp_path / "x", ["pylo"])
    with pytest.raises(ValueError, match="repo_id must be 'owner/name', found None"):
        lopt_jax.push_to_hub(weights, None)
    assert not list(tmp_path.iterdir())


def test_paths_that_tensorstore_cannot_name_are_refused(weights, tmp_path):
    with pytest.raises(WeightsError, match=r"expected a path in UTF-8"):
        save_weights(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["gs://bucket/x", "hf://owner/repo", "https://host/x"])
def test_addresses_are_no_folders(weights, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="a folder of this machine, found an address"):
        save_weights(address, weights)
    with pytest.raises(WeightsError, match="a folder of this machine, found an address"):
        export_weights(weights, address)
    assert not list(tmp_path.iterdir())


def test_names_that_are_too_long(tmp_path):
    for path in ("x" * 300, "./" + "x" * 300, tmp_path / ("x" * 300)):
        with pytest.raises(WeightsError):
            load_weights(path)
        with pytest.raises(WeightsError, match="too long"):
            convert_weights(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_folders_that_may_not_be_read(saved, tmp_path, monkeypatch):
    saved.chmod(0)
    (tmp_path / "weights").mkdir(mode=0)
    monkeypatch.setenv("LOPT_JAX_CACHE", str(tmp_path))
    try:
        for function in (load_weights, convert_weights):
            with pytest.raises(WeightsError, match="Permission denied"):
                function(saved)
        assert not {info.name: info for info in list_weights()}["velo"].offline
        with pytest.raises(WeightsError, match="LOPT_JAX_CACHE"):
            load_weights("velo")
    finally:
        saved.chmod(0o700)
        (tmp_path / "weights").chmod(0o700)


def test_a_wrong_name_says_which_is_close():
    """First what the optimizer can take, in order; of the wrong kind, whose optimizer to take."""
    fitting = "a name out of celo2, celo2_small, elo_celo2, found neither"
    with pytest.raises(WeightsError, match=rf"{fitting}\. Did you mean 'celo2_small'\?"):
        lopt_jax.celo2(1e-3, "celo2-small")
    with pytest.raises(WeightsError, match="`lopt list` shows all names"):
        load_weights("nothing_like_it")
    with pytest.raises(WeightsError, match=r"Take lopt_jax\.lopt, or other weights"):
        lopt_jax.velo(10, "lopt")
