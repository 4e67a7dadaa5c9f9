"""Models of transformers on inputs that broke other packages; each mark names the report."""

import pytest
import torch
from torch import nn

import vot_kernels
from tests.integrations.tiny import prompts, qwen2, qwen2_5_vl
from vot_kernels.integrations.attention import attention_forward

report = pytest.mark.tested_on


@report("transformers#47170")
@pytest.mark.parametrize("longest", [None, 0, 12, torch.tensor(12)])
def test_images_stay_apart_whatever_maximum_length_comes_along(longest):
    """Without a maximum, transformers' own function attends across all images."""
    attention = qwen2_5_vl().model.visual.blocks[0].attn
    q, k, v = torch.randn(3, 1, 2, 20, 16).unbind(0)
    bounds = torch.tensor([0, 8, 20])
    lengths = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    out, _ = attention_forward(attention, q, k, v, None, scaling=0.25, is_causal=False, **lengths)
    for begin, end in ((0, 8), (8, 20)):
        image = [x[:, :, begin:end] for x in (q, k, v)]
        expected = nn.functional.scaled_dot_product_attention(*image, scale=0.25).transpose(1, 2)
        assert torch.allclose(out[:, begin:end], expected, atol=1e-5)


@report("transformers (documentation)")
@pytest.mark.parametrize("positions", [None, [0, 1, 2, 0, 1, 2, 3, 4]])
def test_a_function_with_a_name_of_its_own_keeps_to_the_past(positions):
    """A registered attention without a mask function gets no mask, and sees the future and other sequences."""
    model, ids = qwen2(attn_implementation="sdpa"), prompts(1, 8)
    options = {"use_cache": False}
    if positions is not None:
        options["position_ids"] = torch.tensor([positions])
    with torch.no_grad():
        expected = model(ids, **options).logits
        with vot_kernels.patched(model):
            found = model(ids, **options).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@report("Liger#911", "ms-swift#7304")
def test_a_patch_that_replaces_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"^Nothing in Sequential can be replaced\. Looked for .* found none at all"
    ):
        vot_kernels.patch(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
