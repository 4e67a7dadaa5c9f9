"""The settings of perception training; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PerceptionTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    Attributes:
        steps: optimiser steps of the whole model.
        batch_size: clips per step.
        learning_rate, warmup: those of both stages; see `vot_kernels.train.loop.Schedule`.
        dynamics_steps: further steps, in a second stage that trains only relations and events.
        weight_decay: weight decay of AdamW.
        clip: largest gradient norm of the first stage.
        seed: seed of weights and data.
        attention: attention of the encoder: "hybrid", or "softmax" to all frames.
    """

    steps: int = 420
    batch_size: int = 12
    learning_rate: float = 2e-3
    dynamics_steps: int = 800
    warmup: int = 50
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 0
    attention: Literal["hybrid", "softmax"] = "hybrid"
