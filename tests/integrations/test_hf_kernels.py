"""The export for the `kernels` package: it runs where this package is hidden, and gives the same numbers."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vot_kernels
from vot_kernels.integrations import hf_kernels
from vot_kernels.integrations.layers import SwiGLUExperts
from vot_kernels.testing import shifted

# The calls that both sides run, with `ops` the kernel or this package.
CALLS = """
import torch

def results(ops, seed, backend="auto"):
    torch.manual_seed(seed)
    lengths = [5, 0, 12, 9]
    layout = ops.PackedLayout.from_lengths(lengths, group_size=4)
    q, k, v = (torch.randn(26, 2, 16, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 5, 5, 17, 26], dtype=torch.int32)
    x, gate_up, down = torch.randn(10, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    chosen, weights = torch.rand(10, 4).topk(2)[1], torch.rand(10, 2)
    found = {
        "hybrid_attention": ops.hybrid_attention(q, k, v, layout, window=1, backend=backend),
        "flash_attn_varlen_func": ops.flash_attn_varlen_func(
            q, k, v, bounds, bounds, 12, 12, causal=True, backend=backend
        ),
        "moe": ops.moe(x, gate_up, down, chosen, weights, backend=backend),
    }
    (found["hybrid_attention"].sum() + found["flash_attn_varlen_func"].square().sum()).backward()
    return {**found, "gradient": q.grad}
"""
SCRIPT = f"""
import importlib.util, json, sys
from pathlib import Path
import numpy as np

class Hide:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "vot_kernels":
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

sys.meta_path.insert(0, Hide())
{CALLS}
folder, out, seed, backend = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
name = json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]
try:
    from kernels import get_local_kernel
    kernel = get_local_kernel(folder, backend="cpu")
except ImportError:
    spec = importlib.util.spec_from_file_location(name, folder / "build/torch-cpu/__init__.py")
    kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
assert not any(module.startswith("vot_kernels") for module in sys.modules)
np.savez(out, **{{key: x.detach().numpy() for key, x in results(kernel, seed, backend).items()}})
namespaces = {{op.split("::")[0] for op in torch._C._dispatch_get_all_op_names() if "vot_kernels" in op}}
assert namespaces == {{name}}, namespaces
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return hf_kernels.export(tmp_path_factory.mktemp("export") / "vot-kernels")


def builds(exported):
    return [exported / "build" / f"torch-{backend}" for backend in ("cuda", "cpu")]


def run(exported, folder, backend, seed, **environment):
    """Return the results of the kernel in a process of its own, by name."""
    script, out = folder / "script.py", folder / "out.npz"
    script.write_text(SCRIPT)
    command = [sys.executable, script, exported, out, str(seed), backend]
    settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    process = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with np.load(out) as found:
        return {name: torch.from_numpy(found[name]) for name in found}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_kernel_gives_the_numbers_of_the_package(backend, exported, tmp_path):
    """The device code of Triton runs on its interpreter here."""
    seed, scope = shifted(7), {}
    exec(CALLS, scope)
    expected = scope["results"](vot_kernels, seed, "torch")
    interpreted = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    found = run(exported, tmp_path, backend, seed, **interpreted)
    assert found.keys() == expected.keys()
    exact = {"rtol": 0, "atol": 0} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    for name, right in expected.items():
        assert right.abs().sum() > 0
        torch.testing.assert_close(found[name], right.detach(), **exact)


def test_every_import_is_relative_or_of_what_a_kernel_may_use(exported):
    outside = set()
    for build in builds(exported):
        for path in build.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = path.parents[node.level - 1]
                    target = base.joinpath(*(node.module or "").split("."))
                    assert base.is_relative_to(build)
                    assert target.is_dir() or target.with_suffix(".py").is_file(), (
                        f"{path}: {ast.unparse(node)}"
                    )
                elif isinstance(node, ast.ImportFrom):
                    outside.add(node.module.split(".")[0])
                elif isinstance(node, ast.Import):
                    outside |= {alias.name.split(".")[0] for alias in node.names}
    assert outside - sys.stdlib_module_names == {"torch", "numpy", "triton"}


def test_metadata_tells_the_builds_apart_and_lists_every_file(exported):
    facts = [json.loads((build / "metadata.json").read_text()) for build in builds(exported)]
    assert [fact["backend"]["type"] for fact in facts] == ["cuda", "cpu"]
    assert len({fact["id"] for fact in facts}) == 2 and all(fact["id"].isidentifier() for fact in facts)
    for build, fact in zip(builds(exported), facts, strict=True):
        digests = fact["digest"]["files"]
        files = {p.relative_to(build).as_posix(): p for p in build.rglob("*") if p.is_file()}
        files = {
            name: path for name, path in files.items() if "__pycache__" not in name
        }  # of who imported it
        assert files.keys() - digests.keys() == {"metadata.json"} and digests.keys() <= files.keys()
        for name, digest in digests.items():
            assert hashlib.sha256(files[name].read_bytes()).digest() == b64decode(digest)
        text = "".join(p.read_text() for name, p in files.items() if name.endswith("/op.py"))
        named = re.findall(rf'custom_op\(\s*"{fact["id"]}::', text)
        assert len(named) == text.count("@custom_op(") >= 16


def test_other_sources_have_other_names(exported, tmp_path, monkeypatch):
    files = hf_kernels._files()
    monkeypatch.setattr(hf_kernels, "_files", lambda: files | {"files.py": files["files.py"] + "# changed\n"})
    changed = hf_kernels.export(tmp_path / "changed")
    ids = {
        json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"]
        for folder in (exported, changed)
    }
    assert len(ids) == 2


def test_layers_have_a_forward_and_nothing_else():
    allowed = {"forward", "has_backward", "can_torch_compile"}
    assert {name for name in vars(SwiGLUExperts) if not name.startswith("__")} <= allowed
    assert "__init__" not in vars(SwiGLUExperts)


def test_the_layer_takes_the_place_of_experts_of_transformers():
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=6, num_experts=4)
    config._experts_implementation = "eager"
    experts = Qwen3MoeExperts(config)
    torch.manual_seed(shifted(3))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x, (weights, chosen) = torch.randn(10, 8), torch.rand(10, 4).topk(2)
    torch.testing.assert_close(
        SwiGLUExperts.forward(experts, x, chosen, weights), experts(x, chosen, weights)
    )
    experts.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="needs the activation SiLU, got GELU"):
        SwiGLUExperts.forward(experts, x, chosen, weights)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (hf_kernels.export(empty) / "build").is_dir()
    before = sorted(empty.rglob("*"))
    with pytest.raises(FileExistsError, match=r"The folder '.*empty' is not empty; name one that is"):
        hf_kernels.export(empty)
    assert sorted(empty.rglob("*")) == before


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    write = hf_kernels._write

    def failing(folder: Path, backend: str, files: dict[str, str]) -> None:
        write(folder, backend, files)
        if backend == "cpu":
            raise OSError("no space left")

    monkeypatch.setattr(hf_kernels, "_write", failing)
    with pytest.raises(OSError, match="no space left"):
        hf_kernels.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_kernels", str(tmp_path / "out")])
    assert hf_kernels.main() == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert hf_kernels.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not empty" in error
