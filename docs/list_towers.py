"""Every vision tower of the installed transformers on `vot_kernels.patch`: writes the table of docs/towers.md.

Nothing is listed by hand. A walk over the model files finds the towers, each is built small with random weights, and
its outputs and gradients with and without the patch are compared. `python docs/list_towers.py` rewrites the table.
"""

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import listing
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import vot_kernels
from vot_kernels.integrations import attention

PAGE = Path(__file__).with_name("towers.md")
OUTPUT, GRADIENT = 2e-5, 2e-4  # errors allowed, relative to the largest number
MARK = "towers"
PACKED, PADDED = "packed", "rows"
GRID = [[1, 4, 8], [3, 8, 4]]  # frames, rows and columns of patches: an image and a clip

# Sizes of a small model, wherever a config has the name and a number.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers", "encoder_layers", "insert_layer_id"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "projection_hidden_dim", "adapter_in_dim"), 64),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(
        ("out_hidden_size", "text_hidden_size", "adapter_out_dim", "projection_intermediate_size"), 32
    ),
    **{"head_dim": 32, "num_local_experts": 4, "patch_size": 4, "window_size": 16, "image_size": 32},
    **{"insert_layer_id": 0, "posemb_grid_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "crop_size": 32},
    **{
        "num_position_embeddings": 64,
        "max_position_embeddings": 64,
        "pred_hidden_size": 64,
        "frames_per_clip": 4,
    },
    **{"num_frames": 4, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "max_image_size": 32},
    **{"decoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_intermediate_size": 32},
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "layer_types": ["conv", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "per_layer_config": {},
}


@dataclass(frozen=True)
class Tower:
    """A vision tower: the family's folder in transformers, its class, and how images lie in its batches."""

    family: str
    kind: type[PreTrainedModel]
    layout: str

    @property
    def name(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True)
class Finding:
    """What came of a tower: "exact", "refused" by the patch, "not built" here, or "wrong"."""

    status: str
    reason: str = ""


def towers() -> list[Tower]:
    """The towers of the installed transformers."""
    return [*packed_towers(), *padded_towers()]


@cache
def packed_towers() -> tuple[Tower, ...]:
    """Models that cut a buffer of patches into images: those with cumulative lengths for their attention."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "cu_seq_lens_q=" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for kind in vars(module).values():
            if not (inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and "forward" in vars(kind)):
                continue
            code = inspect.unwrap(kind.forward).__code__
            cuts = any("seqlens" in name or "grid_thw" in name for name in code.co_names + code.co_varnames)
            if kind.__module__ == module.__name__ and cuts and takes_pixels(kind):
                found.append(Tower(path.parent.name, kind, PACKED))
    return tuple(sorted(found, key=lambda tower: (tower.family, tower.name)))


@cache
def padded_towers() -> tuple[Tower, ...]:
    """Transformers over patches among the auto classes, with a row of a batch for an image or a clip."""
    packed = {tower.kind for tower in packed_towers()}
    found = []
    for names in MODEL_MAPPING_NAMES.values():
        kind = getattr(transformers, names if isinstance(names, str) else names[0], None)
        if not inspect.isclass(kind) or kind in packed or not issubclass(kind, PreTrainedModel):
            continue
        looks_up = "ALL_ATTENTION_FUNCTIONS" in vars(importlib.import_module(kind.__module__))
        if looks_up and takes_pixels(kind) and hasattr(kind.config_class, "patch_size"):
            found.append(Tower(kind.__module__.split(".")[2], kind, PADDED))
    return tuple(sorted(found, key=lambda tower: (tower.family, tower.name)))


def takes_pixels(kind: type[PreTrainedModel]) -> bool:
    """Whether patches or pixels are the first thing that a model takes, and no text is."""
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return bool(names) and names[0].startswith(("pixel_values", "hidden_states")) and "input_ids" not in names


def small_config(kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """The default config of a model, but small."""
    config_class = kind.config_class
    default = config_class().to_dict()
    general = PreTrainedConfig().to_dict()
    changes = {
        name: fitting(name, default[name], default)
        for name in SMALL
        if default.get(name) is not None and name not in general
    }
    return config_class(**changes)


def fitting(name: str, value: Any, config: dict[str, Any]) -> Any:
    """The small value in the form that the config has: a number, one per side, or one per layer."""
    small = SMALL[name]
    if name == "layer_types":
        return [value[0], "full_attention"]
    if isinstance(value, (list, tuple)) and isinstance(small, int):
        return type(value)([small] * len(value))
    return small


def build(tower: Tower) -> PreTrainedModel:
    """A small one in evaluation mode, its weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    config = small_config(tower.kind)
    model = tower.kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    return model


def inputs_of(tower: Tower, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What the model may take, the likeliest first; the first that it runs with is used."""
    config, parameters = model.config, list(inspect.signature(tower.kind.forward).parameters)[1:]
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    patch = getattr(config, "patch_size", 4)
    patch = patch if isinstance(patch, int) else patch[0]
    time = next(
        (getattr(config, n) for n in ("temporal_patch_size", "patch_temporal") if hasattr(config, n)), 1
    )
    torch.manual_seed(1)
    if tower.layout == PACKED and "image_sizes" in parameters:
        sizes = [[4 * patch, 8 * patch], [8 * patch, 4 * patch]]
        yield {
            parameters[0]: torch.randn(2, channels, 8 * patch, 8 * patch),
            "image_sizes": torch.tensor(sizes),
        }
    elif tower.layout == PACKED and "target_sizes" in parameters:
        sizes = torch.tensor([[4, 8], [8, 4]])
        yield {parameters[0]: torch.randn(1, channels, patch, 64 * patch), "target_sizes": sizes}
    elif tower.layout == PACKED:
        merge = getattr(config, "spatial_merge_size", 1)
        [name] = [name for name in parameters if name.endswith("grid_thw")]
        for grid in (torch.tensor(GRID), torch.tensor(GRID).index_fill(1, torch.tensor(0), 1)):
            for shape in shapes(int(grid.prod(1).sum()), channels, patch, time, merge):
                inputs = {parameters[0]: torch.randn(shape), name: grid}
                yield inputs | ({"merge_sizes": torch.tensor([2, 2])} if "merge_sizes" in parameters else {})
    else:
        size = getattr(config, "image_size", None) or getattr(config, "crop_size", 32)
        size = size if isinstance(size, int) else size[0]
        mask = torch.ones(2, 4, 4, dtype=torch.bool)
        mask[1, 2:] = False
        grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
        described = {
            "pixel_attention_mask": mask.flatten(1).int(),
            "spatial_shapes": torch.tensor([[4, 4], [2, 4]]),
            "pixel_position_ids": grid.where(mask.flatten(1)[..., None], -1),
        }
        padded = {name: value for name, value in described.items() if name in parameters}
        if padded:  # patches of images of several sizes, the second padded
            yield {parameters[0]: torch.randn(2, 16, channels * patch * patch), **padded}
        if "patch_attention_mask" in parameters:
            yield {
                parameters[0]: torch.randn(2, channels, 4 * patch, 4 * patch),
                "patch_attention_mask": mask,
            }
        yield {parameters[0]: torch.randn(2, channels, size, size)}
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
        yield {parameters[0]: torch.randn(2, frames, channels, size, size)}
        yield {parameters[0]: torch.randn(2, channels, frames, size, size)}


def shapes(patches: int, channels: int, patch: int, time: int, merge: int) -> Iterator[tuple[int, ...]]:
    """Shapes of a buffer of patches."""
    yield patches, channels * time * patch * patch
    yield patches, channels * patch * patch
    yield patches, channels, patch, patch
    yield patches, channels, time, patch, patch
    yield 1, patches, channels, patch, patch
    yield patches, merge * patch, merge * patch, channels  # what is merged to one token


def examine(tower: Tower) -> Finding:
    """Build a tower, and compare it patched and not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(tower)
        except Exception as error:
            return Finding("not built", brief(error))
        inputs, error = None, None
        for candidate in inputs_of(tower, model):
            try:
                with torch.no_grad():
                    model(**candidate)
                inputs = candidate
                break
            except Exception as caught:
                error = error or caught
        if inputs is None:
            return Finding("not built", brief(error))
        return compare(model, inputs)


def compare(model: nn.Module, inputs: dict[str, Any]) -> Finding:
    """The same numbers with and without the patch, and really by our function, once per layer."""
    expected, gradients = run(model, inputs)
    keys = list(model.state_dict())
    try:
        with counted() as calls, vot_kernels.patched(model) as report:
            found, found_gradients = run(model, inputs)
            if list(model.state_dict()) != keys:
                return Finding("wrong", "the keys of its state_dict change")
    except ValueError as error:
        return Finding("refused", str(error).rpartition(" and found ")[2] or str(error))
    layers = [row for row in report.replaced if row.after == "flash_attn_varlen_func"]
    if len(calls) > len(layers) or len(layers) > 0 == len(calls):
        return Finding("wrong", f"{len(calls)} calls for {len(layers)} modules")
    errors = [listing.relative(a, b) for a, b in zip(found, expected, strict=True)]
    largest = max(g.abs().max().item() for g in gradients.values() if g.numel())
    slopes = [
        listing.relative(found_gradients[name], gradient, 1e-3 * largest)
        for name, gradient in gradients.items()
    ]
    if max(errors) > OUTPUT or max(slopes) > GRADIENT:
        return Finding("wrong", f"outputs differ by {max(errors):.0e}, gradients by {max(slopes):.0e}")
    again, _ = run(model, inputs)
    if not all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)):
        return Finding("wrong", "it is another model after unpatch")
    left = "; ".join(dict.fromkeys(f"{row.kind} stays: {row.reason}" for row in report.left))
    return Finding("exact" if layers else "refused", left)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The tokens of every call of our function."""
    calls: list[int] = []
    op: Callable[..., Tensor] = attention.flash_attn_varlen_func

    def recorded(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(q.shape[0])
        return op(q, *arguments, **options)

    attention.flash_attn_varlen_func = recorded
    try:
        yield calls
    finally:
        attention.flash_attn_varlen_func = op


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of a sum of them by every parameter and the pixels."""
    first = next(iter(inputs))
    leaf = inputs[first].clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    outputs = [x for x in tensors(model(**inputs | {first: leaf})) if x.requires_grad]
    torch.manual_seed(3)
    sum((x * torch.randn(x.shape)).sum() / x.abs().max().detach().clamp(min=1e-3) for x in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients | {"pixels": leaf.grad}


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of a nested output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def brief(error: BaseException | None) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:90].strip() if lines else ''}"


def table(findings: dict[Tower, Finding]) -> list[str]:
    """The rows of the table, one per tower."""
    return [
        f"| {t.family} | `{t.name}` | {t.layout} | {found.status} | {found.reason.replace('|', '/')} |"
        for t, found in findings.items()
    ]


def lines(rows: list[str]) -> list[str]:
    """The rows as a table, below the version of transformers that it is about."""
    version = f"transformers {transformers.__version__}: {listing.statuses(rows, 3)}."
    return [version, "", *listing.table(["family", "tower", "images are", "status", "notes"], rows)]


if __name__ == "__main__":
    listing.write(PAGE, MARK, lines(table({tower: examine(tower) for tower in towers()})))
