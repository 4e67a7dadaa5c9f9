"""Draw the picture in docs/architecture.md from the imports of the package.

`python docs/draw_architecture.py` rewrites the picture; with `--check` it only says whether the picture is up to date.
An arrow means "imports". An arrow that follows from two others is left out.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
SOURCES = {"vot_kernels": ROOT / "vot_kernels", "vot_kernels.kernels": ROOT / "kernels" / "triton"}
# Each room of the house: what it holds, in a few words.
LABELS = {
    "cli": "command line",
    "pipelines": "files to results",
    "watching": "eyes and readers of clips",
    "reasoning": "the five steps, language models",
    "train": "training stages",
    "data": "video, DigitWorld",
    "models": "encoder, perception, graph",
    "integrations": "other people's models",
    "distributed": "several ranks",
    "nn": "modules",
    "ops": "one folder per op",
    "cpp": "compiles and loads csrc/",
    "kernels": "Triton device code",
    "tuning": "launch parameters",
    "scene_graph": "STSG",
    "packing": "PackedLayout",
    "files": "atomic writes",
    "extras": "what to install",
    "testing": "comparators",
    "info": "what runs here, and why",
}


def part(module: str) -> str:
    """The room that a dotted name belongs to: `vot_kernels.ops.aoe` is in `ops`."""
    return (module.split(".") + [""])[1]


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports, imports inside of functions included."""
    found: dict[str, set[str]] = {name: set() for name in LABELS}
    for prefix, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            if (
                path.name == "__main__.py"
            ):  # an entry point, which nothing imports, so it stands above every room
                continue
            module = ".".join([prefix, *path.relative_to(folder).with_suffix("").parts])
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vot_kernels."):
                    found.setdefault(part(module), set()).add(part(node.module or ""))
    found.pop("__init__", None)
    return {name: others - {name, ""} for name, others in found.items()}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the arrows that follow from longer paths."""

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(other) for other in graph[name]))

    return {
        name: {other for other in others if not any(other in reach(between) for between in others - {other})}
        for name, others in graph.items()
    }


def picture() -> str:
    """The graph in the language of mermaid."""
    graph = reduced(imports())
    lines = [f'    {name}["<b>{name}</b><br/>{LABELS.get(name, "")}"]' for name in sorted(graph)]
    lines += [f"    {name} --> {other}" for name in sorted(graph) for other in sorted(graph[name])]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def drawn(page: str) -> str:
    """`page` with the picture as the imports have it now."""
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), page, count=1, flags=re.DOTALL)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(drawn(page) != page)
    PAGE.write_text(drawn(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
