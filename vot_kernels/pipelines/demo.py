"""The demo: one clip that the bundled checkpoint knows and one that it does not."""

import sys
from collections.abc import Iterator
from pathlib import Path

from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.pipelines.video_qa import VideoAnswer, VideoQA, load_language_model, load_perception


def run_demo(out: Path) -> Iterator[tuple[VideoAnswer, Path]]:
    """Answer a question about each clip and write a picture and a trace each into `out`."""
    from vot_kernels.files import atomic_write

    print("Loading the perception checkpoint and the language model …", file=sys.stderr)
    video_qa = VideoQA(*load_perception(), load_language_model())
    clip, question, candidates = digitworld_clip()
    questions = [
        (clip, question, list(candidates)),
        (natural_clip(), "What is moving through the street?", ["bicycles", "a train", "a dog"]),
    ]
    for path, text, choices in questions:
        result = video_qa.ask(path, text, choices)
        picture = result.save_picture(out / f"{path.stem}.png")
        with atomic_write(out / f"{path.stem}.json") as temporary:
            temporary.write_text(result.answer.to_json(indent=1))
        yield result, picture
