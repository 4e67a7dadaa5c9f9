"""The descriptor paths of the range attention forward on a GPU that has them, warp specialization among them."""

import pytest
import torch

from vot_kernels import PackedLayout, flash_attn_varlen_func, packed_attention
from vot_kernels.ops import launch as launching
from vot_kernels.ops.packed_attention import reference
from vot_kernels.ops.parts.range_attention.triton import KeyRanges, range_attention_forward
from vot_kernels.testing import check_against_reference, make_qkv, make_tensor, poison_segment

OP = "packed_attention"
pytestmark = pytest.mark.gpu
SIZES = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64), (torch.float16, 128)]


@pytest.fixture(params=["tma", "warp_specialized"])
def variant(request, backend, device, monkeypatch):
    """The name of a variant, and that every forward has taken it."""
    if backend != "triton" or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("tensor descriptors need a GPU of compute capability 9.0 and the triton backend")
    seen = []
    inner = launching.launch

    def launch(kernel, grid, config, arguments):
        if kernel.__name__ == "_range_attention_fwd_kernel":
            seen.append(
                (config.variant, config.blocks.get("USE_TMA", 0), config.blocks.get("WARP_SPECIALIZE", 0))
            )
        inner(kernel, grid, config, arguments)

    monkeypatch.setattr(launching, "launch", launch)
    yield request.param
    assert set(seen) == {(request.param, 1, int(request.param == "warp_specialized"))}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, head_dim", SIZES)
def test_against_the_reference(dtype, head_dim, causal, variant, device):
    layout = PackedLayout.from_lengths((127, 0, 128, 129, 1, 640, 63, 65), device=device)
    options = {"causal": causal, "return_lse": True, "backend": "triton", "_variant": variant}
    check_against_reference(
        lambda *x: packed_attention(*x, layout, **options),
        lambda *x: reference.packed_attention(*x, layout, causal=causal),
        make_qkv(layout.num_tokens, 4, head_dim, kv_heads=2, dtype=dtype, device=device),
        roundings=4.0,
        names=["out", "lse"],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_keys_of_another_length(causal, variant, device):
    rows, keys = (torch.tensor((0, *n), device=device).cumsum(0).int() for n in ((300, 5), (700, 260)))
    q = make_tensor(305, 4, 128, dtype=torch.bfloat16, device=device)
    k, v = (make_tensor(960, 2, 128, seed=i, dtype=torch.bfloat16, device=device) for i in (1, 2))
    ranges = KeyRanges.of_segments(rows, keys, 200, 0 if causal else 40)

    def run(*x):
        return [range_attention_forward(*x, ranges, 128**-0.5, variant=variant)[0]]

    def oracle(*x):
        options = {"causal": causal, "window_size": (200, 40), "backend": "reference"}
        return [flash_attn_varlen_func(*x, rows, keys, 300, 700, **options)]

    check_against_reference(run, oracle, [q, k, v], roundings=4.0, gradients=False)


def test_a_neighbour_is_never_read_and_the_same_inputs_give_the_same_bits(variant, device):
    layout = PackedLayout.from_lengths((1000, 77, 2000), device=device)
    inputs = make_qkv(layout.num_tokens, 8, 64, dtype=torch.bfloat16, device=device)
    options = {"backend": "triton", "_variant": variant}
    clean = packed_attention(*inputs, layout, **options)
    dirty = packed_attention(*(poison_segment(x, layout, 1) for x in inputs), layout, **options)
    assert torch.equal(clean[:1000], dirty[:1000]) and torch.equal(clean[1077:], dirty[1077:])
    assert dirty[1000:1077].isnan().all()
    for _ in range(20):
        assert torch.equal(packed_attention(*inputs, layout, **options), clean)
