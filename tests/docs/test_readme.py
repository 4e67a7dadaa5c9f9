"""The documentation runs: every Python block is executed, every shell command is checked against the CLI."""

import ast
import importlib.util
import os
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vot_kernels.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
)
SHELLS = ("bash", "console", "sh", "shell")
# Commands that a reader may be told to run and that cannot be checked here.
KNOWN_PROGRAMS = {"cat", "cd", "export", "git", "head", "ls", "pip", "pytest", "torchrun"}
ENGINES = ("daft",)  # packages in no extra; a block that imports one runs where it is installed
CHECKED_PROGRAMS = {"make", "python", "python3", "vot"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line of the document on which the text begins."""

    document: str
    language: str
    text: str
    line: int

    @property
    def id(self) -> str:
        return f"{self.document}:{self.line}"


def parse_blocks(document: str, markdown: str) -> list[Block]:
    found, language, lines, start = [], None, [], 0
    for number, line in enumerate(markdown.splitlines(), 1):
        fence = re.match(r"\s*```+\s*([\w+-]*)", line)
        if fence and language is None:
            language, lines, start = fence[1].lower(), [], number + 1
        elif fence and not fence[1]:
            found.append(Block(document, language, "\n".join(lines) + "\n", start))
            language = None
        else:
            lines.append(line)
    assert language is None, f"{document}:{start - 1}: the block that begins here is never closed"
    return found


def blocks(*languages: str) -> list[Block]:
    existing = [name for name in DOCUMENTS if (ROOT / name).exists()]
    found = [block for name in existing for block in parse_blocks(name, (ROOT / name).read_text())]
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The simple commands of a shell block as words; in a console block, only what follows a prompt."""
    text = block.text.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "||", "|"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [command for words in found if (command := _without_assignments(words))]


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def problem(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    match words:
        case ["timeout", seconds, *words] if seconds.isdigit():
            return problem(words)
    program, *arguments = words
    if program.endswith(".sh"):
        found = os.access(ROOT / program, os.X_OK)
        return None if found else f"there is no script {program} that may be executed"
    program = program.rsplit("/", 1)[-1]
    if program not in KNOWN_PROGRAMS | CHECKED_PROGRAMS:
        return f"{program} is not a program that the documentation may rely on"
    if program == "vot":
        return _cli_problem(arguments)
    if program == "make":
        return _make_problem(arguments)
    if program in ("python", "python3"):
        return _python_problem(arguments)
    return None


def _cli_problem(arguments: list[str]) -> str | None:
    path = arguments[: next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))]
    help_text, status = cli_help(tuple(path))
    if status:
        return f"`vot {shlex.join(path)} --help` ends with {status}: {help_text.strip()}"
    options = {word.split("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)}
    unknown = sorted(
        word for word in options if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", help_text)
    )
    return f"`vot {shlex.join(path)} --help` does not name {', '.join(unknown)}" if unknown else None


@cache
def cli_help(path: tuple[str, ...]) -> tuple[str, int]:
    """What `vot … --help` prints, wide and without colours, and its exit status."""
    plain = {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [*path, "--help"], prog_name="vot", env=plain)
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output), result.exit_code


def _make_problem(arguments: list[str]) -> str | None:
    targets = [word for word in arguments if "=" not in word and not word.startswith("-")]
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    unknown = [target for target in targets if target not in rules]
    return f"the Makefile has no target {', '.join(unknown)}" if unknown else None


def _python_problem(arguments: list[str]) -> str | None:
    match arguments:
        case ["-m", "venv" | "pip" | "pytest", *_]:
            return None
        case ["-m", module, *_]:
            return None if _module_exists(module) else f"there is no module {module}"
        case [script, *_] if script.endswith(".py"):
            return None if (ROOT / script).exists() else f"there is no file {script}"
    return None


def _module_exists(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and (
        not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__") is not None
    )


def run_block(block: Block) -> None:
    """Execute a Python block in a fresh namespace; a traceback names the line of the document."""
    code = compile("\n" * (block.line - 1) + block.text, ROOT / block.document, "exec")
    exec(code, {"__name__": "__main__"})


def test_the_readme_shows_python():
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert any(block.document == "README.md" for block in blocks("python")), (
        "README.md has no ```python block"
    )


def test_the_readme_names_its_two_commands():
    assert (ROOT / "README.md").exists(), "README.md is missing"
    named = [words for block in blocks(*SHELLS) if block.document == "README.md" for words in commands(block)]
    assert ["make", "demo"] in named and ["make", "test"] in named


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.id)
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for engine in ENGINES:
        if f"import {engine}" in block.text:
            pytest.importorskip(engine)
    try:
        run_block(block)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", blocks(*SHELLS), ids=lambda block: block.id)
def test_shell_block_is_valid(block):
    assert [found for words in commands(block) if (found := problem(words))] == []


def test_parser_of_blocks():
    shell_text = "  ```bash\n  vot ask a.mp4 \\\n    'why?'  # comment\n  ```\n"
    markdown = f"a\n```python\nx = 1\n```\n\n```\nplain\n```\n{shell_text}"
    python, plain, shell = parse_blocks("X.md", markdown)
    assert (python.language, python.text, python.line) == ("python", "x = 1\n", 3)
    assert plain.language == ""
    assert commands(shell) == [["vot", "ask", "a.mp4", "why?"]]
    with pytest.raises(AssertionError, match="X.md:1.*never closed"):
        parse_blocks("X.md", "```python\nx")


def test_parser_of_commands():
    console = Block("X.md", "console", "$ A=1 make test && vot info --json | head\noutput\n", 1)
    assert commands(console) == [["make", "test"], ["vot", "info", "--json"], ["head"]]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("make frobnicate", "no target frobnicate"),
        ("python -m vot_kernels.frobnicate", "no module"),
        ("python benchmarks/frobnicate.py", "no file"),
        ("vot frobnicate", "ends with 2"),
        ("vot info --frobnicate", "does not name --frobnicate"),
        ("frobnicate", "not a program"),
        ("benchmarks/frobnicate.sh out", "no script"),
    ],
)
def test_the_checker_finds(command, reason):
    assert reason in (problem(shlex.split(command)) or "")


def test_a_failing_block_names_its_line(tmp_path):
    with pytest.raises(ZeroDivisionError) as error:
        run_block(Block("README.md", "python", "x = 1\nx / 0\n", 41))
    assert error.traceback[-1].lineno + 1 == 42


def test_every_python_block_parses():
    for block in blocks("python"):
        ast.parse(block.text)
