"""Tiny random object detectors in folders, each with the processor of its family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from vot_kernels.testing import shifted

LABELS = {0: "person", 1: "bicycle", 2: "traffic light"}
_SIZE = {"height": 64, "width": 64}
_NAMES = {"id2label": LABELS, "label2id": {name: n for n, name in LABELS.items()}}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_QUERIES = {"d_model": 32, "num_queries": 12, "decoder_layers": 2, "decoder_attention_heads": 4}


def rt_detr() -> tuple[nn.Module, Any]:
    backbone = transformers.RTDetrResNetConfig(**_RESNET, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_ffn_dim=32,
        decoder_in_channels=[32, 32, 32],
        **_QUERIES,
        **_NAMES,
    )
    return transformers.RTDetrForObjectDetection(config), transformers.RTDetrImageProcessor(size=_SIZE)


def d_fine() -> tuple[nn.Module, Any]:
    backbone = transformers.HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        return_idx=[1, 2, 3],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_ffn_dim=32,
        decoder_in_channels=[32, 32, 32],
        decoder_n_points=[2, 2, 2],
        **_QUERIES,
        **_NAMES,
    )
    return transformers.DFineForObjectDetection(config), transformers.RTDetrImageProcessor(size=_SIZE)


def detr() -> tuple[nn.Module, Any]:
    backbone = transformers.ResNetConfig(**_RESNET, out_features=["stage4"])
    layers = {"encoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4}
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        **layers,
        **_QUERIES,
        **_NAMES,
    )
    size = {"shortest_edge": 64, "longest_edge": 64}
    return transformers.DetrForObjectDetection(config), transformers.DetrImageProcessor(size=size)


def _words(specials: tuple[str, ...], words: str) -> Tokenizer:
    vocabulary = {word: n for n, word in enumerate((*specials, *words.split()))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def owlv2() -> tuple[nn.Module, Any]:
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(("!", "[UNK]", "<end>"), "a red bicycle person car"),
        unk_token="[UNK]",
        pad_token="!",
        eos_token="<end>",
        model_max_length=8,
    )
    text = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    pictures = transformers.Owlv2ImageProcessor(size={"height": 32, "width": 32})
    return transformers.Owlv2ForObjectDetection(config), transformers.Owlv2Processor(pictures, words)


def grounding_dino() -> tuple[nn.Module, Any]:
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "."), "a red bicycle person car"),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    text = transformers.BertConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_ffn_dim=32,
        num_feature_levels=4,
        max_text_len=32,
        **_QUERIES,
    )
    size = {"shortest_edge": 64, "longest_edge": 64}
    pictures = transformers.GroundingDinoImageProcessor(size=size)
    return transformers.GroundingDinoForObjectDetection(config), transformers.GroundingDinoProcessor(
        pictures, words
    )


DETECTORS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "rt_detr": rt_detr,
    "d_fine": d_fine,
    "detr": detr,
    "owlv2": owlv2,
    "grounding_dino": grounding_dino,
}
ZERO_SHOT = ("owlv2", "grounding_dino")


def save(detector: str, folder: Path) -> Path:
    """Save a tiny detector and its processor."""
    torch.manual_seed(shifted(0))
    model, processor = DETECTORS[detector]()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
