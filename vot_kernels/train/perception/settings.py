"""The settings of perception training; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import Training, setting


@dataclass(frozen=True)
class PerceptionTraining(Training):
    """Settings of a run."""

    steps: int = setting(420, "Optimiser steps of the whole model.")
    batch_size: int = 12
    dynamics_steps: int = setting(800, "Further steps that train relations and events alone.", least=0)
    name_steps: int = setting(250, "Further steps that train labels by shape, whatever the colour.", least=0)
    num_frames: int = setting(16, "Frames per clip.", least=2)
    clip: float = setting(1.0, "Largest gradient norm of the first stage; inf clips nothing.")
    attention: Literal["hybrid", "softmax"] = setting(
        "hybrid", "Attention of the encoder; softmax reaches all frames."
    )
    accumulation: int = setting(
        1,
        "Parts into which a step is cut, to save memory, of equal weight; steps without pixels are not cut.",
    )
