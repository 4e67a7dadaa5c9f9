"""From a video file and a question to an answer with evidence."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vot_kernels.data.video import FrameStream, VideoClip
from vot_kernels.models.checkpoint import find_checkpoint, is_own_model, load_checkpoint, on_device
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.pipelines.long_video.looking import PER_MOMENT, look_at
from vot_kernels.pipelines.long_video.reading import see_stream, see_windows, shown_part
from vot_kernels.pipelines.sampling import Sampling, check_window, checkpoint_folder, open_samples
from vot_kernels.reasoning.calibration import read_calibrations
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModel, quiet_transformers
from vot_kernels.reasoning.moments import moments_to_look_at
from vot_kernels.reasoning.reasoning import VideoOfThought, check_candidates, check_question, outside
from vot_kernels.reasoning.smollm2 import load_smollm2
from vot_kernels.reasoning.types import Answer, Evidence, EvidenceEvent, EvidenceRelation, Switches
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.watching.detector import load_detector
from vot_kernels.watching.loading import load_video_language_model
from vot_kernels.watching.perception import PerceptionEyes
from vot_kernels.watching.protocols import WINDOW, DeferredModel, Eyes, Reader, Sight, as_reader
from vot_kernels.watching.video_language import VideoLanguageModel
from vot_kernels.watching.written import WrittenGraph

Video = str | os.PathLike[str] | VideoClip | FrameStream
"""A file, or what was decoded of one."""


@dataclass(frozen=True)
class VideoAnswer:
    """An answer, and the clip and the sight of it that it comes from.

    Of a video longer than a window the clip holds an even choice of frames, and the graph is about all of them.

    Attributes:
        read: the clip that the reader was shown, around the moments that matter; None if it is `clip`, or if the
            reader sees none.
    """

    answer: Answer
    clip: VideoClip
    sight: Sight
    read: VideoClip | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the answer with its trace, what the clip is, who saw it and the scene graph, as plain data."""
        return {
            "video": os.fspath(self.clip.info.path),
            "looked_at": self.clip.info.describe(),
            "reader_looked_at": None if self.read is None else self.read.info.describe(),
            **self.answer.to_dict(),
            "in_domain": self.sight.in_domain,
            "eyes": self.sight.to_dict(),
            "stsg": self.sight.stsg.to_dict(),
        }

    @property
    def known_stsg(self) -> STSG | None:
        """The scene graph, or None of a clip that the checkpoint does not know."""
        return self.sight.stsg if self.answer.warning is None else None

    @property
    def shown_stsg(self) -> STSG | None:
        """The part of the known scene graph about the frames of the clip."""
        return None if self.known_stsg is None else shown_part(self.known_stsg, self.clip.times)

    def evidence_lines(self, limit: int | None = None) -> list[str]:
        """Return the evidence as short lines with times in seconds: events, relations and boxes, `limit` of each."""
        evidence = self.answer.evidence
        events = [f"{event.time_s:.2f} s: {_event_words(event)}" for event in evidence.events]
        relations = [f"{r.start_s:.2f}–{r.end_s:.2f} s: {_relation_words(r)}" for r in evidence.relations]
        boxes = [
            f"{box.time_s:.2f} s: {box.id} {box.name} in the box ({', '.join(f'{side:.2f}' for side in box.box)})"
            for box in evidence.boxes
        ]
        parts = (("events", events), ("relations", relations), ("boxes", boxes))
        return [line for name, lines in parts for line in _shortened(lines, limit, name)]

    def save_picture(self, path: str | os.PathLike[str]) -> Path:
        """Write the frames as a PNG; if the checkpoint knows the clip, with its tracklets and events."""
        from vot_kernels.data.contact_sheet import save_contact_sheet

        title = f"{self.answer.question} {self.answer.text}"
        return save_contact_sheet(path, self.clip, self.shown_stsg, title=title)


def _event_words(event: EvidenceEvent) -> str:
    actor, *others = event.participants
    return " ".join([actor, event.kind, *others])


def _relation_words(relation: EvidenceRelation) -> str:
    words = f"{relation.subject} {relation.predicate}"
    return words if relation.object == relation.subject else f"{words} {relation.object}"


def _shortened(lines: list[str], limit: int | None, name: str) -> list[str]:
    if limit is None or len(lines) <= limit:
        return lines
    return [*lines[:limit], f"… and {len(lines) - limit} more {name}"]


