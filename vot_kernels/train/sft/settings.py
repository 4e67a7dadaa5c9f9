"""The settings of supervised finetuning; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import setting


@dataclass(frozen=True)
class SftTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine."""

    text: Literal["all", "lora"] = setting(
        "all", "What of the language model is trained: all of it, or adapters (lora)."
    )
    steps: int = setting(1200, "Optimiser steps.")
    batch_size: int = setting(4, "Clips per step, each with up to four questions.")
    frames: float = setting(
        1.0, "Share of the clips whose frames are shown beside their graph; a graph alone takes less time."
    )
    learning_rate: float = setting(
        2e-3, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    warmup: int = setting(50, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm.")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )
    seed: int = setting(0, "Seed of adapters and data.")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph", "text" if self.text == "all" else "lora")
