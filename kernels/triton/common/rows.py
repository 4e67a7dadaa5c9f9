"""Loads and stores of rows of a strided matrix, in blocks padded to a power of two columns."""

import triton
import triton.language as tl


@triton.jit
def head_rows(pointer, head, head_stride, stride, UNIT: tl.constexpr):
    """Return where the rows of one head of `[rows, heads, columns]` begin, and the distance from one to the next.

    head_stride, stride: in units of UNIT elements, as `vot_kernels.ops.launch.strides` returns them.
    """
    return pointer + head.to(tl.int64) * (head_stride * UNIT), stride * UNIT


@triton.jit
def row_source(
    pointer,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Return the source of `load_rows` for the rows before `end`: a descriptor if USE_TMA, else `pointer` itself.

    The descriptor ends where the rows do, so that no block holds rows of a neighbour: their NaN would survive a
    multiplication by weights of 0. `launch.with_workspace` says what a descriptor needs from the host.
    """
    if USE_TMA:
        end = tl.maximum(end, 1)  # a descriptor cannot have 0 rows; this one is never read
        source = tl.make_tensor_descriptor(pointer, [end, HEAD_DIM], [stride, 1], [BLOCK, BLOCK_D])
    else:
        source = pointer
    return source


@triton.jit
def load_source(
    source,
    first,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Call `load_rows` on a `row_source` of the same `end`; the result is the same with and without USE_TMA."""
    if USE_TMA:
        block = source.load([first, 0])
    else:
        block = load_rows(source, first, end, stride, HEAD_DIM, BLOCK_D, BLOCK, MASKED)
    return block


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
    """Load rows from `first` on, `[BLOCK, BLOCK_D]`; 0 past HEAD_DIM columns and, if MASKED, from row `end` on."""
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
    """Write the rows from `first` up to `end` of a `[BLOCK, BLOCK_D]` block in the dtype of `pointer`."""
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    mask = (row < end)[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (column < HEAD_DIM)[None, :]
    pointers = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask)


@triton.jit
def load_block(
    pointer, first, end, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load `[ROWS, COLUMNS]` from row `first` and `column` on; 0 from row `end` and from column WIDTH on.

    This loads part of the columns with 32-bit addresses, where `load_rows` loads whole rows with 64-bit ones. It
    requires ROWS * stride < 2**31, so that only the first row needs a 64-bit address.
    """
    row = tl.arange(0, ROWS)
    index = tl.arange(0, COLUMNS)
    mask = (row < end - first)[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (index < WIDTH - column)[None, :]
    pointer += first.to(tl.int64) * stride + column
    return tl.load(pointer + (row[:, None] * stride + index[None, :]), mask, other=0.0)


@triton.jit
def store_block(
    pointer, block, first, end, stride, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write a block as `load_block` reads it, in the dtype of `pointer`."""
    row = tl.arange(0, ROWS)
    index = tl.arange(0, COLUMNS)
    mask = (row < end - first)[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (index < WIDTH - column)[None, :]
    pointers = pointer + first.to(tl.int64) * stride + column + (row[:, None] * stride + index[None, :])
    tl.store(pointers, block.to(pointer.dtype.element_ty), mask)


@triton.jit
def load_column(pointer, first, end, stride, ROWS: tl.constexpr):
    """Load one element of each of ROWS rows; 0 from row `end` on."""
    row = tl.arange(0, ROWS)
    return tl.load(pointer + first.to(tl.int64) * stride + row * stride, row < end - first, other=0.0)
