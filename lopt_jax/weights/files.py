"""Files: those of strangers are read up to a limit, our own are written whole."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

from lopt_jax.weights.base import weights_error

# A FIFO is opened without waiting for a writer, and then refused.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_regular(path: Path, limit: int, source: object) -> bytes:
    """Reads a whole file.

    Args:
      path: the file; a link is followed.
      limit: the most bytes to accept.
      source: its name, for the message.

    Raises:
      WeightsError: it is larger, or no regular file: a folder, a FIFO, a device.
      OSError: it cannot be opened or read.
    """
    descriptor = os.open(path, _FLAGS)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise weights_error(source, expected="a file", found="something else of that name")
        data = file.read(min(status.st_size, limit) + 1)
    if len(data) > limit:
        raise weights_error(source, expected=f"at most {limit} bytes", found="a larger file")
    return data


def read_tree(folder: Path, limit: int, max_files: int) -> dict[str, bytes]:
    """Reads all files below a folder; links to folders are not followed.

    Args:
      folder: the folder.
      limit: the most bytes that all files together may have.
      max_files: the most files, and the most folders, that there may be.

    Returns:
      path relative to `folder`, with slashes -> content.

    Raises:
      WeightsError: there is more, or something that is neither a file nor a folder.
      OSError: something cannot be read.
    """
    files: dict[str, bytes] = {}
    total = 0
    for folders, (root, _, names) in enumerate(os.walk(folder, onerror=_raise)):
        if len(files) + len(names) > max_files or folders >= max_files:
            raise weights_error(folder, expected=f"at most {max_files} files", found="more")
        for name in names:
            path = Path(root, name)
            data = read_regular(path, limit - total, path)
            total += len(data)
            files[path.relative_to(folder).as_posix()] = data
    return files


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    raise error
