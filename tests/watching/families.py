"""Tiny random video-language models in folders, each with a real tokenizer and the processor of its family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from vot_kernels.testing import shifted

TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SMOL = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<video>")
INTERN = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
LLAVA = ("<image>", "<video>")
# What the prompts say, so that the tokenizer has words of it.
CORPUS = [
    "Question: Which kind of question is this? Reply with one of: yes/no, count, direction, attribute, which, order.",
    "Objects: What happens in the video: Thought: Proposed answer: How likely is it right? Rate it from 1 to 10.",
    "Frames 0 to 15 of the video are at 0.00, 0.12, 0.25, 0.38, 0.50, 0.62, 0.75, 0.88, 1.00, 1.50, 2.00 s.",
    "Before answering, say in one sentence what the objects in question do and why. Answer in a few words.",
]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(image: str, video: str) -> str:
    """The chat template of Qwen with the marks of another family."""
    marks = f"{{% if c.type == 'image' %}}{image}{{% else %}}{video}{{% endif %}}"
    return QWEN_TEMPLATE.replace("<|vision_start|><|{{ c.type }}_pad|><|vision_end|>", marks)


def tokenizer(special: tuple[str, ...], **named: str) -> Any:
    """A byte-level BPE that knows some words of our prompts and the special tokens of a family."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*TURNS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named or list(special),
    )


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": 0,
    } | changes


_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def _qwen_tokens(words: Any) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    return {f"{name}_token_id": words.convert_tokens_to_ids(t) for name, t in zip(names, QWEN, strict=True)}


def _pixels(patch: int) -> dict[str, Any]:
    side = 2 * patch
    return {"size": {"shortest_edge": side * side, "longest_edge": side * side * 64}, "patch_size": patch}


def qwen2_vl() -> tuple[nn.Module, Any]:
    words = tokenizer(QWEN)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=_text(rope_parameters=_ROPE), vision_config=vision, **_qwen_tokens(words)
    )
    pictures = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    films = transformers.Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    processor = transformers.Qwen2VLProcessor(pictures, words, films, chat_template=QWEN_TEMPLATE)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[nn.Module, Any]:
    words = tokenizer(QWEN)
    vision = _TOWER | {"fullatt_block_indexes": [1], "window_size": 56, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=_ROPE), vision_config=vision, **_qwen_tokens(words)
    )
    pictures = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    films = transformers.Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)
    processor = transformers.Qwen2_5_VLProcessor(pictures, words, films, chat_template=QWEN_TEMPLATE)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_processor(words: Any) -> Any:
    pictures = transformers.Qwen2VLImageProcessor(**_pixels(16))
    films = transformers.Qwen3VLVideoProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64})
    plain = QWEN_TEMPLATE.replace("<|vision_start|><|{{ c.type }}_pad|><|vision_end|>", "{{ MARK }}")
    marks = "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}<|video_pad|>{% endif %}"
    return transformers.Qwen3VLProcessor(
        pictures, words, films, chat_template=plain.replace("{{ MARK }}", marks)
    )


def qwen3_vl() -> tuple[nn.Module, Any]:
    words = tokenizer(QWEN)
    vision = _TOWER | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "patch_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config=_text(rope_parameters=_ROPE, head_dim=8), vision_config=vision, **_qwen_tokens(words)
    )
    return transformers.Qwen3VLForConditionalGeneration(config), _qwen3_processor(words)


def qwen3_5() -> tuple[nn.Module, Any]:
    words = tokenizer(QWEN)
    text = _text(
        rope_parameters=_ROPE,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    vision = _TOWER | {"out_hidden_size": 32, "patch_size": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **_qwen_tokens(words))
    return transformers.Qwen3_5ForConditionalGeneration(config), _qwen3_processor(words)


def smolvlm2() -> tuple[nn.Module, Any]:
    words = tokenizer(SMOL)
    text = _text(model_type="llama")
    config = transformers.SmolVLMConfig(
        text_config=text,
        vision_config=_SIGLIP,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    small = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}
    pictures = transformers.SmolVLMImageProcessor(**small, do_image_splitting=False)
    sampling = {"max_frames": 64, "fps": 1, "video_size": {"longest_edge": 28}}
    films = transformers.SmolVLMVideoProcessor(**small, video_sampling=sampling)
    marks = template("<image>", "<video>")
    processor = transformers.SmolVLMProcessor(pictures, words, films, image_seq_len=4, chat_template=marks)
    return transformers.SmolVLMForConditionalGeneration(config), processor


def internvl() -> tuple[nn.Module, Any]:
    named = dict(
        zip(
            ("start_image_token", "end_image_token", "context_image_token", "video_token"),
            INTERN,
            strict=True,
        )
    )
    words = tokenizer(INTERN, **named)
    vision = _SIGLIP | {"image_size": [28, 28], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        text_config=_text(model_type="qwen2"),
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    size = {"height": 28, "width": 28}
    pictures = transformers.GotOcr2ImageProcessor(size=size)
    films = transformers.InternVLVideoProcessor(size=size)
    marks = template("<IMG_CONTEXT>", "<video>")
    processor = transformers.InternVLProcessor(
        pictures, words, films, image_seq_length=4, chat_template=marks
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def llava_onevision() -> tuple[nn.Module, Any]:
    words = tokenizer(LLAVA)
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(model_type="qwen2"),
        vision_config=_SIGLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 28], [28, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    size = {"height": 28, "width": 28}
    pictures = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 28], [28, 56]])
    films = transformers.LlavaOnevisionVideoProcessor(size=size)
    processor = transformers.LlavaOnevisionProcessor(
        pictures,
        words,
        films,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def video_llama_3() -> tuple[nn.Module, Any]:
    words = tokenizer(QWEN)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VideoLlama3Config(
        text_config=_text(model_type="qwen2"),
        vision_config=vision | {"patch_size": 14},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
    )
    small = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 16}
    pictures = transformers.VideoLlama3ImageProcessor(**small)
    films = transformers.VideoLlama3VideoProcessor(**small)
    marks = template("<|image_pad|>", "<|video_pad|>")
    processor = transformers.VideoLlama3Processor(pictures, words, films, chat_template=marks)
    return transformers.VideoLlama3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "smolvlm2": smolvlm2,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "video_llama_3": video_llama_3,
}


def save(family: str, folder: Path) -> Path:
    """Save a family's tiny model, with weights so large that its replies differ, and its processor."""
    model, processor = FAMILIES[family]()
    torch.manual_seed(shifted(0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