class VideoQA:
    """Answers questions about videos: eyes see the scene graph of a clip, and a reader reasons about it.

    Args:
        eyes: what sees the graph; see `load_eyes`.
        reader: what reasons, a `Reader`, a language model or any `generate(prompt) -> str`.
        switches: which of the five steps run.
        anyway: also reason about a clip that the eyes do not know; otherwise such a clip gets no answer.

    Raises:
        TypeError: `reader` is none of these.
    """

    def __init__(
        self,
        eyes: Eyes,
        reader: Reader | LanguageModel | Callable[[str], str],
        switches: Switches | None = None,
        *,
        anyway: bool = False,
    ):
        self.eyes, self.reader = eyes, as_reader(reader)
        self.switches, self.anyway = switches or Switches(), anyway
        self._file: tuple[Any, VideoClip] | None = None
        self._seen: tuple[VideoClip, Sight] | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """What of other people's models runs on this package, a text for each."""
        found = (getattr(part, "kernels", None) for part in (self.eyes, self.reader))
        return tuple(str(kernels) for kernels in found if kernels is not None)

    @property
    def window(self) -> int:
        """The most frames that the eyes see at once."""
        return getattr(self.eyes, "window", WINDOW)

    @property
    def max_frames(self) -> int:
        """The most frames that the reader is shown, 0 if it sees none."""
        return getattr(self.reader, "max_frames", 0)

    def see(
        self,
        video: Video,
        sampling: Sampling | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> tuple[VideoClip, Sight]:
        """Decode a video, unless it is decoded already, and see its scene graph.

        What is longer than a window is seen window by window in bounded memory, and `report` is called with the
        progress; the clip that is returned holds an even choice of its frames then. The last clip and its graph are
        kept, for the next question about the same file or clip.
        """
        if isinstance(video, VideoClip) and self._seen is not None and self._seen[0] is video:
            return self._seen
        sampling = sampling or Sampling()
        key = None if isinstance(video, VideoClip | FrameStream) else _key(video, sampling)
        known = self._file[1] if key is not None and self._file is not None and self._file[0] == key else None
        if known is not None and self._seen is not None and self._seen[0] is known:
            return self._seen
        frames = self._opened(video, sampling, progress)
        if isinstance(frames, VideoClip):
            self._seen = frames, self.eyes.see(frames)
        elif isinstance(self.eyes, PerceptionEyes):
            self._seen = self._stream(self.eyes, frames, report)
        else:
            self._seen = see_windows(self.eyes, frames, self.window, report)
        self._file = None if key is None else (key, self._seen[0])
        return self._seen

    def _opened(self, video: Video, sampling: Sampling, progress: bool) -> VideoClip | FrameStream:
        """Return a clip of at most a window of frames, or a stream."""
        if isinstance(video, VideoClip):
            return video if len(video.times) <= self.window else FrameStream.of(video)
        if isinstance(video, FrameStream):
            return video if video.is_longer(self.window) else video.clip()
        return open_samples(video, sampling, self.eyes.fps, self.window, progress)

    def _stream(
        self, eyes: PerceptionEyes, frames: FrameStream, report: Callable[[str], None] | None
    ) -> tuple[VideoClip, Sight]:
        """See a stream with a checkpoint, which may give up one that it does not know."""
        source = f"{frames.path.name} seen by {eyes.name}"
        seen = see_stream(eyes.model, eyes.processor, frames, source, give_up=not self.anyway, report=report)
        clip = VideoClip(seen.frames, seen.times, frames.info if seen.complete else frames.stop())
        return clip, eyes.sight(seen.detection)

    def _look(self, video: Video, question: str, clip: VideoClip, stsg: STSG) -> VideoClip | None:
        """Return what the reader is shown instead of `clip`: frames around the moments that the graph names."""
        most = self.max_frames
        if not most or len(clip.times) == stsg.num_frames <= most:
            return None
        moments = moments_to_look_at(question, stsg, max(1, most // PER_MOMENT))
        within = Interval(stsg.frame_times_s[0], stsg.frame_times_s[-1])
        return look_at(video.path if isinstance(video, FrameStream) else video, moments, most, within)

    def ask(
        self,
        video: Video,
        question: str,
        candidates: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> VideoAnswer:
        """Answer a question about a file, a clip or a stream; without candidates the language model proposes them.

        A reader that sees the video is shown all of a short one. Of a longer one it is shown as many frames as it takes
        at once, around the moments that the scene graph names and that matter to the question.
        `report` is called with the name of the current activity.
        """
        question, given = check_question(question), check_candidates(candidates)
        report = report or (lambda activity: None)
        report("Looking at the frames")
        clip, sight = self.see(video, sampling, progress, report)
        if sight.warning is not None and not self.anyway:
            return VideoAnswer(self._refusal(question, given, sight.warning), clip, sight)
        read = self._look(video, question, clip, sight.stsg)
        report("Loading the language model")
        model = self.reader.about(read or clip)
        world = getattr(self.eyes, "world", None) if sight.in_domain else None
        # The confidence was fitted to answers of all five steps.
        whole = getattr(self.eyes, "calibrations", {}) if self.switches == Switches() else {}
        reasoning = VideoOfThought(model, self.switches, world=world, calibration=whole.get(model.name))
        answer = reasoning.run(
            question,
            given,
            sight.stsg,
            domain_warning=sight.warning,
            report=lambda step: report(f"Reasoning: {step.replace('_', ' ')}"),
        )
        return VideoAnswer(answer, clip, sight, read)

    def _refusal(self, question: str, candidates: tuple[str, ...] | None, warning: str) -> Answer:
        return Answer(
            question=question,
            text=outside(warning),
            choice=None,
            choice_before=None,
            confidence=0.0,
            decided_by="none",
            verification="abstained",
            evidence=Evidence(),
            trace=(),
            candidates=candidates,
            warning=warning,
            switches=self.switches,
        )


def _key(path: str | os.PathLike[str], sampling: Sampling) -> tuple[Path, Sampling, int]:
    """Return what tells a file and a choice of its frames from every other."""
    file = Path(path)
    return file, sampling, file.stat().st_mtime_ns if file.exists() else 0


def load_eyes(path: str | os.PathLike[str] | None = None, device: str = "cpu") -> PerceptionEyes:
    """Load a perception checkpoint as eyes. Arguments and errors as in `load_perception`."""
    model, processor = load_perception(path, device)
    return PerceptionEyes(model, processor, read_calibrations(checkpoint_folder(path)))


def load_video_qa(
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    llm: str | os.PathLike[str] | None = None,
    vlm: str | os.PathLike[str] | None = None,
    detector: str | os.PathLike[str] | None = None,
    objects: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    window: int | None = None,
    switches: Switches | None = None,
    anyway: bool = False,
) -> VideoQA:
    """Load whatever answers questions about videos.

    Args:
        checkpoint: folder of a perception checkpoint, which sees the graph; the bundled one for None, unless there is
            another model with eyes.
        llm: folder of a language model, which reads the graph; SmolLM2-135M-Instruct for None. It is loaded when it is
            needed.
        vlm: folder of a video-language model of transformers instead, which reads the graph and sees the clip itself.
            Without a checkpoint and a detector it also writes the graph. A folder of this package's own, as
            `vot train sft` makes it, or the name of one that ships with it, reads the graph of the checkpoint.
        detector: folder of an object detector of transformers, which sees the graph instead of a checkpoint.
        objects: the labels that the detector looks for; see `vot_kernels.watching.detector.DetectorEyes`.
        device: where the models run.
        dtype: of the weights of other people's models but the `llm`, "auto" for that of the files.
        window: frames that the `vlm` is shown at once, 32 for None: of a longer video it sees the scene graph in
            windows of so many, and reads as many around the moments that matter.
        switches, anyway: as in `VideoQA`.

    Raises:
        ValueError: a folder does not hold what it should, there are two language models, or two pairs of eyes, or the
            window is below 4.
        ImportError: a model needs a package that is not installed.
    """
    if llm is not None and vlm is not None:
        raise ValueError("Give one language model: an llm, which reads text alone, or a vlm.")
    if checkpoint is not None and detector is not None:
        raise ValueError("Give one pair of eyes: a checkpoint or a detector.")
    check_window(window)
    reader: Reader = DeferredModel(lambda: load_language_model(llm, device))
    if vlm is not None and is_own_model(vlm):
        from vot_kernels.pipelines.trained_reader import load_trained_reader

        reader = load_trained_reader(find_checkpoint(vlm), device, window or WINDOW)
    elif vlm is not None:
        reader = load_video_language_model(vlm, device, dtype, window or WINDOW)
    eyes: Eyes
    if detector is not None:
        eyes = load_detector(detector, objects, device, dtype)
    elif isinstance(reader, VideoLanguageModel) and checkpoint is None:
        eyes = WrittenGraph(reader, reader.name)
    else:
        eyes = load_eyes(checkpoint, device)
    return VideoQA(eyes, reader, switches, anyway=anyway)


def load_perception(
    path: str | os.PathLike[str] | None = None, device: str = "cpu"
) -> tuple[VotPerceptionModel, VotImageProcessor]:
    """Load a perception checkpoint, onto `device`, and its processor from a folder; None is the bundled one.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: it holds one of another kind, or not all of its weights.
    """
    folder = checkpoint_folder(path)
    with quiet_transformers():
        model = load_checkpoint(VotPerceptionModel, folder)
    model.config.name_or_path = folder.name
    return on_device(model, device), VotImageProcessor.from_pretrained(folder, local_files_only=True)


def load_language_model(path: str | os.PathLike[str] | None = None, device: str = "cpu") -> LanguageModel:
    """Load a local Hugging Face causal LM; None is SmolLM2-135M-Instruct, fetched and converted once."""
    return load_smollm2(device=device) if path is None else HFLanguageModel(path, device=device)
