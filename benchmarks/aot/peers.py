"""`python -m benchmarks.aot.peers`: what the compiler makes of the Triton kernels of others, for docs/gpu-static.md.

It calls the peers that are importable on CPU tensors, takes down what they would launch on sm_90 without running it,
compiles that with every config that their autotuners may choose, and writes benchmarks/results/static-peers.json.
Nothing of the peers is copied; a file or folder of each has to be named, or a package installed:

    VOT_BENCH_TUTORIAL     a file, python/tutorials/06-fused-attention.py of Triton
    VOT_BENCH_SLA          a copy of github.com/thu-ml/SLA
    VOT_BENCH_SCATTERMOE   a copy of github.com/shawntan/scattermoe
    fla-core, liger-kernel

Each variable has a companion, such as VOT_BENCH_SLA_VERSION, for the version to put down. A peer that is missing is
left out with a line that says so, and its records stay as they were.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from benchmarks.aot.compiler import Specialization, compile_kernel, specialize_call
from benchmarks.aot.gpus import GPUS, occupancy
from vot_kernels.files import atomic_write

ARCH = "sm_90"
RESULTS = Path(__file__).parents[1] / "results" / "static-peers.json"
TOKENS, HEADS = 4096, 8
MOST_BLOCKS = 4
Record = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A call of somebody else's kernels.

    Attributes:
        name: of the peer.
        version: what was compiled; raises `ImportError` if the peer is not there.
        calls: functions by the call of `benchmarks.aot.page.CALLS` that they stand beside.
        kernels: names of its kernels, and those of ours that do the same.
    """

    name: str
    version: Callable[[], str]
    calls: dict[tuple[str, str], Callable[[], object]]
    kernels: dict[str, str]


