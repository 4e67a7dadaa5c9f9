"""`python -m benchmarks.first_light OUT [--seconds N] [--call 1|2] [--device cuda|cpu]`: a GPU's first figures.

The first call describes the machine, measures its ceilings, tests which variants of the ops are correct on it, sweeps
those that are, races the best of them with peers, and profiles four kernels. The second call takes the best variant of
each sweep and the best peer of each race and times them again, then runs the GPU tests in bfloat16.

It needs torch, triton and numpy, transformers for the towers, and no installation. Each result is written at once:
OUT/first_light.jsonl has the lines, OUT/first_light.log the output. If it is called again with the same OUT, it
continues. On a CPU it rehearses all of this on small problems.
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from benchmarks.core import Outcome, Provider, Status, Workload, anonymous, as_outputs
from benchmarks.gate import MOST, ROOT, source_hash
from benchmarks.pieces import DONE, Conductor, Journal, Piece, Write
from benchmarks.problems.attention import Attention
from benchmarks.problems.experts import AoE, MoE
from benchmarks.problems.fused import DenseResidual, PackPatches
from benchmarks.problems.towers import Tower
from benchmarks.providers import providers_of
from benchmarks.race import Rules, judge, race
from benchmarks.session import describe_device, race_facts, versions
from benchmarks.timing import measure_ceilings
from benchmarks.workloads import workloads
from vot_kernels import tuning
from vot_kernels.ops.launch import record_launches

WORKLOADS = (
    ("softmax", "ragged-64k-d64"),
    ("hybrid", "64k-d64"),
    ("aoe", "64k-d1536-n64-k8-r512"),
    ("linear", "64k-d64"),
    ("moe", "32k-d2048-n128-k8-h768"),
    ("softmax", "ragged-64k-d128"),
    ("hybrid", "64k-d128"),
    ("linear", "64k-d128"),
    ("towers", "images-qwen3-vl-d72"),
    ("towers", "clip-qwen2.5-vl-d80"),
)
"""Raced with peers, the most informative first."""

SWEPT = (
    ("softmax", "64k-d64"),
    ("softmax", "uniform-64x1k-d64"),
    ("softmax", "64k-d128"),
    ("softmax", "ragged-64k-d72"),
    ("softmax", "ragged-64k-d80"),
    ("hybrid", "ragged-64k-d64"),
    ("fused", "rope-qk-norm-68k"),
    ("fused", "dense-residual-64k"),
    ("fused", "size-aware-embedding-512"),
    ("fused", "pack-patches-64"),
    ("fused", "normalise-patches-64"),
)
"""Beside these, the variants of the ops are compared on the workloads below, without peers."""

FAMILIES = {
    "softmax": ("range_attention",),
    "towers": ("range_attention",),
    "hybrid": ("range_attention", "group_states"),
    "linear": ("linear_attention", "group_states"),
    "aoe": ("experts",),
    "moe": ("experts",),
}
"""The config tables whose variants a suite uses; in the suite "fused" it is the op's own."""

PROFILED = (
    ("softmax", "ragged-64k-d64"),
    ("softmax", "ragged-64k-d128"),
    ("hybrid", "64k-d128"),
    ("linear", "64k-d128"),
)
"""Whose forwards Nsight Compute looks at, where it is installed."""

METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)

DIRECTIONS = ("forward", "both")

PEERS = {
    "softmax": (
        "varlen_attn",
        "flash-attn 3",
        "flash-attn 4",
        "cuDNN SDPA per segment",
        "SDPA per segment",
    ),
    "hybrid": ("FA2 of PyTorch + torch linear", "SDPA + torch linear", "exact varlen_attn", "SLA"),
    "linear": (
        "torch linear",
        "flash-bidirectional-linear-attention",
        "flash-linear-attention chunk",
        "exact SDPA per segment",
    ),
    "aoe": (
        "torch._grouped_mm",
        "authors' dataflow (our writing)",
        "equal-parameter MoE (torch._grouped_mm)",
    ),
    "moe": ("torch._grouped_mm", "Liger fused MoE", "ScatterMoE", "gathered loop"),
    "towers": ("sdpa", "eager", "flash_attention_2"),
}
SLOW_PEERS = {"softmax": ("FlexAttention",)}
"""They take long to compile, so they come last."""

