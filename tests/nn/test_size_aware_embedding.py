"""The module around the size-aware embedding."""

import pytest
import torch

from vot_kernels.nn.size_aware_embedding import SizeAwareEmbedding
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor

LAYOUT = PackedLayout.from_grid_thw([[2, 3, 2], [5, 3, 2], [1, 1, 4]])


def make_module(**options):
    module = SizeAwareEmbedding(6, hidden=8, octaves=2, **options)
    torch.nn.init.normal_(module.fc2.weight)
    return module


def test_identity_at_first_and_then_it_learns():
    module, x = SizeAwareEmbedding(6), make_tensor(LAYOUT.num_tokens, 6)
    y = module(x, LAYOUT, fps=8.0)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert (module.fc2.weight.grad != 0).any() and (module.fc2.bias.grad != 0).all()
    assert (module.fc1.weight.grad == 0).all()  # blocked by the zero layer, for one step


def test_adds_one_vector_per_segment():
    x = make_tensor(LAYOUT.num_tokens, 6)
    added = make_module()(x, LAYOUT) - x
    parts = added.split(LAYOUT.lengths)
    assert all(torch.allclose(part, part[:1].expand_as(part), atol=1e-5) for part in parts)
    assert not torch.allclose(parts[0][0], parts[2][0], atol=1e-2)


@pytest.mark.parametrize("use_frames", [True, False])
def test_use_frames(use_frames):
    """Segments 0 and 1 differ in their number of frames alone; a stream must not see it."""
    x = torch.zeros(LAYOUT.num_tokens, 6)
    parts = make_module(use_frames=use_frames)(x, LAYOUT, fps=8.0).split(LAYOUT.lengths)
    assert torch.equal(parts[0][0], parts[1][0]) is not use_frames


def test_frame_rate_per_segment():
    x, module = torch.zeros(LAYOUT.num_tokens, 6), make_module()
    one = module(x, LAYOUT, fps=torch.tensor([8.0, 24.0, 0.0])).split(LAYOUT.lengths)
    for fps, index in ((8.0, 0), (24.0, 1), (None, 2)):
        torch.testing.assert_close(one[index], module(x, LAYOUT, fps=fps).split(LAYOUT.lengths)[index])


def test_a_bad_argument_is_named():
    with pytest.raises(ValueError, match="dim must be an int >= 1, got 0"):
        SizeAwareEmbedding(0)
    with pytest.raises(ValueError, match="hidden must be an int >= 1, got 0"):
        SizeAwareEmbedding(4, hidden=0)
