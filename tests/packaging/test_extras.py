"""The extras list exactly what the package imports, and an error names what is missing in one sentence."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from vot_kernels.extras import EXTRAS, imports_for, require

ROOT = Path(__file__).parents[2]
CORE = {"torch", "numpy", "triton"}
OF_OTHERS = {
    "torchvision",
    "num2words",
    "accelerate",
    "tensorboard",
}  # transformers and torch import them, not we
# The extras with which a module works; the longest matching prefix counts.
BELONGS = {
    "vot_kernels": (),
    "vot_kernels.cli": ("cli",),
    "vot_kernels.data.contact_sheet": ("video",),
    "vot_kernels.data.digitworld": ("train",),
    "vot_kernels.data.video": ("video",),
    "vot_kernels.data.video.progress": ("video", "cli"),
    "vot_kernels.integrations": ("llm",),
    "vot_kernels.pipelines.lmms_eval": ("llm", "lmms"),
    "vot_kernels.models": ("llm",),
    "vot_kernels.models.graph": (),
    "vot_kernels.models.perception.loss": ("train",),
    "vot_kernels.pipelines": ("video", "llm"),
    "vot_kernels.pipelines.ablation": ("train",),
    "vot_kernels.pipelines.calibration": ("train",),
    "vot_kernels.pipelines.evaluation": ("train",),
    "vot_kernels.pipelines.finetuning": ("rl",),
    "vot_kernels.pipelines.on_ray": ("video", "llm", "ray"),
    "vot_kernels.pipelines.progress": ("cli",),
    "vot_kernels.pipelines.web": ("web",),
    "vot_kernels.reasoning": ("llm",),
    "vot_kernels.train": ("train",),
    "vot_kernels.train.rl": ("train", "rl"),
    "vot_kernels.train.vlm": ("train", "rl"),
    "vot_kernels.watching": ("video", "llm"),
    "vot_kernels.watching.tracking": ("vlm",),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGE_OF = {module: package for modules in EXTRAS.values() for module, package in modules.items()}


def declared(extra: str) -> set[str]:
    """Names of the packages of an extra and of the extras that it includes."""
    names: set[str] = set()
    for line in PROJECT[extra]:
        if included := re.fullmatch(r"vot-kernels\[(.*)\]", line):
            names.update(*map(declared, included[1].split(",")))
        else:
            names.add(re.split(r"[<>=!~;\[ ]", line)[0])
    return names


@cache
def imported(source: str) -> set[str]:
    """Top-level names of everything that is imported from outside the standard library and this package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - CORE - {"vot_kernels"}


@cache
def modules() -> list[tuple[str, str]]:
    """Dotted name and source of every module."""
    paths = sorted((ROOT / "vot_kernels").rglob("*.py"))
    return [
        (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p.read_text())
        for p in paths
    ]


def undeclared(module: str, source: str) -> set[str]:
    """What `source` imports that the extras of `module` do not declare."""
    prefix = max((p for p in BELONGS if f"{module}.".startswith(f"{p}.")), key=len)
    known = set().union(*map(declared, BELONGS[prefix]))
    return {name for name in imported(source) if PACKAGE_OF.get(name) not in known}


@pytest.mark.parametrize(("module", "source"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_optional_imports_are_declared_by_the_extra_of_the_module(module, source):
    assert undeclared(module, source) == set()


def test_the_checker_finds_what_is_not_declared():
    assert undeclared("vot_kernels.data.video.load", "def f():\n    from rich import print") == {"rich"}
    assert undeclared("vot_kernels.ops.aoe.op", "import scipy.special") == {"scipy"}
    assert undeclared("vot_kernels.train.loop", "import pandas, av, rich, os, torch.nn") == {"pandas"}


def test_every_prefix_is_a_module():
    names = [module for module, _ in modules()]
    assert set(BELONGS) <= set(names)


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_declare_what_is_imported_and_nothing_else(extra):
    own = {line for line in declared(extra) if line not in set().union(*map(declared, _included(extra)))}
    assert own == set(EXTRAS[extra].values())
    everything = set().union(*(imported(source) for _, source in modules()))
    assert set(EXTRAS[extra]) <= everything | OF_OTHERS


def _included(extra: str) -> list[str]:
    lines = [re.fullmatch(r"vot-kernels\[(.*)\]", line) for line in PROJECT[extra]]
    return [name for line in lines if line for name in line[1].split(",")]


def test_what_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    require("This", "llm", "cli")
    with pytest.raises(ImportError) as caught:
        require("This", "video", "llm", "train")
    assert str(caught.value) == "This needs av, scikit-learn: pip install 'vot-kernels[video,train]'."
    with pytest.raises(ImportError, match=r"^A film needs av: pip install 'vot-kernels\[video\]'\.$"):  # noqa: SIM117
        with imports_for("A film", "video"):
            import av  # noqa: F401


def test_a_missing_package_of_no_extra_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "colorsys", None)
    with pytest.raises(ModuleNotFoundError, match="colorsys"), imports_for("A film", "video"):
        import colorsys  # noqa: F401


@pytest.mark.parametrize(
    ("words", "extras"),
    [
        (["ask", "a.mp4", "Who?"], "video,llm"),
        (["ask", "--batch", "q.jsonl", "--out", "a.jsonl"], "video,llm"),
        (["encode", "a.mp4", "--out", "a.safetensors"], "video,llm"),
        (["train", "perception", "--out", "run"], "video,llm,train"),
        (["train", "encoder", "--out", "run"], "video,llm,train"),
        (["eval", "digitworld", "--out", "a.json"], "video,llm,train"),
        (["ablate", "--out", "a.json"], "video,llm,train"),
        (["info", "--model", "nano"], "llm"),
        (["demo"], "video,llm"),
        (["demo", "--web"], "video,llm,web"),
    ],
)
def test_every_command_says_what_to_install_after_cli_alone(words, extras, monkeypatch, capsys):
    """None in sys.modules makes a package look as if it were not installed."""
    from vot_kernels import cli

    for module in set().union(*(EXTRAS[extra] for extra in ("video", "llm", "train", "web"))) - set(
        EXTRAS["cli"]
    ):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["vot", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"vot {words[0]}") and f"pip install 'vot-kernels[{extras}]'." in err


def test_without_typer_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import vot_kernels.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "vot needs typer: pip install 'vot-kernels[cli]'."