SECONDS = {
    "environment": (10, 60),
    "ceilings": (10, 60),
    "correctness": (60, 150),
    "sweep": (8, 25),
    "time": (20, 25),
    "slow time": (60, 150),
    "profile": (15, 30),
    "again": (10, 25),
    "tests": (30, 240),
}
"""The estimate and the limit of a piece on a GPU; all races of a workload are one piece."""
REHEARSAL = (1, 60)

GREEN, RED, LEFT_OUT, NOT_JUDGED = "green", "red", "left out", "not judged"
Judged = dict[tuple[str, str], tuple[str, str]]
"""The state and the reason by variant and direction."""
Verdicts = dict[tuple[str, ...], tuple[str, str]]
"""The state and the reason by suite, workload, variant and direction."""
Work = Callable[[Write], None]

LENGTHS = (127, 128, 129, 1664)  # below, at and above a block, and one of several groups
TOKENS = 1024  # of experts
SIZES = ((1, 8, 16), (1, 6, 22), (2, 26, 32))  # images and a clip, for towers


def _find_kernels() -> None:
    """Make the kernels importable if the package is not installed, because they are in another folder."""
    if find_spec("vot_kernels.kernels") is None:
        kernels = ModuleType("vot_kernels.kernels")
        kernels.__path__ = [str(ROOT / "kernels" / "triton")]
        sys.modules["vot_kernels.kernels"] = kernels


_find_kernels()


def _variants(workload: Workload, arch: str) -> tuple[Provider, ...]:
    """Return our providers that are judged and swept, the ordinary one first.

    Others prefer a variant of the config tables, if that changes a launch for this workload on `arch`; "cpu" rehearses
    with the torch backend, which has no variants but for one in name.
    """
    ordinary = next(p for p in providers_of(workload.suite) if p.name == f"vot-kernels {_backend(arch)}")
    families = FAMILIES.get(workload.suite, (workload.problem.op,))
    names = sorted({name for family in families for name in tuning.variants(family)})
    if arch == "cpu":
        names = ["rehearsed"] if (workload.suite, workload.name) == SWEPT[0] else []
    else:
        names = [name for name in names if _launched(workload, arch, name) != _launched(workload, arch)]
    others = (
        replace(ordinary, name=f"{ordinary.name}, {name}", around=partial(tuning.preferring, name))
        for name in names
    )
    return ordinary, *others


def _providers(workload: Workload, arch: str, names: Collection[str]) -> list[Provider]:
    """Return providers by name: pieces have names alone, because a process that is spawned cannot get a provider."""
    known = {p.name: p for p in (*providers_of(workload.suite), *_variants(workload, arch))}
    return [known[name] for name in names]


def _backend(arch: str) -> str:
    return "torch" if arch == "cpu" else "triton"


@cache
def _launched(workload: Workload, arch: str, *preferred: str) -> list[str] | None:
    """Return the kernels and configs that few tokens of a workload would launch, None if that cannot be recorded."""
    problem, dtype = _few(workload.problem, "cpu"), workload.dtype
    provider = next(p for p in providers_of(workload.suite) if p.name == "vot-kernels triton")
    cpu = torch.device("cpu")
    try:
        with tuning.preferring(*preferred), record_launches(arch) as launches:
            leaves = [x.requires_grad_(x.is_floating_point()) for x in problem.inputs(dtype, cpu)]
            outs = as_outputs(provider.run(problem, provider.prepare(problem, dtype, cpu), *leaves))
            outs = [out for out in outs if out.requires_grad]
            if outs:
                torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], outs, allow_unused=True)
    except Exception:  # whatever a launcher raises here, it will raise on the GPU, where it is reported
        return None
    return [f"{launch.kernel.__name__} {launch.config}" for launch in launches]


