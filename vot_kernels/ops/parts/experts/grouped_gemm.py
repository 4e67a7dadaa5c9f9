"""Launchers of the matrix products over rows grouped by expert, and of the sum over a token's slots.

`Slots` says which places belong to which expert, on the device alone: grids are functions of what the host knows.
"""

from collections.abc import Mapping

from torch import Tensor

from vot_kernels.ops.launch import ceil_div, find_config, launch, matrices_contiguous, rows_contiguous
from vot_kernels.ops.parts.experts.slots import Slots
from vot_kernels.tuning import Config

OP = "grouped_gemm"
_VECTOR = 8  # numbers of 16 bits in the widest load


def grouped_matmul(
    a: Tensor,
    w: Tensor,
    slots: Slots,
    *,
    gather: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
    addend: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out[p] = a[row of p] @ w[e] (+ a2[p] @ w2[e]) (+ scale[p] * rows[p]) at each place p of an expert e.

    Products add up in float32 and are rounded once.

    Args:
        a: `[slots, K]`, or with `gather` `[tokens, K]`: the row of a place is then that of its token.
        w: `[experts, K, N]`, any strides; copied unless K or N is contiguous.
        slots: the places of each expert.
        gather: see `a`.
        second: a2 `[slots, K2]` and w2 `[experts, K2, N]`.
        addend: scale, float32 `[slots]`, and rows `[slots, N]`.

    Returns:
        `[slots, N]` in the dtype of `a`; rows from offsets[-1] on are uninitialized.
    """
    from vot_kernels.kernels.experts.grouped_gemm import _grouped_matmul_kernel

    experts, depth, columns = w.shape
    places = slots.order.shape[0]
    a, w = rows_contiguous(a), matrices_contiguous(w)
    a2, w2 = (None, None) if second is None else (rows_contiguous(second[0]), matrices_contiguous(second[1]))
    scale, rows = (None, None) if addend is None else (addend[0].contiguous(), rows_contiguous(addend[1]))
    out = a.new_empty(places, columns)
    if not places:
        return out

    depth2 = 0 if a2 is None else a2.shape[1]
    strides = _strides(
        (columns, depth, depth2),
        a=_row_stride(a),
        w=_matrix_stride(w),
        w_expert=w.stride(0),
        a2=_row_stride(a2),
        w2=_matrix_stride(w2),
        w2_expert=0 if w2 is None else w2.stride(0),
        addend=_row_stride(rows),
    )

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return ((places // blocks["BLOCK_M"] + experts) * ceil_div(columns, blocks["BLOCK_N"]),)

    launch(
        _grouped_matmul_kernel,
        grid,
        _config("matmul", a, strides, columns=columns),
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
        **strides,
        N=columns,
        K=depth,
        K2=depth2,
        TRANSPOSED=w.stride(2) != 1,
        TRANSPOSED2=w2 is not None and w2.stride(2) != 1,
        TOP_K=slots.top_k if gather else 1,
    )
    return out


def weight_gradient(
    a: Tensor, b: Tensor, slots: Slots, *, gather_a: bool = False, gather_b: bool = False
) -> Tensor:
    """out[e] = sum over the places p of expert e of a[row of p]ᵀ b[row of p], in float32 and ascending order.

    Args:
        a, b: `[slots, M]` and `[slots, N]`, or where gathered `[tokens, M]`, `[tokens, N]`: the row of a place is
            then that of its token.
        slots: the places of each expert.
        gather_a, gather_b: see `a`.

    Returns:
        `[experts, M, N]` in the dtype of `a`; 0 for experts without places.
    """
    from vot_kernels.kernels.experts.grouped_gemm import _weight_gradient_kernel

    experts, (rows, columns) = slots.offsets.shape[0] - 1, (a.shape[1], b.shape[1])
    a, b = rows_contiguous(a), rows_contiguous(b)
    out = a.new_empty(experts, rows, columns)
    strides = _strides((rows, columns), a=_row_stride(a), b=_row_stride(b))
    gather = gather_a or gather_b

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (experts * ceil_div(rows, blocks["BLOCK_M"]) * ceil_div(columns, blocks["BLOCK_N"]),)

    launch(
        _weight_gradient_kernel,
        grid,
        _config("weight_gradient", a, strides, columns=columns, outputs=out.numel(), gather=int(gather)),
        a_ptr=a,
        b_ptr=b,
        out_ptr=out,
        a_order_ptr=slots.order if gather_a else None,
        b_order_ptr=slots.order if gather_b else None,
        offsets_ptr=slots.offsets,
        **strides,
        M=rows,
        N=columns,
        TOP_K=slots.top_k if gather else 1,
    )
    return out


def combine(rows: Tensor, slots: Slots, tokens: int, weights: Tensor | None) -> Tensor:
    """out[t] = sum over the slots j of token t, in float32 and ascending order, of weights[t, j] * its row.

    Args:
        rows: `[slots, N]`, at the places of the slots.
        slots: the place of each slot; those of place -1 add nothing.
        tokens: how many.
        weights: float32 `[tokens, top_k]`, or None for 1.

    Returns:
        `[tokens, N]` in the dtype of `rows`.
    """
    from vot_kernels.kernels.experts.combine import _combine_kernel

    columns = rows.shape[1]
    if not slots.places.shape[0]:
        return rows.new_zeros(tokens, columns)
    rows = rows_contiguous(rows)
    out = rows.new_empty(tokens, columns)
    strides = _strides((columns,), rows=_row_stride(rows))

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (ceil_div(tokens, blocks["BLOCK_T"]) * ceil_div(columns, blocks["BLOCK_N"]),)

    launch(
        _combine_kernel,
        grid,
        _config("combine", rows, strides),
        rows_ptr=rows,
        places_ptr=slots.places,
        weights_ptr=None if weights is None else weights.contiguous(),
        out_ptr=out,
        tokens=tokens,
        **strides,
        N=columns,
        TOP_K=slots.top_k,
    )
    return out


def _config(kernel: str, x: Tensor, strides: Mapping[str, int], **key: int) -> Config:
    """`vector`: whether loads are wide; where they are not, a thread needs more addresses."""
    key |= {"bits": 8 * x.dtype.itemsize, "vector": strides["STRIDE_UNIT"]}
    return find_config(OP, kernel, x.device, **key)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _matrix_stride(w: Tensor | None) -> int:
    """Of the dimension that is not contiguous."""
    if w is None:
        return 0
    return w.stride(1) if w.stride(2) == 1 else w.stride(2)


def _strides(sizes: tuple[int, ...], **strides: int) -> dict[str, int]:
    """`NAME_stride` in units of `STRIDE_UNIT` numbers: 8 if all strides and the sizes of rows are multiples of it.

    Triton asks of an argument whether it is a multiple of 16; that of 8 is enough for the widest loads.
    """
    wide = all(n % _VECTOR == 0 and n < 2**31 for n in (*sizes, *strides.values()))
    unit = _VECTOR if wide else 1
    return {f"{name}_stride": n // unit for name, n in strides.items()} | {"STRIDE_UNIT": unit}
