"""Video-of-Thought: reasoning over a scene graph with any language model, step by step."""

from vot_kernels.vot.llm import GenerateOnlyModel, HFLanguageModel, LanguageModel, LanguageModelError
from vot_kernels.vot.reasoning import VideoOfThought
from vot_kernels.vot.smollm2 import load_smollm2
from vot_kernels.vot.types import Answer, Evidence, Switches

__all__ = [
    "Answer",
    "Evidence",
    "GenerateOnlyModel",
    "HFLanguageModel",
    "LanguageModel",
    "LanguageModelError",
    "Switches",
    "VideoOfThought",
    "load_smollm2",
]
