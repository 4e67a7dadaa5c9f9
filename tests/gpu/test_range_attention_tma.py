"""The descriptor paths of the range attention forward on a GPU that has them, warp specialization among them."""

import pytest
import torch

from vot_kernels import PackedLayout, flash_attn_varlen_func, packed_attention
from vot_kernels.ops.packed_attention import reference
from vot_kernels.ops.parts.range_attention import triton as triton_backend
from vot_kernels.ops.parts.range_attention.triton import prefer_tma
from vot_kernels.testing import check_against_reference, make_qkv, make_tensor, poison_segment

OP = "packed_attention"
pytestmark = pytest.mark.gpu
SIZES = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64), (torch.float16, 128)]


@pytest.fixture(params=[False, True], ids=["descriptors", "warp-specialized"])
def preferring(request, backend, device, monkeypatch):
    """Inside of it a forward takes the path, and has taken it at the end."""
    if backend != "triton" or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("tensor descriptors need a GPU of compute capability 9.0 and the triton backend")
    seen = []
    inner = triton_backend._launch_with_workspace

    def launch(kernel, grid, config, **arguments):
        seen.append((config.blocks.get("USE_TMA", 0), config.blocks.get("WARP_SPECIALIZE", 0)))
        inner(kernel, grid, config, **arguments)

    monkeypatch.setattr(triton_backend, "_launch_with_workspace", launch)
    with prefer_tma(warp_specialize=request.param):
        yield
    assert set(seen) == {(1, int(request.param))}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, head_dim", SIZES)
def test_against_the_reference(dtype, head_dim, causal, preferring, device):
    layout = PackedLayout.from_lengths((127, 0, 128, 129, 1, 640, 63, 65), device=device)
    check_against_reference(
        lambda *x: packed_attention(*x, layout, causal=causal, return_lse=True, backend="triton"),
        lambda *x: reference.packed_attention(*x, layout, causal=causal),
        make_qkv(layout.num_tokens, 4, head_dim, kv_heads=2, dtype=dtype, device=device),
        roundings=4.0,
        names=["out", "lse"],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_keys_of_another_length(causal, preferring, device):
    rows, keys = (torch.tensor((0, *n), device=device).cumsum(0).int() for n in ((300, 5), (700, 260)))
    q = make_tensor(305, 4, 128, dtype=torch.bfloat16, device=device)
    k, v = (make_tensor(960, 2, 128, seed=i, dtype=torch.bfloat16, device=device) for i in (1, 2))

    def run(backend):
        def call(*x):
            options = {"causal": causal, "window_size": (200, 40), "backend": backend}
            return [flash_attn_varlen_func(*x, rows, keys, 300, 700, **options)]

        return call

    check_against_reference(run("triton"), run("reference"), [q, k, v], roundings=4.0)


def test_a_neighbour_is_never_read_and_the_same_inputs_give_the_same_bits(preferring, device):
    layout = PackedLayout.from_lengths((1000, 77, 2000), device=device)
    inputs = make_qkv(layout.num_tokens, 8, 64, dtype=torch.bfloat16, device=device)
    clean = packed_attention(*inputs, layout, backend="triton")
    dirty = packed_attention(*(poison_segment(x, layout, 1) for x in inputs), layout, backend="triton")
    assert torch.equal(clean[:1000], dirty[:1000]) and torch.equal(clean[1077:], dirty[1077:])
    assert dirty[1000:1077].isnan().all()
    for _ in range(20):
        assert torch.equal(packed_attention(*inputs, layout, backend="triton"), clean)
