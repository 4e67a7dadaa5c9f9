"""Hybrid attention in vision towers of transformers: the frames of a clip as groups, the clips as segments.

A tower that attends within frames alone gets the other frames as its far part, with a weight that begins at 0, so that
it computes what it did until training lets them in. One that attends within clips gets a window of near frames, which
is cheaper and another function.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vot_kernels.nn.hybrid_attention import magnitude
from vot_kernels.ops.attention_options import FEATURE_MAPS, Window, window_sides
from vot_kernels.ops.checks import check_choice
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.packing import PackedLayout, brief

FAR_WEIGHT = "far_weight"
_LAYER = "_vot_kernels_hybrid"
_LAYOUT = "_vot_kernels_layout"


@dataclass(frozen=True)
class HybridOptions:
    """What `patch` was asked for; see there."""

    window: Window = 0
    far: float | str | None = "zero"
    layers: str | Sequence[int] = "all"
    feature_map: str = "softmax"
    frames: int | None = None

    def __post_init__(self) -> None:
        window_sides(self.window, None)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        number = isinstance(self.far, (int, float)) and not isinstance(self.far, bool) and self.far >= 0
        if not (number or self.far is None or self.far == "zero"):
            raise ValueError(f'far must be a weight >= 0, "zero" or None, got {brief(self.far)}.')
        whole = isinstance(self.layers, Sequence) and all(type(i) is int for i in self.layers)
        if self.layers != "all" and not (whole and self.layers):
            raise ValueError(f'layers must be "all" or indices, got {brief(self.layers)}.')
        if self.frames is not None and (type(self.frames) is not int or self.frames < 1):
            raise ValueError(f"frames must be a positive int or None, got {brief(self.frames)}.")


@dataclass
class Clips:
    """Which frames of the batch that a tower computes make a clip.

    Attributes:
        frames: frames of every clip; None if the tower is told by `grid_name`.
        grid_name: the argument of the tower's forward with frames, rows and columns of patches `[clips, 3]`.
        grid: what it was in the forward of now.
    """

    frames: int | None
    grid_name: str = ""
    grid: Any = field(default=None, repr=False)
    _rows: dict[tuple, PackedLayout] = field(default_factory=dict, repr=False)

    def note(self, tower: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """A forward pre-hook of the tower."""
        names = list(inspect.signature(type(tower).forward).parameters)[1:]
        self.grid = {**dict(zip(names, arguments, strict=False)), **keywords}.get(self.grid_name)

    @torch.compiler.disable
    def layout(self, cu_seqlens: Tensor | None, batch: int, rows: int, device: torch.device) -> PackedLayout:
        """The layout of a tower's tokens, made once per forward: by its cumulative lengths, or a frame a row."""
        if cu_seqlens is None:
            key = (batch, rows, device)
            if key not in self._rows:
                self._rows = {key: self._make([rows * i for i in range(batch + 1)], device)}
            return self._rows[key]
        if (found := getattr(cu_seqlens, _LAYOUT, None)) is None:
            found = self._make(cu_seqlens.tolist(), device)
            setattr(
                cu_seqlens, _LAYOUT, found
            )  # a checkpoint that computes a layer again has the same tensor
        return found

    def _make(self, bounds: list[int], device: torch.device) -> PackedLayout:
        if self.frames is not None:
            if (len(bounds) - 1) % self.frames:
                raise ValueError(
                    f"The batch must have whole clips of {self.frames} frames, got {len(bounds) - 1} frames."
                )
            return PackedLayout.from_cu_seqlens(bounds[:: self.frames], bounds, device=device)
        if self.grid is None:
            raise ValueError(f"The tower must be given {self.grid_name}: it says which frames make a clip.")
        grid = np.asarray(self.grid.tolist(), np.int64).reshape(-1, 3)
        sizes = grid[:, 1] * grid[:, 2]
        merged = max(1, int((grid[:, 0] * sizes).sum()) // max(1, bounds[-1]))  # patches to a token
        frames = np.repeat(sizes // merged, grid[:, 0])
        clips = np.cumsum([0, *(grid[:, 0] * sizes // merged)])
        groups = np.union1d(bounds, np.cumsum([0, *frames]))
        if groups[-1] != bounds[-1] or np.setdiff1d(clips, bounds).size:
            raise ValueError(
                f"{self.grid_name} {brief(grid.tolist())} does not fit the cumulative lengths {brief(bounds)}."
            )
        return PackedLayout.from_cu_seqlens(clips.tolist(), groups.tolist(), device=device)


@dataclass
class HybridLayer:
    """What makes an attention module hybrid; `attention_forward` finds it on the module."""

    clips: Clips
    window: Window
    feature_map: str

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        """Packed q, k and v to packed output, all `[tokens, heads, head_dim]`."""
        learned = getattr(module, FAR_WEIGHT, None)
        beta, weight = None, None
        if learned is None:
            beta = torch.full(q.shape[1:2], -torch.inf, device=q.device)
        else:
            weight = magnitude(learned)
        return hybrid_attention(
            q,
            k,
            v,
            layout,
            window=self.window,
            beta=beta,
            far_weight=weight,
            feature_map=self.feature_map,
            scale=scale,
        )


class HybridSite(NamedTuple):
    """An attention module that becomes hybrid, its tower, and what the tower knows of clips."""

    module: nn.Module
    tower: nn.Module
    clips: Clips


def layer_of(module: nn.Module) -> HybridLayer | None:
    """What makes a module hybrid, or None."""
    return getattr(module, _LAYER, None)


def grid_owner(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The innermost module around the module `name` that is told a grid of patches, and by which argument."""
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        names = inspect.signature(type(module).forward).parameters
        if found := next((n for n in names if n.endswith("grid_thw")), None):
            return module, found
    return None


def count_heads(module: nn.Module) -> int | None:
    """Query heads of an attention module of transformers."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(number := getattr(owner, name, None), int):
                return number
    return None


def attach(sites: Iterable[HybridSite], options: HybridOptions) -> None:
    """Have attention modules attend as `options` say; their far weights become parameters."""
    watched = set()
    for module, tower, clips in sites:
        if options.far is not None and options.window is not None:
            weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
            dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
            value = 0.0 if options.far == "zero" else float(options.far)
            heads = torch.full([count_heads(module) or 0], value, dtype=dtype, device=weight.device)
            module.register_parameter(FAR_WEIGHT, nn.Parameter(heads))
        setattr(module, _LAYER, HybridLayer(clips, options.window, options.feature_map))
        if id(tower) not in watched:
            tower.register_forward_pre_hook(clips.note, with_kwargs=True)
            watched.add(id(tower))


def undo(model: nn.Module) -> None:
    """Take everything of this file off a model."""
    for module in model.modules():
        if vars(module).pop(_LAYER, None) is not None:
            module._parameters.pop(FAR_WEIGHT, None)
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Clips)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
