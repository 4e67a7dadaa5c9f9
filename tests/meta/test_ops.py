"""Every op has a reference, an opcheck, a benchmark and a row in the README's support table."""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import vot_kernels
import vot_kernels.ops
from vot_kernels.ops.dispatch import FUNCTIONS, OPS

ROOT = Path(__file__).parents[2]
NAMESPACE = "vot_kernels::"


def submodules(package) -> dict[str, object]:
    return {
        info.name: importlib.import_module(f"{package.__name__}.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    }


OP_MODULES = submodules(vot_kernels.ops)
REGISTERED = sorted(
    name.removeprefix(NAMESPACE)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(NAMESPACE)
)


@cache
def sources(folder: str, pattern: str = "*.py") -> dict[Path, str]:
    return {path: path.read_text() for path in sorted((ROOT / folder).rglob(pattern))}


def words(node: ast.AST) -> set[str]:
    """Every identifier of `node`, attributes, imported names and short strings included."""
    found: set[str] = set()
    for inner in ast.walk(node):
        match inner:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word):
                found.add(word)
            case ast.Constant(value=str(text)):
                found.add(text.removeprefix(NAMESPACE))
    return found


def opchecked(source: str) -> set[str]:
    """The words of every function that calls opcheck, those of the module constants it uses included."""
    tree = ast.parse(source)
    constants = {
        target.id: words(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        used = words(node)
        if any("opcheck" in word for word in used | {node.name}):
            found |= used.union(*(constants[word] for word in used if word in constants))
    return found


@cache
def opchecked_by_the_tests() -> set[str]:
    return set().union(*map(opchecked, sources("tests/ops").values()))


@cache
def words_of_the_benchmarks() -> set[str]:
    return set().union(*(words(ast.parse(text)) for text in sources("benchmarks").values()))


def support_rows(readme: str) -> set[str]:
    """The names in backticks in table rows, call parentheses cut off."""
    rows = [line for line in readme.splitlines() if line.lstrip().startswith("|")]
    return {name for row in rows for name in re.findall(r"`([A-Za-z_]\w*)(?:\([^`]*\))?`", row)}


def test_the_public_ops_are_exported_and_known_to_dispatch():
    public = {name for name in vot_kernels.__all__ if inspect.isfunction(getattr(vot_kernels, name))}
    assert public == set(FUNCTIONS) | {"plan_packing", "patch", "patched", "unpatch"}
    assert all(folder in OP_MODULES for folder in FUNCTIONS.values())


def test_ops_are_registered():
    assert REGISTERED, f"nothing is registered under {NAMESPACE}"


@pytest.mark.parametrize("op", sorted(set(FUNCTIONS.values())))
def test_op_has_a_reference(op):
    module = importlib.import_module(f"vot_kernels.ops.{op}.reference")
    assert inspect.isfunction(getattr(module, op, None)), (
        f"vot_kernels/ops/{op}/reference.py does not define {op}"
    )


@pytest.mark.parametrize("op", FUNCTIONS)
def test_op_has_a_docstring_and_keyword_only_options(op):
    function = getattr(vot_kernels, op)
    assert len(inspect.getdoc(function) or "") > 80
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds, "an unknown option must be refused"


@pytest.mark.parametrize("op", REGISTERED)
def test_registered_op_belongs_to_a_file_of_ops(op):
    owners = [path for path, text in sources("vot_kernels/ops").items() if f'"{NAMESPACE}{op}"' in text]
    assert len(owners) == 1, f"{NAMESPACE}{op} should be defined in one file of vot_kernels/ops, not {owners}"


@pytest.mark.parametrize("op", REGISTERED)
def test_registered_op_is_opchecked(op):
    assert {op, f"_{op}"} & opchecked_by_the_tests(), (
        f"no function of tests/ops that calls opcheck names {op}"
    )


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_benchmark(op):
    assert op in words_of_the_benchmarks(), f"no file of benchmarks/ names {op}"


@pytest.mark.parametrize("op", FUNCTIONS)
def test_op_has_a_row_in_the_readme(op):
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing; it must hold the support table of the ops"
    assert op in support_rows(readme.read_text()), f"README.md has no table row with `{op}` in backticks"


def test_the_checks_can_fail():
    assert "aoe" not in support_rows("`aoe` in prose\n| aoe | without backticks |\n| `aoe_other` |")
    assert support_rows("| `aoe` | x |\n|`dense_residual(states, weights)`|") == {"aoe", "dense_residual"}
    unrelated = "def test_a():\n    opcheck(op.aoe_fwd)\ndef test_b():\n    op.aoe_bwd()"
    assert "aoe_bwd" not in opchecked(unrelated)
    assert "aoe_fwd" in opchecked(unrelated)
    table = 'CASES = ["vot_kernels::aoe_bwd"]\ndef test_opcheck():\n    for name in CASES: check(name)'
    assert "aoe_bwd" in opchecked(table)
    assert "aoe" not in words(ast.parse("# aoe\nx = 'the aoe op'"))
