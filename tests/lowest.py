"""Prints the lowest versions that a pyproject.toml allows, as constraints for pip."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def lowest(pyproject: str) -> Iterator[str]:
    """Yields name==version for each requirement of a project and of its extras.

    Args:
      pyproject: the text of a pyproject.toml.

    Raises:
      ValueError: a requirement has no lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in sorted({*project["dependencies"], *extras}):
        if requirement.startswith(f"{project['name']}["):
            continue  # its own extras
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement}: expected name>=version")
        yield "==".join(match.groups())


if __name__ == "__main__":
    print("\n".join(lowest(Path(sys.argv[1]).read_text())))
