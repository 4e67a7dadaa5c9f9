"""`python -m benchmarks.first_light OUT [--seconds N] [--device cuda|cpu]`: first figures of a GPU within minutes.

It describes the machine, measures its ceilings, tests which ops are correct on it, and times these beside PyTorch's
own functions. It needs torch, triton and numpy, transformers for the towers, and no installation. Each result is
written at once: OUT/first_light.jsonl has the lines, OUT/first_light.log the output. If it is called again with the
same OUT, it continues. On a CPU it rehearses all of this on small problems.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from benchmarks.core import Outcome, Provider, Status, Workload
from benchmarks.gate import MOST, ROOT, source_hash
from benchmarks.pieces import DONE, Conductor, Journal, Piece, Write
from benchmarks.problems.attention import Attention
from benchmarks.problems.towers import Tower
from benchmarks.providers import providers_of
from benchmarks.race import Rules, judge, race
from benchmarks.session import describe_device, race_facts, versions
from benchmarks.timing import measure_ceilings
from benchmarks.workloads import workloads

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
"""The most informative first."""

DIRECTIONS = ("forward", "both")

PEERS = {
    "softmax": ("varlen_attn", "cuDNN SDPA per segment", "SDPA per segment"),
    "hybrid": ("FA2 of PyTorch + torch linear", "SDPA + torch linear", "exact varlen_attn"),
    "linear": ("torch linear", "exact SDPA per segment"),
    "aoe": (
        "torch._grouped_mm",
        "authors' dataflow (our writing)",
        "equal-parameter MoE (torch._grouped_mm)",
    ),
    "moe": ("torch._grouped_mm", "gathered loop"),
    "towers": ("sdpa", "eager", "flash_attention_2"),
}
SLOW_PEERS = {"softmax": ("FlexAttention",)}
"""They take long to compile, so they come last."""

SECONDS = {
    "environment": (10, 60),
    "ceilings": (10, 60),
    "correctness": (60, 150),
    "time": (15, 60),
    "slow time": (60, 150),
}
"""The estimate and the limit of a piece on a GPU."""
REHEARSAL = (1, 60)

GREEN, RED, LEFT_OUT, NOT_JUDGED = "green", "red", "left out", "not judged"
Judged = dict[str, tuple[str, str]]
"""The state of each variant, and the reason."""
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


def _variants(suite: str, device: str) -> tuple[str, ...]:
    """Return our providers that are judged and timed, the ordinary one first."""
    if device == "cpu":
        return ("vot-kernels torch",)
    ours = [p.name for p in providers_of(suite) if p.ours]
    return tuple(name for name in ours if name.startswith("vot-kernels triton"))


def first_light(out: Path, seconds: float, device: str) -> int:
    """Run everything. Return the exit status: 0, 1 if something is red, 3 if the device cannot be used."""
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "first_light.jsonl", source=source_hash(besides="benchmarks"))
    conductor = Conductor(journal, out / "first_light.log", seconds)
    complete = False
    try:
        if not _meet(conductor, device):
            conductor.say(f"the device {device} cannot be used, see {conductor.log}")
            return 3
        conductor.run([_piece("ceilings", "ceilings", device, partial(_ceilings, device))])
        chosen = _workloads(device)
        jobs = min(os.cpu_count() or 1, MOST)
        conductor.run(_correctness(chosen, device), jobs, again=device == "cuda" and _nothing_compiled())
        verdicts = _verdicts(conductor, chosen, device)
        red = {" ".join(key): why for key, (state, why) in verdicts.items() if state == RED}
        journal.write("red", red=red)
        conductor.say(f"red: {', '.join(red) or 'nothing'}")
        conductor.run(_races(chosen, verdicts, device))
        complete = True
        _print_times(journal)
        return 1 if red else 0
    finally:
        journal.write("end", complete=complete, pieces=conductor.finished())


def _meet(conductor: Conductor, device: str) -> bool:
    """Write the environment again and continue the lines of this machine. Return whether the device can be used."""
    journal = conductor.journal
    for conductor.method in ("fork", "spawn"):
        name = f"environment, by {conductor.method} at {time.time():.0f}"
        conductor.run([_piece("environment", name, device, partial(_environment, device))])
        if conductor.finished().get(name) == DONE:
            journal.stamp["machine"] = journal.read("environment")[-1]["machine"]
            return True
    return False


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


def _workloads(device: str) -> list[Workload]:
    known = {(w.suite, w.name): w for w in workloads("cuda")}
    chosen = [known[key] for key in WORKLOADS]
    if device == "cuda":
        return chosen
    return [replace(w, problem=_tiny(w.problem), device=device) for w in chosen]


def _tiny(problem: Any) -> Any:
    """Return a small problem of the same kind, for the rehearsal."""
    if isinstance(problem, Attention):
        return replace(problem, lengths=(48, 16), group_size=8, heads=2, kv_heads=2)
    if isinstance(problem, Tower):
        return problem.small()
    return replace(problem.small(), tokens=64, experts=4, top_k=2)


def _case(workload: Workload) -> Workload:
    """Return the workload with few tokens. Verifying it compiles the kernels that the workload needs."""
    problem: Any = workload.problem
    if workload.device == "cuda" and isinstance(problem, Tower):
        problem = replace(problem.small(), sizes=SIZES)
    elif workload.device == "cuda":
        few: Any = {"lengths": LENGTHS} if isinstance(problem, Attention) else {"tokens": TOKENS}
        problem = replace(problem, **few)
    return replace(workload, problem=problem)


def _correctness(chosen: Sequence[Workload], device: str) -> list[Piece]:
    """Return one piece for every variant on every workload, the ordinary variants first."""
    pairs = [(w, variant) for w in chosen for variant in _variants(w.suite, device)]
    pairs.sort(key=lambda pair: _variants(pair[0].suite, device).index(pair[1]))
    return [_piece("correctness", _judging(w, v), device, partial(_judge, _case(w), v)) for w, v in pairs]


def _judging(workload: Workload, variant: str) -> str:
    return f"correctness of {workload.suite} {workload.name}, {variant}"


def _judge(case: Workload, variant: str, write: Write) -> None:
    torch.set_num_threads(1)  # the other cores belong to concurrent pieces
    provider = _providers(case, [variant])[0]
    for direction in DIRECTIONS:
        state, reason = GREEN, ""
        if outcome := judge(provider, case, direction, torch.device(case.device), Rules(), {}):
            state = LEFT_OUT if outcome.status in (Status.MISSING, Status.UNSUPPORTED) else RED
            reason = f"{outcome.status}: {outcome.reason}"
        write("correctness", **race_facts(case, direction, provider), state=state, reason=reason)


def _nothing_compiled() -> bool:
    """Whether Triton's cache is empty: judging fills it on all cores, but a race would on one."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return not Path(folder).exists()


