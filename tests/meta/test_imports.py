"""The import rule, and the calls that the package never makes, checked in the source of every file."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part may import besides itself: imports go one way, from the top down.
GROUND = {"packing", "files", "extras", "scene_graph"}  # they import no other part
OPS = {"packing", "files", "tuning", "testing", "kernels", "cpp"}
NN = OPS | {"ops"}
MODELS = NN | {"nn", "scene_graph"}
DATA = MODELS | {"models", "extras"}
TOP = DATA | {"data"}
ALLOWED = {
    **{part: set() for part in GROUND},
    "cpp": {"files"},
    "kernels": set(),
    "tuning": {"files"},
    "testing": {"packing"},
    "ops": OPS,
    "nn": NN,
    "models": MODELS,
    "distributed": MODELS | {"models"},
    "integrations": TOP,
    "data": DATA,
    "train": TOP
    | {"reasoning", "integrations", "distributed"},  # rewards judge a reply as the reasoning steps do
    "reasoning": TOP,
    "watching": TOP | {"reasoning", "integrations"},
    "pipelines": TOP
    | {"train", "reasoning", "integrations", "watching"},  # what a command does, without its options
    "info": TOP,
    "cli": TOP | {"train", "reasoning", "pipelines", "info", "watching"},
    "": {"packing", "ops", "integrations"},  # vot_kernels/__init__.py
}
REFERENCE_IMPORTS = ("vot_kernels.packing", "vot_kernels.ops.attention_options")  # and other references
# These serve users who have torch and numpy alone; a launcher imports its kernels when it needs them.
LEAN = {
    "",
    "packing",
    "files",
    "extras",
    "scene_graph",
    "tuning",
    "testing",
    "cpp",
    "ops",
    "nn",
    "info",
    "distributed",
}
OPTIONAL = {
    *("av", "PIL", "matplotlib", "sklearn", "scipy"),
    *("transformers", "safetensors", "tokenizers", "gguf", "huggingface_hub"),
    *(
        "typer",
        "click",
        "rich",
        "gradio",
        "yaml",
        "datasets",
        "tensorboard",
        "hypothesis",
        "pytest",
        "triton",
    ),
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NOT_IN_KERNELS = ("torch.nn", "torch.autograd", "os")


def files() -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of every file of the package."""
    for prefix, folder in (("vot_kernels", "vot_kernels"), ("vot_kernels.kernels", "kernels/triton")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([prefix, *parts]).removesuffix(".__init__"), path


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to; "" for the package itself."""
    return (module.split(".") + [""])[1]


def problems(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return everything in `source` that the rules forbid for the file that is imported as `module`."""
    tree = ast.parse(source)
    part = part_of(module)
    if part not in ALLOWED:
        return [f"{module}: the import rule does not know {part!r}; add it to ALLOWED"]
    found = [f"line {line}: {text}" for line, text in _layer_problems(tree, module, part, is_package)]
    found += [f"line {node.lineno}: {text}" for node in ast.walk(tree) for text in _unsafe(node)]
    if part in LEAN:
        found += [
            f"line {line}: {name} is optional, import it inside the function that needs it"
            for line, name in _imports_at_load(tree, module, is_package)
            if name.split(".")[0] in OPTIONAL
        ]
    if re.fullmatch(r"vot_kernels\.ops\.\w+\.reference", module):
        found += [f"line {line}: {text}" for line, text in _reference_problems(tree, module)]
    if part == "kernels":
        found += [f"line {line}: kernels may not use {name}" for line, name in _not_for_kernels(tree, module)]
    return found


def imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The dotted names that an import statement, import_module with a literal, or load("op", backend) may load.

    For an f-string, the text before its first field counts.
    """
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = node.module or ""
            if node.level:
                package = module.split(".")[
                    : None if is_package and node.level == 1 else -node.level + is_package
                ]
                base = ".".join([*package, *filter(None, [node.module])])
            return [f"{base}.{alias.name}" for alias in node.names]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _name(node.func).endswith("import_module"):
            return [name]
        case ast.Call(args=[ast.JoinedStr(values=[ast.Constant(value=str(name)), *_]), *_]) if _name(
            node.func
        ).endswith("import_module"):
            return [name.rstrip(".")]
        case ast.Call(func=ast.Name(id="load"), args=[ast.Constant(value=str(op)), _]):
            return [f"vot_kernels.ops.{op}"]
    return []


def _layer_problems(tree: ast.AST, module: str, part: str, is_package: bool) -> Iterator[tuple[int, str]]:
    if module.endswith(".__main__"):  # an entry point, which nothing imports, so it stands above every layer
        return
    for node in ast.walk(tree):
        for name in imported(node, module, is_package):
            if name.split(".")[0] != "vot_kernels":
                continue
            other = part_of(name)
            if other == "__version__" or other == part or other in ALLOWED[part]:
                continue
            if other == "" and part in ("info", "cli", "integrations"):
                continue
            yield node.lineno, f"{part or 'vot_kernels'} may not import {name}"


def _reference_problems(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """A reference checks the backends, so it may share no code with them."""
    for node in ast.walk(tree):
        for name in imported(node, module, False):
            independent = name.startswith(REFERENCE_IMPORTS) or re.match(
                r"vot_kernels\.ops\.\w+\.reference\b", name
            )
            if name.split(".")[0] == "vot_kernels" and not independent:
                yield node.lineno, f"a reference may not import {name}"


def _imports_at_load(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Imports that run when the file is loaded: not in a function, not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and _name(node.test).endswith("TYPE_CHECKING"):
            continue
        yield from ((node.lineno, name) for name in imported(node, module, is_package))
        yield from _imports_at_load(node, module, is_package)


def _unsafe(node: ast.AST) -> Iterator[str]:
    names = imported(node, "vot_kernels", True)
    for name in names:
        if name.split(".")[0] in UNSAFE_MODULES or name == "torch.load":
            yield f"imports {name}, which can run code from a file"
    match node:
        case ast.Call() if (called := _name(node.func)) in ("torch.load", "eval", "exec", "__import__"):
            yield f"calls {called}"
    match node:
        case ast.keyword(arg="trust_remote_code" | "allow_pickle" as option, value=value) if not _false(
            value
        ):
            yield f"passes {option}"
        case ast.Dict() if any(
            isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not _false(value)
            for key, value in zip(node.keys, node.values, strict=True)
        ):
            yield "passes trust_remote_code"


def _not_for_kernels(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names = imported(node, module, False)
        if isinstance(node, ast.Attribute):
            names = [_name(node)]
        for name in names:
            if any(name == banned or name.startswith(f"{banned}.") for banned in NOT_IN_KERNELS):
                yield node.lineno, name


def _name(node: ast.AST) -> str:
    """`a.b.c` of an expression made of names and dots, else ""."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{_name(node.value)}.{node.attr}"
    return ""


def _false(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize(("module", "path"), [pytest.param(*file, id=file[0]) for file in files()])
def test_file_keeps_the_rules(module, path):
    assert problems(module, path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vot_kernels.ops.aoe", "from vot_kernels.nn import AutonomyOfExperts"),
        ("vot_kernels.ops.aoe", "def f():\n    import vot_kernels.models.encoder"),
        ("vot_kernels.ops.aoe", "from ..nn import mlp"),
        ("vot_kernels.ops.aoe", "from .. import nn"),
        ("vot_kernels.ops.aoe", "import_module('vot_kernels.nn')"),
        ("vot_kernels.ops.aoe", "import importlib\nimportlib.import_module('vot_kernels.data')"),
        ("vot_kernels.ops.aoe", "import_module(f'vot_kernels.nn.{name}')"),
        ("vot_kernels.packing", "load('aoe', backend)"),
        ("vot_kernels.ops.aoe.reference", "def f():\n    load('aoe', 'torch').forward(x)"),
        ("vot_kernels.ops.aoe.reference", "from vot_kernels.ops.aoe import aoe"),
        ("vot_kernels.ops.aoe.reference", "from vot_kernels.tuning import lookup"),
        ("vot_kernels.packing", "from vot_kernels.ops import attention_options"),
        ("vot_kernels.nn.mlp", "from vot_kernels import hybrid_attention"),
        ("vot_kernels.models.encoder", "from vot_kernels.data.video import load_video"),
        ("vot_kernels.data.video", "from vot_kernels.reasoning import steps"),
        ("vot_kernels.train.stages", "from vot_kernels.pipelines import batch"),
        ("vot_kernels.train.__main__", "import pickle"),
        ("vot_kernels.reasoning.steps", "from vot_kernels.cli import main"),
        ("vot_kernels", "from vot_kernels.models import VotEncoder"),
        ("vot_kernels.something_new", ""),
        ("vot_kernels.ops.aoe", "import triton"),
        ("vot_kernels.ops.aoe", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("vot_kernels.nn.mlp", "from transformers import PreTrainedModel"),
        ("vot_kernels.ops.aoe.reference", "class A:\n    import scipy.special"),
        ("vot_kernels.packing", "if True:\n    from sklearn import cluster"),
        ("vot_kernels.files", "import pickle"),
        ("vot_kernels.files", "def f():\n    from pickle import loads"),
        ("vot_kernels.files", "import torch\ntorch.load('x')"),
        ("vot_kernels.files", "from torch import load"),
        ("vot_kernels.files", "eval('1')"),
        ("vot_kernels.files", "exec('1')"),
        ("vot_kernels.reasoning.llm", "AutoModel.from_pretrained(x, trust_remote_code=True)"),
        ("vot_kernels.reasoning.llm", "AutoModel.from_pretrained(x, trust_remote_code=flag)"),
        ("vot_kernels.reasoning.llm", "f(**{'trust_remote_code': True})"),
        ("vot_kernels.files", "np.load(x, allow_pickle=True)"),
        ("vot_kernels.kernels.range_attention", "import torch.nn as nn"),
        ("vot_kernels.kernels.range_attention", "from torch import nn"),
        ("vot_kernels.kernels.range_attention", "import torch\ntorch.nn.functional.silu"),
        ("vot_kernels.kernels.range_attention", "import torch\ntorch.autograd.Function"),
        ("vot_kernels.kernels.range_attention", "import os\nos.environ['X']"),
        ("vot_kernels.kernels.range_attention", "from os import environ"),
        ("vot_kernels.kernels.range_attention", "from vot_kernels.ops import aoe"),
    ],
)
def test_the_checker_finds(module, source):
    assert problems(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vot_kernels.ops.aoe.op", "from vot_kernels.ops.aoe import reference\nfrom .. import dispatch"),
        ("vot_kernels.ops.aoe", "def launch():\n    import triton\n    from vot_kernels.kernels import aoe"),
        ("vot_kernels.ops.aoe.op", "load('aoe', backend).forward(x)"),
        ("vot_kernels.ops.dispatch", "import_module(f'vot_kernels.ops.{op}.{backend}')"),
        ("vot_kernels.nn.mlp", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("vot_kernels.nn.mlp", "from vot_kernels.ops.aoe import aoe\nmodel.eval()"),
        ("vot_kernels.data.video", "import av\nfrom vot_kernels.scene_graph.graph import STSG"),
        ("vot_kernels.reasoning.llm", "AutoModel.from_pretrained(x, trust_remote_code=False)"),
        ("vot_kernels.kernels.range_attention", "import torch\nimport triton\nimport triton.language as tl"),
        ("vot_kernels.cli", "from vot_kernels import __version__\nimport typer"),
        ("vot_kernels.train.__main__", "from vot_kernels.cli import main"),
    ],
)
def test_the_checker_accepts(module, source):
    assert problems(module, source) == []


def test_relative_imports_are_resolved():
    [same, up] = ast.parse("from .a import b\nfrom ..c import d").body
    assert imported(same, "vot_kernels.ops.aoe", False) == ["vot_kernels.ops.a.b"]
    assert imported(up, "vot_kernels.ops.aoe", False) == ["vot_kernels.c.d"]
    assert imported(same, "vot_kernels.ops", True) == ["vot_kernels.ops.a.b"]
    assert imported(up, "vot_kernels.ops", True) == ["vot_kernels.c.d"]
