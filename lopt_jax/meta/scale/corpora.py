"""Real data of the scale suite: sources and English as tokens, images as arrays.

Sources are read from the Python packages of the machine; everything else is read from the folder
that `python -m lopt_jax.meta.prepare` makes. Packages are dealt to splits by a hash of their name,
so what one split trains on, no other sees.
"""

import hashlib
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCABULARY = 4096  # tokens of every byte-level BPE here
_PACKAGE_BYTES = 12_000_000  # at most, of one package: no package is most of a split
_FILE_BYTES = (500, 300_000)  # smaller files say nothing, larger ones are tables
_SPLITS = {
    "validation": (0,),
    "tuning_validation": (1,),
    "tuning": (2, 3, 4),
    "train": (5, 6, 7, 8, 9),
}
_BUCKETS = 10
_TOKENIZER_BYTES = 16_000_000  # of a corpus, for learning its tokens
_CHUNK = 1 << 16


class Tokens(NamedTuple):
    """A corpus as tokens.

    Fields:
      train: (N,) uint16.
      validation: (M,) uint16, of other packages or of later text.
      digest: sha256 over both, hexadecimal.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str


class Images(NamedTuple):
    """Pictures with classes.

    Fields:
      train: (N, height, width, channels) uint8.
      train_labels: (N,) int32.
      validation: (M, height, width, channels) uint8.
      validation_labels: (M,) int32.
      digest: sha256 over all, hexadecimal.
    """

    train: np.ndarray
    train_labels: np.ndarray
    validation: np.ndarray
    validation_labels: np.ndarray
    digest: str


def package_split(name: str) -> str:
    """The split of a package: a function of its name alone."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % _BUCKETS
    return next(split for split, buckets in _SPLITS.items() if bucket in buckets)


def python_sources(split: str, limit: int) -> str:
    """Python files of the installed packages of a split, in the order of their paths.

    Args:
      split: "train", "validation", "tuning" or "tuning_validation".
      limit: bytes at most.

    Returns:
      The text.
    """
    root = Path(sysconfig.get_path("purelib"))
    texts: list[str] = []
    total = 0
    for package in sorted(path for path in root.iterdir() if path.is_dir()):
        if package.name.endswith((".dist-info", "__pycache__")):
            continue
        if package_split(package.name) != split:
            continue
        used = 0
        for text in _files(package):
            used += len(text)
            if used > _PACKAGE_BYTES or total > limit:
                break
            total += len(text)
            texts.append(text)
    return "\n".join(texts)[:limit]


def _files(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        if _FILE_BYTES[0] <= path.stat().st_size <= _FILE_BYTES[1]:
            yield path.read_text("utf-8", errors="replace")


def english(folder: Path, names: tuple[str, ...]) -> str:
    """Prepared texts, one after the other.

    Args:
      folder: what `python -m lopt_jax.meta.prepare` made.
      names: such as ("gcide",).

    Returns:
      The text.

    Raises:
      FileNotFoundError: a text is not there; the message says how to make it.
    """
    return "\n".join(
        lzma.decompress(_prepared(folder, f"{name}.txt.xz").read_bytes()).decode("utf-8", "replace")
        for name in names
    )


def _prepared(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. Make it with: python -m lopt_jax.meta.prepare {folder}"
        )
    return path


def tokens(train: str, validation: str | None, cache: Path, name: str) -> Tokens:
    """Learns tokens on a training text and encodes both texts; kept in a folder.

    Args:
      train: the training text.
      validation: the validation text; None: every twentieth stretch of the training text.
      cache: a folder for what was made.
      name: of the corpus, for the files.

    Returns:
      The tokens.

    Raises:
      ImportError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError(
            "The scale suite learns tokens with the package tokenizers, which is not installed: "
            "pip install 'lopt_jax[scale]'"
        ) from error

    if validation is None:
        stretches = [train[i : i + _CHUNK] for i in range(0, len(train), _CHUNK)]
        validation = "".join(stretches[10::20])
        train = "".join(s for i, s in enumerate(stretches) if i % 20 != 10)
    digest = hashlib.sha256((train + "\0" + validation).encode()).hexdigest()
    path = cache / f"{name}_{digest[:12]}.npz"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = train[:_TOKENIZER_BYTES]
        tokenizer.train_from_iterator(_chunks(sample), trainer)
        encoded = {
            split: np.concatenate(
                [np.asarray(e.ids, np.uint16) for e in tokenizer.encode_batch(list(_chunks(text)))]
            )
            for split, text in (("train", train), ("validation", validation))
        }
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, train=encoded["train"], validation=encoded["validation"])
    with np.load(path) as kept:
        return Tokens(kept["train"], kept["validation"], digest)


def _chunks(text: str) -> Iterator[str]:
    for start in range(0, len(text), _CHUNK):
        yield text[start : start + _CHUNK]


def images(folder: Path, name: str) -> Images:
    """Prepared pictures.

    Args:
      folder: what `python -m lopt_jax.meta.prepare` made.
      name: "fashion_mnist" or "clipart".

    Returns:
      The pictures; where the source has no validation split, every tenth example is one.

    Raises:
      FileNotFoundError: they are not there; the message says how to make them.
    """
    with np.load(_prepared(folder, f"{name}.npz")) as kept:
        arrays = {key: kept[key] for key in kept.files}
    if "test_images" in arrays:
        train, labels = arrays["train_images"], arrays["train_labels"]
        validation, validation_labels = arrays["test_images"], arrays["test_labels"]
    else:
        held_out = np.arange(len(arrays["images"])) % 10 == 9
        train, labels = arrays["images"][~held_out], arrays["labels"][~held_out]
        validation, validation_labels = arrays["images"][held_out], arrays["labels"][held_out]
    labels, validation_labels = labels.astype(np.int32), validation_labels.astype(np.int32)
    if train.ndim == 3:
        train, validation = train[..., None], validation[..., None]
    digest = hashlib.sha256(train.tobytes() + labels.tobytes() + validation.tobytes()).hexdigest()
    return Images(train, labels, validation, validation_labels, digest)