def _verdicts(conductor: Conductor, chosen: Sequence[Workload], device: str) -> Verdicts:
    lines, ended = conductor.journal.read("correctness"), conductor.finished()
    verdicts: Verdicts = {}
    for w in chosen:
        for variant in _variants(w.suite, device):
            end = ended.get(_judging(w, variant))
            for direction in DIRECTIONS:  # it crashed or hung, or has not run
                verdicts[w.suite, w.name, variant, direction] = (
                    (RED, end) if end else (NOT_JUDGED, "no time left")
                )
    for r in lines:
        verdicts[r["suite"], r["workload"], r["provider"], r["direction"]] = r["state"], r["reason"]
    return verdicts


# --- times ---


def _races(chosen: Sequence[Workload], verdicts: Verdicts, device: str) -> list[Piece]:
    """Return races: the forward of all workloads, forward and backward, then both beside the slow peers."""
    pieces = []
    for kind, peers in (("time", PEERS), ("slow time", SLOW_PEERS)):
        for direction in DIRECTIONS:
            for w in (w for w in chosen if w.suite in peers):
                ours = _variants(w.suite, device)[: 1 if kind == "slow time" else None]
                judged = {name: verdicts[w.suite, w.name, name, direction] for name in ours}
                pieces.append(_racing(kind, w, direction, judged, peers[w.suite], device))
    return pieces


def _racing(
    kind: str, workload: Workload, direction: str, judged: Judged, peers: tuple[str, ...], device: str
) -> Piece:
    """Race all in turns, or each alone if that fails. If none of ours is green, there is nothing to compare with."""
    name = f"{kind} of {workload.suite} {workload.name} {direction}"
    green = [variant for variant, (state, _) in judged.items() if state == GREEN]
    racers = [*green, *peers] if green else []
    parts = tuple(
        _piece(kind, f"{name}, {each}", device, partial(_race, workload, direction, {}, [each]))
        for each in racers
    )
    return _piece(kind, name, device, partial(_race, workload, direction, judged, racers), parts)


def _race(workload: Workload, direction: str, judged: Judged, racers: list[str], write: Write) -> None:
    cuda = workload.device == "cuda"
    rules = Rules(seconds_per_provider=0.5, rounds=None if cuda else 2, quick=not cuda)
    providers = _providers(workload, racers)
    outcomes = race(workload, direction, providers, rules)
    if cuda:
        torch.cuda.synchronize()  # fails after an illegal access, in which case no measurement counts
    for provider in _providers(workload, judged):
        state, reason = judged[provider.name]
        if state != GREEN:
            status = Status.UNSUPPORTED if state == LEFT_OUT else Status.GATED
            providers.append(provider)
            outcomes[provider.name] = Outcome(provider.name, status, f"{state}: {reason}")
    for provider in providers:
        facts = race_facts(workload, direction, provider)
        write("time", **facts, **_figures(outcomes[provider.name], facts["flops"]))


def _figures(outcome: Outcome, flops: int) -> dict[str, Any]:
    """Return the outcome, with the medians and the rate of the kernel alone, which readers look at first."""
    facts = asdict(outcome)
    del facts["provider"]
    if outcome.status is not Status.TIMED:
        return facts
    whole, kernel = median(outcome.whole_s), median(outcome.kernel_s)
    return {**facts, "whole_ms": 1e3 * whole, "kernel_ms": 1e3 * kernel, "tflops": flops / kernel / 1e12}


def _print_times(journal: Journal) -> None:
    for r in journal.read("time"):
        if r["status"] == Status.TIMED:
            name = f"{r['suite']} {r['workload']} {r['direction']}"
            print(f"{name:<42} {r['provider']:<40} {r['kernel_ms']:9.3f} ms {r['tflops']:7.1f} TFLOP/s")


def _providers(workload: Workload, names: Collection[str]) -> list[Provider]:
    return [p for p in providers_of(workload.suite) if p.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the results; what it holds already is not repeated")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default 540)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Asking whether there is a GPU must not initialize CUDA here, or forks could not use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import_module("torch._dynamo")  # every op's first call imports it; forked processes have it already
    if find_spec("transformers"):
        import_module("transformers.modeling_utils")  # every tower imports it
    try:
        return first_light(options.out, options.seconds, options.device)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
