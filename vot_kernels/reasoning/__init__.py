"""Video-of-Thought: reasoning over a scene graph with any language model, step by step."""

from vot_kernels.reasoning.llm import GenerateOnlyModel, HFLanguageModel, LanguageModel, LanguageModelError
from vot_kernels.reasoning.reasoning import VideoOfThought
from vot_kernels.reasoning.smollm2 import load_smollm2
from vot_kernels.reasoning.types import Answer, Evidence, Switches
from vot_kernels.reasoning.what_if import World

__all__ = [
    "Answer",
    "Evidence",
    "GenerateOnlyModel",
    "HFLanguageModel",
    "LanguageModel",
    "LanguageModelError",
    "Switches",
    "VideoOfThought",
    "World",
    "load_smollm2",
]
