"""Packing patches on a GPU."""

import pytest
import torch

from vot_kernels import pack_patches
from vot_kernels.ops.pack_patches import reference
from vot_kernels.testing import make_tensor

OP = "pack_patches"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("patch", [1, 14, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_equals_the_reference(dtype, patch, device):
    shapes = [(3, 4 * patch, 5 * patch), (4, 3, 2 * patch, 3 * patch), (3, patch, patch)]
    images = [(make_tensor(*s, seed=i) * 60).to(device, dtype) for i, s in enumerate(shapes)]
    values, grid = pack_patches(images, patch)
    expected, expected_grid = reference.pack_patches(images, patch, temporal_patch_size=1)
    assert torch.equal(values, expected) and torch.equal(grid.cpu(), expected_grid.cpu())