def first_light(out: Path, seconds: float, device: str, call: int = 1) -> int:
    """Run one call. Return the exit status: 0, 1 if something is red, 3 if the device cannot be used."""
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "first_light.jsonl", source=source_hash(besides="benchmarks"))
    conductor = Conductor(journal, out / "first_light.log", seconds)
    complete = False
    try:
        if (arch := _meet(conductor, device)) is None:
            conductor.say(f"the device {device} cannot be used, see {conductor.log}")
            return 3
        status = (_first_call if call == 1 else _second_call)(conductor, device, arch)
        complete = True
        _print_times(journal)
        return status
    finally:
        journal.write("end", complete=complete, pieces=conductor.finished())


def _first_call(conductor: Conductor, device: str, arch: str) -> int:
    conductor.run([_piece("ceilings", "ceilings", device, partial(_ceilings, device))])
    raced, swept = _workloads(WORKLOADS, device), _workloads(SWEPT, device)
    chosen = [*raced, *swept]
    jobs = min(os.cpu_count() or 1, MOST)
    conductor.run(_correctness(chosen, device, arch), jobs, again=device == "cuda" and _nothing_compiled())
    verdicts = _verdicts(conductor, chosen, arch)
    red = {" ".join(key): why for key, (state, why) in verdicts.items() if state == RED}
    conductor.journal.write("red", red=red)
    conductor.say(f"red: {', '.join(red) or 'nothing'}")
    conductor.run([piece for w in chosen for piece in _sweeping(w, verdicts, device, arch)])
    conductor.run(_races(raced, verdicts, conductor.journal, device, arch))
    if device == "cuda":
        known = {(w.suite, w.name): w for w in raced}
        conductor.run([_profiling(known[key]) for key in PROFILED])
    return 1 if red else 0


def _second_call(conductor: Conductor, device: str, arch: str) -> int:
    """Time our best variants and the best peers again, then run the GPU tests in bfloat16."""
    pieces, journal = [], conductor.journal
    for w in _workloads(WORKLOADS, device):
        names = [name for ours in (True, False) if (name := _fastest(journal, w, ours))]
        work = partial(_race, "again", w, arch, names, {}, SECONDS["again"][1])
        pieces.append(_piece("again", f"again {w.suite} {w.name}", device, work))
    conductor.run(pieces)
    if device == "cuda":
        conductor.run(
            [_piece("tests", "GPU tests in bfloat16", device, partial(_tests, journal.path.parent))]
        )
    return 0


def _meet(conductor: Conductor, device: str) -> str | None:
    """Write the environment again and continue the lines of this machine. Return its architecture, such as "sm_90" or
    "cpu", None if the device cannot be used."""
    journal = conductor.journal
    for conductor.method in ("fork", "spawn"):
        name = f"environment, by {conductor.method} at {time.time():.0f}"
        conductor.run([_piece("environment", name, device, partial(_environment, device))])
        if conductor.finished().get(name) == DONE:
            found = journal.read("environment")[-1]
            journal.stamp["machine"] = found["machine"]
            return str(found["device"].get("capability", device))
    return None


def _piece(kind: str, name: str, device: str, work: Work, parts: tuple[Piece, ...] = ()) -> Piece:
    estimate, limit = SECONDS[kind] if device == "cuda" else REHEARSAL
    return Piece(name, work, estimate, limit, parts)


# --- the machine ---


def _environment(device: str, write: Write) -> None:
    torch.ones(1, device=device).item()
    described = describe_device(torch.device(device))
    driver = _printed("nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv")
    commit = _printed("git", "-C", str(ROOT), "rev-parse", "HEAD")
    facts = {"device": described, "versions": versions(), "driver": driver, "commit": commit}
    write("environment", machine=described["name"], **facts)


