"""What the site takes from elsewhere: its address from pyproject.toml, pages from other folders."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: Any) -> Any:
    """Sets the addresses, and lists every page of docs/design under "Design"."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    config.site_url = urls["Documentation"]
    config.repo_url = urls["Source"]
    config.repo_name = config.site_name
    pages = sorted(path.name for path in (ROOT / "docs" / "design").glob("*.md"))
    (design,) = (entry["Design"] for entry in config.nav if "Design" in entry)
    design[:0] = [f"design/{name}" for name in pages]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Shows pages of the repository's root, whose links begin there."""
    name = ROOT_PAGES.get(page.file.src_uri)
    if name is None:
        return markdown
    text = (ROOT / name).read_text().replace("](docs/", "](")
    for uri, root_name in ROOT_PAGES.items():
        text = text.replace(f"]({root_name})", f"]({uri})")
    return text
