"""The memory-bound ops of an encoder at one size, one class per op."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import counters
from benchmarks.core import Work
from vot_kernels.ops.dense_residual.reference import dense_residual as dense_residual_reference
from vot_kernels.ops.dense_residual.reference import dense_residual_norm as dense_residual_norm_reference
from vot_kernels.ops.pack_patches.reference import pack_patches as pack_patches_reference
from vot_kernels.ops.rope_qk_norm import default_sections
from vot_kernels.ops.rope_qk_norm.reference import rope_qk_norm as rope_qk_norm_reference
from vot_kernels.ops.size_aware_embedding import size_features
from vot_kernels.ops.size_aware_embedding.reference import (
    size_aware_embedding as size_aware_embedding_reference,
)
from vot_kernels.packing import PackedLayout

ROWS = 512  # rows that are verified at full size
ALL_ROWS = 2048  # up to this number, all rows are verified

Grid = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class DenseResidual:
    """Weighted sum of `states` tensors `[tokens, width]`; inputs are the states, then the weights."""

    tokens: int
    width: int = 768
    states: int = 8

    @property
    def op(self) -> str:
        return "dense_residual"

    @property
    def size(self) -> int:
        return self.tokens

    def describe(self) -> str:
        return f"{self.states} states of {self.tokens:,} × {self.width:,}"

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return contiguous states in one buffer, as DenseFormer stores them, and float32 weights."""
        normal = _normal(device, seed)
        stored = normal((self.states, self.tokens, self.width), dtype)
        return *stored.unbind(), normal((self.states,), torch.float32)

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        return spread_rows(self.tokens, inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        *states, weights = inputs
        return dense_residual_reference([_at(state, rows) for state in states], weights)

    def small(self) -> "DenseResidual":
        return replace(self, tokens=40, width=24)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.dense_residual(self, direction, itemsize)


@dataclass(frozen=True)
class DenseResidualNorm(DenseResidual):
    """The weighted sum and its RMS norm; inputs are the states, their weights and the norm's weight."""

    eps: float = 1e-6

    def describe(self) -> str:
        return f"{super().describe()}, with the norm"

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        norm = 1 + _normal(device, seed + 1)((self.width,), torch.float32, 0.1)
        return *super().inputs(dtype, device, seed), norm

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        *states, weights, norm = inputs
        return dense_residual_norm_reference([_at(state, rows) for state in states], weights, norm, self.eps)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.dense_residual_norm(self, direction, itemsize)


@dataclass(frozen=True)
class RopeQkNorm:
    """Queries and keys of one layer for clips of `grid` patches; inputs are q, k and the two norm weights."""

    grid: Grid
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    theta: float = 100.0
    eps: float = 1e-6

    @property
    def op(self) -> str:
        return "rope_qk_norm"

    @property
    def size(self) -> int:
        return sum(t * y * x for t, y, x in self.grid)

    @property
    def sections(self) -> list[int]:
        """Channel pairs of t, y and x."""
        return default_sections(self.head_dim // 2)

    def describe(self) -> str:
        return f"{self.size:,} tokens, {self.heads} + {self.kv_heads} heads of {self.head_dim}"

    def layout(self, device: torch.device | str = "cpu") -> PackedLayout:
        """Build the packing anew."""
        return PackedLayout.from_grid_thw(self.grid, device=device)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        normal = _normal(device, seed)
        q, k = (normal((self.size, heads, self.head_dim), dtype) for heads in (self.heads, self.kv_heads))
        return q, k, *(1 + normal((self.head_dim,), dtype, 0.1) for _ in range(2))

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        return spread_rows(self.size, inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, q_weight, k_weight = inputs
        options = {"theta": self.theta, "sections": self.sections, "eps": self.eps}
        return rope_qk_norm_reference(
            _at(q, rows),
            _at(k, rows),
            _at(self.layout(q.device).positions, rows),
            q_weight=q_weight,
            k_weight=k_weight,
            **options,
        )

    def small(self) -> "RopeQkNorm":
        return replace(
            self, grid=((2, 3, 4), (1, 1, 1), (1, 5, 2)), heads=max(1, self.heads // 6), kv_heads=1
        )

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.rope_qk_norm(self, direction, itemsize)


@dataclass(frozen=True)
class SizeAwareEmbedding:
    """Images of `grid` patches, `width` wide; inputs are x and the weights of the two layers."""

    grid: Grid
    width: int = 768
    hidden: int = 48
    octaves: int = 4

    @property
    def op(self) -> str:
        return "size_aware_embedding"

    @property
    def size(self) -> int:
        return sum(t * y * x for t, y, x in self.grid)

    def describe(self) -> str:
        return f"{self.size:,} tokens of {len(self.grid):,} images, {self.width:,} wide"

    def layout(self, device: torch.device | str = "cpu") -> PackedLayout:
        """Build the packing anew."""
        return PackedLayout.from_grid_thw(self.grid, device=device)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        normal = _normal(device, seed)
        features = 12 * self.octaves
        return (
            normal((self.size, self.width), dtype),
            normal((self.hidden, features), dtype, features**-0.5),
            normal((self.hidden,), dtype, 0.1),
            normal((self.width, self.hidden), dtype, self.hidden**-0.5),
            normal((self.width,), dtype, 0.1),
        )

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        return spread_rows(self.size, inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        x, *weights = inputs
        layout = self.layout(x.device)
        features = size_features(layout.sizes, octaves=self.octaves)
        bounds = layout.cu_seqlens.long()
        if rows is not None:  # the number of rows before each boundary
            bounds = torch.searchsorted(rows, bounds)
        return size_aware_embedding_reference(_at(x, rows), bounds, features, *weights)

    def small(self) -> "SizeAwareEmbedding":
        return replace(self, grid=((1, 3, 4), (2, 1, 5), (1, 1, 1)), width=24)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.size_aware_embedding(self, direction, itemsize)


@dataclass(frozen=True)
class PackPatches:
    """Images of `sizes` (height, width) pixels cut into patches; inputs are the images `[3, height, width]`."""

    sizes: tuple[tuple[int, int], ...]
    patch_size: int = 16

    @property
    def op(self) -> str:
        return "pack_patches"

    @property
    def size(self) -> int:
        return sum(height * width for height, width in self.sizes) // self.patch_size**2

    def describe(self) -> str:
        areas = sorted(self.sizes, key=lambda size: size[0] * size[1])
        smallest, largest = (f"{height} × {width}" for height, width in (areas[0], areas[-1]))
        return (
            f"{len(self.sizes)} images of {smallest} to {largest}, {self.size:,} patches of {self.patch_size}"
        )

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        normal = _normal(device, seed)
        return tuple(normal((3, height, width), dtype) for height, width in self.sizes)

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        return spread_rows(self.size, inputs[0].device)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        if rows is None:
            return pack_patches_reference(inputs, self.patch_size, temporal_patch_size=1)[0]
        p = self.patch_size
        patches, wanted, first = [], rows.tolist(), 0
        for image in inputs:
            columns = image.shape[2] // p
            count = image.shape[1] // p * columns
            for row in (row - first for row in wanted if first <= row < first + count):
                y, x = row // columns * p, row % columns * p
                patches.append(image[:, y : y + p, x : x + p].reshape(-1))
            first += count
        return torch.stack(patches)

    def small(self) -> "PackPatches":
        p = self.patch_size
        return replace(self, sizes=((2 * p, 3 * p), (p, p), (p, 4 * p)))

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.pack_patches(self, direction, itemsize)


@dataclass(frozen=True)
class NormalisePatches(PackPatches):
    """uint8 frames `[3, height, width]` to normalised patches in the dtype of the workload.

    Inputs are the frames, then `mean` and `std`, which are exact in every dtype.
    """

    mean: tuple[float, ...] = (0.5, 0.375, 0.25)
    std: tuple[float, ...] = (0.25, 0.5, 0.25)

    def describe(self) -> str:
        return f"uint8, normalised: {super().describe()}"

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed)

        def frame(height: int, width: int) -> Tensor:
            shades = torch.randint(256, (3, height, width), generator=generator, device=device)
            return shades.to(torch.uint8)

        numbers = (torch.tensor(x, dtype=dtype, device=device) for x in (self.mean, self.std))
        return *(frame(*size) for size in self.sizes), *numbers

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        *frames, mean, std = inputs
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean, std = (x.to(wide)[:, None, None] for x in (mean, std))
        normalised = [(frame.to(wide) / 255 - mean) / std for frame in frames]
        return super().oracle(normalised, rows).to(inputs[-1].dtype)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.normalise_patches(self, direction, itemsize)


def spread_rows(total: int, device: torch.device) -> Tensor | None:
    """Return evenly spread rows, ascending, including the first and the last; None if there are few rows in all."""
    if total <= ALL_ROWS:
        return None
    return torch.linspace(0, total - 1, ROWS, dtype=torch.float64).round().long().unique().to(device)


def _normal(device: torch.device, seed: int):
    """Return `normal(shape, dtype, std=1)`, each call of which gives the next numbers of the seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    return normal


def _at(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]
