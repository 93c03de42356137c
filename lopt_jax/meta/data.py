"""Data: scikit-learn's data sets, Python's own source, and what `prepare` wrote.

Every data set has a hash, of what was read before anything was computed: two machines that read the
same have the same hash, whatever their arithmetic.
"""

import functools
import hashlib
import lzma
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VOCABULARY = 96  # the printable ASCII bytes 32..126 as 1..95, everything else as 0
_MODULES = (
    "argparse.py", "ast.py", "bdb.py", "cmd.py", "code.py", "configparser.py", "copy.py", "csv.py",
    "dataclasses.py", "datetime.py", "decimal.py", "difflib.py", "dis.py", "doctest.py",
    "enum.py", "fractions.py", "ftplib.py", "functools.py", "gzip.py", "heapq.py", "inspect.py",
)  # fmt: skip
_VALID_FRACTION = 0.2
FOLDER_VARIABLE = "LOPT_JAX_DATA"  # names the folder that `prepare` wrote
_CANVAS = 32  # pictures are put into squares of this size before they are made smaller


class Dataset(NamedTuple):
    """Examples in one fixed shuffled order: the first `num_train` are for training.

    Fields:
      inputs: (N, D) float32, each feature standardised over the training examples.
      targets: (N,) int32 class indices, or (N, K) float32 for regression.
      num_classes: number of classes, 0 for regression.
      num_train: examples [0, num_train) are for training, the rest for validation.
      sha256: of what was read.
    """

    inputs: np.ndarray
    targets: np.ndarray
    num_classes: int
    num_train: int
    sha256: str = ""


class Text(NamedTuple):
    """Tokens (N,) int32: the first `num_train` are for training, the rest for validation."""

    tokens: np.ndarray
    num_train: int
    sha256: str


class Pictures(NamedTuple):
    """Small pictures with classes.

    Fields:
      images: (N, side, side, channels) uint8.
      labels: (N,) int32.
      num_train: the first are for training, the rest for validation.
      mean: of all training pixels, in [0, 255].
      deviation: their standard deviation.
      sha256: of what was read.
    """

    images: np.ndarray
    labels: np.ndarray
    num_train: int
    mean: float
    deviation: float
    sha256: str


