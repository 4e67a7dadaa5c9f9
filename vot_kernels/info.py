"""What runs here: versions, GPUs, and which backend each op would use. `python -m vot_kernels.info [--json]`.

Meant for bug reports, so it must work where something is broken: every probe is guarded, and the exception of
a probe is reported in its place.
"""

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

import vot_kernels
from vot_kernels.extras import EXTRAS

# Imported to learn their version, because an installed but broken one is what a bug report is about.
CORE = ("torch", "triton", "numpy")


def collect() -> dict[str, Any]:
    """Everything that `main` prints, as plain JSON types. It never raises.

    Returns:
        A dict with the keys "vot_kernels", "python", "platform", "cpu", "packages" (name to version, None
        if not installed), "extras" (extra to such a dict), "cpp" (the C++ kernels: "path", "problem" (why they cannot
        be used, None if they can), "isa" that runs, "isas" compiled, "compiler"), "gpus" (a list of dicts with "name",
        "capability" and "memory_gib"), "no_gpu" (why that list is empty, else None) and "backends" (op to
        backend to the reasons against it, for float32 on the default device; "auto" chooses the first backend
        without a reason). A probe that failed leaves {"error": "its exception"}.
    """
    gpus = _guarded(_gpus)
    found = isinstance(gpus, list)
    return {
        "vot_kernels": {"version": vot_kernels.__version__, "path": os.path.dirname(vot_kernels.__file__)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": _guarded(platform.platform),
        "cpu": _guarded(_cpu),
        "packages": {name: _guarded(partial(_imported_version, name)) for name in CORE},
        "extras": {
            # Read from the metadata alone: importing all of them would take ten seconds.
            extra: {name: _guarded(partial(_metadata_version, name)) for name in packages.values()}
            for extra, packages in EXTRAS.items()
        },
        "cpp": _guarded(_cpp),
        "gpus": gpus if found else [],
        "no_gpu": None if found and gpus else _guarded(_why_no_gpu) if found else gpus,
        "backends": _guarded(_backends),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, with `--json` as one JSON object. Returns the exit status, 0."""
    parser = argparse.ArgumentParser(
        prog="python -m vot_kernels.info",
        description="Print versions, GPUs, and which backend each op would use and why not the others.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    as_json = parser.parse_args(argv).json
    report = collect()
    print(json.dumps(report, indent=2) if as_json else format_report(report))
    return 0


def format_report(report: Mapping[str, Any]) -> str:
    """The text of `main` for a dict from `collect`."""
    python, own = report["python"], report["vot_kernels"]
    rows = [
        ("vot-kernels", f"{own['version']}  ({own['path']})"),
        ("python", f"{python['version']}  ({python['executable']})"),
        ("platform", _text(report["platform"])),
        ("cpu", _text(report["cpu"])),
        *((name, _text(version)) for name, version in report["packages"].items()),
        *((f"[{extra}]", _extra_text(versions)) for extra, versions in report["extras"].items()),
        ("C++", _cpp_text(report["cpp"])),
        *(("gpu", _gpu_text(gpu)) for gpu in report["gpus"]),
    ]
    if not report["gpus"]:
        rows.append(("gpu", f"none: {_text(report['no_gpu'])}"))
    header = 'backends with backend="auto" and float32'
    return "\n".join([*_aligned(rows), "", header, *_backend_lines(report["backends"])])


def _guarded(probe: Callable[[], Any]) -> Any:
    """The result of `probe`, or {"error": …}: a broken module may raise anything, even SystemExit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}


def _imported_version(name: str) -> str | None:
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise
    return str(module.__version__)


def _metadata_version(name: str) -> str | None:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    threads = import_module("torch").get_num_threads()
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} torch threads"


def _cpp() -> dict[str, Any]:
    found = import_module("vot_kernels.cpp.library").library()
    return {**asdict(found), "path": found.path and str(found.path), "isas": list(found.isas)}


def _gpus() -> list[dict[str, Any]]:
    cuda = import_module("torch").cuda
    if not cuda.is_available():
        return []
    return [_gpu(cuda.get_device_properties(index)) for index in range(cuda.device_count())]


def _gpu(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _why_no_gpu() -> str:
    torch = import_module("torch")
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    reasons = [str(warning.message).splitlines()[0] for warning in caught]
    return reasons[0] if reasons else "torch finds no CUDA device"


def _backends() -> dict[str, Any]:
    return dict(import_module("vot_kernels.ops.dispatch").describe_backends())


def _text(value: object) -> str:
    if isinstance(value, Mapping) and "error" in value:
        return f"broken ({value['error']})"
    return "not installed" if value is None else str(value)


def _extra_text(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_text(version)}" for name, version in versions.items())


def _cpp_text(cpp: Mapping[str, Any]) -> str:
    if "error" in cpp:
        return _text(cpp)
    if cpp["problem"] is not None:
        return f"none: {cpp['problem']}"
    return f"{cpp['isa']} of {', '.join(cpp['isas'])}, by {cpp['compiler']}  ({cpp['path']})"


def _gpu_text(gpu: Mapping[str, object]) -> str:
    return f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _backend_lines(backends: Mapping[str, Any]) -> list[str]:
    if "error" in backends:
        return [f"unknown: {_text(backends)}"]
    return _aligned([(op, _choice(reasons)) for op, reasons in backends.items()])


def _choice(reasons: Mapping[str, Sequence[str]]) -> str:
    """ "auto" chooses the first backend without a reason against it; the ones before it say why not."""
    refused: list[str] = []
    for name, against in reasons.items():
        if not against:
            return "; ".join([name, *refused])
        refused.append(f"not {name}: {', '.join(against)}")
    return "; ".join(["none", *refused])


if __name__ == "__main__":
    raise SystemExit(main())
