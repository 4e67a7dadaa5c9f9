"""Rows of a strided matrix to and from a block padded to a power of two columns."""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    pointer,
    first,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`[BLOCK, BLOCK_D]`: BLOCK rows from `first` on; 0 past HEAD_DIM columns and, if MASKED, from row `end` on."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    pointers = pointer + first.to(tl.int64) * stride + (row.to(tl.int64)[:, None] * stride + column[None, :])
    if MASKED:
        mask = (first + row < end)[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (column < HEAD_DIM)[None, :]
        block = tl.load(pointers, mask, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        block = tl.load(pointers, (column < HEAD_DIM)[None, :], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def store_rows(
    pointer,
    block,
    first,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write rows `first` to before `end` of a `[BLOCK, BLOCK_D]` block in the dtype of `pointer`."""
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    mask = (row < end)[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (column < HEAD_DIM)[None, :]
    pointers = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask)
