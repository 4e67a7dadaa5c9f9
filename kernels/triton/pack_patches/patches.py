"""Images of any sizes cut into patches in one launch, and the gradients put back.

A table of int64 describes the images; the host writes it anew for each call. For n images it holds

    bounds    [n + 1]   patches of the images before each, as the program's tiles count them
    address   [n]       of the first pixel
    row       [n]       of the packed buffer, of the first patch
    height    [n]       patches
    width     [n]       patches
    strides   [4, n]    of frame, channel, row and column, in units of UNIT elements

Where a pixel lies is a sum of two parts, that of its patch and that of its place within the patch.
"""

import triton
import triton.language as tl

from ..common.tiles import locate_tile


@triton.jit
def _pixels(
    table_ptr,
    count,
    tile,
    value,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS_APART: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return pointers to the pixels of a tile's patches `[BLOCK_P, values]`, rows of the buffer, and which exist.

    value: places within a patch, in the order (channel, frame, row, column), of which FRAMES are in a patch.
    """
    image, first = locate_tile(table_ptr, count, tile, BLOCK_P)
    begin = tl.load(table_ptr + image)
    end = tl.load(table_ptr + image + 1)
    facts = table_ptr + count + 1 + image
    address = tl.load(facts)
    row = tl.load(facts + count)
    height = tl.load(facts + 2 * count).to(tl.int32)  # divisions of 64 bits would be calls
    width = tl.load(facts + 3 * count).to(tl.int32)
    frame_stride = tl.load(facts + 4 * count) * UNIT
    channel_stride = tl.load(facts + 5 * count) * UNIT
    row_stride = tl.load(facts + 6 * count) * UNIT

    patch = (first - begin).to(tl.int32) + tl.arange(0, BLOCK_P)
    t = patch // (height * width) * FRAMES
    y = patch // width % height * PATCH
    x = patch % width * PATCH
    frame = value // (PATCH * PATCH) % FRAMES
    channel = value // (PATCH * PATCH * FRAMES)
    column = value % PATCH
    if COLUMNS_APART:
        column_stride = tl.load(facts + 7 * count)
        x = x * column_stride
        column = column * column_stride
    outer = t * frame_stride + y * row_stride + x
    inner = channel * channel_stride + frame * frame_stride + value // PATCH % PATCH * row_stride + column
    pixels = tl.multiple_of(address.to(tl.pointer_type(TYPE)), UNIT * (TYPE.primitive_bitwidth // 8))
    return pixels + outer[:, None] + inner[None, :], row + patch, patch < end - begin


@triton.jit
def _at_channels(numbers, value, VALUES: tl.constexpr):
    """Return the number of the channel of each place within a patch, `[1, values]`, from a tuple of one per channel."""
    channel = value // (VALUES // len(numbers))
    found = tl.zeros(channel.shape, tl.float32)
    for i in tl.static_range(len(numbers)):
        found = tl.where(channel == i, numbers[i], found)
    return found[None, :]


@triton.jit(do_not_specialize=["count"])
def _pack_patches_kernel(
    out_ptr,
    table_ptr,
    scales,
    shifts,
    count,
    TYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS_APART: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the patches of `count` images of dtype TYPE; times the scale plus the shift of the channel, or None.

    out `[patches, CHANNELS * FRAMES * PATCH * PATCH]`, contiguous; scales, shifts: tuples of CHANNELS numbers.
    Grid: (patches // BLOCK_P + count) * cdiv(values of a patch, BLOCK_V).
    """
    VALUES: tl.constexpr = CHANNELS * FRAMES * PATCH * PATCH
    VALUE_BLOCKS: tl.constexpr = triton.cdiv(VALUES, BLOCK_V)
    value = tl.program_id(0) % VALUE_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = tl.program_id(0) // VALUE_BLOCKS
    pixels, row, present = _pixels(
        table_ptr, count, tile, value, FRAMES, PATCH, UNIT, COLUMNS_APART, TYPE, BLOCK_P
    )
    mask = present[:, None] & (value < VALUES)[None, :]
    values = tl.load(pixels, mask, other=0)
    if scales is not None:
        values = values.to(tl.float32) * _at_channels(scales, value, VALUES) + _at_channels(
            shifts, value, VALUES
        )
    tl.store(out_ptr + row[:, None] * VALUES + value[None, :], values.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def _unpack_patches_kernel(
    d_out_ptr,
    table_ptr,
    scales,
    count,
    TYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    REPEATS: tl.constexpr,
    PATCH: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradients of `count` images of dtype TYPE, contiguous; times the scale of the channel, or None.

    d_out `[patches, CHANNELS * FRAMES * REPEATS * PATCH * PATCH]`, contiguous. A still image, which has FRAMES 1,
    stands for REPEATS frames of its patches; its gradient is their sum.
    Grid: (patches // BLOCK_P + count) * cdiv(values of the images in a patch, BLOCK_V).
    """
    VALUES: tl.constexpr = CHANNELS * FRAMES * PATCH * PATCH
    VALUE_BLOCKS: tl.constexpr = triton.cdiv(VALUES, BLOCK_V)
    value = tl.program_id(0) % VALUE_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = tl.program_id(0) // VALUE_BLOCKS
    pixels, row, present = _pixels(table_ptr, count, tile, value, FRAMES, PATCH, UNIT, False, TYPE, BLOCK_P)
    mask = present[:, None] & (value < VALUES)[None, :]
    source = d_out_ptr + row[:, None] * (VALUES * REPEATS)
    if REPEATS == 1:
        total = tl.load(source + value[None, :], mask, other=0.0)
    else:
        SIDE: tl.constexpr = PATCH * PATCH
        place = value // SIDE * (SIDE * REPEATS) + value % SIDE
        total = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
        for repeat in range(REPEATS):
            total += tl.load(source + (place + repeat * SIDE)[None, :], mask, other=0.0).to(tl.float32)
    if scales is not None:
        total = total.to(tl.float32) * _at_channels(scales, value, VALUES)
    tl.store(pixels, total.to(TYPE), mask)
