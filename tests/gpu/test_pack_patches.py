"""Packing patches on a GPU."""

import pytest
import torch

from vot_kernels import pack_patches
from vot_kernels.ops.pack_patches import reference
from vot_kernels.testing import assert_close_to_exact, check_against_reference, make_tensor

OP = "pack_patches"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("patch", [1, 14, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_equals_the_reference(dtype, patch, backend, device):
    shapes = [(3, 4 * patch, 5 * patch), (4, 3, 2 * patch, 3 * patch), (3, patch, patch)]
    images = [(make_tensor(*s, seed=i) * 60).to(device, dtype) for i, s in enumerate(shapes)]
    values, grid = pack_patches(images, patch, backend=backend)
    expected, expected_grid = reference.pack_patches(images, patch, temporal_patch_size=1)
    assert torch.equal(values, expected) and torch.equal(grid.cpu(), expected_grid.cpu())


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_match_the_reference(normalised, temporal, backend, device, dtype):
    """The gradients of a still image that fills several frames are summed."""
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]} if normalised else {}
    shapes = [(3, 56, 70), (2 * temporal, 3, 28, 42), (3, 14, 14)]
    images = [make_tensor(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(shapes)]

    def runner(backend):
        return lambda *xs: (
            pack_patches(xs, 14, temporal_patch_size=temporal, backend=backend, **colours)[0],
        )

    check_against_reference(runner(backend), runner("reference"), images)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_frames_become_normalised_patches(layout, backend, device, dtype):
    frames = [(make_tensor(4, 3, 64, 96, seed=i).abs() * 99).to(device, torch.uint8) for i in range(3)]
    if layout == "channels last":
        frames = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in frames]
    options = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5]}
    found, _ = pack_patches(frames, 16, dtype=dtype, backend=backend, **options)
    low, _ = pack_patches(frames, 16, dtype=dtype, backend="reference", **options)
    exact, _ = pack_patches([x.double() / 255 for x in frames], 16, backend="reference", **options)
    assert_close_to_exact(found, low, exact)
