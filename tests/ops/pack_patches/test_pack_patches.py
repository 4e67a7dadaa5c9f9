"""Patch packing against cutting by hand, and back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.marks import COMPUTING, compiled, cpp, interpreted
from tests.threads import differing
from vot_kernels.ops.dispatch import describe_backends, select
from vot_kernels.ops.pack_patches import op, pack_patches, reference, unpack_patches
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    assert_close_to_exact,
    check_against_reference,
    make_tensor,
    uninitialized_is_nan,
)

# Every backend that computes: the kernels run on Triton's interpreter.
BACKENDS = (*COMPUTING, pytest.param("triton", marks=interpreted))

sizes = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4))  # 0 frames: a still image


COLOURS = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
"""Mean and standard deviation of the channels."""


def make_images(grid, channels, patch, temporal, dtype=torch.float32):
    images = []
    for i, (t, y, x) in enumerate(grid):
        frames = (t * temporal,) if t else ()
        image = make_tensor(*frames, channels, y * patch, x * patch, seed=i)
        images.append((image * 60).to(dtype) if dtype == torch.uint8 else image.to(dtype))
    return images


@pytest.mark.parametrize("backend", COMPUTING)
@settings(max_examples=60)
@given(
    st.lists(sizes, min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2),
    st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
)
def test_matches_the_reference_and_returns(backend, grid, channels, patch, temporal, dtype):
    images = make_images(grid, channels, patch, temporal, dtype)
    values, grid_thw = pack_patches(images, patch, temporal_patch_size=temporal, backend=backend)
    expected, expected_grid = reference.pack_patches(images, patch, temporal_patch_size=temporal)
    assert values.dtype == dtype and grid_thw.dtype == torch.int64
    assert torch.equal(values, expected) and torch.equal(grid_thw, expected_grid)
    again, _ = pack_patches(images, patch, temporal_patch_size=temporal, backend="reference")
    assert torch.equal(again, expected)
    channels_last = [image.transpose(-1, -3).contiguous().transpose(-1, -3) for image in images]
    again, _ = pack_patches(channels_last, patch, temporal_patch_size=temporal, backend=backend)
    assert torch.equal(again, expected)
    clips = unpack_patches(values, grid_thw, patch, temporal_patch_size=temporal)
    for clip, image in zip(clips, images, strict=True):
        assert torch.equal(clip, image.expand(temporal, *image.shape) if image.ndim == 3 else image)


AWKWARD = [(2, 1, 3), (0, 2, 2), (1, 1, 1), (0, 1, 2), (1, 3, 1)]


@interpreted
@pytest.mark.parametrize(("channels", "patch", "temporal"), [(3, 4, 2), (1, 1, 1), (2, 5, 3), (3, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_the_kernel_equals_the_reference(channels, patch, temporal, dtype):
    images = make_images(AWKWARD, channels, patch, temporal, dtype)
    expected, _ = reference.pack_patches(images, patch, temporal_patch_size=temporal)
    for some in (images, [image.transpose(-1, -3).contiguous().transpose(-1, -3) for image in images]):
        with uninitialized_is_nan():
            values, _ = pack_patches(some, patch, temporal_patch_size=temporal, backend="triton")
        assert torch.equal(values, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temporal", [1, 2])
def test_normalised_colours_match_the_reference(backend, temporal, dtype):
    options = {"temporal_patch_size": temporal, "mean": COLOURS[0], "std": COLOURS[1]}

    def runner(backend, **more):
        return lambda *xs: (pack_patches(xs, 4, backend=backend, **options, **more)[0],)

    images = make_images(AWKWARD[:3], 3, 4, temporal, dtype)
    check_against_reference(runner(backend), runner("reference"), images)
    frames = make_images(AWKWARD[:3], 3, 4, temporal, torch.uint8)
    (values,), (low,) = (runner(name, dtype=dtype)(*frames) for name in (backend, "reference"))
    (exact,) = runner("reference", dtype=torch.float64)(*(frame.double() / 255 for frame in frames))
    assert_close_to_exact(values, low, exact)


def test_normalised_frames_are_those_of_plain_arithmetic():
    frame = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    values, _ = pack_patches([frame], 2, mean=[0.5], std=[0.25], backend="torch")
    torch.testing.assert_close(values, torch.tensor([[-2.0, 2.0, -1.2, -0.4]]))
    assert pack_patches([frame], 2, mean=[0.5], std=[0.25], dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5] * 3}, "std must be 3 numbers, one per channel"),
        ({"mean": [0.5] * 2, "std": [1.0] * 3}, "mean must be 3 numbers"),
        ({"mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}, "std must not have a 0"),
        ({"mean": ["a"] * 3, "std": [1.0] * 3}, r"mean\[0\] must be a number"),
        ({"dtype": torch.float32}, "dtype is that of normalised values and needs mean and std"),
        ({"mean": [0.5] * 3, "std": [1.0] * 3, "dtype": torch.uint8}, "dtype must be a floating dtype"),
    ],
)
def test_a_bad_normalisation_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack_patches([IMAGE], 4, **options)


def test_order_of_patches_and_of_values():
    """The expected values are written out, so that the reference cannot be wrong in the same way."""
    clip = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    values, grid = pack_patches([clip], 2, temporal_patch_size=2)
    assert grid.tolist() == [[1, 2, 3]] and values.shape == (6, 3 * 2 * 2 * 2)
    for patch in range(6):
        y, x = divmod(patch, 3)
        expected = [
            float(clip[frame, channel, 2 * y + row, 2 * x + column])
            for channel in range(3)
            for frame in range(2)
            for row in range(2)
            for column in range(2)
        ]
        assert values[patch].tolist() == expected


def test_rows_follow_the_positions_of_the_layout():
    clip = torch.zeros(3, 1, 4, 6)
    for t in range(3):
        for y in range(2):
            for x in range(3):
                clip[t, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 100 * t + 10 * y + x
    values, grid = pack_patches([clip], 2)
    positions = PackedLayout.from_grid_thw(grid).positions
    assert torch.equal(values[:, 0], (positions * torch.tensor([100, 10, 1])).sum(1).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_strided_images(backend):
    image = make_tensor(4, 6, 3).permute(2, 0, 1).requires_grad_()
    values, grid = pack_patches([image, image[None]], 2, backend=backend)
    upstream = make_tensor(*values.shape, seed=1)
    (gradient,) = torch.autograd.grad(values, image, upstream)
    torch.testing.assert_close(gradient, sum(c[0] for c in unpack_patches(upstream, grid, 2)))


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("temporal", [1, 2])
def test_gradients_match_the_reference_in_float64(backend, temporal):
    check_gradients(backend, temporal, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temporal", [1, 2])
def test_gradients_match_the_reference(backend, temporal, dtype):
    check_gradients(backend, temporal, dtype)


def check_gradients(backend, temporal, dtype):
    """The gradients of a still image that fills several frames are summed."""
    images = make_images([(2, 1, 3), (0, 2, 2), (1, 1, 1), (0, 1, 2)], 3, 4, temporal, dtype)

    def runner(backend):
        return lambda *xs: (pack_patches(xs, 4, temporal_patch_size=temporal, backend=backend)[0],)

    check_against_reference(runner(backend), runner("reference"), images)


@cpp
@pytest.mark.parametrize(("patch", "dtype"), [(16, torch.float32), (14, torch.float32), (16, torch.uint8)])
def test_results_written_past_the_cache(patch, dtype):
    """On any number of threads."""
    images = make_images([(0, 30, 42), (3, 20, 31)], 3, patch, 1, dtype)
    expected, _ = pack_patches(images, patch, backend="torch")
    assert torch.equal(pack_patches(images, patch, backend="cpp")[0], expected)
    assert differing(lambda: [pack_patches(images, patch, backend="cpp")[0]]) == []
    if dtype.is_floating_point:
        leaves = [image.requires_grad_() for image in images]
        upstream = make_tensor(*expected.shape)
        found, wanted = (
            torch.autograd.grad(pack_patches(leaves, patch, backend=backend)[0], leaves, upstream)
            for backend in ("cpp", "torch")
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_opcheck(backend, dtype):
    images = make_images([(2, 1, 3), (0, 2, 2)], 3, 4, 2, dtype)
    images[1] = images[1].transpose(1, 2)
    if dtype.is_floating_point:
        images = [image.requires_grad_() for image in images]
    torch.library.opcheck(op._pack_patches_fwd.op, (images, 4, 2, [], [], dtype, backend))
    torch.library.opcheck(op._pack_patches_fwd.op, (images, 4, 2, *COLOURS, torch.float16, backend))
    d_values = make_tensor(1, 3 * 2 * 16).expand(10, -1)
    arguments = (d_values, [4, 4, 12, 0, 8, 8], 4, 2, *COLOURS, torch.float16, backend)
    torch.library.opcheck(op._pack_patches_bwd.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_patch_as_large_as_its_image_shares_no_memory_with_it():
    image = make_tensor(1, 4, 4)
    values, _ = pack_patches([image], 4)
    values.zero_()
    assert (image != 0).all()


@compiled
def test_a_backend_is_chosen_by_name():
    usable = [name for name, reasons in describe_backends("cpu")["pack_patches"].items() if not reasons]
    assert select("pack_patches", "auto", IMAGE.byte()) == usable[0]
    with pytest.raises(ValueError, match="backend must be one of"):
        pack_patches([IMAGE], 4, backend="fast")
    with pytest.raises(ValueError, match="No backend can serve pack_patches"):
        pack_patches([IMAGE], 4, backend="triton")


def test_canary_a_transposed_patch_is_rejected():
    image = make_tensor(3, 4, 4)
    expected, _ = reference.pack_patches([image], 2, temporal_patch_size=1)
    assert not torch.equal(pack_patches([image.transpose(1, 2)], 2)[0], expected)
    assert not torch.equal(pack_patches([image.flip(0)], 2)[0], expected)


IMAGE = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("images", "patch", "temporal", "message"),
    [
        ([], 4, 1, "at least one image"),
        ([IMAGE, torch.zeros(3, 8, 10)], 4, 1, r"Image 1 is 8 x 10 pixels \(height x width\).*patch_size 4"),
        ([torch.zeros(3, 0, 8)], 4, 1, "Image 0 is 0 x 8"),
        (
            [torch.zeros(3, 3, 8, 8)],
            4,
            2,
            "Image 0 has 3 frames, which is not a multiple of temporal_patch_size 2",
        ),
        ([torch.zeros(8, 8)], 4, 1, "Image 0 must be"),
        ([IMAGE, IMAGE.double()], 4, 1, "but image 1 has torch.float64"),
        ([IMAGE, torch.zeros(1, 8, 8)], 4, 1, "but image 1 has torch.float32, cpu, 1"),
        ([IMAGE.int()], 4, 1, "Image 0 must be uint8 or floating"),
        ([IMAGE], 0, 1, "patch_size must be an int >= 1 .*, got 0"),
        ([IMAGE], 4.0, 1, "patch_size must be an int >= 1 .*, got 4.0"),
        ([IMAGE], 4, -1, "temporal_patch_size must be"),
        (["a.png"], 4, 1, "Image 0 must be a tensor"),
    ],
)
def test_a_bad_image_is_named(images, patch, temporal, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack_patches(images, patch, temporal_patch_size=temporal)


def test_unpack_rejects_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match=r"pixel_values must be \[6, a multiple of 4\]"):
        unpack_patches(torch.zeros(5, 12), [[1, 2, 3]], 2)
    with pytest.raises(ValueError, match="a multiple of 4"):
        unpack_patches(torch.zeros(6, 10), [[1, 2, 3]], 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    images = [image.requires_grad_() for image in make_images([(2, 1, 3), (0, 2, 2)], 3, 4, 2)]

    def step(*images):
        values, grid = pack_patches(images, 4, temporal_patch_size=2, backend=backend)
        return values.square().sum() + grid.sum()

    actual, expected = torch.compile(step, backend="aot_eager", fullgraph=True)(*images), step(*images)
    assert torch.equal(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, images), torch.autograd.grad(expected, images), strict=True):
        assert torch.equal(a, b)
