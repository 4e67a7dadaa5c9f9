"""The settings of encoder pretraining; importing them takes no time."""

from dataclasses import dataclass

from vot_kernels.train.config import Training, setting

RANDOM_TEACHER = "random"


@dataclass(frozen=True)
class EncoderTraining(Training):
    """Settings of a run."""

    batch_size: int = setting(16, "Clips per step, of mixed sizes.")
    distillation: float = setting(1.0, "Weight of distillation; 0 is off.")
    contrastive: float = setting(1.0, "Weight of contrast; 0 is off.")
    num_frames: int = setting(16, "Frames per clip.")
    caption_width: int = setting(96, "Width of the caption encoder.")
    caption_layers: int = setting(2, "Layers of the caption encoder.")
    h264_share: float = setting(0.5, "Share of the clips that are encoded with H.264 and decoded.")

    def __post_init__(self) -> None:
        weights = (self.distillation, self.contrastive)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "distillation and contrastive must be at least 0 and one of them positive, "
                f"got {self.distillation} and {self.contrastive}."
            )
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, because contrast needs two clips, got {self.batch_size}."
            )
