"""Batches where packed tokens belong, and the reverse: the sentence names the call that makes it right, and it does."""

import re

import pytest
import torch

from tests.rounding import nearly_equal
from vot_kernels import (
    PackedLayout,
    aoe,
    flash_attn_func,
    flash_attn_varlen_func,
    hybrid_attention,
    hybrid_attention_step,
    linear_attention,
    moe,
    packed_attention,
    rope_qk_norm,
)
from vot_kernels.nn import (
    HybridAttention,
    LinearAttention,
    PackedAttentionPooling,
    SizeAwareEmbedding,
)
from vot_kernels.testing import make_experts, make_moe, make_tensor

BATCH, LENGTH, HEADS, WIDTH = 2, 7, 3, 8
LAYOUT = PackedLayout.from_lengths([LENGTH] * BATCH, group_size=LENGTH)
OPS = {
    "hybrid_attention": lambda q, layout: hybrid_attention(q, q, q, layout),
    "packed_attention": lambda q, layout: packed_attention(q, q, q, layout),
    "linear_attention": lambda q, layout: linear_attention(q, q, q, layout),
    "hybrid_attention_step": lambda q, layout: hybrid_attention_step(q, q, q)[0],
    "rope_qk_norm": lambda q, layout: rope_qk_norm(q, q, layout.positions)[0],
}


def refusal(call) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def advised(message: str, **values) -> list:
    """What the expressions in a message come to."""
    found = re.findall(r"[a-z]\.(?:transpose\([\d, ]+\)\.)?(?:flatten|transpose)\(0, 1\)", message)
    return [eval(expression, {"torch": torch}, values) for expression in found]


@pytest.mark.parametrize("name", OPS)
def test_a_batch_of_heads_into_an_op(name):
    right = make_tensor(BATCH, LENGTH, HEADS, WIDTH)
    expected = OPS[name](right.flatten(0, 1), LAYOUT)
    message = refusal(lambda: OPS[name](right, LAYOUT))
    assert message.startswith(
        "q must have the shape [tokens, heads, head_dim], got [2, 7, 3, 8]; flatten a batch"
    )
    assert "PackedLayout.from_lengths([T] * B)" in message and "PackedLayout.from_mask" in message
    assert torch.equal(OPS[name](advised(message, q=right)[0], LAYOUT), expected)
    heads_first = right.transpose(1, 2).contiguous()
    message = refusal(lambda: OPS[name](heads_first, LAYOUT))
    assert nearly_equal(OPS[name](advised(message, q=heads_first)[1], LAYOUT), expected)


@pytest.mark.parametrize(
    "name", [name for name in OPS if name not in ("hybrid_attention_step", "rope_qk_norm")]
)
def test_heads_before_tokens(name):
    right = make_tensor(BATCH * LENGTH, HEADS, WIDTH)
    heads_first = right.transpose(0, 1)
    message = refusal(lambda: OPS[name](heads_first, LAYOUT))
    assert message.startswith(
        "q has 3 rows, fewer than the 14 tokens of layout; [heads, tokens, head_dim] fits after"
    )
    [fixed] = advised(message, q=heads_first)
    assert torch.equal(OPS[name](fixed, LAYOUT), OPS[name](right, LAYOUT))
    assert "transpose" not in refusal(lambda: OPS[name](right[:5], LAYOUT))


MODULES = {
    "HybridAttention": lambda: HybridAttention(16, 2),
    "LinearAttention": lambda: LinearAttention(16, 2),
    "PackedAttentionPooling": lambda: PackedAttentionPooling(16),
    "SizeAwareEmbedding": lambda: SizeAwareEmbedding(16),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_into_a_module(name):
    module, x = MODULES[name](), make_tensor(BATCH, LENGTH, 16)
    message = refusal(lambda: module(x, LAYOUT))
    assert (
        message.startswith("x must have the shape [tokens, ")
        and "got [2, 7, 16]; flatten a batch with" in message
    )
    assert "PackedLayout.from_lengths([7] * 2), or pack it with PackedLayout.from_mask if" in message
    layout = PackedLayout.from_lengths([7] * 2, group_size=7)
    [flat] = advised(message, x=x)
    assert torch.equal(module(flat, layout), module(x.flatten(0, 1), LAYOUT))
    assert "flatten" not in refusal(lambda: module(x[0, :, :5], LAYOUT))


@pytest.mark.parametrize("op", [lambda x: aoe(x, *make_experts()[1:], 2), lambda x: moe(x, *make_moe()[1:])])
def test_a_batch_into_experts(op):
    message = refusal(lambda: op(make_tensor(3, 11, 24)))
    assert "got [3, 11, 24]; flatten a batch with x.flatten(0, 1)" in message
    assert op(advised(message, x=make_tensor(3, 11, 24))[0]).shape == (33, 24)


def test_flash_attention_for_batches_and_for_packed_tokens():
    packed, bounds = make_tensor(BATCH * LENGTH, HEADS, WIDTH), torch.tensor([0, 7, 14], dtype=torch.int32)
    batch = packed.unflatten(0, (BATCH, LENGTH))
    message = refusal(lambda: flash_attn_varlen_func(batch, batch, batch, bounds, bounds, 7, 7))
    assert message.endswith("; flash_attn_func takes a batch [batch, seqlen, heads, head_dim].")
    message = refusal(lambda: flash_attn_func(packed, packed, packed))
    assert message.endswith("; flash_attn_varlen_func takes packed tokens [total, heads, head_dim].")
    assert flash_attn_func(batch, batch, batch).shape == batch.shape


def test_cumulative_lengths_in_place_of_a_layout():
    q = make_tensor(14, HEADS, WIDTH)
    message = refusal(lambda: packed_attention(q, q, q, torch.tensor([0, 7, 14])))
    assert "as from_lengths, from_cu_seqlens, from_mask or from_grid_thw makes it, got Tensor" in message
