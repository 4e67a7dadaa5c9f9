"""The video-language model, and its registration with the Auto classes of transformers.

After `import vot_kernels.models.vot`, `AutoConfig`, `AutoModelForImageTextToText` and `AutoProcessor` load its folders.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vot_kernels.models.vot.configuration import VotConfig, VotGraphConfig
from vot_kernels.models.vot.modeling import VotForConditionalGeneration, VotModel, VotStream
from vot_kernels.models.vot.processing import CHAT_TEMPLATE, PLACEHOLDERS, VotProcessor, add_placeholders

AutoConfig.register("vot", VotConfig, exist_ok=True)
AutoModelForImageTextToText.register(VotConfig, VotForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VotConfig, VotProcessor, exist_ok=True)

__all__ = [
    "CHAT_TEMPLATE",
    "PLACEHOLDERS",
    "VotConfig",
    "VotForConditionalGeneration",
    "VotGraphConfig",
    "VotModel",
    "VotProcessor",
    "VotStream",
    "add_placeholders",
]
