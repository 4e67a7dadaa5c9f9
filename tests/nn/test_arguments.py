"""What a module refuses, when it is made or at its first call, in a sentence that says what is allowed."""

import pytest
import torch

from vot_kernels.nn import (
    AutonomyOfExperts,
    DenseResidual,
    HybridAttention,
    LinearAttention,
    PackedAttentionPooling,
    SizeAwareEmbedding,
    SwiGLU,
)
from vot_kernels.packing import PackedLayout

X, LAYOUT = torch.randn(5, 32), PackedLayout.from_lengths([5])

CASES = {
    "dim must be an int >= 1, got 0": lambda: HybridAttention(0, 1),
    "head_dim must be an int >= 1, got -3": lambda: HybridAttention(32, 4, head_dim=-3),
    "head_dim must be an int >= 1, got 0": lambda: LinearAttention(32, 4, head_dim=0),
    "num_heads must be an int >= 1, got 2.0": lambda: HybridAttention(32, 2.0),
    "num_kv_heads must be an int >= 1, got 0": lambda: HybridAttention(32, 4, num_kv_heads=0),
    "backend must be one of 'auto', .*, got 'xx'": lambda: HybridAttention(32, 4, backend="xx"),
    "backend must be one of 'auto', .*, got 'yy'": lambda: LinearAttention(32, 4, backend="yy"),
    "backend must be one of 'auto', .*, got 'zz'": lambda: AutonomyOfExperts(32, 4, 2, 64, backend="zz"),
    "rotary must be a callable .*, got 'yes'": lambda: HybridAttention(32, 4, rotary="yes"),
    "far_init must be a number, got 'a'": lambda: HybridAttention(32, 4, far_init="a"),
    "beta_init must be a number, got 'b'": lambda: HybridAttention(32, 4, beta_init="b"),
    r"position_embeddings must be a pair \(cos, sin\)": (
        lambda: HybridAttention(32, 4)(X, LAYOUT, (torch.ones(5, 8),))
    ),
    "d_ffn must be an int >= 1, got -100": lambda: AutonomyOfExperts(32, 4, 2, d_ffn=-100),
    "top_k must be an int >= 1, got 2.5": lambda: AutonomyOfExperts(32, 4, 2.5, 64),
    "num_experts must be an int >= 1, got 0": lambda: AutonomyOfExperts(32, 0, 1, 64),
    "shared_hidden must be an int >= 0, got -1": lambda: AutonomyOfExperts(32, 4, 2, 64, shared_hidden=-1),
    "bias_rate must be a number, got 'c'": lambda: AutonomyOfExperts(32, 4, 2, 64, bias_rate="c"),
    "x must be a tensor, got None": lambda: AutonomyOfExperts(32, 4, 2, 64)(None),
    r"x must have the shape \[..., 32\], got \[\]": lambda: AutonomyOfExperts(32, 4, 2, 64)(
        torch.tensor(1.0)
    ),
    r"x must have the shape \[..., 32\], got \[5, 33\]": (
        lambda: AutonomyOfExperts(32, 4, 2, 64)(torch.randn(5, 33))
    ),
    "hidden must be an int >= 1, got -1": lambda: SwiGLU(4, -1),
    "dim must be an int >= 1, got -4": lambda: PackedAttentionPooling(-4, 2),
    "octaves must be an int >= 1, got 0": lambda: SizeAwareEmbedding(4, octaves=0),
    "Block 2 reads the state 1, which the memory does not have": lambda: DenseResidual(3)(X, 2, {0: X}),
}


@pytest.mark.parametrize("message", CASES)
def test_bad_arguments_are_one_sentence(message):
    with pytest.raises((TypeError, ValueError), match=message):
        CASES[message]()
