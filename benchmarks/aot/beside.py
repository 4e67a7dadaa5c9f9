"""The part of docs/gpu-static.md that puts our kernels beside Triton kernels of others; see `benchmarks.aot.peers`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "static-peers.json"
HEADER = ("call", "kernel", "ours", "peer", "its kernel", "peer's", "remark")
Record = dict[str, Any]
Place = tuple[str, str, str]  # op, call, kernel

SMALLER = "more blocks of smaller tiles, with more instructions"
PHI = "ours applies the feature map in the loop; the peer reads features that another kernel wrote"
REASONS: dict[tuple[str, Place], str] = {
    ("Triton's tutorial", ("packed_attention", "bf16 d64", "range_attention_fwd")): SMALLER,
    ("Triton's tutorial", ("packed_attention", "bf16 d64", "range_attention_dkdv")): (
        "ours is the fused form, which adds to dq, too: 5 products in place of 7; "
        "the pair of kernels has 1.28 at 2 × 4"
    ),
    ("Triton's tutorial", ("packed_attention", "bf16 d128", "range_attention_fwd")): (
        "0.89 is the peer's warp-specialised form, without masks; ours has 1.29, because it masks every block, "
        f"and is no default; {SMALLER}"
    ),
    ("SLA", ("hybrid_attention", "bf16 d64", "range_attention_fwd")): SMALLER,
    ("SLA", ("hybrid_attention", "bf16 d64", "range_attention_dq")): SMALLER,
    ("SLA", ("hybrid_attention", "bf16 d64", "range_attention_dkdv")): (
        "ours has the far part in the same kernel, and takes 254 registers; "
        "with 64 keys and 4 warps Triton 3.6 spills in the loop"
    ),
    ("fla-core", ("linear_attention", "bf16 d64", "group_states")): (
        f"{PHI}; with 32 rows and 2 warps ours has 8.28 at 4 × 2"
    ),
    ("fla-core", ("linear_attention", "bf16 d128", "group_states")): (
        f"{PHI}; with 32 rows and 4 warps ours has 4.38 at 2 × 4, as many warps"
    ),
    ("Liger", ("moe", "bf16 d2048 h768 n128", "expert_hidden")): SMALLER,
    ("Liger", ("moe", "bf16 d2048 h768 n128", "grouped_matmul")): SMALLER,
    ("Liger", ("moe", "bf16 d2048 h768 n128", "weight_gradient")): SMALLER,
    ("ScatterMoE", ("moe", "bf16 d2048 h768 n128", "weight_gradient")): (
        "ours reads rows in place through an index, the peer has copied them into order; with tiles of 128 × 128 "
        "ours has 1.11 at 2 × 4, and with 128 places at a time 0.78 at 1 × 8, but then an expert's last block has "
        "more places that are masked"
    ),
}
"""Why a peer has fewer instructions, or more blocks per SM, for each row where one does."""

TEXT = """
## Beside Triton kernels of others

Instructions per kMAC, at blocks per SM × warps per block, on sm_90 with Triton {triton}.
`python -m benchmarks.aot.peers` compiles the peers' own sources, and `benchmarks/results/static-peers.json` has all
figures. A peer's autotuner chooses its config on a GPU, so those configs are here that no other one beats. The tutorial
computes in fp16, all others in bf16. Other configs of ours, in remarks, are compiled in the same way. Few instructions
or many blocks are no time: no GPU has measured any of these.

Peers: {peers}.
"""


def ahead(ours: Record, theirs: Sequence[Record]) -> bool:
    """Whether no config of the peer has fewer instructions or more blocks per SM than ours."""
    return all(
        ours["instructions_per_kmac"] <= one["instructions_per_kmac"]
        and ours["blocks_per_sm"] >= one["blocks_per_sm"]
        for one in theirs
    )


def rows(
    document: Record, records: Sequence[Record]
) -> Iterator[tuple[tuple[str, Place], Record, list[Record]]]:
    """Yield for each kernel of a peer its key in `REASONS`, our record and the peer's ones."""
    ours = {(one["op"], one["call"], one["kernel"]): one for one in document["now"] if one["arch"] == "sm_90"}
    found: dict[tuple[str, Place], list[Record]] = {}
    for one in records:
        found.setdefault((one["peer"], (one["op"], one["call"], one["kernel"])), []).append(one)
    for key, theirs in found.items():
        if key[1] in ours:
            yield key, ours[key[1]], theirs


def section(document: Record, reasons: Mapping[tuple[str, Place], str] = REASONS) -> Iterator[str]:
    """Yield the lines of the section."""
    records = json.loads(RESULTS.read_text(encoding="utf-8"))["peers"]
    names = dict.fromkeys(f"{one['peer']} ({one['version']})" for one in records)
    yield TEXT.format(triton=records[0]["triton"], peers=", ".join(names))
    yield "| " + " | ".join(HEADER) + " |"
    yield "| " + " | ".join(["---"] * len(HEADER)) + " |"
    for (peer, place), ours, theirs in rows(document, records):
        remark = "ours is not behind" if ahead(ours, theirs) else reasons[peer, place]
        cells = [f"{place[0]} {place[1].removeprefix('bf16 ')}", f"`{place[2]}`", _figure(ours), peer]
        cells += [f"`{theirs[0]['their_kernel'].strip('_')}`", ", ".join(map(_figure, theirs)), remark]
        yield "| " + " | ".join(cells) + " |"


def _figure(record: Record) -> str:
    return f"{record['instructions_per_kmac']:.2f} at {record['blocks_per_sm']} × {record['threads'] // 32}"
