"""The two language models of the video-language model, and which of its parts a stage trains."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.data.digitworld.traces import ask, summary_text, write_trace
from vot_kernels.data.digitworld.truth import VOCABULARY
from vot_kernels.extras import imports_for
from vot_kernels.models.checkpoint import load_checkpoint
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.vot import (
    PLACEHOLDERS,
    VotConfig,
    VotForConditionalGeneration,
    VotGraphConfig,
    VotProcessor,
    add_placeholders,
)
from vot_kernels.train.encoder.stage import caption
from vot_kernels.train.vlm.induction import begin_with_induction

LanguageModelName = Literal["nano", "smollm2"]
PARTS = {
    "encoder": "model.encoder.",
    "projector": "model.projector.",
    "graph": "model.graph.",
    "text": "model.language_model.",
}
"""The parts of the model and how the names of their parameters begin; "lora" are the adapters in the text."""

NANO_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 128**-0.5,
    "attention_bias": True,  # by which heads look back
    # Most rotations are so slow that a word in the graph resembles the same word in a question far behind it.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}
NUM_FRAMES = 4
_VOCABULARY_SIZE = 1024
_WORDS = r"<\|?/?[a-z_]+\|?>| ?[A-Za-z]+[0-9]*=?| ?@?[0-9]+(?:\.[0-9]+)?[:,]?|\n| ?[^ A-Za-z0-9\n<]+|<| "
_TOKENIZER_EPISODES = 150
_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
_LORA_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build_model(
    name: LanguageModelName, perception: Path, seed: int, language_model: Path | None = None
) -> tuple[VotForConditionalGeneration, VotProcessor]:
    """Return a new video-language model with the encoder of a perception checkpoint, and its processor.

    Args:
        name: "nano", a Llama of 0.9 M parameters with random weights and a tokenizer trained here, or "smollm2".
        perception: folder of a perception checkpoint.
        seed: seed of the new weights.
        language_model: folder of SmolLM2; needed for "smollm2" alone.
    """
    seen = load_checkpoint(VotPerceptionModel, perception)
    if name == "nano":
        tokenizer, whole = nano_tokenizer(), None
        text = _nano_config(tokenizer)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if language_model is None:
            raise ValueError("smollm2 needs the folder of its language model, got None.")
        source: dict[str, Any] = {"local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(language_model, **source)
        whole = AutoModelForCausalLM.from_pretrained(
            language_model, dtype=torch.float32, use_safetensors=True, **source
        )
        add_placeholders(tokenizer)
        text = whole.config
        text.vocab_size = max(len(tokenizer), text.vocab_size)
    image, video, graph = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
    config = VotConfig(
        vision_config=seen.config.encoder,
        text_config=text,
        graph_config=VotGraphConfig.for_vocabulary(VOCABULARY),
        image_token_id=image,
        video_token_id=video,
        graph_token_id=graph,
    )
    torch.manual_seed(seed)
    model = VotForConditionalGeneration.from_parts(config, seen.encoder, whole)
    if whole is None:
        begin_with_induction(model.model.language_model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = VotProcessor.for_model(
        config, tokenizer, num_frames=NUM_FRAMES, max_pixels=seen.config.max_pixels
    )
    return model, processor


def nano_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on the text of DigitWorld; the same in every run.

    An identifier, a number and a moment are one token each ("o1=", "47", "@12"): what a small model must find again in
    its prompt is then a single token, and what follows it the next.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words: Any = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>", *PLACEHOLDERS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left"
    )


def _texts() -> Iterator[str]:
    for index in range(_TOKENIZER_EPISODES):
        episode = generate_episode("train", index)
        yield from (caption(episode.stsg), summary_text(episode.stsg), episode.stsg.to_text(every=8))
        for question in episode.questions:
            yield f"user\n{ask(question.text, question.candidates)}"
            yield f"assistant\n{write_trace(question, episode.stsg, short=True)}"


def _nano_config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    tokens: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(vocab_size=len(tokenizer), **NANO_TEXT, **tokens)


def add_lora(model: VotForConditionalGeneration, seed: int) -> Any:
    """Return the model with LoRA adapters in the language model's linear layers.

    Raises:
        ImportError: peft is not installed.
    """
    with imports_for("LoRA", "rl"):
        from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules=_LORA_LAYERS, **_LORA))


def train_only(model: nn.Module, parts: Iterable[str]) -> nn.ParameterDict:
    """Make the parameters of `parts` trainable and all others not, and return the trainable ones by name.

    Args:
        model: the video-language model, or one with adapters.
        parts: keys of `PARTS`, or "lora".

    Raises:
        ValueError: a part is unknown, or the model has no parameter of it.
    """
    found: dict[str, nn.Parameter] = {}
    for part in parts:
        if part not in (*PARTS, "lora"):
            raise ValueError(f"A part must be one of {', '.join(PARTS)}, lora, got {part!r}.")
        names = {name: p for name, p in model.named_parameters() if part_of(name) == part}
        if not names:
            raise ValueError(f"This model has no parameters of the part {part!r}.")
        found |= names
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)
    return nn.ParameterDict({name.replace(".", "/"): p for name, p in found.items()})


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to; the head, where it is not the embedding, is text."""
    if ".lora_" in name:
        return "lora"
    return next((part for part, prefix in PARTS.items() if prefix in name), "text")


def check_trained(model: nn.Module, parts: Sequence[str]) -> None:
    """Check that exactly the parameters of `parts` are trained.

    Raises:
        RuntimeError: names the first parameter that should be trained and is not, or the other way round.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (part_of(name) in parts):
            state = "trained" if parameter.requires_grad else "not trained"
            raise RuntimeError(f"{name} is {state}, but the stage trains exactly {', '.join(parts)}.")


def save_half(model: Any, processor: Any, folder: Path) -> None:
    """Write fp16 safetensors, configurations and processor or tokenizer; the model keeps its own dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        half = type(model).from_pretrained(scratch, dtype=torch.float16)
    half.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_vlm(folder: Path) -> tuple[VotForConditionalGeneration, VotProcessor]:
    """Load a video-language model in float32, for inference, and its processor.

    A folder with adapters is joined with its language model, which is fetched once; see `load_adapters`.

    Raises:
        FileNotFoundError: the folder lacks a file that every checkpoint has.
        ValueError: it is another kind of checkpoint, or does not have all weights.
    """
    from vot_kernels.train.vlm.adapters import has_adapters, load_adapters

    if has_adapters(folder):
        return load_adapters(folder)
    model = load_checkpoint(VotForConditionalGeneration, folder)
    return model, VotProcessor.from_pretrained(folder, local_files_only=True)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts
