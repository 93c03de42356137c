"""Gathers a weights file and the small files beside it, from a path or an address."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lopt_jax.brief import brief
from lopt_jax.weights.base import weights_error
from lopt_jax.weights.files import read_regular
from lopt_jax.weights.schema import MAX_BYTES

GIN = "config.gin"
JSON = "config.json"
# Names under which the field publishes weights, in the order of preference.
RNN_FOLDER, MLP_FOLDER = "VeLO_RNN", "VeLO_MLP"  # PyLO's pair, each with a model.safetensors
KNOWN_NAMES = ("params", "theta.state", "model.safetensors")
KNOWN_ENDINGS = (".state", ".checkpoint", ".safetensors", ".pickle", ".pkl", ".msgpack")
_MAX_NEIGHBOUR = 1 << 20


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A weights file in memory, with its neighbours.

    Attributes:
      origin: the path or the address, for messages and metadata.
      data: the weights file.
      gin: `config.gin` beside it, if any.
      json: `config.json` beside it, if any.
      second: the second weights file of a pair (PyLO's VeLO), if any.
    """

    origin: str
    data: bytes
    gin: bytes | None = None
    json: bytes | None = None
    second: bytes | None = None


def scheme_of(address: str) -> str:
    """Returns the scheme of an address, "" of a path (also of one with a drive letter)."""
    scheme = address.split("://", 1)[0] if "://" in address else ""
    return scheme.lower()


def local_path(path_or_url: str | os.PathLike[str]) -> Path | None:
    """Returns the path that is meant, with ~ expanded; None where it is a remote address.

    Raises:
      TypeError: it is neither a text nor a path.
      WeightsError: text that names nothing: a user that is not there, a NUL character; or a
        file:// address of another host.
    """
    text = os.fspath(path_or_url) if isinstance(path_or_url, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(
            "expected a name, a path or an address of weights, a text or a pathlib.Path; found "
            f"{type(path_or_url).__name__}."
        )
    scheme = scheme_of(text) if isinstance(path_or_url, str) else ""
    try:
        if not text or b"\0" in os.fsencode(text):
            raise ValueError("a NUL character" if text else "an empty text")
        if not scheme:
            return Path(text).expanduser()
        if scheme != "file":
            return None
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"the host {parts.netloc!r}")
        return Path(unquote(parts.path))
    except (ValueError, RuntimeError) as error:
        expected = "file:///absolute/path" if scheme == "file" else "a path or an address"
        found = str(error)[:120].rstrip(".")
        raise weights_error(brief(text), expected=expected, found=found) from error


def local_folder(path: str | os.PathLike[str]) -> Path:
    """Returns the folder to write to, with ~ expanded.

    Raises:
      WeightsError: as `local_path`; or a remote address.
    """
    folder = local_path(path)
    if folder is None:
        raise weights_error(
            path,
            expected="a folder of this machine",
            found="an address",
            advice="Save to a folder; lopt_jax.push_to_hub uploads to the Hugging Face Hub.",
        )
    return folder


def read_local(path: Path, origin: str | None = None) -> Bundle:
    """Reads a weights file, or the weights file in a folder, with its neighbours.

    Args:
      path: a file or a folder.
      origin: what to call it; the path itself where None.

    Raises:
      WeightsError: there is no weights file that can be read, more than one, or one that is too
        large.
    """
    try:
        return _read_bundle(path, origin)
    except OSError as error:
        raise weights_error(
            origin or path,
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            advice="Check the path.",
        ) from error


def _read_bundle(path: Path, origin: str | None) -> Bundle:
    if path.is_dir() and (path / RNN_FOLDER).is_dir() and (path / MLP_FOLDER).is_dir():
        name = origin or os.fspath(path)
        first = _read_bundle(path / RNN_FOLDER, name)
        return dataclasses.replace(first, second=_read_bundle(path / MLP_FOLDER, name).data)
    file = _weights_file(path) if path.is_dir() else path
    folder = file.parent
    name = origin or os.fspath(file)
    return Bundle(
        origin=name,
        data=read_regular(file, MAX_BYTES, name),
        gin=_neighbour(folder / GIN, name),
        json=_neighbour(folder / JSON, name),
    )


def _weights_file(folder: Path) -> Path:
    for name in KNOWN_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in KNOWN_ENDINGS)
    if len(files) == 1:
        return files[0]
    raise weights_error(
        folder,
        expected=f"a weights file: {', '.join(KNOWN_NAMES)}, or one of {KNOWN_ENDINGS}",
        found=f"{len(files)} of them",
        advice="Give the file itself.",
    )


def _neighbour(path: Path, source: str) -> bytes | None:
    if not path.is_file():
        return None
    return read_regular(path, _MAX_NEIGHBOUR, f"{path.name} of {source}")
