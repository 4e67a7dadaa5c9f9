"""The settings of the stages of reinforcement learning; importing them takes no time."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from vot_kernels.train.config import Training, setting

_WEIGHT = "_weight"


@dataclass(frozen=True)
class RlTraining(Training):
    """What all stages of reinforcement learning have in common."""

    warmup: int = 10


@dataclass(frozen=True)
class GrpoTraining(RlTraining):
    """What the three stages of GRPO have in common."""

    steps: int = 100
    batch_size: int = setting(4, "Questions per step, each about a clip of its own.")
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    seed: int = setting(0, "Seed of adapters, data and replies.")
    text: Literal["all", "lora"] = setting(
        "all", "What of the language model is trained: all of it, or adapters (lora)."
    )
    generations: int = setting(4, "Replies per question, which are compared with each other.", least=2)
    temperature: float = setting(1.0, "Temperature at which replies are drawn.", above=0)
    max_reply_tokens: int = setting(192, "Tokens after which a reply is cut off.", least=1)
    frames: int = setting(4, "Frames of each clip that the model sees.", least=1)
    sigma_s: float = setting(
        0.5, "Seconds by which an event may be off and still earn 0.6 of the temporal reward.", above=0
    )

    item_name: ClassVar[str] = "replies"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.weights.values()):
            raise ValueError("At least one reward must have a weight other than 0.")

    @property
    def items(self) -> int:
        """How many replies a step has."""
        return self.batch_size * self.generations

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained; the graph tokens are read as they are."""
        projector = ("projector",) if self.frames else ()
        return (*projector, "text" if self.text == "all" else "lora")

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

    frames: int = setting(
        4,
        "Frames of each clip that the model sees beside its graph; 0 for the graph alone, which takes less time.",
        least=0,
    )
    accuracy_weight: float = setting(1.0, "Weight of the reward of accuracy.")
    grounding_weight: float = setting(0.5, "Weight of the reward of grounding.")
    temporal_weight: float = setting(0.5, "Weight of the reward of times.")
    consistency_weight: float = setting(0.0, "Weight of the reward of consistency.")


@dataclass(frozen=True)
class GrpoPreference(GrpoReasoning):
    """Settings of GRPO with a reward model of preferences, at a low weight beside the other rewards."""

    preference_weight: float = setting(0.2, "Weight of the reward model, whose scores lie between 0 and 1.")


@dataclass(frozen=True)
class PreferenceTraining(RlTraining):
    """Settings of a reward model."""

    steps: int = 200
    batch_size: int = setting(8, "Pairs of replies per step.")
    learning_rate: float = 3e-4
    seed: int = setting(0, "Seed of the new weights and of the data.")

    item_name: ClassVar[str] = "pairs"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained: all of a copy of the language model, and its new head."""
        return ("text",)
