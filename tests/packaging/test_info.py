"""`python -m vot_kernels.info` describes the installation and never fails, whatever is broken."""

import json
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from vot_kernels import __version__, info
from vot_kernels.cpp.library import library
from vot_kernels.extras import EXTRAS
from vot_kernels.ops.dispatch import BACKENDS, FUNCTIONS


def test_report_of_this_machine():
    report = info.collect()
    assert report["vot_kernels"]["version"] == __version__
    assert report["packages"]["torch"] == torch.__version__
    assert set(report["extras"]) == set(EXTRAS)
    assert report["extras"]["video"]["av"].count(".") >= 1
    assert bool(report["gpus"]) == torch.cuda.is_available() == (report["no_gpu"] is None)
    assert report["cpp"]["problem"] == library().problem and report["cpp"]["isa"] == library().isa
    assert set(report["backends"]) == set(FUNCTIONS)
    assert all(list(reasons) == list(BACKENDS) for reasons in report["backends"].values())


def test_text_of_the_command():
    as_module = subprocess.run(
        [sys.executable, "-m", "vot_kernels.info"], capture_output=True, text=True, check=True
    )
    assert as_module.stderr == ""
    for word in (__version__, torch.__version__, "[llm]", "gpu", *FUNCTIONS):
        assert word in as_module.stdout


def test_json_of_the_command(capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--nonsense"])
    assert stop.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libcuda.so.1: bad header')", "OSError: libcuda.so.1: bad header"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import a_missing_dependency", "No module named 'a_missing_dependency'"),
        ("", "no attribute '__version__'"),
    ],
)
def test_a_broken_triton_is_reported(tmp_path, monkeypatch, capsys, source, reason):
    (tmp_path / "triton.py").write_text(source)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert info.main([]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("triton "))
    assert "broken" in line
    assert reason in line
    monkeypatch.delitem(sys.modules, "triton", raising=False)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("torch", "raise ImportError('libtorch_cpu.so: undefined symbol\\nmore')", "undefined symbol"),
        ("numpy", "raise RuntimeError('built for another ABI')", "built for another ABI"),
    ],
)
def test_a_broken_dependency_is_reported(tmp_path, module, source, reason):
    """Run it in a fresh interpreter, because this one needs torch and numpy."""
    (tmp_path / f"{module}.py").write_text(source)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from vot_kernels.info import main; main(['--json'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert reason in report["packages"][module]["error"]
    assert "broken" in info.format_report(report)


def test_a_missing_module_is_not_called_broken():
    assert info._imported_version("a_module_that_does_not_exist") is None
    assert info._metadata_version("a-distribution-that-does-not-exist") is None
    assert info._text(None) == "not installed"


def test_broken_dispatch_is_reported(monkeypatch, capsys):
    def broken() -> None:
        raise KeyError("hybrid_attention")

    monkeypatch.setattr("vot_kernels.ops.dispatch.describe_backends", broken)
    assert info.main([]) == 0
    assert "unknown: broken (KeyError: 'hybrid_attention')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cpp", "text"),
    [
        ({"problem": "they are not compiled"}, "none: they are not compiled"),
        ({"error": "OSError: no"}, "broken (OSError: no)"),
        (
            {
                "problem": None,
                "isa": "avx2",
                "isas": ["avx512", "avx2"],
                "compiler": "c++ 12",
                "path": "a.so",
            },
            "avx2 of avx512, avx2, by c++ 12  (a.so)",
        ),
    ],
)
def test_what_is_said_of_the_cpp_kernels(cpp, text):
    assert info._cpp_text(cpp) == text


def test_gpus_are_listed(monkeypatch):
    properties = namedtuple("Properties", "name major minor total_memory")("NVIDIA H100", 9, 0, 80 * 2**30)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda index: properties
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr("vot_kernels.ops.dispatch.describe_backends", dict)
    report = info.collect()
    assert report["gpus"] == [{"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 80.0}] * 2
    assert report["no_gpu"] is None
    assert info.format_report(report).count("NVIDIA H100, compute capability 9.0, 80.0 GiB") == 2


def test_a_failing_driver_is_reported(monkeypatch):
    def broken() -> bool:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=broken))
    monkeypatch.setattr("vot_kernels.ops.dispatch.describe_backends", dict)
    report = info.collect()
    assert report["gpus"] == []
    assert report["no_gpu"] == {"error": "RuntimeError: CUDA driver initialization failed"}
    assert "none: broken (RuntimeError: CUDA driver" in info.format_report(report)


@pytest.mark.parametrize(
    ("reasons", "text"),
    [
        ({"triton": [], "torch": []}, "triton"),
        ({"triton": ["no GPU", "old"], "torch": []}, "torch; not triton: no GPU, old"),
        ({"triton": ["no GPU"], "torch": ["dtype"]}, "none; not triton: no GPU; not torch: dtype"),
    ],
)
def test_the_choice_names_every_refusal_before_it(reasons, text):
    assert info._choice(reasons) == text
