"""The minimal work, against numbers computed by hand; comments show the sums, not the formulas."""

import pytest
import torch

from benchmarks.problems.attention import Attention
from benchmarks.problems.experts import AoE, MoE
from benchmarks.problems.fused import (
    DenseResidual,
    DenseResidualNorm,
    NormalisePatches,
    PackPatches,
    RopeQkNorm,
    SizeAwareEmbedding,
)
from benchmarks.problems.towers import Tower

K = 1024
RAGGED = (16 * K, 12 * K, 8 * K, 8 * K, 6 * K, 4 * K, 4 * K, 2 * K, 2 * K, K, K)
TERA = 10**12


@pytest.mark.parametrize(
    ("problem", "flops", "tera"),
    [
        # 65,536² pairs, two products, 2 x 64 operations, 16 heads.
        (Attention("packed_attention", (64 * K,)), 17_592_186_044_416, 17.6),
        (Attention("packed_attention", (64 * K,), head_dim=128), 35_184_372_088_832, 35.2),
        # 256 + 144 + 64 + 64 + 36 + 16 + 16 + 4 + 4 + 1 + 1 = 606 times 1,024² pairs.
        (Attention("packed_attention", RAGGED), 2_602_750_181_376, 2.6),
        (Attention("packed_attention", RAGGED, head_dim=128), 5_205_500_362_752, 5.2),
        # 65,536 tokens, 16 states of 64 x 64, built and read, 2 operations each.
        (Attention("linear_attention", (64 * K,)), 17_179_869_184, 0.017),
        (Attention("linear_attention", (64 * K,), head_dim=128), 68_719_476_736, 0.069),
        # Each of 256 groups sees 4, except at the ends (1 too few on the left, 2 + 1 on the right): 1,020 pairs of
        # groups of 65,536 pairs of tokens, and the states as above.
        (Attention("hybrid_attention", (64 * K,), window=(1, 2)), 290_984_034_304, 0.29),
        (Attention("hybrid_attention", (64 * K,), head_dim=128, window=(1, 2)), 616_327_806_976, 0.62),
    ],
)
def test_the_table_of_the_design_note(problem, flops, tera):
    work = problem.work("forward", 2)
    assert work.flops == flops
    assert flops / TERA == pytest.approx(tera, abs=0.006 if tera < 1 else 0.06)
    # Four buffers of 65,536 x 16 x head_dim numbers of two bytes.
    assert work.bytes == {64: 536_870_912, 128: 1_073_741_824}[problem.head_dim]
    assert round(work.bytes / 1e9, 2) == {64: 0.54, 128: 1.07}[problem.head_dim]


@pytest.mark.parametrize(
    ("direction", "flops", "bytes_"),
    [
        # Pairs 1 + 2 + 3 + 4 = 10 and 1, times 2 operations, 8 channels, 4 heads: 704 per product.
        # q and o 5 x 4 x 8 x 2 = 320 bytes each, k and v 160.
        ("forward", 2 * 704, 960),
        ("backward", 5 * 704, 4 * 320 + 4 * 160),
        ("both", 7 * 704, 960 + 1920),
    ],
)
def test_causal_attention_with_grouped_heads(direction, flops, bytes_):
    problem = Attention("packed_attention", (4, 0, 1), heads=4, kv_heads=2, head_dim=8, causal=True)
    work = problem.work(direction, 2)
    assert (work.flops, work.bytes) == (flops, bytes_)


@pytest.mark.parametrize(("direction", "flops"), [("forward", 192), ("backward", 480), ("both", 672)])
def test_linear_attention_by_hand(direction, flops):
    # 3 tokens x 4 x 4 x 2 operations = 96 per product with a state; 2 forward, 5 backward.
    problem = Attention("linear_attention", (2, 1), heads=1, kv_heads=1, head_dim=4)
    assert problem.work(direction, 4).flops == flops


