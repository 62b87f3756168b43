"""MkDocs hooks: pages of the repository's root join the site.

Links into the tree work in both places.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# A file of the root, and the page that shows it.
FROM_ROOT = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\(([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the root."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point each link at the page that shows its target.

    A link to a file that is no page becomes plain text.
    """
    shown = page.file.src_uri
    in_tree = {target: name for name, target in FROM_ROOT.items()}.get(shown, f"docs/{shown}")

    def link(matched: re.Match[str]) -> str:
        text, address = matched.groups()
        path, mark, anchor = address.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return matched[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_tree), path))
        target = f"docs/{FROM_ROOT[target]}" if target in FROM_ROOT else target
        if not target.startswith("docs/"):
            if not (ROOT / target).exists():
                return matched[0]  # MkDocs reports it
            return text
        relative = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(shown) or ".")
        return f"[{text}]({relative}{mark}{anchor})"

    return _LINK.sub(link, markdown)
