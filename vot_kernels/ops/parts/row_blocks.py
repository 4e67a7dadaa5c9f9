"""Cutting of rows into blocks whose intermediate results stay in a CPU's cache."""

from collections.abc import Iterator

import torch

_BLOCK_NUMBERS = 2**16  # elements that one thread works on at a time


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices that cover `rows` rows of `width` elements: small ones on a CPU, a single one elsewhere.

    Each PyTorch call reads and writes memory. In a chain of calls on a small block, each finds the results of the
    previous call in the cache.
    """
    block = rows
    if device.type == "cpu":
        block = max(1, _BLOCK_NUMBERS * torch.get_num_threads() // max(1, width))
    for start in range(0, rows, max(1, block)):
        yield slice(start, min(start + block, rows))
