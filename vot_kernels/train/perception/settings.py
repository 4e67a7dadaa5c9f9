"""The settings of perception training; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import setting


@dataclass(frozen=True)
class PerceptionTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine."""

    steps: int = setting(420, "Optimiser steps of the whole model.")
    batch_size: int = setting(12, "Clips per step.")
    learning_rate: float = setting(
        2e-3, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    dynamics_steps: int = setting(800, "Further steps that train relations and events alone.")
    name_steps: int = setting(250, "Further steps that train labels by shape, whatever the colour.")
    warmup: int = setting(50, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm of the first stage.")
    seed: int = setting(0, "Seed of weights and data.")
    attention: Literal["hybrid", "softmax"] = setting(
        "hybrid", "Attention of the encoder; softmax reaches all frames."
    )