@pytest.mark.parametrize("lengths", [(1,), (10,), (7, 0, 13), (3, 3, 3, 20, 1), (0,)])
@pytest.mark.parametrize("window", [0, 1, 3, (2, 0), (0, 1), 100])
@pytest.mark.parametrize("group_size", [1, 4, 64])
def test_near_pairs_are_those_of_the_mask(lengths, window, group_size):
    problem = Attention("hybrid_attention", lengths, 1, 1, 4, group_size=group_size, window=window)
    left, right = (window, window) if isinstance(window, int) else window
    tokens = [(s, i // group_size) for s, n in enumerate(lengths) for i in range(n)]
    count = sum(a == b and -left <= h - g <= right for a, g in tokens for b, h in tokens)
    assert problem.near_pairs() == count


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_pairs_are_those_of_the_mask(causal):
    problem = Attention("packed_attention", (3, 0, 5, 1), 1, 1, 4, causal=causal)
    segments = torch.tensor([0] * 3 + [1] * 5 + [2])
    mask = segments[:, None] == segments
    assert problem.near_pairs() == int((mask.tril() if causal else mask).sum())
    assert Attention("linear_attention", (3, 5)).near_pairs() == 0


SMALL = [
    # y = sum of 2 states of 12 numbers: 24 multiply-adds; dx = w dy 24 products, dw = <dy, x> 24 multiply-adds.
    # 2 states and y of 48 bytes; dy, 2 states, 2 gradients.
    (DenseResidual(3, width=4, states=2), "forward", 4, 48, 144),
    (DenseResidual(3, width=4, states=2), "backward", 4, 72, 240),
    (DenseResidual(3, width=4, states=2), "both", 4, 120, 384),
    # The same, and 12 numbers normed: written forward, its gradient and the sum read backward.
    (DenseResidualNorm(3, width=4, states=2), "forward", 4, 48 + 48, 192),
    (DenseResidualNorm(3, width=4, states=2), "backward", 4, 72 + 108, 336),
    # 3 tokens x (2 + 1) heads x 4 = 36 numbers, 7 operations forward and 15 backward; x, y and x, dy, dx.
    (RopeQkNorm(((1, 1, 3),), heads=2, kv_heads=1, head_dim=4), "forward", 4, 252, 288),
    (RopeQkNorm(((1, 1, 3),), heads=2, kv_heads=1, head_dim=4), "backward", 4, 540, 432),
    (RopeQkNorm(((1, 1, 3),), heads=2, kv_heads=1, head_dim=4), "both", 4, 792, 720),
    # 5 tokens x 3 = 15 additions; 2 images through 12 x 2 and 2 x 3 weights: 2 x 2 x (24 + 6) = 120.
    (SizeAwareEmbedding(((1, 2, 2), (1, 1, 1)), width=3, hidden=2, octaves=1), "forward", 4, 135, 120),
    (SizeAwareEmbedding(((1, 2, 2), (1, 1, 1)), width=3, hidden=2, octaves=1), "backward", 4, 255, 120),
    (SizeAwareEmbedding(((1, 2, 2), (1, 1, 1)), width=3, hidden=2, octaves=1), "both", 4, 390, 240),
    # 3 x 2 x 4 values, read and written.
    (PackPatches(((2, 4),), patch_size=2), "forward", 4, 0, 192),
    (PackPatches(((2, 4),), patch_size=2), "backward", 4, 0, 192),
    (PackPatches(((2, 4),), patch_size=2), "both", 4, 0, 384),
    # 24 bytes read and 24 numbers written; a division, a subtraction and a division each.
    (NormalisePatches(((2, 4),), patch_size=2), "forward", 2, 72, 72),
    # Hidden width 8: (3 x 4 x 5 - 2 x 4) / (2 + 8) = 5.2 to a multiple of 8. 2 tokens: caches of 3 experts 2 x 4
    # each (24), 2 chosen bodies of 8 x (2 + 4 + 4) (160): 368 multiply-adds.
    # Backward: twice 2 x (2 chosen caches 16 + bodies 160) = 704 multiply-adds.
    # Weights 3 x (8 + 16 + 32 + 32) = 264 numbers; x and y 8 each.
    (AoE(2, dim=4, experts=3, top_k=2, rank=2, d_ffn=5), "forward", 2, 736, 560),
    (AoE(2, dim=4, experts=3, top_k=2, rank=2, d_ffn=5), "backward", 2, 1408, 1104),
    (AoE(2, dim=4, experts=3, top_k=2, rank=2, d_ffn=5), "both", 2, 2144, 1664),
    # 4 slots x 3 x 5 x 4 = 240 multiply-adds; 3 experts of 60 weights, x and y of 8, 4 ids of 8 bytes, 4 weights.
    (MoE(2, dim=4, experts=3, top_k=2, hidden=5), "forward", 2, 480, 432),
    # x, dy, dx 24, weights and their gradients 360, routing weights and theirs 8, ids 32 bytes.
    (MoE(2, dim=4, experts=3, top_k=2, hidden=5), "backward", 2, 960, 816),
    (MoE(2, dim=4, experts=3, top_k=2, hidden=5), "both", 2, 1440, 1248),
    # One token and 2 of 100 experts: no other expert is read, but every gradient is written.
    (MoE(1, dim=4, experts=100, top_k=2, hidden=5), "forward", 2, 240, 2 * (8 + 120 + 2) + 16),
    (MoE(1, dim=4, experts=100, top_k=2, hidden=5), "backward", 2, 480, 2 * (12 + 120 + 6000 + 4) + 16),
]


@pytest.mark.parametrize(("problem", "direction", "itemsize", "flops", "bytes_"), SMALL)
def test_small_problems_by_hand(problem, direction, itemsize, flops, bytes_):
    work = problem.work(direction, itemsize)
    assert (work.flops, work.bytes) == (flops, bytes_)


def test_towers():
    # Four patches of 768 numbers, 128 wide, four projections and a layer of 48: 98,304 + 65,536 + 12,288 products
    # each; then 16 pairs, two products of 128.
    forward = 2 * 4 * 176_128 + 2 * 2 * 16 * 128
    problem = Tower(64, ((1, 2, 2),), layers=1, heads=2)
    assert problem.work("forward", 4).flops == forward == 1_417_216
    assert problem.work("both", 4).flops == 3 * 1_409_024 + 7 * 4_096
    assert (
        problem.work("both", 4).bytes == problem.work("forward", 4).bytes + problem.work("backward", 4).bytes
    )
    # Twice as many frames, twice as many pairs. Windows of 8 x 8 patches in the first of two layers cut 12 x 8 into
    # 64 and 32 patches: 4,096 + 1,024 pairs in place of 96 squared.
    one, two = (Tower(64, ((t, 2, 2),), layers=1, heads=2).work("forward", 4).flops for t in (1, 2))
    assert two == 2 * one
    windows = Tower(80, ((1, 12, 8),), layers=2, heads=2)
    products = windows.work("both", 4).flops - windows.work("forward", 4).flops * 3
    assert products == (7 - 3 * 2) * 2 * 160 * (5_120 + 9_216)
