"""The Triton backend of `size_aware_embedding`: each row is read once and written once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, rows_contiguous, strides

_FWD = Kernel("size_aware_embedding", "fwd", "size_aware_embedding.segment_add:_segment_add_kernel")
_BWD = Kernel("size_aware_embedding", "bwd", "size_aware_embedding.segment_add:_segment_add_bwd_kernel")
_SUM = Kernel("size_aware_embedding", "sum_tiles", "size_aware_embedding.segment_add:_sum_tiles_kernel")


def forward(x: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Add to each row of x the row of its segment in `embedding`; rows from `tokens` on become zero."""
    x, out = rows_contiguous(x, compact=True), x.new_empty(x.shape)
    segments, width = embedding.shape

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return ((x.shape[0] // blocks["TILE"] + segments + 1) * ceil_div(width, blocks["BLOCK_D"]),)

    _FWD.launch(
        grid,
        key=_key(x),
        x_ptr=x,
        embedding_ptr=embedding.contiguous(),
        bounds_ptr=cu_seqlens.contiguous(),
        out_ptr=out,
        num_tokens=x.shape[0],
        num_segments=segments,
        **strides(x=x),
        WIDTH=width,
    )
    return out


def backward(d_out: Tensor, embedding: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return d_x and d_embedding; sums are in a fixed order, without atomics."""
    d_out, d_x = rows_contiguous(d_out, compact=True), d_out.new_empty(d_out.shape)
    (segments, width), bounds = embedding.shape, cu_seqlens.contiguous()
    config = _BWD.config(d_out.device, _key(d_out))
    tiles = d_out.shape[0] // config.blocks["TILE"] + segments + 1
    partials = d_out.new_empty(tiles, width, dtype=torch.float32)
    _BWD.launch(
        (tiles * ceil_div(width, config.blocks["BLOCK_D"]),),
        config=config,
        d_out_ptr=d_out,
        bounds_ptr=bounds,
        d_x_ptr=d_x,
        partials_ptr=partials,
        num_tokens=d_out.shape[0],
        num_segments=segments,
        **strides(d_out=d_out),
        WIDTH=width,
    )
    d_embedding = embedding.new_empty(embedding.shape, dtype=torch.float32)
    _SUM.launch(
        lambda blocks: (segments * ceil_div(width, blocks["BLOCK_D"]),),
        partials_ptr=partials,
        bounds_ptr=bounds,
        sums_ptr=d_embedding,
        WIDTH=width,
        TILE=config.blocks["TILE"],
    )
    return d_x, d_embedding.to(embedding.dtype)


def _key(x: Tensor) -> dict[str, int]:
    return {"bits": 8 * x.element_size(), "width": x.shape[1]}
