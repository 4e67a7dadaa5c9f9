"""From a command's options to the models that answer: what can be wrong is found before they are imported."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.cli.options import STEPS

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoQA


@dataclass(frozen=True)
class Models:
    """The options that say which models answer, and how."""

    checkpoint: Path | None = None
    llm: Path | None = None
    vlm: Path | None = None
    detector: Path | None = None
    objects: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "auto"
    window: int | None = None
    skip: tuple[str, ...] = ()
    anyway: bool = False

    @property
    def fps(self) -> float:
        """Frames per second that the models want."""
        from vot_kernels.pipelines.sampling import wanted_fps

        return wanted_fps(self.checkpoint, self.vlm, self.detector)

    @property
    def loading(self) -> str:
        """What a user waits for while they are loaded."""
        eyes = "detector" if self.detector else "perception checkpoint"
        return f"Loading the {'video-language model' if self.vlm else eyes}"

    def absolute(self) -> "Models":
        """The same, with paths that mean the same in any folder."""
        given = {name: getattr(self, name) for name in ("checkpoint", "llm", "vlm", "detector")}
        return replace(self, **{name: path.absolute() for name, path in given.items() if path is not None})

    def check(self) -> None:
        """Find whatever can be wrong with the options before a model is imported."""
        from vot_kernels.models.checkpoint import VLM, checkpoint_kind, is_own_model
        from vot_kernels.pipelines.sampling import check_device, check_window, checkpoint_folder
        from vot_kernels.reasoning.llm import check_model_folder
        from vot_kernels.watching.loading import (
            check_detector_folder,
            check_dtype,
            check_video_language_folder,
        )

        unknown = sorted(set(self.skip) - set(STEPS))
        if unknown:
            raise ValueError(f"--skip must be one of {', '.join(STEPS)}, got {unknown[0]!r}.")
        if self.llm is not None and self.vlm is not None:
            raise ValueError(
                "Give --llm, which reads text alone, or --vlm, which also sees the video, not both."
            )
        if self.checkpoint is not None and self.detector is not None:
            raise ValueError("Give --checkpoint or --detector to see the scene graph with, not both.")
        if self.objects and self.detector is None:
            raise ValueError("--objects says what a detector looks for; give --detector PATH with it.")
        if self.window is not None and self.vlm is None:
            raise ValueError(
                "--window says how many frames a video-language model sees at once; give --vlm PATH with it."
            )
        check_window(self.window)
        check_device(self.device)
        check_dtype(self.dtype)
        own = self.vlm is not None and is_own_model(self.vlm)
        if self.detector is None and (self.vlm is None or own or self.checkpoint is not None):
            checkpoint_folder(self.checkpoint)
        if self.llm is not None:
            check_model_folder(self.llm)
        if self.vlm is not None and own:
            checkpoint_kind(self.vlm, VLM)
        elif self.vlm is not None:
            check_video_language_folder(self.vlm)
        if self.detector is not None:
            check_detector_folder(self.detector)

    def load(self) -> "VideoQA":
        """Load them."""
        from vot_kernels.reasoning.types import Switches

        self.check()
        switches = Switches(**{name: False for name in self.skip})
        from vot_kernels.pipelines.video_qa import load_video_qa

        return load_video_qa(
            checkpoint=self.checkpoint,
            llm=self.llm,
            vlm=self.vlm,
            detector=self.detector,
            objects=self.objects,
            device=self.device,
            dtype=self.dtype,
            window=self.window,
            switches=switches,
            anyway=self.anyway,
        )
