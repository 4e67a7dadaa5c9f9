"""Vision towers of transformers with random weights: the widths of released models, with few layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks import counters
from benchmarks.core import Work
from benchmarks.problems.encoder import verified_clips

PATCHED = "patched"
Sizes = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Family:
    """A tower of transformers: its class, its sizes, and its arguments.

    Attributes:
        name: name for the reader.
        kind: its class in transformers.
        config: the sizes of a released model; other values are the defaults of transformers.
        patch: side of a patch in pixels.
        frames: video frames in one patch.
        rows: whether an image has its own row of a padded batch; otherwise the patches of all images are in one
            buffer.
        apart: whether every frame of a clip is given as an image.
        merged: number of patches for one row of the output.
        window: side of an attention window in patches, in all layers but the last; None for no windows.
        projector: the part that serves only the language model after the tower; it is left out.
    """

    name: str
    kind: str
    config: dict[str, Any]
    patch: int
    frames: int = 2
    rows: bool = False
    apart: bool = False
    merged: int = 1
    window: int | None = None
    projector: str | None = "merger"


FAMILIES = {
    72: Family(
        "Qwen3-VL",
        "Qwen3VLVisionModel",
        {"hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "deepstack_visual_indexes": []},
        patch=16,
    ),
    80: Family(
        "Qwen2.5-VL",
        "Qwen2_5_VisionTransformerPretrainedModel",
        {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 112},
        patch=14,
        window=8,
    ),
    64: Family(
        "SigLIP2",
        "Siglip2VisionModel",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vision_use_head": False},
        patch=16,
        frames=1,
        rows=True,
        apart=True,
        projector=None,
    ),
    # The inner width of its layers is out_hidden_size; intermediate_size is the projector's.
    128: Family(
        "GLM-4.1V",
        "Glm4vVisionModel",
        {"hidden_size": 1536, "num_heads": 12, "out_hidden_size": 4096, "intermediate_size": 16},
        patch=14,
        apart=True,
        merged=4,
    ),
}
"""By the size of a head."""

_UNSEEN = "k_proj.bias"  # its gradient is rounding only, which nobody can compute correctly
_NARROW = {"intermediate_size": 48, "out_hidden_size": 32, "num_patches": 16, "num_position_embeddings": 16}


@dataclass(frozen=True)
class Tower:
    """A tower on images or clips; inputs are the patches `[patches, values]`, then all parameters.

    The output is `[patches / merged, width]` for the images in turn, without padding.

    Attributes:
        head_dim: the key of `FAMILIES`.
        sizes: (frames, height, width) of each image or clip, the sides in patches, even.
        layers: number of layers, as in the model itself but fewer.
        heads: number of heads; None for that of the released model.
    """

    head_dim: int
    sizes: Sizes
    layers: int = 2
    heads: int | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.head_dim]

    @property
    def op(self) -> str:
        return f"{self.family.name} tower"

    @property
    def ops(self) -> tuple[str, ...]:
        """The GPU tests that must be green before a patched tower is timed."""
        return ("flash_attention",)

    @property
    def grid(self) -> Sizes:
        """`sizes` with the frames of one patch counted as one."""
        return tuple((-(-t // self.family.frames), y, x) for t, y, x in self.sizes)

    @property
    def lengths(self) -> list[int]:
        """The number of patches of each image or clip."""
        return [prod(sides) for sides in self.grid]

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def describe(self) -> str:
        frames = max(t for t, _, _ in self.sizes)
        what = f"{len(self.sizes)} images" if frames == 1 else f"a clip of {frames} frames"
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        rows = ", a row for each image" if self.family.rows else ""
        return (
            f"{layers} of {self.family.name}, heads of {self.head_dim}, {what}, {self.size:,} patches{rows}"
        )

    def config(self) -> Any:
        """Return the config of transformers.

        Raises:
            ImportError: transformers is not installed.
        """
        import transformers

        family = self.family
        kind = getattr(transformers, family.kind).config_class
        known = kind().to_dict()
        heads, layers = (
            ("num_heads", "depth") if "depth" in known else ("num_attention_heads", "num_hidden_layers")
        )
        sizes = {**family.config, layers: self.layers, "patch_size": family.patch}
        if family.window:
            sizes["fullatt_block_indexes"] = [self.layers - 1]
        if self.heads is not None:
            sizes |= {name: size for name, size in _NARROW.items() if name in known}
            sizes |= {heads: self.heads, "hidden_size": self.heads * self.head_dim}
        return kind(**sizes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by name, without biases of keys, which softmax cancels."""
        model = _model(self.head_dim, self.layers, self.heads, "eager", torch.device("cpu"))
        parameters = model.named_parameters()
        return {name: tuple(p.shape) for name, p in parameters if not name.endswith(_UNSEEN)}

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return patches and weights scaled so that activations keep their size and attention is far from uniform."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(self.size, 3 * self.family.frames * self.family.patch**2, generator=generator)
        weights = []
        for name, shape in self.shapes().items():
            noise = torch.randn(shape, generator=generator)
            spread = 0.1 if len(shape) == 1 else prod(shape[1:]) ** -0.5
            weights.append(spread * noise + (len(shape) == 1 and not name.endswith("bias")))
        return tuple(x.to(device, dtype) for x in (pixels, *weights))

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Return all rows of the images in `verified`."""
        if len(self.verified) == len(self.sizes):
            return None
        begins = list(accumulate((n // self.family.merged for n in self.lengths), initial=0))
        rows = [torch.arange(begins[i], begins[i + 1]) for i in self.verified]
        return torch.cat(rows).to(inputs[0].device)

    @property
    def verified(self) -> list[int]:
        """The images that are verified, ascending; no other image influences them."""
        return verified_clips(self.lengths)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """Compute every image alone, by the plain attention of transformers."""
        pixels, *weights = inputs
        parts = pixels.split(self.lengths)
        alone = []
        for i in self.verified if rows is not None else range(len(self.sizes)):
            one = replace(self, sizes=(self.sizes[i],))
            alone.append(apply(one, "eager", one.arguments(pixels.device), parts[i], *weights))
        return torch.cat(alone)

    def small(self) -> "Tower":
        """Return two heads of the same size, on at most eight images, each a few patches large."""
        largest = max(max(sides) for _, *sides in self.sizes)

        def few(patches: int) -> int:
            return max(2, 2 * round(3 * patches / largest))

        frames = 2 * self.family.frames
        sizes = tuple((min(t, frames), few(y), few(x)) for t, y, x in self.sizes[:8])
        return replace(self, sizes=sizes, heads=2)

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of the tower besides patches."""
        frames = [(1, y, x) for t, y, x in self.grid for _ in range(t)]
        grid = torch.tensor(frames if self.family.apart else self.grid)
        if not self.family.rows:
            return {"grid_thw": grid.to(device)}
        shapes = grid[:, 1:]
        lengths = shapes.prod(1)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"pixel_attention_mask": mask.long().to(device), "spatial_shapes": shapes.to(device)}

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.tower(self, direction, itemsize)


