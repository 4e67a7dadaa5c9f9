"""The demo: one clip that the bundled checkpoint knows and one that it does not."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.data.sample_clips import digitworld_clip, natural_clip
from vot_kernels.files import atomic_write
from vot_kernels.models.checkpoint import BUNDLED_READER
from vot_kernels.pipelines.sampling import Sampling, checkpoint_fps, sample_video

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoAnswer


def demo_questions() -> list[tuple[Path, str, tuple[str, ...]]]:
    """Return the bundled clips, each with a question and its candidates.

    If the package that holds the natural clip is not installed, one line on stderr says so.
    """
    questions = [digitworld_clip()]
    try:
        bicycles = natural_clip()
        questions.append((bicycles, "What is moving through the street?", ("bicycles", "a train", "a dog")))
    except FileNotFoundError as error:
        print(f"The second clip of the demo is left out. {error}", file=sys.stderr)
    return questions


def run_demo(
    out: Path, report: Callable[[str], None], device: str = "cpu"
) -> Iterator[tuple["VideoAnswer", Path]]:
    """Answer a question about each clip and write a picture and a trace each into `out`.

    SmolLM2 answers, with all five steps. Then the video-language model that ships with the package answers about the
    clip that it knows, with the thought that it was trained to write.
    """
    questions = demo_questions()
    clips = [sample_video(path, Sampling(), checkpoint_fps()) for path, _, _ in questions]
    report("Loading the perception checkpoint")
    from vot_kernels.pipelines.trained_reader import load_trained_reader
    from vot_kernels.pipelines.video_qa import VideoQA, load_eyes, load_language_model
    from vot_kernels.watching.protocols import DeferredModel

    eyes = load_eyes(device=device)
    video_qa = VideoQA(eyes, DeferredModel(lambda: load_language_model(device=device)))

    def answer(asked: VideoQA, number: int, name: str) -> "tuple[VideoAnswer, Path]":
        _, text, choices = questions[number]
        result = asked.ask(clips[number], text, choices, report=report)
        picture = result.save_picture(out / f"{name}.png")
        with atomic_write(out / f"{name}.json") as temporary:
            temporary.write_text(result.answer.to_json(indent=1))
        return result, picture

    for number, (path, _, _) in enumerate(questions):
        yield answer(video_qa, number, path.stem)
    reader = load_trained_reader(BUNDLED_READER, device)
    yield answer(VideoQA(eyes, reader), 0, f"{questions[0][0].stem}-reader")
