"""How segments attend in PyTorch, wherever exact attention is asked for: one plan, so that the same bits come out.

On a CPU torch's kernel reads any strides, so segments are views of the packed tensors where nothing has to be
converted, masked or shared among heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.parts.range_attention.blocks import stretches
from vot_kernels.ops.parts.range_attention.torch import RangePass, plan_pass, plan_windows

_COPIED = 2**13  # numbers in a run; copying more takes longer than a call of torch's kernel


class Passes(NamedTuple):
    """What rows see: each pass has at most one key range per row.

    `views` is the only pass in blocks that `attend_rows` takes, None if it cannot serve the call.
    """

    passes: tuple[RangePass, ...]
    views: RangePass | None = None


def row_width(q: Tensor, k: Tensor, v: Tensor) -> int | None:
    """The numbers of a row if torch's kernel can read it as it lies, else None."""
    as_it_lies = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if not as_it_lies or q.shape[1] != k.shape[1] or any(x.stride(2) != 1 for x in (q, k, v)):
        return None
    return q.shape[1] * q.shape[2]


def plan_segments(
    segments: np.ndarray, left: int | None, right: int | None, width: int | None, device: torch.device
) -> Passes:
    """Ranges of rows and keys that need no mask, unless there is a limit on the left.

    In the frame of a segment row i sees the keys before i + shift + 1. So the rows that see some but not all
    keys are a causal square whose first key is the one they start at, and see all keys before that.

    Args:
        segments: `[n, 4]`: where the rows of each begin and end, and where its keys do.
        left, right: keys seen before and after the aligned place, None for all; 0 on the right if causal.
        width: see `row_width`.
        device: of the tensors.
    """
    if left is not None:
        blocks = plan_windows(segments, left, right, device)
        return Passes((blocks,) if blocks else ())
    row, row_end, key, key_end = segments.T
    shift = key_end - key if right is None else key_end - key - (row_end - row) + right
    first = np.clip(row - shift, row, row_end)
    last = np.clip(row + key_end - key - shift, first, row_end)
    offset = key - row + shift
    squares = np.stack([first, last, first + offset, last + offset], axis=1)
    before = np.stack([first, last, key, first + offset], axis=1)
    whole = np.stack([last, row_end, key, key_end], axis=1)
    others = np.stack([before, whole], axis=1).reshape(-1, 4)
    passes = [plan_pass(squares, True, device), plan_pass(others, False, device)]
    passes = [blocks for blocks in passes if blocks]
    views = None if width is None or len(passes) > 1 else _as_views(passes, width)
    return Passes(tuple(passes), views)


def _as_views(passes: Sequence[RangePass], width: int) -> RangePass:
    """The blocks of one pass at most, cut into blocks of adjacent runs; runs that are short are rather copied."""
    found = []
    for item in (item for blocks in passes for item in blocks):
        starts = np.stack([item.queries.starts, item.keys.starts], axis=1)
        apart = item.queries.length * width > _COPIED
        lengths = (item.queries.length, item.keys.length)
        for part in stretches(starts, lengths) if apart else [slice(None)]:
            found.append(item.part(part))
    return tuple(found)
