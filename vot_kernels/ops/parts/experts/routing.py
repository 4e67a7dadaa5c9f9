"""Launchers of the Triton kernels that choose experts and sort the choices, and their caches, by expert.

No function here waits for the device. Sizes of the weights are constants of the kernels; the number of tokens is not.
"""

from typing import Any

import torch
from torch import Tensor

from vot_kernels.ops.launch import Kernel, ceil_div, contiguous, rows_contiguous
from vot_kernels.ops.parts.experts.slots import Slots

_CACHE_NORMS = Kernel("experts", "cache_norms", "experts.norms:_cache_norms_kernel")
_SUM_SPANS = Kernel("experts", "sum_spans", "experts.norms:_sum_spans_kernel")
_SELECT_EXPERTS = Kernel("experts", "select_experts", "experts.topk:_select_experts_kernel")
_RANK_SLOTS = Kernel("experts", "rank_slots", "experts.index:_rank_slots_kernel")
_PLACE_SLOTS = Kernel("experts", "place_slots", "experts.index:_place_slots_kernel")
_GATHER_CACHES = Kernel("experts", "gather_caches", "experts.gather:_gather_caches_kernel")
_MIXING_BACKWARD = Kernel("experts", "mixing_backward", "experts.index:_mixing_backward_kernel")
_SPANS = (128, 64, 32, 16)  # columns whose squares make a partial sum; 8 if these pad a rank too much


def cache_norms(x: Tensor, w_down: Tensor, keep_cache: bool) -> tuple[Tensor, Tensor | None]:
    """Return squared norms float32 `[tokens, experts]` of C_i = x W_downᵢᵀ, and C `[tokens, experts, rank]` if kept.

    The squares are of the float32 accumulator; C has the dtype of x.

    Args:
        x: `[tokens, dim]`, float32, float16 or bfloat16, any strides.
        w_down: `[experts, rank, dim]`, the same dtype, any strides.
    """
    x, w_down = rows_contiguous(x), rows_contiguous(w_down)
    tokens, (experts, rank, dim) = x.shape[0], w_down.shape
    span = _span(rank)
    spans = ceil_div(rank, span)
    columns = experts * spans * span
    cache = x.new_empty(tokens, experts, rank) if keep_cache else None
    sums = x.new_empty((tokens, experts * spans), dtype=torch.float32)
    aligned = _aligned(rank * x.itemsize) and _has_aligned_rows(x) and _has_aligned_rows(w_down)
    key = {"bits": 8 * x.itemsize, "aligned": int(aligned), "columns": columns, "keep": int(keep_cache)}
    _CACHE_NORMS.launch(
        lambda blocks: (ceil_div(tokens, blocks["BLOCK_T"]) * ceil_div(columns, blocks["BLOCK_C"]),),
        key=key,
        x_ptr=x,
        w_ptr=w_down,
        sums_ptr=sums,
        cache_ptr=cache,
        tokens=tokens,
        X_STRIDE=x.stride(0) if tokens > 1 else dim,
        W_EXPERT_STRIDE=w_down.stride(0),
        W_RANK_STRIDE=w_down.stride(1),
        EXPERTS=experts,
        RANK=rank,
        DIM=dim,
        SPAN=span,
    )
    return (sums if spans == 1 else _sum_spans(sums, experts)), cache


