"""Under autocast an op computes on inputs cast to its dtype, and nothing inside is autocast once more."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.fuzz.calls import MAKERS, Draw
from tests.fuzz.checks import autocast, run_with_gradients
from vot_kernels import (
    PackedLayout,
    dense_residual,
    flash_attn_func,
    hybrid_attention,
    linear_attention,
    pack_patches,
    packed_attention,
    rope_qk_norm,
)
from vot_kernels.nn import HybridAttention, LinearAttention, RotaryEmbedding
from vot_kernels.testing import make_tensor

LAYOUT = PackedLayout.from_lengths([24, 17], group_size=4)


def make_qkv(*dtypes: torch.dtype) -> list[torch.Tensor]:
    """As many tensors as dtypes, q with two query heads to a key head."""
    shapes = [(41, 4, 16), (41, 2, 16), (41, 2, 16)]
    return [make_tensor(*s, seed=i, dtype=d) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]


def attend(op, q, k, v, backend="auto"):
    options = {"backend": backend}
    if op is hybrid_attention:
        return op(q, k, v, LAYOUT, window=1, beta=torch.tensor([0.1, 0.2, 0.3, 0.4]), **options)
    if op is linear_attention:
        decay = torch.tensor([-0.1, -0.2, -0.3, -0.4])
        return op(q, k, v, LAYOUT, causal=True, log_decay=decay, feature_map="elu", **options)
    if op is flash_attn_func:
        return op(q[None], k[None], v[None], causal=True, **options)
    return op(q, k, v, LAYOUT, causal=True, **options)


@pytest.mark.tested_on("axolotl#3805")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", [hybrid_attention, packed_attention, linear_attention, flash_attn_func])
def test_attention_computes_on_cast_inputs_and_gradients_have_the_dtype_of_the_leaf(op, backend):
    leaves = [x.requires_grad_() for x in make_qkv(*[torch.float32] * 3)]
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = attend(op, *halves, backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(op, *leaves, backend)
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=backend != "reference"
    ):  # there, autograd's own products
        grads = torch.autograd.grad(found.float().square().sum(), leaves)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    for grad, half in zip(grads, torch.autograd.grad(expected.float().square().sum(), halves), strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, half.float())


def test_a_norm_may_leave_queries_and_keys_in_float32():
    """As RMSNorm does under autocast on CUDA, while values come in half precision."""
    q, k, v = make_qkv(torch.float32, torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = hybrid_attention(q, k=k, v=v, layout=LAYOUT)
    assert torch.equal(found, hybrid_attention(q.bfloat16(), k.bfloat16(), v, LAYOUT))
    with pytest.raises(TypeError, match="v must have the dtype of q"):
        hybrid_attention(q, k, v, LAYOUT)


def test_float64_stays():
    q, k, v = make_qkv(*[torch.float64] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed_attention(q, k, v, LAYOUT), packed_attention(q, k, v, LAYOUT, causal=False))
        assert packed_attention(q, k, v, LAYOUT).dtype == torch.float64


def test_half_precision_meets_the_other_half_precision():
    q, k, v = make_qkv(*[torch.float16] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(q, k, v, LAYOUT).dtype == torch.bfloat16
        assert pack_patches([q], 1)[0].dtype == torch.float16


def test_what_is_no_matrix_product_takes_the_widest_dtype():
    single, half = torch.ones(3, 2, 4), torch.ones(3, 2, 4, dtype=torch.bfloat16)
    positions = torch.ones(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense_residual([half, single], torch.ones(2)).dtype == torch.float32
        assert dense_residual([half, half], torch.ones(2)).dtype == torch.bfloat16
        q, k = rope_qk_norm(single, half, positions)
        assert q.dtype == k.dtype == torch.float32
        assert rope_qk_norm(half, half, positions)[0].dtype == torch.bfloat16


def test_mistakes_get_the_sentences_they_get_without_autocast():
    q, k, v = make_qkv(*[torch.float32] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="q must be a tensor"):
            hybrid_attention([q], k, v, LAYOUT)
        with pytest.raises(TypeError, match="positional argument"):
            packed_attention(q, k, v, LAYOUT, 1)
        with pytest.raises(TypeError, match="multiple values"):
            packed_attention(q, k, v, LAYOUT, q=q)
        with pytest.raises(ValueError, match="at least one state"):
            dense_residual([], torch.ones(0))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_op_has_a_rule(kind):
    for index in range(6):
        draw = Draw(0, index)
        call = MAKERS[kind](draw)
        autocast(call, *run_with_gradients(call.run, call.tensors), 1e-6)


@pytest.mark.parametrize("module", [HybridAttention, LinearAttention])
def test_an_attention_module_compiles_to_one_graph(module):
    layer, x = module(32, 2, rotary=RotaryEmbedding()), make_tensor(41, 32).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x, LAYOUT), layer(x, LAYOUT)
    assert counter.frame_count == 1 and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    parameters = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(found.sum(), parameters, allow_unused=True),
        torch.autograd.grad(expected.sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
