"""The pre-commit hooks are local and use what `make` installed."""

from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
HOOKS = [
    (repository["repo"], hook)
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
]


def test_hooks_are_those_of_lint():
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert [hook["entry"].split()[0] for _, hook in HOOKS] == [
        ".venv/bin/ruff",
        ".venv/bin/ruff",
        ".venv/bin/mypy",
    ]
    assert [line.split()[0].removeprefix("@$(BIN)/") for line in lint.splitlines()[1:]] == [
        "ruff",
        "ruff",
        "mypy",
    ]


@pytest.mark.parametrize(("repository", "hook"), HOOKS, ids=[hook["id"] for _, hook in HOOKS])
def test_a_hook_downloads_nothing(repository, hook):
    assert repository == "local" and hook["language"] == "system"
    assert "additional_dependencies" not in hook
