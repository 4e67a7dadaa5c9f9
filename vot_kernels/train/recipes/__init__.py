"""One YAML file per stage, with every setting, its default and its meaning.

`python -m vot_kernels.train.recipes` writes them anew from the settings of the stages.
"""

from importlib.resources import files

from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.rl.settings import (
    GrpoPerception,
    GrpoPreference,
    GrpoReasoning,
    PreferenceTraining,
)
from vot_kernels.train.sft.settings import SftTraining

STAGES: dict[str, type] = {
    "perception": PerceptionTraining,
    "linearize": Linearization,
    "encoder": EncoderTraining,
    "projector": ProjectorTraining,
    "sft": SftTraining,
    "grpo-perception": GrpoPerception,
    "grpo-reasoning": GrpoReasoning,
    "preference": PreferenceTraining,
    "grpo-preference": GrpoPreference,
}
"""The stages of `vot train` and their settings."""


def recipe(stage: str) -> str:
    """Return the text of a stage's recipe.

    Raises:
        ValueError: there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"A stage must be one of {', '.join(STAGES)}, got {stage!r}.")
    return files(__name__).joinpath(f"{stage}.yaml").read_text(encoding="utf-8")
