"""What is compared: a part is its variants, as changes of a configuration, and what is measured of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A metric of a run: its title in tables, whether more of it is better, and the number of digits shown."""

    title: str
    more_is_better: bool
    digits: int = 3


@dataclass(frozen=True)
class Variant:
    """What a part becomes.

    Attributes:
        name: in tables.
        changes: what differs from the default: `encoder`, fields of the encoder's configuration; `training`, settings
            of the stage; `kind`, the class of the encoder; `reads`, as what a graph is read; `stages`, what follows
            supervised training; `system`, who answers.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A comparison.

    Attributes:
        name: as `--only` takes it.
        question: what it answers.
        task: what each variant does; a key of `tasks.TASKS`.
        variants: at least two; the others are compared with the first.
        measures: keys of `MEASURES`; the first is drawn.
    """

    name: str
    question: str
    task: str
    variants: tuple[Variant, ...]
    measures: tuple[str, ...]


MEASURES = {
    "test_loss": Measure("held-out loss", False),
    "test_center_px": Measure("centre error, px", False, 2),
    "test_presence": Measure("presence", True),
    "test_colour": Measure("colour", True),
    "resolution_loss": Measure("loss, held-out sizes", False),
    "resolution_center_px": Measure("centre error, held-out sizes, px", False, 2),
    "resolution_presence": Measure("presence, held-out sizes", True),
    "step_time": Measure("time of a step", False, 2),
    "distil_tokens": Measure("distance from the teacher", False),
    "video_to_caption_r1": Measure("caption of a clip, R@1", True),
    "caption_to_video_r1": Measure("clip of a caption, R@1", True),
    "probe_colour": Measure("probe: colours", True),
    "probe_count": Measure("probe: count", True),
    "nats": Measure("nats per token of the reply", False),
    "accuracy": Measure("right answers", True),
    "grounding": Measure("grounding", True),
    "temporal": Measure("times", True),
    "preference": Measure("score of the reward model", True),
    "seen_grounding": Measure("grounding, of frames alone", True),
}
"""What runs measure. A step's time is that of forward and backward, relative to the default encoder's."""

_SEEN = ("test_loss", "test_center_px", "test_presence", "test_colour", "step_time")
_DEFAULT = Variant("hybrid")
_DENSE = {"attention": "softmax", "aoe_every": 0}
_LEARNT = ("probe_colour", "probe_count", "video_to_caption_r1", "caption_to_video_r1", "distil_tokens")

PARTS: tuple[Part, ...] = (
    Part(
        "attention",
        "Softmax near and linear far, or one of them for all?",
        "perception",
        (
            _DEFAULT,
            Variant("softmax alone", {"encoder": {"attention": "softmax"}}),
            Variant("linear alone", {"encoder": {"attention": "linear"}}),
        ),
        _SEEN,
    ),
    Part(
        "normaliser",
        "One normaliser for near and far, or one each and a gate?",
        "perception",
        (Variant("one"), Variant("two, gated", {"encoder": {"attention": "gated"}})),
        _SEEN[:-1],
    ),
    Part(
        "experts",
        "Experts that choose themselves, a router, or none?",
        "perception",
        (
            Variant("Autonomy-of-Experts"),
            Variant("dense, as many operations", {"encoder": {"aoe_every": 0}}),
            Variant("dense, as many parameters", {"encoder": {"aoe_every": 0, "intermediate_size": 192}}),
            Variant("top-k with a router", {"encoder": {"expert_choice": "routed"}}),
            Variant("with a shared expert", {"encoder": {"shared_expert_size": 64, "num_experts": 6}}),
        ),
        _SEEN,
    ),
    Part(
        "dense residual",
        "Does averaging over past blocks help?",
        "perception",
        (Variant("on"), Variant("off", {"encoder": {"dense_residual": False}})),
        _SEEN[:-1],
    ),
    Part(
        "size embedding",
        "Does it help with sizes that were never trained on?",
        "perception",
        (Variant("on"), Variant("off", {"encoder": {"size_embedding": False}})),
        ("resolution_loss", "resolution_center_px", "resolution_presence", "test_loss"),
    ),
    Part(
        "packing",
        "Does packing change what is learnt, and what does padding cost?",
        "encoder",
        (
            Variant("packed", {"encoder": _DENSE}),
            Variant("padded to the longest", {"encoder": _DENSE, "kind": "padded"}),
        ),
        ("distil_tokens", "probe_colour", "video_to_caption_r1", "step_time"),
    ),
    Part(
        "distillation",
        "Does distillation add to contrast?",
        "encoder",
        (Variant("on"), Variant("off", {"training": {"distillation": 0.0}})),
        _LEARNT[:-1],
    ),
    Part(
        "contrast",
        "Does contrast with captions add to distillation?",
        "encoder",
        (Variant("on"), Variant("off", {"training": {"contrastive": 0.0}})),
        ("probe_colour", "probe_count", "distil_tokens"),
    ),
    Part(
        "graph tokens",
        "Does a video-language model gain from the tokens of a graph that it reads as text?",
        "reading",
        (
            Variant("tokens and text"),
            Variant("text alone", {"reads": ["text"]}),
            Variant("tokens alone", {"reads": ["tokens"]}),
            Variant("neither", {"reads": []}),
        ),
        ("nats", "accuracy"),
    ),
    Part(
        "reinforcement",
        "What does each stage of GRPO add to supervised training?",
        "reinforcement",
        (
            Variant("supervised", {"stages": []}),
            Variant("and perception", {"stages": ["perception"]}),
            Variant("and reasoning", {"stages": ["perception", "reasoning"]}),
            Variant("and preferences", {"stages": ["perception", "reasoning", "preference"]}),
        ),
        ("accuracy", "grounding", "temporal", "preference", "seen_grounding"),
    ),
    Part(
        "thought",
        "Does a language model gain from Video-of-Thought, without its last step?",
        "answers",
        (Variant("five steps", {"system": "vot_unverified"}), Variant("direct", {"system": "direct"})),
        ("accuracy",),
    ),
    Part(
        "verification",
        "Does the language model gain from the last step, which verifies the answer?",
        "answers",
        (Variant("verified", {"system": "vot"}), Variant("not", {"system": "vot_unverified"})),
        ("accuracy",),
    ),
    Part(
        "verification of our model",
        "Does our video-language model gain from it?",
        "answers",
        (Variant("verified", {"system": "vlm_verified"}), Variant("not", {"system": "vlm"})),
        ("accuracy",),
    ),
)
