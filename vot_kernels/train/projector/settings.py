"""The settings of the projector stage; importing them takes no time."""

from dataclasses import dataclass
from typing import Literal

from vot_kernels.train.config import Training, setting


@dataclass(frozen=True)
class ProjectorTraining(Training):
    """Settings of a run."""

    steps: int = 400
    language_model: Literal["nano", "smollm2"] = setting(
        "nano", "nano is new and is trained too; SmolLM2-135M-Instruct (smollm2) stays as it is."
    )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("projector", "graph") + (("text",) if self.language_model == "nano" else ())
