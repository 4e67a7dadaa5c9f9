"""Rewards of Video-of-Thought replies, for GRPO with TRL or without it.

Each is a pure function with the signature of TRL's custom rewards: it takes the completions and the columns of the
dataset as lists, one entry per completion, and returns a list of rewards, None where there is nothing to compare with.
All lie in [0, 1], a perfect reply has 1, and none grows with the length of a reply.
"""

from vot_kernels.train.rewards.answers import accuracy, order_bonus
from vot_kernels.train.rewards.consistency import consistency
from vot_kernels.train.rewards.form import form
from vot_kernels.train.rewards.grounding import grounding, temporal
from vot_kernels.train.rewards.reading import Completion, with_options

__all__ = [
    "Completion",
    "accuracy",
    "consistency",
    "form",
    "grounding",
    "order_bonus",
    "temporal",
    "with_options",
]
