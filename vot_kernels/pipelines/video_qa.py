"""From a video file and a question to an answer with evidence."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vot_kernels.data.video import FrameStream, VideoClip
from vot_kernels.models.checkpoint import load_checkpoint, on_device
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.pipelines.long_video.reading import WINDOW, see_stream, shown_part
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, sample_video, stream_samples
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModel, quiet_transformers
from vot_kernels.reasoning.reasoning import VideoOfThought, check_candidates, check_question, outside
from vot_kernels.reasoning.smollm2 import load_smollm2
from vot_kernels.reasoning.types import Answer, Evidence, EvidenceEvent, EvidenceRelation, Switches
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.watching.detector import load_detector
from vot_kernels.watching.loading import load_video_language_model
from vot_kernels.watching.perception import PerceptionEyes
from vot_kernels.watching.protocols import DeferredModel, Eyes, Reader, Sight, as_reader
from vot_kernels.watching.video_language import VideoLanguageModel
from vot_kernels.watching.written import WrittenGraph

if TYPE_CHECKING:
    from vot_kernels.watching.cost import Estimate


@dataclass(frozen=True)
class VideoAnswer:
    """An answer, and the clip and the sight of it that it comes from.

    Of a video longer than a window the clip holds an even choice of frames, and the graph is about all of them.
    """

    answer: Answer
    clip: VideoClip
    sight: Sight

    def to_dict(self) -> dict[str, Any]:
        """Return the answer with its trace, what the clip is, who saw it and the scene graph, as plain data."""
        return {
            "video": os.fspath(self.clip.info.path),
            "looked_at": self.clip.info.describe(),
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

    def estimate(self, clip: VideoClip) -> "Estimate | None":
        """Return what a question about `clip` takes, None if the reader does not look at it."""
        return self.reader.estimate(clip) if hasattr(self.reader, "estimate") else None

    def see(
        self,
        video: str | os.PathLike[str] | VideoClip | FrameStream,
        sampling: Sampling | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> tuple[VideoClip, Sight]:
        """Decode a file, unless it is already decoded, and see its scene graph.

        A perception checkpoint sees a video of any length window by window, and `report` is called with the progress
        of one that is longer; other eyes see a clip. The last clip and its graph are kept, for the next question about
        the same file or clip.
        """
        if isinstance(video, VideoClip) and self._seen is not None and self._seen[0] is video:
            return self._seen
        short = isinstance(video, VideoClip) and len(video.times) <= WINDOW
        if isinstance(self.eyes, PerceptionEyes) and not short:
            return self._see_windows(self.eyes, video, sampling or Sampling(), progress, report)
        clip = video.clip() if isinstance(video, FrameStream) else video
        if not isinstance(clip, VideoClip):
            key = _key(clip, sampling or Sampling())
            if self._file is None or self._file[0] != key:
                self._file = key, sample_video(clip, sampling or Sampling(), self.eyes.fps, progress)
            clip = self._file[1]
        if self._seen is None or self._seen[0] is not clip:
            self._seen = clip, self.eyes.see(clip)
        return self._seen

    def _see_windows(
        self,
        eyes: PerceptionEyes,
        video: str | os.PathLike[str] | VideoClip | FrameStream,
        sampling: Sampling,
        progress: bool,
        report: Callable[[str], None] | None,
    ) -> tuple[VideoClip, Sight]:
        """See a video of any length; the clip returned holds at most one window of its frames."""
        key = None
        if isinstance(video, VideoClip):
            frames = FrameStream.of(video)
        elif isinstance(video, FrameStream):
            frames = video
        else:
            key = _key(video, sampling)
            if (
                self._seen is not None
                and self._file is not None
                and self._file[0] == key
                and self._file[1] is self._seen[0]
            ):
                return self._seen
            frames = stream_samples(video, sampling, eyes.fps, progress)
        source = f"{frames.path.name} seen by {eyes.name}"
        seen = see_stream(eyes.model, eyes.processor, frames, source, give_up=not self.anyway, report=report)
        clip = VideoClip(seen.frames, seen.times, frames.info if seen.complete else frames.stop())
        self._seen = clip, eyes.sight(seen.detection)
        self._file = None if key is None else (key, clip)
        return self._seen

    def ask(
        self,
        video: str | os.PathLike[str] | VideoClip | FrameStream,
        question: str,
        candidates: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> VideoAnswer:
        """Answer a question about a file, a clip or a stream; without candidates the language model proposes them.

        `report` is called with the name of the current activity.
        """
        question, given = check_question(question), check_candidates(candidates)
        report = report or (lambda activity: None)
        report("Looking at the frames")
        clip, sight = self.see(video, sampling, progress, report)
        if sight.warning is not None and not self.anyway:
            return VideoAnswer(self._refusal(question, given, sight.warning), clip, sight)
        report("Loading the language model")
        world = getattr(self.eyes, "world", None) if sight.in_domain else None
        reasoning = VideoOfThought(self.reader.about(clip), self.switches, world=world)
        answer = reasoning.run(
            question,
            given,
            sight.stsg,
            domain_warning=sight.warning,
            report=lambda step: report(f"Reasoning: {step.replace('_', ' ')}"),
        )
        return VideoAnswer(answer, clip, sight)

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
    return PerceptionEyes(*load_perception(path, device))


def load_video_qa(
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    llm: str | os.PathLike[str] | None = None,
    vlm: str | os.PathLike[str] | None = None,
    detector: str | os.PathLike[str] | None = None,
    objects: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
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
            Without a checkpoint and a detector it also writes the graph.
        detector: folder of an object detector of transformers, which sees the graph instead of a checkpoint.
        objects: the labels that the detector looks for; see `vot_kernels.watching.detector.DetectorEyes`.
        device: where the models run.
        dtype: of the weights of other people's models but the `llm`, "auto" for that of the files.
        switches, anyway: as in `VideoQA`.

    Raises:
        ValueError: a folder does not hold what it should, or there are two language models, or two pairs of eyes.
        ImportError: a model needs a package that is not installed.
    """
    if llm is not None and vlm is not None:
        raise ValueError("Give one language model: an llm, which reads text alone, or a vlm.")
    if checkpoint is not None and detector is not None:
        raise ValueError("Give one pair of eyes: a checkpoint or a detector.")
    reader: Reader = DeferredModel(lambda: load_language_model(llm, device))
    if vlm is not None:
        reader = load_video_language_model(vlm, device, dtype)
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
