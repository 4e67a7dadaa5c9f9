"""The settings of supervised finetuning; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import Training, setting


@dataclass(frozen=True)
class SftTraining(Training):
    """Settings of a run."""

    steps: int = 1200
    batch_size: int = setting(4, "Clips per step.")
    seed: int = setting(0, "Seed of adapters and data.")
    text: Literal["all", "lora"] = setting(
        "all", "What of the language model is trained: all of it, or adapters (lora)."
    )
    questions: int = setting(
        12,
        "Questions per clip, at most; more of them cost less, since the graph is read once for all.",
        least=1,
    )
    frames: float = setting(
        1.0,
        "Share of the clips whose frames are shown beside their graph; a graph alone takes less time.",
        least=0,
        most=1,
    )
    thoughts: Literal["whole", "short"] = setting(
        "whole", "Whether thoughts compare what they read; from short ones a new model learns to read sooner."
    )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph", "text" if self.text == "all" else "lora")