def _printed(*command: str) -> str | None:
    """Return the output of a program, None if it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _ceilings(device: str, write: Write) -> None:
    found: Any = measure_ceilings(torch.device(device), [torch.bfloat16])
    tflops = found["matmul_flops_per_s"]["bfloat16"] / 1e12
    write("ceilings", matmul_bf16_tflops=tflops, copy_gb_per_s=found["copy_bytes_per_s"] / 1e9)


# --- correctness ---


def _workloads(keys: Sequence[tuple[str, str]], device: str) -> list[Workload]:
    known = {(w.suite, w.name): w for w in workloads("cuda")}
    chosen = [known[key] for key in keys]
    if device == "cuda":
        return chosen
    # Not all processors have instructions for bfloat16.
    return [replace(w, problem=_tiny(w.problem), device=device, dtype=torch.float32) for w in chosen]


def _tiny(problem: Any) -> Any:
    """Return a small problem of the same kind, for the rehearsal."""
    if isinstance(problem, Attention):
        return replace(problem, lengths=(48, 16), group_size=8, heads=2, kv_heads=2)
    if isinstance(problem, AoE | MoE):
        return replace(problem.small(), tokens=64, experts=4, top_k=2)
    return problem.small()


def _case(workload: Workload) -> Workload:
    """Return the workload with few tokens. Verifying it compiles the kernels that the workload needs."""
    return replace(workload, problem=_few(workload.problem, workload.device))


def _few(problem: Any, device: str) -> Any:
    """Return a problem that needs the same kernels, with few tokens."""
    if isinstance(problem, Tower):
        return replace(problem.small(), sizes=SIZES) if device == "cuda" else problem.small()
    if isinstance(problem, Attention):
        return replace(problem, lengths=LENGTHS) if problem.size > sum(LENGTHS) else problem
    if isinstance(problem, AoE | MoE | DenseResidual):
        return replace(problem, tokens=min(problem.tokens, TOKENS))
    if isinstance(problem, PackPatches):
        return replace(problem, sizes=problem.sizes[:4])
    return replace(problem, grid=problem.grid[-1:])


def _correctness(chosen: Sequence[Workload], device: str, arch: str) -> list[Piece]:
    """Return one piece for every variant on every workload, the ordinary variants first."""
    pairs = [(w, i, variant) for w in chosen for i, variant in enumerate(_variants(w, arch))]
    pairs.sort(key=lambda pair: pair[1])
    return [
        _piece("correctness", _judging(w, v.name), device, partial(_judge, w, arch, v.name))
        for w, _, v in pairs
    ]


def _judging(workload: Workload, variant: str) -> str:
    return f"correctness of {workload.suite} {workload.name}, {variant}"


def _directions(workload: Workload) -> tuple[str, ...]:
    """Return the directions that are timed; patches of images that nobody differentiates are packed alone."""
    return DIRECTIONS[:1] if isinstance(workload.problem, PackPatches) else DIRECTIONS


def _judge(workload: Workload, arch: str, name: str, write: Write) -> None:
    torch.set_num_threads(1)  # the other cores belong to concurrent pieces
    case, (variant,) = _case(workload), _providers(workload, arch, [name])
    for direction in _directions(case):
        state, reason = GREEN, ""
        if outcome := judge(variant, case, direction, torch.device(case.device), Rules(), {}):
            state = LEFT_OUT if outcome.status in (Status.MISSING, Status.UNSUPPORTED) else RED
            reason = f"{outcome.status}: {outcome.reason}"
        write("correctness", **race_facts(case, direction, variant), state=state, reason=reason)


def _nothing_compiled() -> bool:
    """Whether Triton's cache is empty: judging fills it on all cores, but a race would on one."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return not Path(folder).exists()


def _verdicts(conductor: Conductor, chosen: Sequence[Workload], arch: str) -> Verdicts:
    lines, ended = conductor.journal.read("correctness"), conductor.finished()
    verdicts: Verdicts = {}
    for w in chosen:
        for variant in _variants(w, arch):
            end = ended.get(_judging(w, variant.name))
            for direction in _directions(w):  # it crashed or hung, or has not run
                verdicts[w.suite, w.name, variant.name, direction] = (
                    (RED, end) if end else (NOT_JUDGED, "no time left")
                )
    for r in lines:
        verdicts[r["suite"], r["workload"], r["provider"], r["direction"]] = r["state"], r["reason"]
    return verdicts


# --- times ---


