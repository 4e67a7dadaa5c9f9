"""Cutting rows into blocks whose intermediate results stay in the cache of a CPU."""

from collections.abc import Iterator

import torch

_BLOCK_NUMBERS = 2**16  # numbers that one thread works on at a time


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` numbers: small ones on a CPU, a single one elsewhere.

    Each PyTorch call reads and writes memory. A chain of calls on a small block finds the results of the call before
    in the cache.
    """
    block = rows
    if device.type == "cpu":
        block = max(1, _BLOCK_NUMBERS * torch.get_num_threads() // max(1, width))
    for start in range(0, rows, max(1, block)):
        yield slice(start, min(start + block, rows))
