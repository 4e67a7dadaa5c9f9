"""`python docs/list_traffic.py` writes the table of docs/scale.md: what each GPU receives, counted and not measured."""

from pathlib import Path

import listing

from vot_kernels.distributed import traffic
from vot_kernels.distributed.traffic import Video

PAGE = Path(__file__).with_name("scale.md")
MARK = "traffic"
HOUR = Video(frames=3600, frame_tokens=256, heads=16, kv_heads=16, head_dim=64)
RANKS = (8, 16, 32, 64, 128, 256)
HEADER = ["GPUs", "frames on each", "near", "far", "hybrid", "ring attention", "Ulysses"]


def size(received: int) -> str:
    """Bytes in megabytes, or in gigabytes from 1000 of them on."""
    megabytes = received / 1e6
    return f"{megabytes:.1f} MB" if megabytes < 1000 else f"{megabytes / 1000:.2f} GB"


def row(ranks: int) -> str:
    """A row of the table: the rank that receives most."""
    window = (1, 1)
    most = max(range(ranks), key=lambda rank: traffic.hybrid_attention(HOUR, ranks, rank, window).forward)
    near, far = (count(HOUR, ranks, most, window) for count in (traffic.near_bytes, traffic.far_bytes))
    heads = traffic.ulysses(HOUR, ranks)
    ring = traffic.ring_attention(HOUR, ranks).forward
    cells = [size(x) for x in (near, far, near + far, ring)]
    other = "more GPUs than heads" if heads is None else size(heads.forward)
    return f"| {ranks} | {HOUR.frames / ranks:.0f} | {' | '.join(cells)} | {other} |"


def lines() -> list[str]:
    """The table as counted now."""
    return listing.table(HEADER, map(row, RANKS))


if __name__ == "__main__":
    listing.write(PAGE, MARK, lines())
