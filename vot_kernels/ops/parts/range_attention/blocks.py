"""Runs of rows of equal length in a packed buffer, computed as one batch.

The torch backend has no kernel that takes ragged ranges, so it sorts the ranges of a packing into blocks of
equal shape. Buffers here are head-major, `[heads, tokens, width]`, so that the rows of a run are contiguous.
Evenly spaced runs (groups of one size, overlapping windows) are strided views, without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.dtypes import accumulator

_CHUNK_BYTES = {"cpu": 2**23, "other": 2**28}  # the largest size of one temporary


@dataclass(frozen=True, eq=False)
class Blocks:
    """Runs of `length` rows that begin at `starts` (ascending), on tensors of `device`.

    Writes are deterministic, because values are added only between runs that do not overlap.
    """

    starts: np.ndarray
    length: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_rows(self) -> int:
        """The number of rows of all runs together."""
        return len(self) * self.length

    @property
    def are_adjacent(self) -> bool:
        """Whether each run begins where the one before it ends."""
        return self._step == self.length

    def take(self, buffer: Tensor) -> Tensor:
        """Return `[heads, runs, length, width]`: a view if the runs are evenly spaced, else a copy."""
        if self._step is not None:
            return self._view(buffer)
        runs = buffer.index_select(1, self._rows)
        return runs.view(buffer.shape[0], len(self), self.length, buffer.shape[2])

    def put(self, buffer: Tensor, values: Tensor) -> None:
        """Write `[heads, runs, length, width]` into the rows of `buffer`; the runs must not overlap."""
        if self._step is not None:
            self._view(buffer).copy_(values)
        else:
            buffer.index_copy_(1, self._rows, values.flatten(1, 2))

    def add(self, buffer: Tensor, values: Tensor) -> None:
        """Add `[heads, runs, length, width]` to the rows of `buffer`, overlapping runs in turn."""
        for part, runs in self._disjoint:
            if runs._step is not None:
                runs._view(buffer).add_(values[:, part])
            else:
                total = runs.take(buffer).add_(values[:, part])
                buffer.index_copy_(1, runs._rows, total.flatten(1, 2))

    def take_rows(self, x: Tensor) -> Tensor:
        """Return `[runs, heads, length, width]` of `[tokens, heads, width]`: a view if the runs are evenly spaced."""
        if self._step is not None:
            return self._view(x.transpose(0, 1)).transpose(0, 1)
        return x.index_select(0, self._rows).unflatten(0, (len(self), self.length)).transpose(1, 2)

    def put_rows(self, x: Tensor, values: Tensor) -> None:
        """Write `[runs, heads, length, width]` into the rows of `[tokens, heads, width]`; the runs must not overlap."""
        if self._step is not None:
            self.take_rows(x).copy_(values)
        else:
            x.index_copy_(0, self._rows, values.transpose(1, 2).flatten(0, 1))

    def _view(self, buffer: Tensor) -> Tensor:
        heads, _, width = buffer.shape
        head_stride, row_stride, stride = buffer.stride()
        assert self._step is not None
        return buffer.as_strided(
            (heads, len(self), self.length, width),
            (head_stride, self._step * row_stride, row_stride, stride),
            buffer.storage_offset() + int(self.starts[0]) * row_stride,
        )

    @cached_property
    def _step(self) -> int | None:
        """The number of rows from one run to the next, or None if it varies."""
        if len(self) == 1:
            return self.length
        steps = np.diff(self.starts)
        return int(steps[0]) if (steps == steps[0]).all() else None

    @cached_property
    def _rows(self) -> Tensor:
        rows = self.starts[:, None] + np.arange(self.length)
        with torch.inference_mode(False):
            return torch.from_numpy(rows.reshape(-1)).to(self.device, non_blocking=True)

    @cached_property
    def _disjoint(self) -> list[tuple[slice, "Blocks"]]:
        """Every c-th run, c times, for the smallest c with which no two of them overlap."""
        ends = self.starts + self.length
        apart = 1
        while (self.starts[apart:] < ends[:-apart]).any():
            apart += 1
        if apart == 1:
            return [(slice(None), self)]
        parts = [slice(i, None, apart) for i in range(apart)]
        return [(part, Blocks(self.starts[part], self.length, self.device)) for part in parts]


def bucket(columns: np.ndarray) -> list[np.ndarray]:
    """Return the row indices of the integer array `columns` `[rows, columns]`, one ascending array per distinct row."""
    if not len(columns):
        return []
    _, which, counts = np.unique(columns, axis=0, return_inverse=True, return_counts=True)
    return np.split(np.argsort(which.reshape(-1), kind="stable"), np.cumsum(counts)[:-1])


def stretches(starts: np.ndarray, lengths: Sequence[int]) -> list[slice]:
    """Cut `starts` `[runs, columns]` wherever a run does not begin at the end of the previous one, in any column."""
    breaks = np.flatnonzero((np.diff(starts, axis=0) != lengths).any(axis=1)) + 1
    return [slice(begin, end) for begin, end in pairwise([0, *breaks.tolist(), len(starts)])]


def to_heads(x: Tensor, tokens: int) -> Tensor:
    """Copy `[tokens, heads, d]` without slack to contiguous `[heads, tokens, d]` in at least float32."""
    wide = accumulator(x.dtype)
    return x[:tokens].transpose(0, 1).to(wide, memory_format=torch.contiguous_format).contiguous()


def to_tokens(x: Tensor, rows: Tensor, fill: float = 0.0) -> None:
    """Write `[heads, tokens, d]` into `rows` `[rows, heads, d]`, in its dtype; slack rows become `fill`."""
    rows[: x.shape[1]] = x.transpose(0, 1)
    rows[x.shape[1] :] = fill


def head_chunks(q: Tensor, k: Tensor, state_size: int) -> list[tuple[slice, slice]]:
    """Return the query heads and key heads to work on at a time.

    Heads are independent. Few at a time keep temporaries in cache and small enough for the allocator to reuse them,
    and bound the states of many small groups. `state_size` is the number of elements per key head.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    repeats = heads // kv_heads
    numbers = max(repeats * q.shape[0], k.shape[0]) * q.shape[2] + state_size
    budget = _CHUNK_BYTES["cpu" if q.device.type == "cpu" else "other"]
    at_once = max(1, budget // max(1, numbers * max(q.element_size(), 4)))
    starts = range(0, kv_heads, at_once)
    return [(slice(i * repeats, (i + at_once) * repeats), slice(i, i + at_once)) for i in starts]


def cut_heads(x: Tensor | None, heads: slice) -> Tensor | None:
    """Select heads of an optional `[tokens, heads, ...]`."""
    return None if x is None else x[:, heads]


def append_column(x: Tensor, value: float) -> Tensor:
    """Append a column of `value` to x."""
    return torch.nn.functional.pad(x, (0, 1), value=value)


def repeat_heads(x: Tensor, repeats: int) -> Tensor:
    """Repeat each key head for every query head that shares it."""
    return x if repeats == 1 else x.repeat_interleave(repeats, 0)


def fold_heads(x: Tensor, repeats: int) -> Tensor:
    """Apply the adjoint of `repeat_heads`."""
    return x if repeats == 1 else x.unflatten(0, (-1, repeats)).sum(1)
