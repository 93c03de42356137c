"""What the site takes from elsewhere: its address from pyproject.toml, pages from other folders."""

import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: Any) -> Any:
    """Sets the addresses, and lists every page of docs/design under "Design"."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    config.site_url = urls["Documentation"]
    # no repo_url: the theme would ask GitHub's API for its stars on every page
    social = {"icon": "fontawesome/brands/git-alt", "link": urls["Source"], "name": "Source"}
    config.extra["social"] = [social]
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


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Resolves links of notebooks to pages, which only mkdocs' own Markdown has resolved."""
    if not page.file.src_uri.startswith("notebooks/"):
        return html

    def address(found: re.Match[str]) -> str:
        target = files.get_file_from_path(found[1])
        if target is None:
            raise PluginError(f"{page.file.src_uri}: a link to {found[1]}, which is not there")
        return f'href="{target.url_relative_to(page.file)}{found[2]}"'

    return re.sub(r'href="\.\./([\w/]+\.md)((?:#[\w-]+)?)"', address, html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Leaves out MathJax, which notebooks would load from another host: none has a formula."""
    return re.sub(r"<script data-mkdocs-jupyter-mathjax.*?</script>", "", output, flags=re.S)
