"""The settings of the projector stage; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ProjectorTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    Attributes:
        language_model: "nano", a small Llama with random weights, which is trained too, or "smollm2",
            SmolLM2-135M-Instruct, which stays as it is.
        steps, learning_rate, warmup, clip: see `vot_kernels.train.loop.Schedule`.
        batch_size: clips per step.
        weight_decay: weight decay of AdamW.
        seed: seed of weights and data.
    """

    language_model: Literal["nano", "smollm2"] = "nano"
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph") + (("text",) if self.language_model == "nano" else ())
