"""Launchers of the matrix products over rows grouped by expert, and of the sum over a token's slots.

`Slots` has the places of each expert, on the device only, so grids depend only on what the host knows.
"""

from collections.abc import Mapping
from math import gcd

from torch import Tensor

from vot_kernels.ops.launch import (
    Kernel,
    ceil_div,
    contiguous,
    matrices_contiguous,
    rows_contiguous,
    strides,
)
from vot_kernels.ops.parts.experts.slots import Slots

_MATMUL = Kernel("experts", "matmul", "experts.grouped_gemm:_grouped_matmul_kernel")
_WEIGHT_GRADIENT = Kernel("experts", "weight_gradient", "experts.grouped_gemm:_weight_gradient_kernel")
_COMBINE = Kernel("experts", "combine", "experts.combine:_combine_kernel")


def grouped_matmul(
    a: Tensor,
    w: Tensor,
    slots: Slots,
    *,
    gather: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
    addend: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute out[p] = a[row of p] @ w[e] (+ a2[p] @ w2[e]) (+ scale[p] * rows[p]) at each place p of an expert e.

    Products are summed in float32 and rounded once.

    Args:
        a: `[slots, K]`, or with `gather` `[tokens, K]`, where the row of a place is that of its token.
        w: `[experts, K, N]`, any strides; copied unless K or N is contiguous.
        slots: the places of each expert.
        gather: see `a`.
        second: a2 `[slots, K2]` and w2 `[experts, K2, N]`.
        addend: scale, float32 `[slots]`, and rows `[slots, N]`.

    Returns:
        `[slots, N]` in the dtype of `a`; rows from offsets[-1] on are uninitialized.
    """
    experts, depth, columns = w.shape
    places = slots.order.shape[0]
    a, w = rows_contiguous(a), matrices_contiguous(w)
    a2, w2 = (None, None) if second is None else (rows_contiguous(second[0]), matrices_contiguous(second[1]))
    scale, rows = (None, None) if addend is None else (addend[0].contiguous(), rows_contiguous(addend[1]))
    out = a.new_empty(places, columns)
    if not places:
        return out

    depth2 = 0 if a2 is None else a2.shape[1]
    told = strides({"w": w, "w2": w2}, a=a, a2=a2, addend=rows)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return ((places // blocks["BLOCK_M"] + experts) * ceil_div(columns, blocks["BLOCK_N"]),)

    _MATMUL.launch(
        grid,
        key=_key(a, told["STRIDE_UNIT"], columns, depth, depth2) | {"columns": columns},
        a_ptr=a,
        w_ptr=w,
        a2_ptr=a2,
        w2_ptr=w2,
        scale_ptr=scale,
        addend_ptr=rows,
        out_ptr=out,
        order_ptr=slots.order if gather else None,
        offsets_ptr=slots.offsets,
        experts=experts,
        **told,
        N=columns,
        K=depth,
        K2=depth2,
        TOP_K=slots.top_k if gather else 1,
    )
    return out


def weight_gradient(
    a: Tensor, b: Tensor, slots: Slots, *, gather_a: bool = False, gather_b: bool = False
) -> Tensor:
    """Sum a[row of p]ᵀ b[row of p] over the places p of each expert, in float32 and ascending order.

    Args:
        a, b: `[slots, M]` and `[slots, N]`, or if gathered `[tokens, M]` and `[tokens, N]`, where the row of a place
            is that of its token.
        slots: the places of each expert.
        gather_a, gather_b: see `a`.

    Returns:
        `[experts, M, N]` in the dtype of `a`; 0 for experts without places.
    """
    experts, (rows, columns) = slots.offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    a, b = rows_contiguous(a), rows_contiguous(b)
    out = a.new_empty(experts, rows, columns)
    told = strides(a=a, b=b)
    gather = gather_a or gather_b
    key = _key(a, told["STRIDE_UNIT"], rows, columns)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (experts * ceil_div(rows, blocks["BLOCK_M"]) * ceil_div(columns, blocks["BLOCK_N"]),)

    _WEIGHT_GRADIENT.launch(
        grid,
        key=key | {"columns": columns, "outputs": out.numel(), "gather": int(gather)},
        a_ptr=a,
        b_ptr=b,
        out_ptr=out,
        a_order_ptr=slots.order if gather_a else None,
        b_order_ptr=slots.order if gather_b else None,
        offsets_ptr=slots.offsets,
        **told,
        M=rows,
        N=columns,
        TOP_K=slots.top_k if gather else 1,
    )
    return out


def combine(rows: Tensor, slots: Slots, tokens: int, weights: Tensor | None) -> Tensor:
    """Sum weights[t, j] * its row over the slots j of each token t, in float32 and ascending order.

    Args:
        rows: `[slots, N]`, at the places of the slots.
        slots: the place of each slot; slots with place -1 add nothing.
        tokens: number of tokens.
        weights: float32 `[tokens, top_k]`, or None for 1.

    Returns:
        `[tokens, N]` in the dtype of `rows`.
    """
    columns = rows.shape[1]
    if not slots.places.shape[0]:
        return rows.new_zeros(tokens, columns)
    rows = rows_contiguous(rows)
    out = rows.new_empty(tokens, columns)

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (ceil_div(tokens, blocks["BLOCK_T"]) * ceil_div(columns, blocks["BLOCK_N"]),)

    _COMBINE.launch(
        grid,
        rows_ptr=rows,
        places_ptr=slots.places,
        weights_ptr=contiguous(weights),
        out_ptr=out,
        tokens=tokens,
        **strides(rows=rows),
        N=columns,
        TOP_K=slots.top_k,
    )
    return out


def _key(x: Tensor, unit: int, *sizes: int) -> dict[str, int]:
    """Return `vector`, the number of elements that one load takes; with few, a thread needs more addresses."""
    return {"bits": 8 * x.dtype.itemsize, "vector": gcd(unit, *sizes)}