def _sweeping(workload: Workload, verdicts: Verdicts, device: str, arch: str) -> list[Piece]:
    """Return the sweep of our variants on a workload, none if there is one alone."""
    ours = _variants(workload, arch)
    if len(ours) < 2:
        return []
    judged = _judged(workload, [p.name for p in ours], verdicts)
    return [_racing("sweep", workload, judged, (), device, arch)]


def _races(
    chosen: Sequence[Workload], verdicts: Verdicts, journal: Journal, device: str, arch: str
) -> list[Piece]:
    """Return the races of all workloads, then those beside the slow peers. Of ours, the ordinary variant takes part and
    the fastest of the sweep."""
    pieces = []
    for kind, peers in (("time", PEERS), ("slow time", SLOW_PEERS)):
        for w in (w for w in chosen if w.suite in peers):
            ordinary, *others = (p.name for p in _variants(w, arch))
            best = [name for name in others if name == _fastest(journal, w, True)]
            judged = _judged(w, [ordinary, *(best if kind == "time" else ())], verdicts)
            pieces.append(_racing(kind, w, judged, peers[w.suite], device, arch))
    return pieces


def _judged(workload: Workload, ours: Sequence[str], verdicts: Verdicts) -> Judged:
    return {
        (name, direction): verdicts[workload.suite, workload.name, name, direction]
        for name in ours
        for direction in _directions(workload)
    }


def _fastest(journal: Journal, workload: Workload, ours: bool) -> str | None:
    """Return the fastest of our variants in the sweep, or of the peers in the race, over all directions that both
    timed; None if none was timed. Peers that solve something else do not count."""
    totals: dict[str, dict[str, float]] = {}
    for r in [*journal.read("sweep"), *journal.read("time")]:
        same = (r["suite"], r["workload"], r["ours"]) == (workload.suite, workload.name, ours)
        if same and r["status"] == Status.TIMED and not r["instead"]:
            totals.setdefault(r["provider"], {})[r["direction"]] = r["kernel_ms"]
    most = max(map(len, totals.values()), default=0)
    whole = {name: sum(times.values()) for name, times in totals.items() if len(times) == most}
    return min(whole, key=lambda name: whole[name], default=None)


def _racing(
    kind: str, workload: Workload, judged: Judged, peers: tuple[str, ...], device: str, arch: str
) -> Piece:
    """Race all in turns, or each alone if that fails. If none of ours is green, there is nothing to compare with."""
    name = f"{kind} of {workload.suite} {workload.name}"
    green = list(dict.fromkeys(variant for (variant, _), (state, _) in judged.items() if state == GREEN))
    racers = [*green, *peers] if green else []
    seconds = (SECONDS[kind] if device == "cuda" else REHEARSAL)[1]
    parts = tuple(
        _piece(
            kind,
            f"{name}, {each}",
            device,
            partial(_race, kind, workload, arch, [each], _only(each, judged), seconds),
        )
        for each in racers
    )
    work = partial(_race, kind, workload, arch, racers, judged, seconds)
    return _piece(kind, name, device, work, parts)


def _only(name: str, judged: Judged) -> Judged:
    return {key: found for key, found in judged.items() if key[0] == name}


def _race(
    kind: str, workload: Workload, arch: str, racers: list[str], judged: Judged, seconds: float, write: Write
) -> None:
    """Race in every direction within `seconds`, and write the outcomes of each direction at once."""
    cuda, begun = workload.device == "cuda", time.monotonic()
    directions = _directions(workload)
    rules = Rules(rounds=None if cuda else 2, quick=not cuda)
    for done, direction in enumerate(directions, start=1):
        rules.deadline = begun + 0.8 * seconds * done / len(directions)
        rules.seconds_per_provider = 0.2 * seconds / (len(directions) * max(1, len(racers)))
        states = {name: found for (name, d), found in judged.items() if d == direction}
        left_out = {name: found for name, found in states.items() if found[0] != GREEN}
        providers = _providers(workload, arch, [name for name in racers if name not in left_out])
        outcomes = race(workload, direction, providers, rules)
        if cuda:
            torch.cuda.synchronize()  # fails after an illegal access, in which case no measurement counts
        for provider in _providers(workload, arch, left_out):
            state, reason = left_out[provider.name]
            status = Status.UNSUPPORTED if state == LEFT_OUT else Status.GATED
            providers.append(provider)
            outcomes[provider.name] = Outcome(provider.name, status, f"{state}: {reason}")
        for provider in providers:
            facts = race_facts(workload, direction, provider)
            write(kind, **facts, **_figures(outcomes[provider.name], facts["flops"]))


