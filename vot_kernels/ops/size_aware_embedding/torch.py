"""The PyTorch backend of `size_aware_embedding`: a row per segment is added to all tokens of the segment."""

import torch
from torch import Tensor

_LONG = 8  # tokens per segment, on average, from which on a CPU processes the segments one by one
_RUN = 64  # rows that are added in sequence; with fewer than 4 the recursion would not end


def forward(x: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Add to each row of x the row of its segment in `embedding`; rows from `tokens` on become zero."""
    out = x.new_empty(x.shape)
    out[tokens:] = 0
    x, packed = x[:tokens], out[:tokens]
    if _one_by_one(x, embedding):
        lengths = cu_seqlens.diff().tolist()
        for rows, row, result in zip(x.split(lengths), embedding, packed.split(lengths), strict=True):
            torch.add(rows, row, out=result)
    else:
        torch.add(x, embedding.repeat_interleave(cu_seqlens.diff(), 0, output_size=tokens), out=packed)
    return out


def backward(d_out: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return d_x and d_embedding; sums are in a fixed order, without atomics."""
    d_x = d_out.new_empty(d_out.shape)
    d_x[tokens:] = 0
    d_x[:tokens] = d_out[:tokens]
    d_embedding = embedding.new_empty(embedding.shape)
    if _one_by_one(d_out[:tokens], embedding):
        lengths = cu_seqlens.diff().tolist()
        for rows, row in zip(d_out[:tokens].split(lengths), d_embedding, strict=True):
            torch.sum(rows, 0, dtype=row.dtype, out=row)
        return d_x, d_embedding
    return d_x, _segment_sums(d_x[:tokens].to(embedding.dtype), cu_seqlens.long())


def _one_by_one(x: Tensor, embedding: Tensor) -> bool:
    return x.device.type == "cpu" and x.shape[0] >= _LONG * embedding.shape[0]


def _segment_sums(rows: Tensor, bounds: Tensor) -> Tensor:
    """Return the sums of rows[bounds[i] : bounds[i + 1]], `[len(bounds) - 1, dim]`.

    Runs of `_RUN` rows are summed, then runs of these sums, and so on: the rounding error grows with the logarithm of
    the length of a segment, not with the length.
    """
    longest = rows.shape[0]
    while longest > _RUN:
        cuts = torch.arange(0, rows.shape[0] + 1, _RUN, device=rows.device)
        edges = torch.cat([bounds, cuts]).sort().values
        rows, bounds = _sum_runs(rows, edges), torch.searchsorted(edges, bounds)
        longest = longest // _RUN + 2
    return _sum_runs(rows, bounds)


def _sum_runs(rows: Tensor, bounds: Tensor) -> Tensor:
    if bounds.shape[0] == 1:
        return rows.new_zeros(0, rows.shape[1])
    return torch.segment_reduce(rows, "sum", offsets=bounds, axis=0, unsafe=True, initial=0)
