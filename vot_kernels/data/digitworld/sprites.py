"""Sprites of DigitWorld: real handwritten digits (scikit-learn's 8 × 8 set), drawn at sub-pixel positions.

Pixel i covers [i, i + 1), so its centre is at i + 0.5; positions are in these continuous coordinates.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vot_kernels.extras import imports_for

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 40, 40),
    "green": (40, 210, 40),
    "blue": (60, 90, 255),
    "yellow": (255, 235, 40),
    "magenta": (240, 50, 240),
    "cyan": (40, 230, 240),
    "orange": (255, 140, 20),
    "white": (255, 255, 255),
}
COLOUR_NAMES = tuple(COLOURS)
IMAGE_SPLITS = ("train", "val", "test")
_SIDE = 8
_SPAN = 9  # source pixels across a sprite, so that centred ink stays in the box
_FRACTIONS = (0.7, 0.1, 0.2)  # of each digit's images, in the order of IMAGE_SPLITS
_SPLIT_SEED = 20250315  # fixed, because the held-out images must never depend on a run


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [1797, 8, 8] in [0, 1], labels int64 [1797])."""
    rows = _digit_rows()
    images = (rows[:, :-1].reshape(-1, _SIDE, _SIDE) / 16.0).astype(np.float32)
    images.flags.writeable = False
    return images, rows[:, -1].astype(np.int64)


def _digit_rows() -> np.ndarray:
    """Return each image's 64 pixels and its label, float64 [1797, 65].

    They are read from scikit-learn's file, if it is where it always was: to import the package takes a second or two,
    in every command and in every process that prepares batches.
    """
    package = find_spec("sklearn")
    if package and package.origin:
        file = Path(package.origin).parent / "datasets/data/digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    with imports_for("DigitWorld, whose digits are scikit-learn's,", "train"):
        from sklearn.datasets import load_digits
    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


@lru_cache(maxsize=1)
def image_split() -> dict[str, tuple[np.ndarray, ...]]:
    """Return for "train", "val" and "test" ten int64 arrays, each digit's image indices. Disjoint and fixed."""
    labels = digit_images()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in IMAGE_SPLITS}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        cuts = np.round(np.cumsum(_FRACTIONS[:-1]) * len(order)).astype(int)
        for name, part in zip(IMAGE_SPLITS, np.split(order, cuts), strict=True):
            parts[name].append(np.sort(part))
    return {name: tuple(digits) for name, digits in parts.items()}


@lru_cache(maxsize=1)
def _ink_centroids() -> np.ndarray:
    """Return the centre of mass of each image in source pixels, float32 [1797, (x, y)]; sprites are centred on it."""
    images = digit_images()[0]
    places = np.arange(_SIDE, dtype=np.float32) + 0.5
    total = images.sum((1, 2))
    return np.stack([images.sum(1) @ places / total, images.sum(2) @ places / total], axis=1)


def render(
    centers: np.ndarray,
    images: Sequence[int] | np.ndarray,
    colours: Sequence[str],
    radius: float,
    height: int,
    width: int,
) -> np.ndarray:
    """Draw coloured digits on black; where sprites overlap, the brighter value per channel is kept.

    centers: float [T, N, 2] as (x, y) px, at least `radius` from every edge; images: N indices into
    `digit_images`; colours: N names of `COLOURS`; radius: half the sprite's side in px.
    Returns uint8 [T, height, width, 3].
    """
    window = int(np.ceil(2 * radius)) + 3
    margin = 3  # recentred ink may leave its square by a pixel or two; the canvas is cropped afterwards
    canvas = np.zeros((len(centers), height + 2 * margin, width + 2 * margin, 3), dtype=np.uint8)
    corners = np.floor(centers - radius).astype(np.int64) - 1  # [T, N, 2], first pixel of the window
    weights = _hat_weights(centers, corners, np.asarray(images), radius, window)  # [T, N, (x, y), window, 8]
    ink = digit_images()[0][np.asarray(images)]
    sprites = weights[:, :, 1] @ ink @ weights[:, :, 0].swapaxes(-1, -2)  # [T, N, window, window]

    frame = np.arange(len(centers))[:, None, None]
    offsets = np.arange(window)
    for n, colour in enumerate(colours):
        rows = (corners[:, n, 1, None] + margin + offsets)[:, :, None]
        columns = (corners[:, n, 0, None] + margin + offsets)[:, None, :]
        shade = np.asarray(COLOURS[colour], dtype=np.float32)
        painted = (sprites[:, n, :, :, None] * shade + 0.5).astype(np.uint8)
        canvas[frame, rows, columns] = np.maximum(canvas[frame, rows, columns], painted)
    return np.ascontiguousarray(canvas[:, margin:-margin, margin:-margin])


def _hat_weights(
    centers: np.ndarray, corners: np.ndarray, images: np.ndarray, radius: float, window: int
) -> np.ndarray:
    """Return bilinear weights of the 8 source pixels per window pixel and axis: float32 [T, N, 2, window, 8]."""
    scale = _SPAN / (2 * radius)  # source pixels per frame pixel
    centroid = _ink_centroids()[images]  # [N, 2]
    pixels = corners[..., None] + np.arange(window) + 0.5
    source = (pixels - centers[..., None]) * scale + centroid[..., None]
    taps = np.arange(_SIDE) + 0.5
    return np.maximum(0.0, 1.0 - np.abs(source[..., None] - taps)).astype(np.float32)
