"""The settings of supervised finetuning; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SftTraining:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    Attributes:
        text: "all" trains the language model as a whole, "lora" adapters in it.
        steps, learning_rate, warmup, clip: see `vot_kernels.train.loop.Schedule`.
        batch_size: clips per step, each with up to three questions.
        weight_decay: weight decay of AdamW.
        seed: seed of weights and data.
    """

    text: Literal["all", "lora"] = "all"
    steps: int = 1200
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph", "text" if self.text == "all" else "lora")