def digest(*arrays: np.ndarray) -> str:
    """The sha256 of the arrays' types, shapes and elements, in hexadecimal digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str} {array.shape} ".encode())
        total.update(np.ascontiguousarray(array))
    return total.hexdigest()


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn, whose data these tasks are made of, is not installed: "
            "pip install 'lopt_jax[meta]'",
            name="sklearn",
        ) from error
    return datasets


def _split(inputs: np.ndarray, targets: np.ndarray, num_classes: int, seed: int = 0) -> Dataset:
    sha256 = digest(inputs, targets)
    order = np.random.default_rng(seed).permutation(len(inputs))
    num_train = len(inputs) - round(_VALID_FRACTION * len(inputs))
    inputs = inputs[order].astype(np.float32)
    mean = inputs[:num_train].mean(0)
    deviation = inputs[:num_train].std(0)
    inputs = (inputs - mean) / np.where(deviation > 1e-3, deviation, 1.0)
    return Dataset(np.clip(inputs, -5.0, 5.0), targets[order], num_classes, num_train, sha256)


@functools.cache
def load_tabular(name: str) -> Dataset:
    """Loads one of scikit-learn's bundled tables.

    Args:
      name: "digits", "breast_cancer", "wine" or "diabetes".

    Returns:
      The data set; "diabetes" is a regression onto one standardised target.

    Raises:
      ValueError: for an unknown name.
      ModuleNotFoundError: without scikit-learn.
    """
    datasets = _sklearn_datasets()
    if name == "diabetes":
        inputs, targets = datasets.load_diabetes(return_X_y=True)
        sha256 = digest(inputs, targets)
        targets = ((targets - targets.mean()) / targets.std()).astype(np.float32)[:, None]
        return _split(inputs / inputs.std(0), targets, 0)._replace(sha256=sha256)
    loaders = {
        "digits": datasets.load_digits,
        "breast_cancer": datasets.load_breast_cancer,
        "wine": datasets.load_wine,
    }
    if name not in loaders:
        raise ValueError(
            f"name: unknown data set {name!r}; known: {sorted(loaders)} and 'diabetes'"
        )
    inputs, labels = loaders[name](return_X_y=True)
    return _split(inputs, labels.astype(np.int32), int(labels.max()) + 1)


@functools.cache
def load_patches(photograph: str, side: int = 8) -> Dataset:
    """Cuts a sample photograph into grey patches, each its own target.

    Args:
      photograph: "china" or "flower".
      side: height and width of a patch, in pixels.

    Returns:
      inputs and targets (N, side * side), with zero mean and unit variance over all pixels.

    Raises:
      ModuleNotFoundError: without scikit-learn.
    """
    pixels = _sklearn_datasets().load_sample_image(f"{photograph}.jpg")
    image = pixels.astype(np.float32).mean(-1)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    patches = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    patches = patches.transpose(0, 2, 1, 3).reshape(-1, side * side)
    patches = (patches - patches.mean()) / patches.std()
    order = np.random.default_rng(0).permutation(len(patches))
    patches = patches[order]
    num_train = len(patches) - round(_VALID_FRACTION * len(patches))
    return Dataset(patches, patches, 0, num_train, digest(pixels))


@functools.cache
def load_picture(photograph: str, side: int) -> np.ndarray:
    """The middle of a sample photograph, grey, each pixel the mean of a square of 4 x 4.

    Args:
      photograph: "china" or "flower".
      side: height and width of the result, in pixels; at most 106.

    Returns:
      (side, side) float32 with zero mean and unit variance.

    Raises:
      ModuleNotFoundError: without scikit-learn.
    """
    pixels = _sklearn_datasets().load_sample_image(f"{photograph}.jpg")
    image = pixels.astype(np.float32).mean(-1)
    top, left = ((size - 4 * side) // 2 for size in image.shape)
    middle = image[top : top + 4 * side, left : left + 4 * side]
    small = middle.reshape(side, 4, side, 4).mean((1, 3))
    return (small - small.mean()) / small.std()


@functools.cache
def load_source_code(num_bytes: int = 400_000) -> Text:
    """Reads source files of the Python standard library as one sequence of tokens.

    Args:
      num_bytes: length to keep.

    Returns:
      tokens (num_bytes,) in [0, VOCABULARY). Every version of Python has other ones.
    """
    folder = os.path.dirname(os.__file__)
    paths = [os.path.join(folder, module) for module in _MODULES]
    text = b"".join(Path(path).read_bytes() for path in paths if os.path.exists(path))
    if len(text) < 10_000:
        raise FileNotFoundError(f"no standard library sources found in {folder}")
    return _text_of(text[:num_bytes])


def _text_of(text: bytes) -> Text:
    raw = np.frombuffer(text, np.uint8).astype(np.int32)
    tokens = np.where((raw >= 32) & (raw < 127), raw - 31, 0).astype(np.int32)
    return Text(tokens, int(len(tokens) * (1 - _VALID_FRACTION)), digest(tokens))


def load_text(name: str, num_bytes: int = 1_000_000) -> Text:
    """A text that `python -m lopt_jax.meta.prepare` wrote.

    Args:
      name: "brown", stories and news; or "docs", technical English.
      num_bytes: length to keep.

    Returns:
      tokens in [0, VOCABULARY).

    Raises:
      FileNotFoundError: where the folder or the file is missing.
      ValueError: for an unknown name, or a file of another kind.
    """
    if name not in ("brown", "docs"):
        raise ValueError(f"name: expected brown or docs, found {name!r}")
    return _load_text(_prepared(name, ".txt.xz"), num_bytes)


@functools.cache
def _load_text(path: Path, num_bytes: int) -> Text:
    try:
        with lzma.open(path) as file:
            return _text_of(file.read(num_bytes))
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(
            f"{path}: expected text packed by xz ({error}); prepare it again"
        ) from error


def _prepared(name: str, suffix: str = ".npz") -> Path:
    """The path of a file of `prepare`.

    Raises:
      FileNotFoundError: where there is none.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder or "") / f"{name}{suffix}"
    if not folder or not path.is_file():
        found = f"no {path}" if folder else "none"
        raise FileNotFoundError(
            f"{name}: expected {FOLDER_VARIABLE} (or --data) to name the folder of prepared data, "
            f"found {found}; make it with `python -m lopt_jax.meta.prepare FOLDER {name}`"
        )
    return path


