"""The two things that a question about a video needs, each a small protocol that any model can be put behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from vot_kernels.data.video import VideoClip
from vot_kernels.reasoning.llm import LanguageModel, as_language_model
from vot_kernels.reasoning.types import ModelCall, plain
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.text import ParseIssue

VIDEO_LANGUAGE_FPS = 2.0  # what most video-language models were trained on
"""Frames per second that a video-language model is shown by default."""
DETECTOR_FPS = 4.0  # objects still overlap from frame to frame
"""Frames per second that a detector is shown by default."""
WINDOW = 32
"""Frames that are looked at together by default; a longer video is seen window by window."""


@dataclass(frozen=True)
class Sight:
    """What eyes saw in one clip.

    Attributes:
        stsg: the scene graph; its frames are those of the clip.
        eyes: who saw it, for people.
        warning: why it should not be trusted, None if nothing is known against it.
        issues: what was wrong with the text of the graph, if a language model wrote it.
        calls: the requests to that model.
    """

    stsg: STSG
    eyes: str
    warning: str | None = None
    issues: tuple[ParseIssue, ...] = ()
    calls: tuple[ModelCall, ...] = ()

    @property
    def in_domain(self) -> bool:
        """Whether the eyes know what the clip shows."""
        return self.warning is None

    def to_dict(self) -> dict[str, Any]:
        """Return who saw it, with the number of issues and each of them, as plain data; the graph is not in it."""
        issues = [issue._asdict() for issue in self.issues]
        return {"name": self.eyes, "parse_issues": len(issues), "issues": issues, "calls": plain(self.calls)}


@runtime_checkable
class Eyes(Protocol):
    """Sees the scene graph of a clip.

    Eyes may have an attribute `window`, the most frames of a clip that they are shown; without it that is `WINDOW`.

    Attributes:
        name: for people.
        fps: frames per second that it wants where the user does not say.
    """

    name: str
    fps: float

    def see(self, clip: VideoClip) -> Sight:
        """Return the scene graph of `clip`, and who saw it."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Answers questions about clips.

    A reader that sees them has an attribute `max_frames`, the most frames of a clip that it is shown.
    """

    def about(self, clip: VideoClip) -> LanguageModel:
        """Return a language model for prompts about `clip`; it need not see the clip itself."""
        ...


class TextReader:
    """A language model that reads of every clip what the prompts say."""

    def __init__(self, model: LanguageModel | Callable[[str], str]) -> None:
        self.model = as_language_model(model)

    def about(self, clip: VideoClip) -> LanguageModel:
        return self.model


@dataclass(frozen=True)
class DeferredModel:
    """A language model, as a reader, that is loaded on first use: a clip outside of the domain needs none.

    Attributes:
        load: returns the model.
    """

    load: Callable[[], LanguageModel]

    @cached_property
    def model(self) -> LanguageModel:
        """The model, loaded."""
        return as_language_model(self.load())

    def about(self, clip: VideoClip) -> LanguageModel:
        return self.model


def as_reader(model: Reader | LanguageModel | Callable[[str], str]) -> Reader:
    """Return a reader as it is, and a language model, or any `generate(prompt) -> str`, as a reader.

    Raises:
        TypeError: it is none of these.
    """
    return model if isinstance(model, Reader) else TextReader(model)
