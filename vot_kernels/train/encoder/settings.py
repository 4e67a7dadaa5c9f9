"""The settings of encoder pretraining; importing them takes no time."""

from dataclasses import dataclass

from vot_kernels.train.config import Training, setting

RANDOM_TEACHER = "random"


@dataclass(frozen=True)
class EncoderTraining(Training):
    """Settings of a run."""

    batch_size: int = setting(16, "Clips per step, of mixed sizes.")
    distillation: float = setting(1.0, "Weight of distillation; 0 is off.", least=0)
    contrastive: float = setting(1.0, "Weight of contrast; 0 is off.", least=0)
    num_frames: int = setting(16, "Frames per clip.", least=2)
    caption_width: int = setting(96, "Width of the caption encoder, a multiple of 8.", least=8)
    caption_layers: int = setting(2, "Layers of the caption encoder.", least=0)
    h264_share: float = setting(
        0.5, "Share of the clips that are encoded with H.264 and decoded.", least=0, most=1
    )
    accumulation: int = setting(
        1,
        "Parts into which a step is cut, to save memory, of equal weight; contrast compares the clips of a part.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and not self.contrastive:
            raise ValueError("distillation or contrastive must be positive, got 0 and 0.")
        if self.caption_width % 8:
            raise ValueError(f"caption_width must be a multiple of 8, got {self.caption_width}.")
        if self.contrastive and self.part_size < 2:
            raise ValueError(
                "batch_size must be at least 2 per part of a step, because contrast needs two clips, "
                f"got {self.batch_size} in {self.accumulation}."
            )
