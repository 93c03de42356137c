"""Locks of folders that several processes may write to."""

from pathlib import Path
from typing import IO


def lock(path: Path, wait: bool = False) -> IO[bytes] | None:
    """Locks a file, which it makes with its folder where they are missing.

    Args:
      path: of the file.
      wait: until another process that has it lets go.

    Returns:
      The open file: closing it, or the end of the process, frees the lock. None where another has
      it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        import fcntl
    except ImportError:  # Windows: processes that share a folder may do things twice
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file
