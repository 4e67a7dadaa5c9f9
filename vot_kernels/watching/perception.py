"""The eyes that this package trains itself: a perception checkpoint, which knows the world that it was trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
        found = detect(self.model, self.processor, [clip.frames], [clip.times], source)
        (detection,) = explained(self.model, found)
        return self.sight(detection)

    def sight(self, detection: Detection) -> Sight:
        """Return what was detected as a sight."""
        return Sight(detection.stsg, f"the perception checkpoint {self.name}", domain_warning(detection))


def knows_mechanics(model: VotPerceptionModel) -> bool:
    """Whether a checkpoint was trained on a world whose mechanics this package knows, which is DigitWorld."""
    return vocabulary(model.config) == VOCABULARY


def explained(model: VotPerceptionModel, found: Sequence[Detection]) -> list[Detection]:
    """Return what `detect` found with a checkpoint, with the events that the mechanics of its world make of the boxes.

    What the checkpoint itself read from the frames stays where the mechanics are not known, or where a clip does not
    resemble the training clips.
    """
    if not knows_mechanics(model):
        return list(found)
    return [replace(seen, stsg=explain_events(seen.stsg)) if seen.in_domain else seen for seen in found]


def domain_warning(detection: Detection) -> str | None:
    """Return why the answer should not be trusted if the clip does not resemble the training clips, else None."""
    if detection.in_domain:
        return None
    if math.isnan(detection.domain_distance):
        return "the checkpoint gives NaN for it, so its weights are damaged"
    return (
        f"its features lie {detection.domain_distance:.0f} from those of the training clips, "
        f"the limit is {detection.domain_threshold:.0f}"
    )
