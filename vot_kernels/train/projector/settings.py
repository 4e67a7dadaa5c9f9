"""The settings of the projector stage; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import setting


@dataclass(frozen=True)
class ProjectorTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine."""

    language_model: Literal["nano", "smollm2"] = setting(
        "nano", "nano is new and is trained too; SmolLM2-135M-Instruct (smollm2) stays as it is."
    )
    steps: int = setting(400, "Optimiser steps.")
    batch_size: int = setting(4, "Clips per step.")
    learning_rate: float = setting(
        2e-3, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    warmup: int = setting(50, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm.")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )
    seed: int = setting(0, "Seed of weights and data.")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph") + (("text",) if self.language_model == "nano" else ())
