"""Links within the documentation lead somewhere, and the reference has every public name. Needs no docs packages."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))


def prose(markdown: str) -> str:
    """The text without its code, which may look like links and headings."""
    return re.sub(r"^\s*```.*?^\s*```\s*$|`[^`\n]*`", "", markdown, flags=re.DOTALL | re.MULTILINE)


def anchors(markdown: str) -> set[str]:
    """The names of the headings, as GitHub makes them."""
    found: list[str] = []
    headings = re.sub(r"^\s*```.*?^\s*```\s*$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.+?)\s*$", headings, flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = found.count(slug)
        found += [slug] if not count else [slug, f"{slug}-{count}"]
    return set(found)


def broken_links(page: Path, markdown: str) -> list[str]:
    """Return the internal links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: +(\S+)", prose(markdown), flags=re.MULTILINE):
        link = "".join(target)
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve()
        if not path:
            text = markdown
        elif there.exists():
            text = there.read_text(encoding="utf-8") if there.suffix == ".md" else ""
        else:
            found.append(link)
            continue
        if anchor and anchor not in anchors(text):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    page = ROOT / "docs/x.md"
    text = "# One `two` three!\n[a](aoe.md) [b](../README.md#measured) [c](#one-two-three) [d](https://x.org/y)\n"
    assert broken_links(page, text) == []
    assert broken_links(page, "`[a](no.md)` and\n```python\nx[0](no)\n# No\n```\n") == []
    wrong = "# One\n[a](no.md) [b](../README.md#no) [c](#two) [d](aoe.md#balanced)\n\n[e]: ../no.py\n"
    assert broken_links(page, wrong) == ["no.md", "../README.md#no", "#two", "aoe.md#balanced", "../no.py"]
    assert anchors("# A\n## A\n## [B](c.md), d-e\n```\n# f\n```\n") == {"a", "a-1", "b-d-e"}


def public_names() -> dict[str, list[str]]:
    """What each package says is public, by its name."""
    found = {}
    for path in sorted((ROOT / "vot_kernels").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found[module] = ast.literal_eval(node.value)
    return found


def directives() -> list[str]:
    """The names that the reference documents, by their paths."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    return re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)


def test_the_reference_has_every_public_name_once():
    names = directives()
    assert len(names) == len(set(names))
    public = public_names()
    top = {name: f"vot_kernels.{name}" for name in public["vot_kernels"]}  # the shortest path to it
    missing = {
        f"{module}.{name}"
        for module, members in public.items()
        for name in members
        if f"{module}.{name}" not in names and top.get(name) not in names
    }
    assert missing == {"vot_kernels.__version__"}


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.name)
def test_every_name_of_the_reference_exists(page):
    for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed)) and pages | set(site().PAGES.values()) == set(listed)


def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs/site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("place", "link", "moved"),
    [
        ("index.md", "docs/aoe.md#balance", "aoe.md#balance"),
        ("index.md", "examples/README.md", "examples/index.md"),
        ("architecture.md", "../CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("reference/ops.md", "../../README.md", "../index.md"),
        ("reference/ops.md", "../aoe.md", "../aoe.md"),
        ("examples/index.md", "plain_vit.py", "plain_vit.py"),
        ("examples/index.md", "../docs/aoe.md", "../aoe.md"),
        ("index.md", "https://x.org/docs/aoe.md", "https://x.org/docs/aoe.md"),
        ("index.md", "#measured", "#measured"),
    ],
)
def test_links_are_moved_into_the_site(place, link, moved):
    assert site().moved(f"see [it]({link}).", place) == f"see [it]({moved})."