def apply(
    problem: Tower, attention: str, arguments: dict[str, Tensor], pixels: Tensor, *weights: Tensor
) -> Tensor:
    """Return the output of a tower with these weights, differentiable in them.

    `attention` is the name of an implementation in transformers, or `PATCHED`.
    """
    model = _model(problem.head_dim, problem.layers, problem.heads, attention, pixels.device)
    parameters = dict(zip(problem.shapes(), weights, strict=True))
    if not problem.family.rows:
        return torch.func.functional_call(model, parameters, (pixels,), arguments).last_hidden_state
    lengths = arguments["spatial_shapes"].prod(1).tolist()
    batch = pad_sequence(pixels.split(lengths), batch_first=True)
    out = torch.func.functional_call(model, parameters, (batch,), arguments).last_hidden_state
    return out[arguments["pixel_attention_mask"].bool()]


@cache
def _model(head_dim: int, layers: int, heads: int | None, attention: str, device: torch.device) -> nn.Module:
    """Return a tower whose weights take no memory, because every call brings its own."""
    import transformers

    import vot_kernels

    problem = Tower(head_dim, ((1, 2, 2),), layers, heads)
    kind = getattr(transformers, problem.family.kind)
    implementation = "sdpa" if attention == PATCHED else attention
    with device:
        model = kind._from_config(problem.config(), attn_implementation=implementation).eval()
    if problem.family.projector:
        setattr(model, problem.family.projector, nn.Identity())
    if attention == PATCHED:
        vot_kernels.patch(model, padding=not problem.family.rows)
    for path, parameter in list(model.named_parameters()):
        owner, _, name = path.rpartition(".")
        kept = None if path.endswith(_UNSEEN) else nn.Parameter(parameter.to("meta"))
        setattr(model.get_submodule(owner), name, kept)
    return model
