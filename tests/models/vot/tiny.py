"""A tiny video-language model with random weights, its processor, and a conversation for it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from vot_kernels.data.digitworld import VOCABULARY, generate_episode
from vot_kernels.models.encoder import VotEncoderConfig
from vot_kernels.models.vot import (
    PLACEHOLDERS,
    VotConfig,
    VotForConditionalGeneration,
    VotGraphConfig,
    VotProcessor,
)

VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "expert_rank": 8,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the placeholders and the marks of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", *PLACEHOLDERS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left"
    )


def tiny_config(text_config=None, vision=None, **options) -> VotConfig:
    """Return a configuration for `tiny_tokenizer`, by default with a Llama of two layers."""
    tokenizer = tiny_tokenizer()
    if text_config is None:
        text_config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    graph = VotGraphConfig.for_vocabulary(
        VOCABULARY, hidden_size=16, num_attention_heads=2, tokens_per_track=2
    )
    image, video, scene = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
    tokens = {"image_token_id": image, "video_token_id": video, "graph_token_id": scene}
    vision_config = VotEncoderConfig(**VISION | (vision or {}))
    return VotConfig(vision_config, text_config, graph_config=graph, **tokens | options)


def tiny_model(config: VotConfig | None = None) -> VotForConditionalGeneration:
    return VotForConditionalGeneration(config or tiny_config()).eval()


def tiny_processor(config: VotConfig | None = None) -> VotProcessor:
    return VotProcessor.for_model(config or tiny_config(), tiny_tokenizer())


def conversation(index=0, frames=4, text="what is it?", kinds=("video", "graph", "image")) -> list[dict]:
    """Return a message of a user about a DigitWorld clip, its scene graph and its first frame."""
    episode = generate_episode("train", index)
    clip = episode.frames()[:frames]
    shown = {"video": clip, "graph": episode.stsg, "image": clip[0]}
    parts = [{"type": kind, kind: shown[kind]} for kind in kinds]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prepare(processor: VotProcessor, *conversations: list[dict], **options):
    """Return the model's inputs for a batch of conversations."""
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True} | options,
    )
