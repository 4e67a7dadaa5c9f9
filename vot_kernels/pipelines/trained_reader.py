"""A video-language model of this package as a reader: it answers as it was trained, with a thought and an answer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vot_kernels.data.video import VideoClip
from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.vot.processing import VotProcessor
from vot_kernels.reasoning.llm import ThinkingModel, Thought
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.train.vlm.answers import Asked, think
from vot_kernels.train.vlm.conversations import Clip
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.watching.protocols import WINDOW


class TrainedReader:
    """A model that `vot train sft`, or a stage after it, made.

    Args:
        model, processor: as `load_vlm` returns them.
        name: of the model in traces.
        max_frames: most frames that it is shown at once.
    """

    def __init__(self, model: Any, processor: VotProcessor, name: str, max_frames: int = WINDOW) -> None:
        self.model, self.processor, self.name, self.max_frames = model, processor, name, max_frames

    def about(self, clip: VideoClip) -> ThinkingModel:
        """Return the model for questions about `clip` and its scene graph."""
        return ThinkingModel(partial(self._think, Clip(clip.frames, clip.times)), self.name)

    def _think(self, clip: Clip, question: str, candidates: Sequence[str], graph: STSG) -> Thought:
        return think(self.model, self.processor, Asked(clip, graph, question, candidates))


def load_trained_reader(folder: Path, device: str = "cpu", max_frames: int = WINDOW) -> TrainedReader:
    """Load a folder of a video-language checkpoint, or of adapters of one; errors as in `load_vlm`."""
    model, processor = load_vlm(folder)
    return TrainedReader(on_device(model, device), processor, folder.resolve().name, max_frames)
