"""The far part of hybrid attention within a tile of rows: phi(x) times the state of each row's group, and backward.

A state is S `[WIDTH, HEAD_DIM]` and z `[WIDTH]` as in `states.py`, one per group and kv head; `states_ptr` below
points to the state of group 0 and of the program's kv head. A tile may touch several groups, one after the other.
"""

from vot_kernels.kernels.group_states.states import dot, load_features, load_state

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
def far_total(
    features_ptr,
    features_stride,
    states_ptr,
    row_groups_ptr,
    first_group,
    end_group,
    first_row,
    end_row,
    kv_heads,
    WIDTH: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Return phi(x).z of every row, by blocks of BLOCK_F features."""
    index = tl.arange(0, BLOCK_F)
    slot_size = kv_heads.to(tl.int64) * (WIDTH * (HEAD_DIM + 1))
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(0, WIDTH, BLOCK_F):
        features = load_features(
            features_ptr, first_row, end_row, features_stride, column, WIDTH, FEATURE_MAP, BLOCK, BLOCK_F
        )
        for group in range(first_group, end_group):
            z_ptr = states_ptr + group * slot_size + WIDTH * HEAD_DIM + column
            z = tl.load(z_ptr + index, index < WIDTH - column, other=0.0)
            own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
            total += tl.where(own, tl.sum(features * z[None, :], 1), 0.0)
    return total


@triton.jit
def add_far_values(
    sums,
    weight,
    features_ptr,
    features_stride,
    states_ptr,
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
    """Return sums + weight phi(x) S, by blocks of BLOCK_F features; weight `[BLOCK]`, or None for 1."""
    slot_size = kv_heads.to(tl.int64) * (WIDTH * (HEAD_DIM + 1))
    for column in range(0, WIDTH, BLOCK_F):
        features = load_features(
            features_ptr, first_row, end_row, features_stride, column, WIDTH, FEATURE_MAP, BLOCK, BLOCK_F
        )
        if weight is not None:
            features *= weight[:, None]
        for group in range(first_group, end_group):
            state_ptr = states_ptr + group * slot_size
            state, _ = load_state(state_ptr, True, column, 0, WIDTH, HEAD_DIM, BLOCK_F, BLOCK_D)
            own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
            sums += dot(tl.where(own[:, None], features, 0.0), state, TYPE)
    return sums


@triton.jit
def far_gradient(
    values_ptr,
    values_stride,
    last,
    states_ptr,
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
    slot_size = kv_heads.to(tl.int64) * (WIDTH * (HEAD_DIM + 1))
    gradient = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    for group in range(first_group, end_group):
        z_ptr = states_ptr + group * slot_size + WIDTH * HEAD_DIM
        z = tl.load(z_ptr + index, index < WIDTH, other=0.0)
        own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
        gradient += tl.where(own, last, 0.0)[:, None] * z[None, :]
    for column in range(0, HEAD_DIM, BLOCK_F):
        values = load_block(values_ptr, first_row, end_row, values_stride, column, HEAD_DIM, BLOCK, BLOCK_F)
        for group in range(first_group, end_group):
            state_ptr = states_ptr + group * slot_size
            state, _ = load_state(state_ptr, True, 0, column, WIDTH, HEAD_DIM, BLOCK_W, BLOCK_F)
            own = rows_of_group(row_groups_ptr, group, first_row, BLOCK)
            own_values = tl.where(own[:, None], values, 0.0)
            gradient += dot(own_values, tl.trans(state), values_ptr.dtype.element_ty)
    return gradient
