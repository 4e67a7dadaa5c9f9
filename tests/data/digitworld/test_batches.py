import numpy as np
import pytest

from vot_kernels.data.digitworld import (
    COLOUR_NAMES,
    episode_batch,
    generate_episode,
    h264_roundtrip,
)


def batch_of(first, count, split="train", seed=0, num_frames=None, **options):
    """The episodes `first` … of a split as one batch."""
    episodes = [generate_episode(split, first + i, seed, num_frames=num_frames) for i in range(count)]
    return episode_batch(episodes, **options)


def test_a_batch_is_a_pure_function_of_its_episodes():
    one, two = batch_of(28, 4, codec_fraction=0.5), batch_of(28, 4, codec_fraction=0.5)
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(two, name)), name
    assert not np.array_equal(one.frames, batch_of(32, 4, codec_fraction=0.5).frames)
    assert not np.array_equal(one.centers, batch_of(28, 4, seed=1).centers)
    assert one.indices.tolist() == [28, 29, 30, 31]


def test_a_batch_holds_the_truth_of_its_episodes():
    batch = batch_of(0, 6)
    assert batch.frames.shape == (6, 16, 64, 64, 3) and batch.frames.dtype == np.uint8
    assert batch.centers.shape == (6, 16, 5, 2) and batch.hits.shape == (6, 16, 5, 5)
    for b in range(6):
        episode = generate_episode("train", b)
        n = len(episode.scene.digits)
        assert batch.mask[b].tolist() == [True] * n + [False] * (5 - n)
        assert np.array_equal(batch.frames[b], episode.frames())
        assert np.array_equal(batch.centers[b, :, :n], episode.centers) and not batch.centers[b, :, n:].any()
        assert batch.digit[b, :n].tolist() == list(episode.scene.digits) and np.all(batch.digit[b, n:] == -1)
        assert [COLOUR_NAMES[c] for c in batch.colour[b, :n]] == list(episode.scene.colours)
        assert np.array_equal(batch.hits[b, :, :n, :n], episode.hits) and not batch.hits[b, :, n:].any()
        assert np.array_equal(batch.bounces[b, :, :n], episode.bounces)
        assert np.array_equal(batch.hits[b], batch.hits[b].swapaxes(1, 2))


def test_the_share_of_clips_through_the_codec():
    raw, half, full = (batch_of(0, 16, codec_fraction=f, num_frames=4) for f in (0.0, 0.5, 1.0))
    changed = [int((raw.frames != b.frames).any((1, 2, 3, 4)).sum()) for b in (half, full)]
    assert 3 <= changed[0] <= 13 and changed[1] == 16
    both = (half.frames == full.frames).all((1, 2, 3, 4)) | (half.frames == raw.frames).all((1, 2, 3, 4))
    assert both.all()


def test_h264_is_deterministic_faithful_and_worse_at_higher_crf():
    frames = generate_episode("train", 0).frames()
    assert np.array_equal(h264_roundtrip(frames), h264_roundtrip(frames))
    errors = [np.mean((h264_roundtrip(frames, crf).astype(float) - frames) ** 2) for crf in (10, 23, 40)]
    assert errors[0] < errors[1] < errors[2]
    assert 10 * np.log10(255**2 / errors[1]) > 28


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_of(0, 8, split="resolution"), "one size and length, got"),
        (lambda: batch_of(0, 2, codec_fraction=1.5), "0 to 1"),
        (
            lambda: batch_of(0, 2, split="five_objects", max_objects=4),
            r"at most 4 objects \(max_objects\), got 5",
        ),
        (lambda: episode_batch([]), "at least one, got none"),
        (lambda: h264_roundtrip(np.zeros((2, 15, 16, 3), np.uint8)), "must be even for H.264, got 16 × 15"),
        (lambda: h264_roundtrip(np.zeros((2, 16, 16, 3))), "must be uint8"),
        (lambda: h264_roundtrip(np.zeros((2, 16, 16, 3), np.uint8), crf=60), "0 to 51"),
    ],
)
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
