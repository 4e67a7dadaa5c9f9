"""The perception model, which turns a clip into a spatial-temporal scene graph: the encoder with an STSG head."""

from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.modeling import VotPerceptionModel, VotPerceptionOutput
from vot_kernels.models.perception.reading import Detection, detect, to_stsg, vocabulary

__all__ = [
    "Detection",
    "VotPerceptionConfig",
    "VotPerceptionModel",
    "VotPerceptionOutput",
    "detect",
    "to_stsg",
    "vocabulary",
]
