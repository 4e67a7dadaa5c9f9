"""The settings of encoder pretraining; importing them takes no time."""

from dataclasses import dataclass

RANDOM_TEACHER = "random"


@dataclass(frozen=True)
class EncoderTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    Attributes:
        steps, learning_rate, warmup, clip: see `vot_kernels.train.loop.Schedule`.
        batch_size: clips per step, of mixed sizes.
        weight_decay: weight decay of AdamW.
        distillation, contrastive: weights of the objectives; 0 leaves one out.
        num_frames: frames per clip.
        caption_width, caption_layers: size of the caption encoder.
        h264_share: share of the clips that are encoded with H.264 and decoded.
        seed: seed of weights and data.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.02
    clip: float = 1.0
    distillation: float = 1.0
    contrastive: float = 1.0
    num_frames: int = 16
    caption_width: int = 96
    caption_layers: int = 2
    h264_share: float = 0.5
    seed: int = 0

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
