"""What the bundled checkpoint knows of clips unlike those that it was trained on, and what it calls foreign."""

import numpy as np
import pytest

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.data.sample_clips import natural_clip
from vot_kernels.models.perception import detect
from vot_kernels.pipelines.sampling import Sampling, sample_video
from vot_kernels.pipelines.video_qa import load_perception
from vot_kernels.train.perception.metrics import perception_metrics

NATURAL = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def distances():
    """A function from clips, each frames and times, to their distances over the limit."""
    model, processor = load_perception()

    def measure(clips):
        found = []
        for frames, times in clips:
            (detection,) = detect(model, processor, [frames], [times], "a clip")
            assert detection.in_domain == (detection.domain_distance <= detection.domain_threshold)
            found.append(detection.domain_distance / detection.domain_threshold)
        return np.array(found)

    return measure


def world(split, count, **options):
    for index in range(count):
        episode = generate_episode(split, index, 9, **options)
        yield episode_batch([episode], codec_fraction=0.5).frames[0], episode.times


@pytest.fixture(scope="module")
def foreign(distances):
    clips = (
        sample_video(natural_clip(n), Sampling(start=s, end=s + 2.0), 8.0) for n in NATURAL for s in (0, 2)
    )
    return distances((clip.frames, clip.times) for clip in clips)


@pytest.mark.parametrize("split", ["test", "five_objects", "held_out_pairs", "resolution", "long"])
def test_digitworld_is_known_whatever_it_shows(distances, foreign, split):
    """Of 50 clips none may be foreign, so at most 2 per cent are; every natural clip is further away than all."""
    known = distances(world(split, 50))
    assert known.max() <= 1
    assert foreign.min() > known.max()  # the area under the curve of detection is 1


def test_natural_clips_are_foreign(foreign):
    assert foreign.min() > 2


def test_squares_that_move_like_digits_are_foreign(distances):
    frames = np.zeros((16, 64, 64, 3), np.uint8)
    for t in range(16):
        frames[t, 10 + 2 * t : 24 + 2 * t, 20:34] = (255, 0, 0)
        frames[t, 40:54, 5 + 2 * t : 19 + 2 * t] = (0, 0, 255)
    assert distances([(frames, np.arange(16) / 8)]).min() > 1


def test_digits_are_named_in_colours_that_they_never_had_in_training():
    """57 per cent were, before labels were learnt from glimpses in random colours."""
    model, processor = load_perception()
    found = perception_metrics(model, processor, "held_out_pairs", 40, seed=9)
    assert found["label_accuracy"] >= 0.8 and found["attribute_accuracy"] >= 0.99
