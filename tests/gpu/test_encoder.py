"""The whole encoder: a GPU gives what the CPU gives."""

import pytest
import torch

from vot_kernels.testing import make_tensor, max_error, shifted

OP = "hybrid_attention"
pytestmark = pytest.mark.gpu


def test_same_features_and_gradients_as_on_the_cpu(backend, device):
    encoder_module = pytest.importorskip("vot_kernels.models.encoder")
    torch.manual_seed(shifted(0))
    config = encoder_module.VotEncoderConfig.preset("nano")
    encoder = encoder_module.VotEncoder(config).eval()
    grid = torch.tensor([[4, 6, 8], [1, 5, 5], [2, 3, 3]])
    pixels = make_tensor(int(grid.prod(1).sum()), config.patch_numbers)
    results = []
    for where, name in ((torch.device("cpu"), "torch"), (device, backend)):
        encoder.set_attention_backend(name)
        leaf = pixels.to(where).requires_grad_()
        out = encoder.to(where)(leaf, grid.to(where)).last_hidden_state
        (gradient,) = torch.autograd.grad(out.square().mean(), leaf)
        results.append((out.detach().cpu(), gradient.cpu()))
    for a, b in zip(*results, strict=True):
        assert max_error(a, b) <= 2e-3 * float(b.abs().max())
