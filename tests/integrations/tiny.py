"""Small random models of transformers and their inputs."""

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from vot_kernels.testing import shifted

IMAGE, VIDEO, START = 90, 91, 92
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def qwen2(**changes) -> nn.Module:
    return spread(Qwen2ForCausalLM(Qwen2Config(**TEXT | changes)))


def qwen2_5_vl() -> nn.Module:
    vision = VISION | {"fullatt_block_indexes": [1], "window_size": 56}
    text = TEXT | {"rope_parameters": ROPE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_end_token_id=93, **TOKENS)
    return spread(Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> nn.Module:
    vision = VISION | {"deepstack_visual_indexes": [0], "patch_size": 14}
    text = TEXT | {"rope_parameters": ROPE, "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, vision_end_token_id=93, **TOKENS)
    return spread(Qwen3VLForConditionalGeneration(config))


VISION_LANGUAGE = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def spread(model: nn.Module) -> nn.Module:
    """Return it in evaluation mode, with weights so large that attention is far from uniform."""
    torch.manual_seed(shifted(0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


def image_and_text() -> dict:
    """Two prompts with an image each, the first shorter and padded on the left; the images differ in size."""
    torch.manual_seed(shifted(1))
    grids = torch.tensor([[1, 4, 4], [1, 8, 4]])
    patches = int(grids.prod(1).sum())
    rows = [
        [0] * 4 + [5, START, *[IMAGE] * 4, 93, 7, 8],
        [5, START, *[IMAGE] * 8, 93, 9, 6],
    ]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14),
        "image_grid_thw": grids,
    }


def video_and_text(kind: str) -> dict:
    """A prompt with a clip of four frames, two to a patch in time; each model has its own marks around frames."""
    torch.manual_seed(shifted(3))
    if kind == "qwen3_vl":  # a run of video tokens for each place in time
        clip, more = [START, *[VIDEO] * 4, 93] * 2, {}
    else:
        clip, more = [START, *[VIDEO] * 8, 93], {"second_per_grid_ts": torch.tensor([1.0])}
    ids = torch.tensor([[5, *clip, 7, 8, 9]])
    return more | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": torch.randn(32, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


def prompts(*lengths: int) -> torch.Tensor:
    torch.manual_seed(shifted(2))
    return torch.randint(1, 80, lengths)
