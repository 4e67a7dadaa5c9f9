"""A hook of mkdocs (see mkdocs.yml): pages from outside docs/ join the site, and links follow them there."""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# A page's place in the repository, and in the site. Files of the same folders may be linked to as they are.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/index.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `PAGES` and the files that they and the others link to."""
    from mkdocs.structure.files import File

    linked = {
        posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        for origin in [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
        for target in _LINK.findall((ROOT / origin).read_text(encoding="utf-8"))
    }
    outside = {path: path for path in linked if not path.startswith("docs/") and (ROOT / path).is_file()}
    for origin, place in (outside | PAGES).items():
        if place not in files.src_uris:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / origin)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page, which are right in the repository, into those of the site."""
    return moved(markdown, page.file.src_uri)


def moved(markdown: str, place: str) -> str:
    """The text of the page at `place` of the site, with links to where their targets are in the site."""
    origin = next((origin for origin, found in PAGES.items() if found == place), f"docs/{place}")

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        there = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(there, posixpath.dirname(place) or ".")

    return _LINK.sub(link, markdown)
