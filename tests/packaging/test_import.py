"""`import vot_kernels`: fast, and possible without triton, without the extras and without a GPU."""

import importlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import vot_kernels

ROOT = Path(__file__).parents[2]
EXTRAS = ("triton", "av", "transformers", "matplotlib", "sklearn", "scipy", "PIL", "typer", "rich")


def python(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_public_name_resolves():
    for name in vot_kernels.__all__:
        value = getattr(vot_kernels, name)
        assert name == "__version__" or value.__name__ == name
        assert name in dir(vot_kernels)
    assert sorted(vot_kernels.__all__) == vot_kernels.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'attenton'"):
        _ = vot_kernels.attenton
    with pytest.raises(ImportError):
        exec("from vot_kernels import attenton", {})


def test_submodules_survive_the_lazy_names():
    assert importlib.import_module("vot_kernels.ops.hybrid_attention").hybrid_attention_step
    assert callable(vot_kernels.hybrid_attention)


def test_ops_without_triton_extras_or_gpu():
    """None in sys.modules makes an import fail as if the package were not installed."""
    python(
        "import sys; sys.modules.update(dict.fromkeys(" + repr(EXTRAS) + "))\n"
        "import torch; torch.cuda.is_available = lambda: False\n"
        "import vot_kernels; from vot_kernels import *\n"
        "q = torch.ones(3, 1, 4)\n"
        "out = packed_attention(q, q, q, PackedLayout.from_lengths([2, 1]))\n"
        "assert torch.allclose(out, q)"
    )


def own_seconds(code: str, before: str = "import torch", times: int = 1) -> list[float]:
    """CPU seconds of `code` after `before` in fresh interpreters: forks of one, since `before` takes seconds.

    CPU time rather than wall time, so that other programs on the machine count little.
    """
    timed = f"""{before}
import os, time
for _ in range({times}):
    if os.fork() == 0:
        start = time.process_time()
        {code}
        print(time.process_time() - start, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0"""
    found = [float(line) for line in python(timed).splitlines()]
    assert len(found) == times
    return found


def test_import_is_fast():
    assert statistics.median(own_seconds("import vot_kernels", times=3)) < 0.050


def test_touching_every_public_name_is_fast():
    """Registering the ops must not import the compiler, which takes seconds."""
    assert own_seconds("from vot_kernels import *")[0] < 0.5


def test_the_clock_sees_a_slow_import(tmp_path):
    (tmp_path / "slow.py").write_text("sum(range(20_000_000))")
    assert own_seconds("import slow", before=f"import sys; sys.path.append({str(tmp_path)!r})")[0] > 0.050


def test_transformers_still_imports_from_the_repository_root():
    """It looks for a package named `kernels`; a regular one at the root would shadow Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    python("import sys; sys.path.insert(0, ''); from transformers import PreTrainedModel")
