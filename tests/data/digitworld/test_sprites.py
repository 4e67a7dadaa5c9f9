import subprocess
import sys

import numpy as np
import pytest

from vot_kernels.data.digitworld import sprites
from vot_kernels.data.digitworld.sprites import COLOURS, digit_images, image_split, render


@pytest.mark.parametrize("file", ["there", "gone"])
def test_images_are_those_of_scikit_learn(monkeypatch, file):
    from sklearn.datasets import load_digits

    if file == "gone":
        monkeypatch.setattr(sprites, "find_spec", lambda name: None)
    bunch = load_digits()
    images, labels = digit_images.__wrapped__()
    assert np.array_equal(images, (bunch.images / 16).astype(np.float32)) and images.dtype == np.float32
    assert np.array_equal(labels, bunch.target) and labels.dtype == np.int64


def test_scikit_learn_is_not_imported_for_its_images():
    code = (
        "import sys; from vot_kernels.data.digitworld.sprites import digit_images;"
        " digit_images(); print('sklearn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_image_splits_are_disjoint_complete_and_sorted_by_digit():
    labels = digit_images()[1]
    everything = [image for digits in image_split().values() for part in digits for image in part]
    assert sorted(everything) == list(range(len(labels)))
    for digits in image_split().values():
        for digit, images in enumerate(digits):
            assert len(images) >= 15 and np.all(labels[images] == digit)


def test_image_split_never_changes():
    first = {name: [int(part[0]) for part in digits] for name, digits in image_split().items()}
    assert first["train"] == [20, 1, 12, 3, 4, 5, 16, 7, 8, 31] and first["test"] == [
        0,
        177,
        2,
        62,
        14,
        135,
        6,
        108,
        28,
        9,
    ]


@pytest.mark.parametrize("radius", [5.0, 6.5, 9.75])
def test_ink_is_centred_at_sub_pixel_places(radius):
    rng = np.random.default_rng(0)
    centers = rng.uniform(radius, 64 - radius, (40, 1, 2))
    for image in rng.integers(0, 1797, 5):
        frames = render(centers, [image], ["white"], radius, 64, 64)[..., 0].astype(float)
        grid = np.arange(64) + 0.5
        total = frames.sum((1, 2))
        centroid = np.stack([frames.sum(1) @ grid / total, frames.sum(2) @ grid / total], axis=1)
        assert np.abs(centroid - centers[:, 0]).max() < 0.5
        assert np.abs(centroid - centers[:, 0]).mean() < 0.1


def test_sub_pixel_shift_changes_the_picture_smoothly():
    shifts = np.linspace(20, 21, 5)
    frames = render(np.stack([shifts, np.full(5, 30.0)], 1)[:, None], [7], ["white"], 6.5, 64, 64).astype(
        float
    )
    steps = np.abs(np.diff(frames, axis=0)).sum((1, 2, 3))
    whole = np.abs(frames[-1] - frames[0]).sum()
    assert np.array_equal(frames[-1][:, 1:], frames[0][:, :-1])
    assert np.all(steps > 0) and np.all(steps < 0.5 * whole)


def test_colour_and_composition_by_maximum():
    centers = np.array([[(20.0, 30.0), (29.0, 30.0)]])
    both = render(centers, [3, 8], ["red", "green"], 6.5, 64, 64)
    alone = [
        render(centers[:, [n]], [i], [c], 6.5, 64, 64) for n, (i, c) in enumerate([(3, "red"), (8, "green")])
    ]
    assert np.array_equal(both, np.maximum(*alone))
    peak = alone[0].reshape(-1, 3)[alone[0][..., 0].argmax()].astype(float)
    assert np.abs(peak / peak[0] * 255 - COLOURS["red"]).max() < 4


def test_edges_are_drawn_and_nothing_wraps_around():
    corners = np.array([[(6.5, 6.5), (57.5, 57.5)]])
    frame = render(corners, [0, 0], ["white", "white"], 6.5, 64, 64)[0]
    assert frame[:14, :14].any() and frame[50:, 50:].any()
    frame[:16, :16] = frame[48:, 48:] = 0
    assert not frame.any()
