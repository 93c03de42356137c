"""A small parser of the `config.gin` files that lie beside the original's checkpoints.

Only `Name.key = literal` is read, with Python literals alone (`ast.literal_eval`); imports, macros
and references are not followed. Reference for the syntax: github.com/google/gin-config, README.
"""

from __future__ import annotations

import ast
import re

from lopt_jax.weights.base import weights_error

_MAX_LENGTH = 1 << 20
_BINDING = re.compile(r"^(?:[\w./-]+/)?(?:[\w.]+\.)?(\w+)\.(\w+)\s*=\s*(.*)$", re.DOTALL)
_REFERENCE = re.compile(r"^@(?:[\w./-]+/)?(?:\w+\.)*(\w+)(?:\(\))?$")


def parse_gin(data: bytes | str, source: object) -> dict[tuple[str, str], object]:
    """Reads the bindings of a gin file.

    Args:
      data: the whole file.
      source: its name, for the message.

    Returns:
      (name, key) -> value, without module path and scope. A value that is a reference
      (`@name`, `@name()`) is the string "@name"; macros (`%name`) and other expressions that
      are not literals are left out.

    Raises:
      WeightsError: the file is too long or not text.
    """
    if len(data) > _MAX_LENGTH:
        raise weights_error(
            source, expected=f"a gin file of at most {_MAX_LENGTH} bytes", found=f"{len(data)}"
        )
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise weights_error(source, expected="a gin file in UTF-8", found=str(error)) from error
    bindings: dict[tuple[str, str], object] = {}
    for statement in _statements(text):
        match = _BINDING.match(statement)
        if match is None:
            continue  # an import, an include, or a macro of the file itself
        name, key, expression = match.groups()
        reference = _REFERENCE.match(expression.strip())
        if reference is not None:
            bindings[name, key] = "@" + reference.group(1)
            continue
        try:
            bindings[name, key] = ast.literal_eval(expression.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return bindings


def _statements(text: str) -> list[str]:
    """Splits a gin file into statements: joins continued lines and those of open brackets."""
    statements: list[str] = []
    current, depth = "", 0
    for line in text.split("\n"):
        line = _without_comment(line).rstrip()
        continued = line.endswith("\\")
        body = line[:-1] if continued else line
        current += body if not current else " " + body.strip()
        depth += sum(body.count(c) for c in "([{") - sum(body.count(c) for c in ")]}")
        if continued or depth > 0:
            continue
        if current.strip():
            statements.append(current.strip())
        current, depth = "", 0
    if current.strip():
        statements.append(current.strip())
    return statements


def _without_comment(line: str) -> str:
    quote = ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#":
            return line[:position]
    return line