@contextmanager
def recording() -> Iterator[list[Specialization]]:
    """Take down what would be launched on sm_90, with every config of an autotuner."""
    found: list[Specialization] = []

    def note(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        found.append(specialize_call(self, ARCH, args, kwargs))

    def every_config(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(Autotuner, "run", every_config),
        pretended_gpu(),
    ):
        yield found


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let code that asks for the GPU find one of sm_90."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    properties = {"max_shared_mem": GPUS[ARCH].shared_per_block, "multiprocessor_count": 132}
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cpu"),
        get_current_device=lambda: 0,
        get_benchmarker=lambda: None,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    manager = type(triton.runtime.driver)
    with (
        mock.patch.object(manager, "active", driver),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100"),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
    ):
        yield


def _in_words(what: Specialization) -> str:
    """Return blocks, warps and stages as the page writes them."""
    names = {index: what.kernel.params[index].name for (index, *_) in what.constexprs}
    blocks = {
        name: what.constexprs[index,] for index, name in names.items() if re.match(r"BLOCK_|B[KTV]$", name)
    }
    sizes = [f"{name.removeprefix('BLOCK_')}={size}" for name, size in blocks.items()]
    options = what.options
    bound = [f"maxnreg={options['maxnreg']}"] if options["maxnreg"] else []
    return " ".join([*sizes, f"warps={options['num_warps']}", f"stages={options['num_stages']}", *bound])


def measured(peer: Peer, place: tuple[str, str], launches: Sequence[Specialization]) -> list[Record]:
    """Compile the launches of a call and return the best records of each kernel; see `best`."""
    records = []
    for what in launches:
        kernel = what.kernel.__name__
        if kernel not in peer.kernels:
            continue
        try:
            found = compile_kernel(what)
        except (
            Exception
        ):  # the compilers raise many types for what does not fit; autotuners pass over it, too
            continue
        blocks, limited_by = occupancy(
            GPUS[ARCH], threads=found.threads, registers=found.registers, shared=found.shared_bytes
        )
        loop = found.loop
        if loop is None or loop.instructions_per_kmac is None or not blocks:
            continue
        records.append(
            {
                **{"peer": peer.name, "version": peer.version(), "triton": triton.__version__, "arch": ARCH},
                **{"op": place[0], "call": place[1], "kernel": peer.kernels[kernel], "their_kernel": kernel},
                **{"config": _in_words(what), "registers": found.registers, "spill_bytes": found.spill_bytes},
                **{"shared_bytes": found.shared_bytes, "threads": found.threads, "blocks_per_sm": blocks},
                **{"limited_by": limited_by, "instructions_per_kmac": loop.instructions_per_kmac},
                **{"tensor_work": loop.tensor_work, "local_in_loops": found.local_in_loops},
            }
        )
        print(json.dumps(records[-1]), file=sys.stderr)
    return best(records)


def best(records: Sequence[Record]) -> list[Record]:
    """Return the records of each kernel that no other beats, those with the fewest instructions first.

    One beats another if it has fewer instructions at as many blocks per SM, or as many at more blocks. Configs that
    spill in loops are left out where there are others, and so are those with more than 4 blocks, which have small
    tiles.
    """
    found = []
    for kernel in dict.fromkeys(record["their_kernel"] for record in records):
        mine = [record for record in records if record["their_kernel"] == kernel]
        mine = [record for record in mine if not record["local_in_loops"]] or mine
        mine = [record for record in mine if record["blocks_per_sm"] <= MOST_BLOCKS] or mine
        most = 0
        for record in sorted(mine, key=lambda one: (one["instructions_per_kmac"], -one["blocks_per_sm"])):
            if record["blocks_per_sm"] > most:
                found.append(record)
                most = record["blocks_per_sm"]
    return found


def _tutorial() -> ModuleType:
    path = os.environ.get("VOT_BENCH_TUTORIAL", "")
    if not Path(path).is_file():
        raise ImportError("VOT_BENCH_TUTORIAL names no file")
    return _module("vot_bench_tutorial", Path(path))


def _sla() -> ModuleType:
    path = Path(os.environ.get("VOT_BENCH_SLA", ""), "sparse_linear_attention", "kernel.py")
    if not path.is_file():
        raise ImportError("VOT_BENCH_SLA names no folder with sparse_linear_attention/kernel.py")
    return _module("vot_bench_sla", path)


def _scattermoe() -> ModuleType:
    path = Path(os.environ.get("VOT_BENCH_SCATTERMOE", ""), "scattermoe", "kernels", "ops.py")
    if not path.is_file():
        raise ImportError("VOT_BENCH_SCATTERMOE names no folder with scattermoe/kernels/ops.py")
    return _module("vot_bench_scattermoe", path)


def _module(name: str, path: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _qkv(head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(1, HEADS, TOKENS, head_dim, dtype=dtype, requires_grad=True) for _ in range(3)]


def _call_tutorial(head_dim: int) -> None:
    module = _tutorial()
    q, k, v = _qkv(head_dim, torch.float16)  # the only type of 16 bits that it takes
    for specialized in (False, True):
        out = module.attention(q, k, v, False, head_dim**-0.5, specialized)
    out.backward(torch.empty_like(out))


def _call_sla(head_dim: int) -> None:
    q, k, v = _qkv(head_dim, torch.bfloat16)
    for rows in (64, 128):  # the blocks that its authors recommend
        chosen = torch.empty(1, HEADS, TOKENS // rows, TOKENS // 64, dtype=torch.int8)
        table = torch.empty(1, HEADS, TOKENS // rows, 16, dtype=torch.int64)
        out = _sla()._attention.apply(q, k, v, chosen, table, 16, rows, 64)
        out.backward(torch.empty_like(out))


def _call_fla(head_dim: int) -> None:
    from fla.ops.common.chunk_h import chunk_fwd_h

    k, v = (torch.empty(1, TOKENS, HEADS, head_dim, dtype=torch.bfloat16) for _ in range(2))
    chunk_fwd_h(k, v, chunk_size=64, split_size=512)


def _call_liger() -> None:
    from liger_kernel.ops import fused_moe

    rows, experts, dim, hidden = TOKENS, 128, 2048, 768
    index = torch.empty(rows, dtype=torch.int32)
    tiles = [index[: rows // 64]] * 2
    routed = (None, index[: experts + 1], index, index, index, *tiles)
    x = torch.empty(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    w_up = torch.empty(experts, 2 * hidden, dim, dtype=torch.bfloat16, requires_grad=True)
    w_down = torch.empty(experts, dim, hidden, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.empty(rows, 1, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch.object(fused_moe, "compute_routing_metadata", lambda *_: routed):
        out = fused_moe.LigerFusedMoEFunction.apply(x, w_up, w_down, index[:, None], weights)
        out.backward(torch.empty_like(out))


def _call_scattermoe() -> None:
    experts, dim, hidden = 128, 2048, 768
    grads, x = (torch.empty(TOKENS, size, dtype=torch.bfloat16) for size in (2 * hidden, dim))
    _scattermoe().group_bwd_W(grads, x, torch.empty(experts, dtype=torch.int64), experts)


def _version_of(module: Callable[[], ModuleType], variable: str) -> Callable[[], str]:
    def found() -> str:
        module()
        return os.environ.get(f"{variable}_VERSION", "unknown")

    return found


def _installed(package: str, module: str) -> Callable[[], str]:
    def found() -> str:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{package} is not installed")
        return version(package)

    return found


def peers() -> list[Peer]:
    """Return all peers, whether they are there or not."""
    tutorial = {"_attn_fwd": "range_attention_fwd", "_attn_bwd": "range_attention_dkdv"}
    sla = {
        "_attn_fwd": "range_attention_fwd",
        "_attn_bwd_dq": "range_attention_dq",
        "_attn_bwd_dkdv": "range_attention_dkdv",
    }
    liger = {
        "_fused_up_proj_swiglu_kernel": "expert_hidden",
        "_fused_down_proj_kernel": "grouped_matmul",
        "_moe_bwd_dW1_kernel": "weight_gradient",
    }

    def by_width(op: str, call: Callable[[int], object]) -> dict[tuple[str, str], Callable[[], object]]:
        return {(op, f"bf16 d{size}"): lambda size=size: call(size) for size in (64, 128)}  # type: ignore[misc]

    moe = ("moe", "bf16 d2048 h768 n128")
    return [
        Peer(
            "Triton's tutorial",
            _version_of(_tutorial, "VOT_BENCH_TUTORIAL"),
            by_width("packed_attention", _call_tutorial),
            tutorial,
        ),
        Peer("SLA", _version_of(_sla, "VOT_BENCH_SLA"), by_width("hybrid_attention", _call_sla), sla),
        Peer(
            "fla-core",
            _installed("fla-core", "fla"),
            by_width("linear_attention", _call_fla),
            {"chunk_fwd_kernel_h": "group_states"},
        ),
        Peer("Liger", _installed("liger-kernel", "liger_kernel"), {moe: _call_liger}, liger),
        Peer(
            "ScatterMoE",
            _version_of(_scattermoe, "VOT_BENCH_SCATTERMOE"),
            {moe: _call_scattermoe},
            {"_groupXtY": "weight_gradient"},
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the peers and write the results; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--peer", metavar="TEXT", default="", help="those with this in their name; default: all"
    )
    options = parser.parse_args(arguments)
    records = json.loads(RESULTS.read_text(encoding="utf-8"))["peers"] if RESULTS.exists() else []
    for peer in peers():
        if options.peer.lower() not in peer.name.lower():
            continue
        with recording() as launches:
            try:
                peer.version()
            except ImportError as error:
                print(f"{peer.name} is left out: {error}", file=sys.stderr)
                continue
            found = []
            for place, call in peer.calls.items():
                launches.clear()
                call()
                found.append((place, list(launches)))
        records = [one for one in records if one["peer"] != peer.name]
        records += [record for place, noted in found for record in measured(peer, place, noted)]
    text = ",\n".join(f"  {json.dumps(record)}" for record in records)
    with atomic_write(RESULTS) as path:
        command = '"command": "python -m benchmarks.aot.peers"'
        path.write_text(f'{{\n {command},\n "peers": [\n{text}\n ]\n}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