def load_pictures(name: str, side: int, channels: int = 1) -> Pictures:
    """Pictures that `python -m lopt_jax.meta.prepare` wrote, made smaller.

    Args:
      name: "fashion_mnist", in its official split; or "clipart": its ten largest classes, of which
        a fifth, always the same, is for validation.
      side: height and width: 8, 16 or 32.
      channels: 1 for grey, 3 for colour, which "clipart" has.

    Returns:
      The pictures; ten classes.

    Raises:
      FileNotFoundError: where the folder or the file is missing.
      ValueError: for an unknown name or size, or a file of another kind.
    """
    if name not in ("fashion_mnist", "clipart"):
        raise ValueError(f"name: expected fashion_mnist or clipart, found {name!r}")
    if _CANVAS % side:
        raise ValueError(f"side: expected a divisor of {_CANVAS}, found {side}")
    if channels not in ((1,) if name == "fashion_mnist" else (1, 3)):
        raise ValueError(f"channels: {name} has no pictures of {channels} channels")
    return _load_pictures(_prepared(name), name, side, channels)


@functools.cache
def _load_pictures(path: Path, name: str, side: int, channels: int) -> Pictures:
    keys: tuple[str, ...] = ("images", "labels")
    if name == "fashion_mnist":
        keys = ("train_images", "train_labels", "test_images", "test_labels")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = [file[key] for key in keys]
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected arrays {', '.join(keys)} ({error}); prepare it again"
        ) from error
    sha256 = digest(*arrays)
    if name == "fashion_mnist":
        images = np.concatenate(arrays[::2])[..., None]
        labels, num_train = np.concatenate(arrays[1::2]), len(arrays[0])
    else:
        images, labels, num_train = _largest_classes(*arrays)
    if channels == 1:
        images = images.mean(-1, keepdims=True)
    images = shrink(images, side)
    train = images[:num_train].astype(np.float64)
    return Pictures(
        images, labels.astype(np.int32), num_train, float(train.mean()), float(train.std()), sha256
    )


def _largest_classes(
    images: np.ndarray, labels: np.ndarray, count: int = 10
) -> tuple[np.ndarray, np.ndarray, int]:
    """Pictures of the most frequent labels, renumbered by frequency and shuffled."""
    largest = np.argsort(-np.bincount(labels), kind="stable")[:count]
    rank = {int(label): place for place, label in enumerate(largest)}
    rows = np.flatnonzero(np.isin(labels, largest))
    rows = np.random.default_rng(0).permutation(rows)
    ranks = np.array([rank[int(label)] for label in labels[rows]])
    return images[rows], ranks, len(rows) - round(_VALID_FRACTION * len(rows))


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks of pixels, after zeros around that make a square of 32.

    Args:
      images: (N, height, width, channels), no larger than 32.
      side: of the result; divides 32.

    Returns:
      (N, side, side, channels) uint8, rounded.
    """
    count, height, width, channels = images.shape
    top, left = (_CANVAS - height) // 2, (_CANVAS - width) // 2
    canvas = np.zeros((count, _CANVAS, _CANVAS, channels), np.float32)
    canvas[:, top : top + height, left : left + width] = images
    block = _CANVAS // side
    blocks = canvas.reshape(count, side, block, side, block, channels)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)
