"""A video-language model without what others publish: adapters, projector and graph tokens, 12 MB in all.

A folder holds the configuration of the model, the record of its training, and adapters.safetensors in half precision.
The language model, with its tokenizer, is SmolLM2-135M-Instruct, and the encoder that of the bundled perception
checkpoint.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.reasoning.smollm2 import ensure_smollm2
from vot_kernels.train.checkpoint import newest_checkpoint, publish_folder
from vot_kernels.train.vlm.model import add_lora, build_model, part_of

FILE = "adapters.safetensors"
_PARTS = ("lora", "projector", "graph")
_HALVES = 4 * torch.finfo(torch.float16).eps
"""How far merged weights may lie from those of the run: both are rounded to half precision, at another place."""
_RECORDS = ("config.json", "generation_config.json", "training.json")


def export_adapters(run: Path, folder: Path, language_model: Path | None = None) -> None:
    """Write what a finished run of `vot train sft --text lora` on SmolLM2 has learnt in half precision, and its record.

    Args:
        run: folder of the run, with its last checkpoint and model/.
        folder: to write.
        language_model: as for `load_adapters`.

    Raises:
        FileNotFoundError: the run is not finished, or has no checkpoint.
        ValueError: it did not train adapters, or they are not all that its model has learnt.
    """
    record = run / "model" / "training.json"
    checkpoint = newest_checkpoint(run)
    if not record.is_file() or checkpoint is None:
        raise FileNotFoundError(
            f"{run} has no finished run of vot train sft, with its last checkpoint and model."
        )
    if "lora" not in json.loads(record.read_text(encoding="utf-8"))["trained"]:
        raise ValueError(f"{run} trained no adapters; its whole model is {run / 'model'}.")
    learnt = load_file(checkpoint / "model.safetensors")
    halves = {name.replace("/", "."): value.half() for name, value in learnt.items()}
    with publish_folder(folder) as draft:
        for name in _RECORDS:
            shutil.copyfile(run / "model" / name, draft / name)
        save_file(halves, draft / FILE, metadata={"format": "pt"})
        _check_whole(draft, run, language_model)


def _check_whole(folder: Path, run: Path, language_model: Path | None) -> None:
    """Check that adapters and language model make the model of the run: it may have begun with merged ones."""
    made, _ = load_adapters(folder, language_model)
    trained = load_file(run / "model" / "model.safetensors")
    for name, weight in made.state_dict().items():
        if name in trained and (weight - trained[name].float()).abs().max() > _HALVES * weight.abs().max():
            raise ValueError(
                f"{run} began with a model whose own adapters are merged into it, so what it learnt is not all: export "
                "the run before, and begin with that folder, whose adapters are trained on."
            )


def has_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters instead of a whole model."""
    return (folder / FILE).is_file()


def load_adapters(
    folder: Path, language_model: Path | None = None
) -> tuple[VotForConditionalGeneration, VotProcessor]:
    """Return the model of a folder that `export_adapters` wrote, in float32, with its adapters merged.

    Args, Raises: as for `load_adapted`.
    """
    adapted, processor = load_adapted(folder, language_model)
    return adapted.merge_and_unload().eval(), processor


def load_adapted(folder: Path, language_model: Path | None = None) -> tuple[Any, VotProcessor]:
    """Return the model of a folder that `export_adapters` wrote, in float32, with its adapters, and the processor.

    Args:
        folder: with adapters.safetensors.
        language_model: folder of SmolLM2-135M-Instruct; None fetches it once.

    Raises:
        ValueError: the file does not have the weights that the model needs.
    """
    model, processor = build_model("smollm2", BUNDLED_CHECKPOINT, 0, language_model or ensure_smollm2())
    adapted = add_lora(model, 0)
    _fill(adapted, load_file(folder / FILE), folder)
    return adapted, processor


@torch.no_grad()
def _fill(model: Any, learnt: Mapping[str, Tensor], folder: Path) -> None:
    wanted = {name: p for name, p in model.named_parameters() if part_of(name) in _PARTS}
    for name, parameter in wanted.items():
        if name not in learnt or learnt[name].shape != parameter.shape:
            raise ValueError(f"{folder / FILE} has no weights {name} of the shape {list(parameter.shape)}.")
        parameter.copy_(learnt[name])
    if extra := sorted({*learnt} - {*wanted}):
        raise ValueError(f"{folder / FILE} has weights that the model does not have, among them {extra[0]}.")