def _figures(outcome: Outcome, flops: int) -> dict[str, Any]:
    """Return the outcome, with the medians and the rate of the kernel alone, which readers look at first."""
    facts = asdict(outcome)
    del facts["provider"]
    if outcome.status is not Status.TIMED:
        return facts
    whole, kernel = median(outcome.whole_s), median(outcome.kernel_s)
    return {**facts, "whole_ms": 1e3 * whole, "kernel_ms": 1e3 * kernel, "tflops": flops / kernel / 1e12}


# --- profiles and tests ---


def _profiling(workload: Workload) -> Piece:
    name = f"profile of {workload.suite} {workload.name}"
    return _piece("profile", name, "cuda", partial(_profile, workload))


def _profile(workload: Workload, write: Write) -> None:
    """Let Nsight Compute measure the kernels of one forward, and write what it prints for each."""
    if not (ncu := shutil.which("ncu")):
        write("profile", suite=workload.suite, workload=workload.name, reason="ncu is not installed")
        return
    program = "from benchmarks.first_light import run_forward; run_forward(*__import__('sys').argv[1:])"
    command = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-c", program, workload.suite, workload.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = list(csv.DictReader(line for line in done.stdout.splitlines() if line.startswith('"')))
    for row in rows:
        found = {
            name: row.get(name) for name in ("Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
        }
        write("profile", suite=workload.suite, workload=workload.name, **found)
    if not rows:
        reason = anonymous((done.stdout + done.stderr).strip()[-500:])
        write("profile", suite=workload.suite, workload=workload.name, reason=reason)


def run_forward(suite: str, name: str) -> None:
    """Run the forward of a workload in one of Nsight Compute's profiled ranges, after a warm-up."""
    workload = next(w for w in workloads("cuda") if (w.suite, w.name) == (suite, name))
    provider = next(p for p in providers_of(suite) if p.name == "vot-kernels triton")
    device = torch.device(workload.device)
    inputs = workload.problem.inputs(workload.dtype, device)
    prepared = provider.prepare(workload.problem, workload.dtype, device)
    for profiled in (False, True):
        with torch.cuda.profiler.profile() if profiled else nullcontext():
            provider.run(workload.problem, prepared, *inputs)
            torch.cuda.synchronize()


def _tests(out: Path, write: Write) -> None:
    """Run the GPU tests in bfloat16, op by op; a red op does not stop the others."""
    result = out / "gpu-tests-bf16.json"
    command = [sys.executable, "-m", "benchmarks.gate", str(result), "--keep-going", "--seconds", "220"]
    environment = os.environ | {"PYTEST_ADDOPTS": "-k 'bf16 or bfloat16'"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, cwd=ROOT, env=environment, timeout=235)
    for op, state in (json.loads(result.read_text())["ops"] if result.exists() else {}).items():
        write("tests", op=op, state=state)


def _print_times(journal: Journal) -> None:
    for r in [r for kind in ("sweep", "time", "slow time", "again") for r in journal.read(kind)]:
        if r["status"] == Status.TIMED:
            name = f"{r['suite']} {r['workload']} {r['direction']}"
            print(f"{name:<42} {r['provider']:<40} {r['kernel_ms']:9.3f} ms {r['tflops']:7.1f} TFLOP/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results; what it holds already is not repeated")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default 540)")
    parser.add_argument(
        "--call", type=int, choices=(1, 2), default=1, help="2: the best once more, and tests"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Asking whether there is a GPU must not initialize CUDA here, or forks could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import_module("torch._dynamo")  # every op's first call imports it; forked processes have it already
    if find_spec("transformers"):
        import_module("transformers.modeling_utils")  # every tower imports it
    try:
        return first_light(options.out, options.seconds, options.device, options.call)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
