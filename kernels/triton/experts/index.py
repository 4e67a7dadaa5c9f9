"""The slots of all tokens sorted by expert, and the way back from places to slots: see `Slots`.

Slots are cut into tiles of TILE. `_rank_slots_kernel` counts the slots of each expert in each tile. The running sum of
these counts, all tiles of one expert before the next expert, gives the start of each expert's slots of each tile, to
which `_place_slots_kernel` adds a slot's rank within its tile. Slots thus keep their order within an expert.
"""

import triton
import triton.language as tl


@triton.jit
def load_experts(indices_ptr, slot, slots, experts):
    """Load int32 ids, with -1 past the last slot and for ids without an expert."""
    index = tl.load(indices_ptr + slot, slot < slots, other=-1)
    return tl.where((index >= 0) & (index < experts), index, -1).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "tiles", "experts"])
def _rank_slots_kernel(
    indices_ptr, places_ptr, counts_ptr, slots, tiles, experts, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """Write for each slot the number of slots of the same expert before it in its tile, and the counts that are not 0.

    indices: integer `[slots]`; places: int32 `[slots]`; counts: int32 `[experts * tiles + 1]`, the count of expert e in
    tile i at 1 + e * tiles + i. The work is TILE comparisons per slot, for any number of experts.
    """
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    position = tl.arange(0, TILE)
    expert = load_experts(indices_ptr, first + position, slots, experts)
    before = tl.zeros([TILE], tl.int32)
    after = tl.zeros([TILE], tl.int32)
    for start in range(0, TILE, BLOCK):
        other = start + tl.arange(0, BLOCK)
        same = expert[:, None] == load_experts(indices_ptr, first + other, slots, experts)[None, :]
        earlier = other[None, :] < position[:, None]
        before += tl.sum((same & earlier).to(tl.int32), 1)
        after += tl.sum((same & ~earlier).to(tl.int32), 1)
    tl.store(places_ptr + first + position, before, first + position < slots)
    # The first slot of an expert in the tile writes the count of all its slots: itself and those after it.
    count = counts_ptr + 1 + expert.to(tl.int64) * tiles + tile
    tl.store(count, after, (expert >= 0) & (before == 0))


@triton.jit(do_not_specialize=["slots", "tiles", "experts"])
def _place_slots_kernel(
    indices_ptr, starts_ptr, places_ptr, order_ptr, slots, tiles, experts, TILE: tl.constexpr
):
    """Replace ranks within tiles by places, -1 for slots without an expert; order, int32, is the inverse.

    starts: int32, the running sum of the counts of `_rank_slots_kernel`.
    """
    tile = tl.program_id(0)
    slot = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    expert = load_experts(indices_ptr, slot, slots, experts)
    grouped = expert >= 0
    start = tl.load(starts_ptr + expert.to(tl.int64) * tiles + tile, grouped, other=0)
    place = start + tl.load(places_ptr + slot, grouped, other=0)
    tl.store(places_ptr + slot, tl.where(grouped, place, -1), slot < slots)
    tl.store(order_ptr + place, slot.to(tl.int32), grouped)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _mixing_backward_kernel(
    partials_ptr,
    d_weights_ptr,
    places_ptr,
    norms_ptr,
    indices_ptr,
    weights_ptr,
    d_mix_ptr,
    scale_ptr,
    tokens,
    blocks,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of the mixing weights `[tokens, TOP_K]` and the factor of each cache in its norm's gradient.

    d_mix = the sum of partials `[blocks, tokens * TOP_K]` at the slot's place (+ d_weights), in the order of the
    blocks. Through w = softmax(p) of the chosen norms p = |c|, dc = dp c / p with dp = w (d_mix - sum of w d_mix):
    scale `[tokens * TOP_K]` is dp / p at the slot's place, 0 where p = 0. All are float32, except the int32 places and
    the integer indices. With scale_ptr None only d_mix is written, and norms, indices and weights are not read.
    """
    WIDTH: tl.constexpr = triton.next_power_of_2(TOP_K)
    ROWS: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = tl.arange(0, WIDTH)
    slot = token[:, None] * TOP_K + choice[None, :]
    mask = (token < tokens)[:, None] & (choice < TOP_K)[None, :]
    place = tl.load(places_ptr + slot, mask, other=-1)
    grouped = place >= 0

    # Successive tokens have successive places within an expert, so their loads share cache lines.
    pointers = partials_ptr + place
    d_mix = tl.zeros([ROWS, WIDTH], tl.float32)
    for _ in tl.range(blocks, loop_unroll_factor=4):
        d_mix += tl.load(pointers, grouped, other=0.0)
        pointers += tokens.to(tl.int64) * TOP_K
    if d_weights_ptr is not None:
        d_mix += tl.load(d_weights_ptr + slot, mask, other=0.0)
    tl.store(d_mix_ptr + slot, d_mix, mask)

    if scale_ptr is not None:
        weight = tl.load(weights_ptr + slot, mask, other=0.0)
        expert = tl.load(indices_ptr + slot, grouped, other=0)
        norm = tl.load(norms_ptr + token[:, None] * EXPERTS + expert, grouped, other=0.0)
        d_norm = weight * (d_mix - tl.sum(weight * d_mix, 1)[:, None])
        tl.store(scale_ptr + place, tl.where(norm > 0, d_norm / norm, 0.0), grouped)
