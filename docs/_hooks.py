"""What the site takes from elsewhere: its address from pyproject.toml, pages from docs/design."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Sets the addresses, and lists every page of docs/design under "Design"."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    config.site_url = urls["Documentation"]
    config.repo_url = urls["Source"]
    pages = sorted(path.name for path in (ROOT / "docs" / "design").glob("*.md"))
    (design,) = (entry["Design"] for entry in config.nav if "Design" in entry)
    design[:0] = [f"design/{name}" for name in pages]
    return config
