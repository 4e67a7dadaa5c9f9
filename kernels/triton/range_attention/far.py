"""The far part of hybrid attention within a tile of rows: phi(x) times the state of each row's group, and backward.

A state is S `[WIDTH, HEAD_DIM]`, in the dtype that its products take, and z `[WIDTH]` in float32, one per group and kv
head; the pointers below lead to the state of group 0 and of the program's kv head. A tile may touch several groups, one
after the other.
"""

from vot_kernels.kernels.group_states.states import dot, load_features, softmax_scale

import triton
import triton.language as tl

from ..common.ranges import find_interval
from ..common.rows import load_block


@triton.jit
def tile_groups(row_groups_ptr, groups, first_row, end_row, BLOCK: tl.constexpr):
    """Return the first group of the rows from `first_row` up to `end_row`, and one past the last; equal if none."""
    first = find_interval(row_groups_ptr, groups, first_row)
    last = find_interval(row_groups_ptr, groups, tl.minimum(first_row + BLOCK, end_row) - 1)
    return first, tl.where(first_row < end_row, last + 1, first)


@triton.jit
def rows_of_group(row_groups_ptr, group, first_row, BLOCK: tl.constexpr):
    """Return which rows of the tile belong to `group`."""
    row = first_row + tl.arange(0, BLOCK)
    return (row >= tl.load(row_groups_ptr + group)) & (row < tl.load(row_groups_ptr + group + 1))


@triton.jit
def _load_block_of_state(
    states_ptr,
    row,
    column,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load S `[ROWS, COLUMNS]` from (row, column) on; 0 outside."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    mask = (rows < WIDTH)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(states_ptr + rows[:, None] * HEAD_DIM + columns[None, :], mask, other=0.0)


@triton.jit
def add_far(
    sums,
    features_ptr,
    features_stride,
    states_ptr,
    normalisers_ptr,
    row_groups_ptr,
    first_group,
    end_group,
    first_row,
    end_row,
    kv_heads,
    WIDTH: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    TYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Return sums + phi(x) S, and phi(x).z of every row, by blocks of BLOCK_F features."""
    index = tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK], tl.float32)
    scale = None
    if FEATURE_MAP == "softmax" and BLOCK_F < WIDTH:
        scale = softmax_scale(features_ptr, first_row, end_row, features_stride, WIDTH, BLOCK)
    for column in range(0, WIDTH, BLOCK_F):
        features = load_features(
            features_ptr,
            first_row,
            end_row,
            features_stride,
            column,
            WIDTH,
            FEATURE_MAP,
            BLOCK,
            BLOCK_F,
            scale,
        )
        for group in range(first_group, end_group):
            slot = group * kv_heads.to(tl.int64) * WIDTH
            own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
            own_features = tl.where(own[:, None], features, 0.0)
            state = _load_block_of_state(
                states_ptr + slot * HEAD_DIM, column, 0, WIDTH, HEAD_DIM, BLOCK_F, BLOCK_D
            )
            sums += dot(own_features, state, TYPE)
            z = tl.load(normalisers_ptr + slot + column + index, index < WIDTH - column, other=0.0)
            total += tl.sum(own_features * z[None, :], 1)
    return sums, total


@triton.jit
def far_gradient(
    values_ptr,
    values_stride,
    last,
    states_ptr,
    normalisers_ptr,
    row_groups_ptr,
    first_group,
    end_group,
    first_row,
    end_row,
    kv_heads,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Return S values_i + last_i z `[BLOCK, BLOCK_W]`, by blocks of BLOCK_F columns of the values."""
    index = tl.arange(0, BLOCK_W)
    slot_size = kv_heads.to(tl.int64) * WIDTH
    gradient = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for group in range(first_group, end_group):
        z = tl.load(normalisers_ptr + group * slot_size + index, index < WIDTH, other=0.0)
        own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
        gradient += tl.where(own, last, 0.0)[:, None] * z[None, :]
    for column in range(0, HEAD_DIM, BLOCK_F):
        values = load_block(values_ptr, first_row, end_row, values_stride, column, HEAD_DIM, BLOCK, BLOCK_F)
        for group in range(first_group, end_group):
            state_ptr = states_ptr + group * slot_size * HEAD_DIM
            state = _load_block_of_state(state_ptr, 0, column, WIDTH, HEAD_DIM, BLOCK_W, BLOCK_F)
            own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
            own_values = tl.where(own[:, None], values, 0.0)
            gradient += dot(own_values, tl.trans(state), values_ptr.dtype.element_ty)
    return gradient
