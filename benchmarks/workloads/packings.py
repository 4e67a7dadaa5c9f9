"""Lengths of the segments of a packed buffer, as functions of its tokens. Their sum is exactly `total`."""

import random

# In 64ths of the total: at 65,536 tokens these are segments of 16k, 12k, 8k, 8k, 6k, 4k, 4k, 2k, 2k, 1k, 1k.
_RAGGED = (16, 12, 8, 8, 6, 4, 4, 2, 2, 1, 1)

# (frames, height, width) in tokens as Qwen-VL sees them: cells of 28 x 28 pixels (14 x 14 patches merged two by
# two), and two video frames to one of tokens.
_MEDIA = (
    (1, 16, 16),  # 448 x 448
    (1, 27, 37),  # 1024 x 768
    (16, 13, 23),  # a clip of 32 frames at 640 x 360
    (1, 26, 46),  # 1280 x 720
    (1, 17, 23),  # 640 x 480
    (1, 63, 44),  # a page of 1240 x 1754
    (1, 8, 8),  # an icon of 224 x 224
    (32, 9, 16),  # a clip of 64 frames at 448 x 252
    (1, 39, 69),  # 1920 x 1080
    (12, 17, 30),  # a clip of 24 frames at 854 x 480
    (1, 12, 12),  # 336 x 336
    (1, 36, 27),  # 768 x 1024
)


def uniform(total: int, count: int) -> tuple[int, ...]:
    """Return `count` segments of equal length, the last with what remains."""
    length = total // count
    return (*[length] * (count - 1), total - length * (count - 1))


def ragged(total: int) -> tuple[int, ...]:
    """Return eleven segments between a quarter and a 64th of a total that 64 divides."""
    if total % 64:
        raise ValueError(f"total must be a multiple of 64, got {total}.")
    return tuple(total // 64 * share for share in _RAGGED)


def long_among_short(total: int, short: int = 256) -> tuple[int, ...]:
    """Return one segment of half the tokens in the middle of many segments of `short` tokens."""
    around = [short] * ((total - total // 2) // short)
    middle = len(around) // 2
    return (*around[:middle], total - sum(around), *around[middle:])


def zipf(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Return lengths longest, longest / 2, longest / 3, ... in random order, repeated until the total is full."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        ranks = range(1, max(2, longest // 32))
        lengths += draw.sample([longest // rank for rank in ranks], len(ranks))
    while sum(lengths) - lengths[-1] >= total:
        lengths.pop()
    lengths[-1] -= sum(lengths) - total
    return tuple(lengths)


def qwen_vl(total: int) -> tuple[int, ...]:
    """Return images and clips of usual sizes in turn, one segment each; a last image fills the rest."""
    lengths: list[int] = []
    sizes = [frames * height * width for frames, height, width in _MEDIA]
    while fitting := [size for size in sizes if size <= total - sum(lengths)]:
        following = sizes[len(lengths) % len(sizes)]
        lengths.append(following if following in fitting else max(fitting))
    rest = total - sum(lengths)
    return (*lengths, rest) if rest else tuple(lengths)
