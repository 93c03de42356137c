"""Files that are whole or not there: a run may be killed while it writes."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, and its folder where it is missing.

    Where it cannot be written whole, as on a full disk, the file of before stays as it was.

    Args:
      path: of the file.
      content: all of it.

    Raises:
      OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON list with a line for each row.

    Args:
      path: of the file.
      rows: of JSON values.

    Raises:
      OSError: it could not be written.
    """
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_whole(path, f"[\n{lines}\n]\n".encode())


def read_rows(path: Path, fields: Iterable[str]) -> list[dict[str, Any]]:
    """Reads what `write_rows` wrote; no rows where there is no file.

    Args:
      path: of the file.
      fields: that every row has.

    Raises:
      ValueError: for a damaged file, or one of something else; the message names it.
    """
    rows = read_json(path)
    if rows is None:
        return []
    wanted = set(fields)
    if not isinstance(rows, list) or not all(isinstance(x, dict) and wanted <= {*x} for x in rows):
        raise ValueError(f"{path}: expected a list of rows with {', '.join(sorted(wanted))}")
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is no file.

    Raises:
      ValueError: for a file that holds no JSON; the message names it.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # of its encoding, too
        raise ValueError(f"{path}: expected JSON ({error})") from error
