"""What MkDocs does beside its plugins: anchors as GitHub makes them, and links to files that are not pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def github_anchor(heading: str, separator: str) -> str:
    """Return a heading's anchor: lower case, punctuation dropped, blanks as the separator."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Make anchors as GitHub does, so that a link works in the repository and on the site."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Replace links to files outside docs/: by the repository's address if `repo_url` names one, else by the path.

    Raises FileNotFoundError for a link to a file that does not exist.
    """
    folder = Path("docs") / Path(page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        label, target, fragment = link[1], link[2], link[3] or ""
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = os.path.normpath(folder / target)
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: no file {target}")
        if config.repo_url:
            return f"[{label}]({config.repo_url.rstrip('/')}/blob/main/{path}{fragment})"
        return f"`{path}`" if label in (path, f"`{path}`") else f"{label} (`{path}`)"

    return LINK.sub(replaced, markdown)
