"""An encoder gives the same results with another attention backend; Triton's kernels run on its interpreter."""

import pytest
import torch
from torch.func import functional_call

from tests.marks import compiled, interpreted
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.nn.attention_projections import AttentionProjections
from vot_kernels.testing import check_against_reference, make_tensor, shifted

GRID = torch.tensor([[3, 2, 2], [1, 1, 3]])


def small_encoder(**overrides):
    torch.manual_seed(shifted(0))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = VotEncoderConfig.preset("nano", **sizes, window=0, full_attention_every=2, **overrides)
    return VotEncoder(config).eval()


@pytest.mark.parametrize("backend", ["torch", "auto", pytest.param("triton", marks=interpreted)])
def test_same_features_and_gradients_as_the_reference(backend):
    encoders = {dtype: small_encoder().to(dtype) for dtype in (torch.float32, torch.float64)}
    parameters = dict(encoders[torch.float32].named_parameters())
    (beta,) = (
        name for name in parameters if name.endswith("attention.beta")
    )  # the second layer is exact softmax

    def features(backend):
        def run(pixels, values):
            encoder = encoders[pixels.dtype]
            encoder.set_attention_backend(backend)
            out = functional_call(encoder, {beta: values}, (pixels, GRID))
            return out.last_hidden_state, out.pooler_output

        return run

    pixels = make_tensor(int(GRID.prod(1).sum()), encoders[torch.float32].config.patch_numbers)
    check_against_reference(features(backend), features("reference"), [pixels, parameters[beta]])


@compiled
@pytest.mark.parametrize("attention", ["hybrid", "softmax", "linear"])
def test_the_backend_reaches_every_layer_and_is_not_saved(attention, tmp_path):
    encoder = small_encoder(attention=attention)
    encoder.set_attention_backend("reference")
    layers = [x for x in encoder.modules() if isinstance(x, AttentionProjections)]
    assert len(layers) == 2 and all(x.backend == "reference" for x in layers)
    assert not any("backend" in name for name in encoder.state_dict())
    encoder.save_pretrained(tmp_path)
    again = VotEncoder.from_pretrained(tmp_path)
    assert all(x.backend == "auto" for x in again.modules() if isinstance(x, AttentionProjections))


@compiled
def test_refusals_in_one_sentence():
    encoder = small_encoder()
    with pytest.raises(ValueError, match="backend must be one of 'auto', .* got 'cuda'"):
        encoder.set_attention_backend("cuda")
    encoder.set_attention_backend("triton")
    with pytest.raises(ValueError, match="no Triton kernel runs on CPU tensors"):
        encoder(make_tensor(15, encoder.config.patch_numbers), GRID)