def select_experts(
    squares: Tensor, bias: Tensor | None, top_k: int, weighting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norms float32 `[tokens, experts]`, indices int64 and weights float32 `[tokens, top_k]`.

    The largest of norms + bias are chosen, largest first. Ties go to the lowest id, and NaN comes before any number.

    Args:
        squares: float32 `[tokens, experts]`, squared norms.
        bias: `[experts]` or None.
        weighting: "topk_softmax" or "softmax_topk", see `vot_kernels.aoe`.
    """
    squares = squares.contiguous()
    tokens, experts = squares.shape
    norms = torch.empty_like(squares)
    indices = squares.new_empty((tokens, top_k), dtype=torch.int64)
    weights = squares.new_empty(tokens, top_k)
    _SELECT_EXPERTS.launch(
        lambda blocks: (_row_blocks(tokens, experts, blocks["BLOCK"]),),
        squares_ptr=squares,
        bias_ptr=contiguous(bias, torch.float32),
        norms_ptr=norms,
        indices_ptr=indices,
        weights_ptr=weights,
        tokens=tokens,
        EXPERTS=experts,
        TOP_K=top_k,
        SOFTMAX_FIRST=weighting == "softmax_topk",
    )
    return norms, indices, weights


def group_slots(indices: Tensor, experts: int) -> Slots:
    """Sort the choices by expert, keeping the order of the slots within each expert.

    Args:
        indices: int32 or int64 `[tokens, top_k]`, any strides. A token may name an expert twice; ids outside 0 to
            experts - 1 are skipped.
    """
    indices = indices.contiguous()
    slots = indices.numel()
    config = _RANK_SLOTS.config(indices.device)
    tile = config.blocks["TILE"]
    tiles = max(ceil_div(slots, tile), 1)
    counts = indices.new_zeros(experts * tiles + 1, dtype=torch.int32)
    order, places = (indices.new_empty(slots, dtype=torch.int32) for _ in range(2))
    sizes: dict[str, Any] = {"slots": slots, "tiles": tiles, "experts": experts}
    _RANK_SLOTS.launch(
        lambda _: (ceil_div(slots, tile),),
        config=config,
        indices_ptr=indices,
        places_ptr=places,
        counts_ptr=counts,
        **sizes,
    )
    starts = torch.cumsum(counts, 0, dtype=torch.int32)
    _PLACE_SLOTS.launch(
        (ceil_div(slots, tile),),
        indices_ptr=indices,
        starts_ptr=starts,
        places_ptr=places,
        order_ptr=order,
        **sizes,
        TILE=tile,
    )
    return Slots(order, places, starts[::tiles].contiguous(), indices.shape[1])


def gather_caches(caches: Tensor, slots: Slots) -> Tensor:
    """Return `[slots, rank]` in the order of places, taken from `[tokens, experts, rank]`."""
    experts, rank = caches.shape[1:]
    count = slots.order.shape[0]
    out = caches.new_empty(count, rank)
    _GATHER_CACHES.launch(
        lambda blocks: (count // blocks["BLOCK_M"] + experts, ceil_div(rank, blocks["BLOCK_R"])),
        caches_ptr=contiguous(caches),
        out_ptr=out,
        order_ptr=slots.order,
        offsets_ptr=slots.offsets,
        experts=experts,
        top_k=slots.top_k,
        RANK=rank,
    )
    return out


def mixing_backward(
    partials: Tensor,
    d_weights: Tensor | None,
    slots: Slots,
    norms: Tensor,
    indices: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the mixing weights, and the factor by which the norm of a cache adds to its gradient.

    With w the softmax over the chosen norms p = |c|, d_mix = the sum of partials at the slot's place + d_weights, and
    dp = w (d_mix - sum of w d_mix over the token's slots). The gradient of c through p is scale c with scale = dp / p,
    or 0 where p is 0.

    Args:
        partials: float32 `[blocks, slots]`, in the order of places.
        d_weights: float32 `[tokens, top_k]` or None.
        norms: float32 `[tokens, experts]`.
        indices: integer `[tokens, top_k]`.
        weights: float32 `[tokens, top_k]`.

    Returns:
        d_mix float32 `[tokens, top_k]` and scale float32 `[slots]` in the order of places, undefined from
        offsets[-1] on.
    """
    scale = partials.new_empty(partials.shape[1])
    d_mix = _mixing_backward(partials, d_weights, slots, norms, indices, weights, scale)
    return d_mix, scale


def sum_partials(partials: Tensor, slots: Slots) -> Tensor:
    """Sum partials `[blocks, slots]` at the place of each slot to float32 `[tokens, top_k]`; 0 if it has no place."""
    return _mixing_backward(partials, None, slots, None, None, None, None)


def _mixing_backward(
    partials: Tensor,
    d_weights: Tensor | None,
    slots: Slots,
    norms: Tensor | None,
    indices: Tensor | None,
    weights: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    top_k = slots.top_k
    tokens = slots.places.shape[0] // top_k
    d_mix = partials.new_empty(tokens, top_k)
    _MIXING_BACKWARD.launch(
        lambda blocks: (_row_blocks(tokens, top_k, blocks["BLOCK"]),),
        partials_ptr=contiguous(partials),
        d_weights_ptr=contiguous(d_weights),
        places_ptr=slots.places,
        norms_ptr=contiguous(norms),
        indices_ptr=contiguous(indices),
        weights_ptr=contiguous(weights),
        d_mix_ptr=d_mix,
        scale_ptr=scale,
        tokens=tokens,
        blocks=partials.shape[0],
        EXPERTS=slots.offsets.shape[0] - 1,
        TOP_K=top_k,
    )
    return d_mix


def _sum_spans(sums: Tensor, experts: int) -> Tensor:
    """Return float32 `[tokens, experts]` from sums `[tokens, experts * spans]`."""
    squares = sums.new_empty(sums.shape[0], experts)
    spans = sums.shape[1] // experts
    _SUM_SPANS.launch(
        lambda blocks: (_row_blocks(squares.numel(), spans, blocks["BLOCK"]),),
        sums_ptr=sums,
        squares_ptr=squares,
        count=squares.numel(),
        SPANS=spans,
    )
    return squares


def _span(rank: int) -> int:
    """Return the widest span that pads `rank` by at most a sixteenth, because padding is computed for nothing."""
    return next((span for span in _SPANS if -rank % span * 16 <= rank), 8)


def _has_aligned_rows(x: Tensor) -> bool:
    strides = [stride * x.itemsize for stride in x.stride()[:-1]]
    return _aligned(x.data_ptr(), x.shape[-1] * x.itemsize, *strides)


def _aligned(*lengths: int) -> bool:
    """Whether addresses that many bytes apart can be read and written 16 bytes at a time."""
    return all(length % 16 == 0 for length in lengths)


def _row_blocks(rows: int, width: int, block: int) -> int:
    """Return the programs for rows of `width` elements, padded to a power of two, with about `block` of them each."""
    return ceil_div(rows, max(block >> (width - 1).bit_length(), 1))
