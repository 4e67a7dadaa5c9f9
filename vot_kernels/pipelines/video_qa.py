"""From a video file and a question to an answer with evidence."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vot_kernels.data.video import VideoClip
from vot_kernels.models.checkpoint import load_checkpoint, on_device
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import Detection, detect
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder, sample_video
from vot_kernels.reasoning.llm import HFLanguageModel, LanguageModel, quiet_transformers
from vot_kernels.reasoning.reasoning import VideoOfThought, check_candidates, check_question, outside
from vot_kernels.reasoning.smollm2 import load_smollm2
from vot_kernels.reasoning.types import Answer, Evidence, EvidenceEvent, EvidenceRelation, Switches
from vot_kernels.scene_graph.graph import STSG


@dataclass(frozen=True)
class VideoAnswer:
    """An answer, and the clip and the scene graph that it comes from."""

    answer: Answer
    clip: VideoClip
    detection: Detection

    def to_dict(self) -> dict[str, Any]:
        """Return the answer with its trace, a description of the clip, and the scene graph, as plain data."""
        return {
            "video": os.fspath(self.clip.info.path),
            "looked_at": self.clip.info.describe(),
            **self.answer.to_dict(),
            "in_domain": self.detection.in_domain,
            "stsg": self.detection.stsg.to_dict(),
        }

    @property
    def known_stsg(self) -> STSG | None:
        """The scene graph, or None of a clip that the checkpoint does not know."""
        return self.detection.stsg if self.answer.warning is None else None

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
        return save_contact_sheet(path, self.clip, self.known_stsg, title=title)


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


@dataclass(frozen=True)
class DeferredModel:
    """A language model that is loaded on first use: a clip outside of the domain needs none.

    Attributes:
        load: returns the model.
    """

    load: Callable[[], LanguageModel]


class VideoQA:
    """Reads the scene graph of a video with a perception checkpoint, and reasons about it with a language model.

    Args:
        perception, processor: a checkpoint and the processor saved with it; see `load_perception`.
        llm: the language model, any `generate(prompt) -> str`, or a `DeferredModel`.
        switches: which of the five steps run.
        anyway: also reason about a clip that the checkpoint does not know; otherwise such a clip gets no answer.
    """

    def __init__(
        self,
        perception: VotPerceptionModel,
        processor: VotImageProcessor,
        llm: LanguageModel | Callable[[str], str] | DeferredModel,
        switches: Switches | None = None,
        *,
        anyway: bool = False,
    ):
        self.perception, self.processor = perception, processor
        self.switches, self.anyway = switches or Switches(), anyway
        self._llm = llm
        if not isinstance(llm, DeferredModel):
            self.reasoning  # noqa: B018  an unusable model is refused now

    @cached_property
    def reasoning(self) -> VideoOfThought:
        """The five steps, with the language model loaded."""
        llm = self._llm.load() if isinstance(self._llm, DeferredModel) else self._llm
        return VideoOfThought(llm, self.switches)

    def see(
        self,
        video: str | os.PathLike[str] | VideoClip,
        sampling: Sampling | None = None,
        progress: bool = False,
    ) -> tuple[VideoClip, Detection]:
        """Decode a file, unless it is already a clip, and read its scene graph."""
        clip = video
        if not isinstance(clip, VideoClip):
            clip = sample_video(clip, sampling or Sampling(), self.perception.config.fps, progress)
        checkpoint = self.perception.config.name_or_path or "an unnamed checkpoint"
        source = f"{Path(clip.info.path).name} seen by {checkpoint}"
        (detection,) = detect(self.perception, self.processor, [clip.frames], [clip.times], source)
        return clip, detection

    def ask(
        self,
        video: str | os.PathLike[str] | VideoClip,
        question: str,
        candidates: Sequence[str] | None = None,
        sampling: Sampling | None = None,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> VideoAnswer:
        """Answer a question about a file or a clip; without candidates the language model proposes them.

        `report` is called with the name of the current activity.
        """
        if report is not None:
            report("Looking at the frames")
        clip, detection = self.see(video, sampling, progress)
        return VideoAnswer(self.answer(question, candidates, detection, report), clip, detection)

    def answer(
        self,
        question: str,
        candidates: Sequence[str] | None,
        detection: Detection,
        report: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about a scene graph that was read earlier."""
        warning = domain_warning(detection)
        if warning is not None and not self.anyway:
            return Answer(
                question=check_question(question),
                text=outside(warning),
                choice=None,
                choice_before=None,
                confidence=0.0,
                decided_by="none",
                verification="abstained",
                evidence=Evidence(),
                trace=(),
                candidates=check_candidates(candidates),
                warning=warning,
                switches=self.switches,
            )
        if report is not None:
            report("Loading the language model")
        reasoning = self.reasoning

        def begun(step: str) -> None:
            if report is not None:
                report(f"Reasoning: {step.replace('_', ' ')}")

        return reasoning.run(question, candidates, detection.stsg, domain_warning=warning, report=begun)


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


def domain_warning(detection: Detection) -> str | None:
    """Return why the answer should not be trusted if the clip does not resemble the training clips, else None."""
    if detection.in_domain:
        return None
    return (
        f"its features lie {detection.domain_distance:.0f} from those of the training clips, "
        f"the limit is {detection.domain_threshold:.0f}"
    )
