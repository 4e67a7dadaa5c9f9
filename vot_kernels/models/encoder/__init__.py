"""The packed long-sequence image encoder."""

from vot_kernels.models.encoder.configuration import PRESETS, VotEncoderConfig
from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderOutput, VotStreamState
from vot_kernels.models.encoder.processing import VotImageProcessor

__all__ = [
    "PRESETS",
    "VotEncoder",
    "VotEncoderConfig",
    "VotEncoderOutput",
    "VotImageProcessor",
    "VotStreamState",
]
