"""The eyes that this package trains itself: a perception checkpoint, which knows the world that it was trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from vot_kernels.data.digitworld.particle_filter import explain_events
from vot_kernels.data.digitworld.physics import Physics
from vot_kernels.data.digitworld.truth import VOCABULARY
from vot_kernels.data.video import VideoClip
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import Detection, detect, vocabulary
from vot_kernels.reasoning.calibration import Calibration
from vot_kernels.watching.protocols import Sight


class PerceptionEyes:
    """A perception checkpoint as eyes.

    Args:
        model, processor: the checkpoint and the processor that was saved with it.
        calibrations: of the confidence of answers, by the name of the language model that reads what it sees.

    Attributes:
        world: simulates what a clip does not show; None where the checkpoint was trained on a world without mechanics
            that this package knows.
    """

    def __init__(
        self,
        model: VotPerceptionModel,
        processor: VotImageProcessor,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.calibrations = calibrations or {}
        self.world = Physics() if knows_mechanics(model) else None
        self.name = model.config.name_or_path or "an unnamed checkpoint"
        self.fps = float(model.config.fps)

    def see(self, clip: VideoClip) -> Sight:
        source = f"{Path(clip.info.path).name} seen by {self.name}"
        (detection,) = watch(self.model, self.processor, [clip.frames], [clip.times], source)
        return self.sight(detection)

    def sight(self, detection: Detection) -> Sight:
        """Return what was detected as a sight."""
        return Sight(detection.stsg, f"the perception checkpoint {self.name}", domain_warning(detection))


def knows_mechanics(model: VotPerceptionModel) -> bool:
    """Whether a checkpoint was trained on a world whose mechanics this package knows, which is DigitWorld."""
    return vocabulary(model.config) == VOCABULARY


def watch(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    clips: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    source: str = "",
    read: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> list[Detection]:
    """Detect the graphs of clips, as `detect` does with the same arguments, and explain their events.

    Where the mechanics are known, the events of a clip that resembles the training clips are those that the mechanics
    make of its boxes, not those that the checkpoint read from its frames.
    """
    found = detect(model, processor, clips, times, source, read)
    if not knows_mechanics(model):
        return found
    return [replace(seen, stsg=explain_events(seen.stsg)) if seen.in_domain else seen for seen in found]


def domain_warning(detection: Detection) -> str | None:
    """Return why the answer should not be trusted if the clip does not resemble the training clips, else None."""
    if detection.in_domain:
        return None
    return (
        f"its features lie {detection.domain_distance:.0f} from those of the training clips, "
        f"the limit is {detection.domain_threshold:.0f}"
    )
