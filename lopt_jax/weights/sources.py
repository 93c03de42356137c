"""Gathers a weights file and the small files beside it, from a path or an address."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lopt_jax.weights.base import weights_error
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
    """Returns the path that is meant, None where it is a remote address.

    Raises:
      WeightsError: a file:// address of another host.
    """
    if isinstance(path_or_url, os.PathLike):
        return Path(path_or_url)
    scheme = scheme_of(path_or_url)
    if not scheme:
        return Path(path_or_url).expanduser()
    if scheme != "file":
        return None
    parts = urlsplit(path_or_url)
    if parts.netloc not in ("", "localhost"):
        raise weights_error(
            path_or_url, expected="file:///absolute/path", found=f"the host {parts.netloc!r}"
        )
    return Path(unquote(parts.path))


def read_local(path: Path, origin: str | None = None) -> Bundle:
    """Reads a weights file, or the weights file in a folder, with its neighbours.

    Args:
      path: a file or a folder.
      origin: what to call it; the path itself where None.

    Raises:
      WeightsError: there is no weights file, more than one, or one that is too large.
    """
    if path.is_dir() and (path / RNN_FOLDER).is_dir() and (path / MLP_FOLDER).is_dir():
        name = origin or os.fspath(path)
        first = read_local(path / RNN_FOLDER, name)
        return dataclasses.replace(first, second=read_local(path / MLP_FOLDER, name).data)
    file = _weights_file(path) if path.is_dir() else path
    folder = file.parent
    name = origin or os.fspath(file)
    data = _read(file, name, MAX_BYTES)
    return Bundle(
        origin=name,
        data=data,
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
    return _read(path, f"{path.name} of {source}", _MAX_NEIGHBOUR) if path.is_file() else None


def _read(path: Path, source: str, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise weights_error(source, expected="a file", found="something else of that name")
        with path.open("rb") as file:
            data = file.read(min(size, limit) + 1)
    except OSError as error:
        raise weights_error(
            source,
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            advice="Check the path.",
        ) from error
    if len(data) > limit:
        raise weights_error(source, expected=f"at most {limit} bytes", found="a larger file")
    return data
