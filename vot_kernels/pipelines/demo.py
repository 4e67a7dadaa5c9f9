"""The demo: one clip that the bundled checkpoint knows and one that it does not."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.files import atomic_write
from vot_kernels.pipelines.sampling import Sampling, checkpoint_fps, sample_video

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer


def run_demo(out: Path) -> Iterator[tuple["VideoAnswer", Path]]:
    """Answer a question about each clip and write a picture and a trace each into `out`."""
    path, question, candidates = digitworld_clip()
    questions = [
        (path, question, list(candidates)),
        (natural_clip(), "What is moving through the street?", ["bicycles", "a train", "a dog"]),
    ]
    clips = [sample_video(path, Sampling(), checkpoint_fps()) for path, _, _ in questions]
    print("Loading the perception checkpoint and the language model …", file=sys.stderr)
    from vot_kernels.pipelines.video_qa import VideoQA, load_language_model, load_perception

    video_qa = VideoQA(*load_perception(), load_language_model())
    for (path, text, choices), clip in zip(questions, clips, strict=True):
        result = video_qa.ask(clip, text, choices)
        picture = result.save_picture(out / f"{path.stem}.png")
        with atomic_write(out / f"{path.stem}.json") as temporary:
            temporary.write_text(result.answer.to_json(indent=1))
        yield result, picture
