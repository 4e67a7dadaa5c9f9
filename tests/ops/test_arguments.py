"""What an attention op cannot honour it refuses in a sentence, and never drops it silently."""

import numpy as np
import pytest
import torch

import vot_kernels
from tests.fuzz.broken import FUNCTIONS, check_broken
from tests.fuzz.calls import Draw
from vot_kernels import (
    PackedLayout,
    dense_residual,
    flash_attn_func,
    flash_attn_varlen_func,
    hybrid_attention,
    hybrid_attention_step,
    linear_attention,
    packed_attention,
)
from vot_kernels.ops.hybrid_attention import HybridAttentionState
from vot_kernels.testing import make_tensor

LAYOUT = PackedLayout.from_lengths([24, 17], group_size=4)
BOUNDS = torch.tensor([0, 24, 41], dtype=torch.int32)


def make_qkv(seed=0, tokens=41, heads=2, dtype=torch.float32):
    return [make_tensor(tokens, heads, 16, seed=seed + i, dtype=dtype) for i in range(3)]


def varlen(*qkv, **options):
    return flash_attn_varlen_func(*qkv, BOUNDS, BOUNDS, 24, 24, **options)


@pytest.mark.parametrize("scale", [torch.tensor(0.3, requires_grad=True), torch.tensor(0.3), "softmax", True])
def test_scale_is_a_number(scale):
    q, k, v = make_qkv()
    for op in (hybrid_attention, packed_attention):
        with pytest.raises(TypeError, match="scale must be a number"):
            op(q, k, v, LAYOUT, scale=scale)
    with pytest.raises(TypeError, match="softmax_scale must be a number"):
        varlen(q, k, v, softmax_scale=scale)
    with pytest.raises(TypeError, match="scale must be a number"):
        hybrid_attention_step(q, k, v, scale=scale)
    assert torch.equal(
        packed_attention(q, k, v, LAYOUT, scale=np.float32(0.5)), packed_attention(q, k, v, LAYOUT, scale=0.5)
    )


def test_forward_mode_is_refused():
    q, k, v = make_qkv()
    for op in (
        lambda q: hybrid_attention(q, k, v, LAYOUT),
        lambda q: linear_attention(k, q, v, LAYOUT),
        lambda q: varlen(k, v, q),
        lambda q: dense_residual([k, q], torch.ones(2)),
    ):
        with pytest.raises(ValueError, match="no forward-mode derivative"):
            torch.func.jvp(op, (q,), (torch.ones_like(q),))


def test_forward_mode_is_refused_for_every_floating_argument():
    layout = PackedLayout.from_lengths([4, 3], group_size=2)
    x, image = torch.randn(7, 4), torch.randn(3, 4, 4)
    head, heads = torch.randn(7, 2, 4), torch.randn(4)
    experts = [torch.randn(3, 2, 4), torch.randn(3, 5, 2), torch.randn(3, 5, 4), torch.randn(3, 5, 4)]
    mlp = [torch.randn(5, 12), torch.zeros(5), torch.randn(4, 5), torch.zeros(4)]
    indices = torch.zeros(7, 2, dtype=torch.int64)
    calls = [
        (lambda *t: vot_kernels.aoe(*t, 2), [x, *experts]),
        (
            lambda *t: vot_kernels.moe(*t[:3], indices, t[3]),
            [x, torch.randn(3, 10, 4), torch.randn(3, 4, 5), torch.ones(7, 2)],
        ),
        (lambda *t: vot_kernels.packed_attention(*t, layout), [head, head, head]),
        (
            lambda q, k, *w: vot_kernels.rope_qk_norm(
                q, k, torch.zeros(7, 3), q_weight=w[0], k_weight=w[1], sections=(1, 1, 0)
            ),
            [head, head, heads, heads],
        ),
        (lambda *t: vot_kernels.size_aware_embedding(t[0], layout, *t[1:]), [x, *mlp]),
        (lambda image: vot_kernels.pack_patches([image], 2, temporal_patch_size=1), [image]),
        (lambda *t: hybrid_attention_step(*t), [head, head, head]),
    ]
    for call, tensors in calls:
        call(*tensors)
        for i, one in enumerate(tensors):
            with pytest.raises(ValueError, match="no forward-mode derivative"):
                torch.func.jvp(
                    lambda t, i=i, call=call, tensors=tensors: call(*tensors[:i], t, *tensors[i + 1 :]),
                    (one,),
                    (torch.ones_like(one),),
                )


def test_a_step_refuses_features_that_ask_for_gradients():
    q, k, v = make_qkv()
    features = {"q_features": q.abs(), "k_features": k.abs().requires_grad_()}
    with pytest.raises(RuntimeError, match="for inference"):
        hybrid_attention_step(q, k, v, **features)
    with torch.no_grad():
        hybrid_attention_step(q, k, v, **features)


