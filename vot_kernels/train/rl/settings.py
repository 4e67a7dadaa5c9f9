"""The settings of the stages of reinforcement learning; importing them takes no time."""

from dataclasses import dataclass, fields
from typing import Literal

from vot_kernels.train.config import setting

_WEIGHT = "_weight"


@dataclass(frozen=True)
class GrpoTraining:
    """What the three stages of GRPO have in common; two runs with equal settings give equal weights on one machine."""

    text: Literal["all", "lora"] = setting(
        "all", "What of the language model is trained: all of it, or adapters (lora)."
    )
    steps: int = setting(100, "Optimiser steps.")
    batch_size: int = setting(4, "Questions per step, each about a clip of its own.")
    generations: int = setting(4, "Replies per question, which are compared with each other.")
    accumulation: int = setting(1, "Parts into which the replies of a step are cut, to save memory.")
    learning_rate: float = setting(
        1e-4, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    warmup: int = setting(10, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm.")
    temperature: float = setting(1.0, "Temperature at which replies are drawn.")
    max_reply_tokens: int = setting(192, "Tokens after which a reply is cut off.")
    frames: int = setting(4, "Frames of each clip that the model sees.")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )
    validate_every: int = setting(0, "Steps between two measurements of held-out clips; 0 is never.")
    validation_clips: int = setting(16, "Held-out clips in each of these measurements.")
    sigma_s: float = setting(
        0.5, "Seconds by which an event may be off and still earn 0.6 of the temporal reward."
    )
    seed: int = setting(0, "Seed of adapters, data and replies.")

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "generations": 2, "accumulation": 1, "frames": 1, "warmup": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}.")
        if (self.batch_size * self.generations) % self.accumulation:
            raise ValueError(
                f"accumulation must divide the {self.batch_size * self.generations} replies of a step, "
                f"got {self.accumulation}."
            )
        if not any(self.weights.values()):
            raise ValueError("At least one reward must have a weight other than 0.")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained; the graph tokens are not, since TRL hands over frames alone."""
        return ("projector", "text" if self.text == "all" else "lora")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name."""
        names = [field.name for field in fields(self) if field.name.endswith(_WEIGHT)]
        return {name.removesuffix(_WEIGHT): getattr(self, name) for name in names}


@dataclass(frozen=True)
class GrpoPerception(GrpoTraining):
    """Settings of GRPO on perception: the model sees the frames alone."""

    form_weight: float = setting(0.5, "Weight of the reward of form.")
    grounding_weight: float = setting(1.0, "Weight of the reward of grounding.")


@dataclass(frozen=True)
class GrpoReasoning(GrpoTraining):
    """Settings of GRPO on reasoning: the model also reads tracklets and events."""

    accuracy_weight: float = setting(1.0, "Weight of the reward of accuracy.")
    grounding_weight: float = setting(0.5, "Weight of the reward of grounding.")
    temporal_weight: float = setting(0.5, "Weight of the reward of times.")
    consistency_weight: float = setting(0.0, "Weight of the reward of consistency.")


@dataclass(frozen=True)
class GrpoPreference(GrpoReasoning):
    """Settings of GRPO with a reward model of preferences, at a low weight beside the other rewards."""

    preference_weight: float = setting(0.2, "Weight of the reward model, whose scores lie between 0 and 1.")


@dataclass(frozen=True)
class PreferenceTraining:
    """Settings of a reward model; two runs with equal settings give equal weights on one machine."""

    steps: int = setting(200, "Optimiser steps.")
    batch_size: int = setting(8, "Pairs of replies per step.")
    accumulation: int = setting(1, "Parts into which the pairs of a step are cut, to save memory.")
    learning_rate: float = setting(
        3e-4, "Peak learning rate, reached after the warmup, from which it falls to 0 along half a cosine."
    )
    warmup: int = setting(10, "Steps in which the learning rate rises.")
    weight_decay: float = setting(0.02, "Weight decay of AdamW, on matrices alone.")
    clip: float = setting(1.0, "Largest gradient norm.")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Numbers of matrix products in training; weights stay in float32."
    )
    validate_every: int = setting(0, "Steps between two measurements of held-out pairs; 0 is never.")
    validation_clips: int = setting(16, "Held-out clips in each of these measurements.")
    seed: int = setting(0, "Seed of the new weights and of the data.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation must divide the {self.batch_size} pairs of a step, got {self.accumulation}."
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained: all of a copy of the language model, and its new head."""
        return ("text",)