@pytest.mark.parametrize(
    "layout", [PackedLayout.from_lengths([24, 17]), PackedLayout.from_cu_seqlens([0, 24, 41])]
)
def test_a_window_needs_groups(layout):
    q, k, v = make_qkv()
    for options in ({"window": 1}, {"window": (2, 0)}, {"window": None, "causal": "group"}):
        for where in (layout, layout.to("cpu")):
            with pytest.raises(ValueError, match="groups, but the layout has none"):
                hybrid_attention(q, k, v, where, **options)
    assert torch.equal(hybrid_attention(q, k, v, layout, window=None), packed_attention(q, k, v, layout))


def test_one_group_to_a_segment_is_a_grouping_where_it_was_asked_for():
    q, k, v = make_qkv()
    exact = packed_attention(q, k, v, LAYOUT)
    for layout in (
        PackedLayout.from_lengths([24, 17], group_size=30),
        PackedLayout.from_cu_seqlens([0, 24, 41], cu_groups=[0, 24, 41]),
        PackedLayout.from_grid_thw([[1, 4, 6], [1, 1, 17]]),
    ):
        assert torch.equal(hybrid_attention(q, k, v, layout, window=1), exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_lengths_in_place_of_cumulative_lengths(backend):
    q, k, v = make_qkv()
    lengths = torch.tensor([20, 28], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must begin with 0, .* got 20"):
        flash_attn_varlen_func(q, k, v, lengths, lengths, 28, 28, backend=backend)


def test_no_heads_and_no_channels():
    none = torch.zeros(41, 0, 16)
    for q, k in ((none, none), (none, torch.zeros(41, 1, 16)), (torch.zeros(41, 1, 16), none)):
        with pytest.raises(ValueError, match="heads"):
            varlen(q, k, k)
        with pytest.raises(ValueError, match="heads"):
            packed_attention(q, k, k, LAYOUT)
    flat = torch.zeros(41, 2, 0)
    for op in (lambda: varlen(flat, flat, flat), lambda: linear_attention(flat, flat, flat, LAYOUT)):
        with pytest.raises(ValueError, match="head_dim must be at least 1"):
            op()
    with pytest.raises(ValueError, match="head_dim must be at least 1"):
        flash_attn_func(flat[None], flat[None], flat[None])


def test_a_window_beyond_all_groups_is_all_of_them():
    q, k, v = make_qkv()
    assert torch.equal(
        hybrid_attention(q, k, v, LAYOUT, window=2**70), hybrid_attention(q, k, v, LAYOUT, window=None)
    )


@pytest.mark.parametrize("window", [0, 2])
def test_a_stream_owns_its_state(window):
    """The caller may have one buffer for all groups."""
    groups = [make_qkv(seed=10 * i, tokens=5) for i in range(5)]
    features = [[x.abs() for x in make_qkv(seed=100 * i, tokens=5)[:2]] for i in range(5)]
    buffers = [torch.empty(5, 2, 16) for _ in range(5)]
    kept, shared = HybridAttentionState(), HybridAttentionState()
    for group, (q_features, k_features) in zip(groups, features, strict=True):
        for buffer, x in zip(buffers, (*group, q_features, k_features), strict=True):
            buffer.copy_(x)
        given = {"q_features": buffers[3], "k_features": buffers[4], "window": window}
        out, shared = hybrid_attention_step(*buffers[:3], shared, **given)
        given |= {"q_features": q_features, "k_features": k_features}
        expected, kept = hybrid_attention_step(*group, kept, **given)
        assert torch.equal(out, expected)


def test_the_features_of_a_stream_stay_what_they_were():
    q, k, v = make_qkv(tokens=5)
    _, state = hybrid_attention_step(q, k, v)
    with pytest.raises(ValueError, match="k_features must have the width"):
        hybrid_attention_step(q, k, v, state, q_features=q.abs(), k_features=k.abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_stream_under_autocast_keeps_its_sums(dtype):
    layout = PackedLayout.from_lengths([600 * 2], group_size=2)
    q, k, v = make_qkv(tokens=1200, dtype=dtype)
    rounded = [x if dtype == torch.float64 else x.bfloat16() for x in (q, k, v)]
    options = {"window": 1, "feature_map": "elu"}
    expected = hybrid_attention(*rounded, layout, causal="group", **options)
    state = None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(600):
            rows = slice(2 * i, 2 * i + 2)
            out, state = hybrid_attention_step(q[rows], k[rows], v[rows], state, **options)
    assert state.far.dtype == dtype
    assert (out - expected[-2:]).abs().max() <= 2 * torch.finfo(expected.dtype).eps * expected.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_broken_arguments_get_a_sentence(seed):
    assert len(FUNCTIONS) > 12
    for index in range(150):
        check_broken(Draw(seed, index))
