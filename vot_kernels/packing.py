"""Packed variable-length batches: which rows of one long buffer belong to which segment and group.

Many images, frames and clips lie in one buffer `[tokens, ...]`. `cu_seqlens` cuts it into *segments* (one
image, clip or document; tokens never attend across segments) and `cu_groups` cuts each segment into
contiguous *groups* (a frame, a band of rows or a fixed block), the unit that attention windows count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1
"""What a buffer holds at most, so that int32 counts its rows."""


@dataclass(frozen=True, eq=False)
class Padding:
    """Where the tokens of a padded batch lie, so that they can be packed and unpacked.

    Attributes:
        rows: int64 `[tokens]`, the place of each packed token in the flattened `[batch * length]`.
        shape: (batch, length) of the padded batch.
    """

    rows: Tensor
    shape: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """`[batch, length, ...]` to `[tokens, ...]`, without the padding.

        Raises:
            ValueError: x has another batch or length than the mask.
        """
        if not isinstance(x, Tensor) or x.shape[:2] != self.shape:
            batch, length = self.shape
            raise ValueError(
                f"x must have the shape [{batch}, {length}, ...] of the mask, got {_shape_of(x)}."
            )
        return x.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """`[tokens, ...]` to `[batch, length, ...]` with zeros for padding; rows past the tokens are left out.

        Raises:
            ValueError: x has fewer rows than the mask has tokens.
        """
        tokens = self.rows.shape[0]
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] < tokens:
            raise ValueError(
                f"x must have a row for each of the {tokens} tokens of the mask, got {_shape_of(x)}."
            )
        batch, length = self.shape
        padded = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, self.rows, x[:tokens])
        return padded.unflatten(0, self.shape)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where every segment and group of a packed buffer begins, and where its tokens lie in space and time.

    Build it with `from_lengths`, `from_cu_seqlens`, `from_mask` or `from_grid_thw`, once per batch. Every field is a
    tensor, so a layout passes through `torch.compile` without guarding on the lengths of one batch; the
    `host_*` copies live on the CPU, so nothing on the hot path asks the device for a number.

    Attributes:
        cu_seqlens: int32 `[segments + 1]`, first row of each segment, then the number of packed tokens.
        cu_groups: int32 `[groups + 1]`, first row of each group, likewise.
        segment_groups: int32 `[segments + 1]`, index of the first group of each segment.
        positions: int32 `[tokens, 3]`, (t, y, x) of each token, restarting at 0 in every segment.
        sizes: int32 `[segments, 3]`, (frames, height, width) of each segment in tokens, without prefix tokens.
        host_cu_seqlens, host_cu_groups, host_segment_groups: the same numbers on the CPU.
        grouped: whether groups were asked for; if not, each segment is one, and there is nothing for a window to count.
        patch_rows, prefix_rows: int64, the rows of patches and those of prefix tokens (CLS, registers), each in order;
            None where no prefix was asked for: all rows are patches.
    """

    cu_seqlens: Tensor
    cu_groups: Tensor
    segment_groups: Tensor
    positions: Tensor
    sizes: Tensor
    host_cu_seqlens: Tensor
    host_cu_groups: Tensor
    host_segment_groups: Tensor
    grouped: bool = field(default=True, kw_only=True)
    patch_rows: Tensor | None = field(default=None, kw_only=True)
    prefix_rows: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        group_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> "PackedLayout":
        """One-dimensional segments of `lengths` tokens, cut into groups of `group_size` (None: one group).

        Token i of a segment gets the position (i, 0, 0). Lengths may be 0.

        Raises:
            ValueError: a length is negative, `group_size` is not positive, or the tokens exceed 2**31 - 1.
        """
        counts = _host_ints(lengths, "lengths")
        if counts.ndim != 1:
            raise ValueError(f"lengths must be one-dimensional, got shape {tuple(counts.shape)}.")
        _check_lengths(counts)
        grid = np.stack([counts, np.ones_like(counts), np.ones_like(counts)], axis=1)
        return cls._build(grid, _block_groups(counts, group_size), device, group_size is not None)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        cu_groups: Tensor | Sequence[int] | None = None,
        *,
        group_size: int | None = None,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "PackedLayout":
        """From cumulative lengths as FlashAttention and Qwen-VL use them: `[0, n_0, n_0 + n_1, ...]`.

        A device tensor is copied to the host once, here. The groups come from `cu_groups` (which must
        contain every segment boundary; equal neighbours make an empty group) or from `group_size`.
        The layout lies on `device`, by default that of `cu_seqlens`.

        Raises:
            TypeError: not int32 or int64.
            ValueError: not one-dimensional, not starting at 0, decreasing, or ending beyond `num_tokens`.
        """
        if device is None and isinstance(cu_seqlens, Tensor):
            device = cu_seqlens.device
        bounds = _cumulative(cu_seqlens, "cu_seqlens")
        counts = np.diff(bounds)
        _check_lengths(counts)
        if num_tokens is not None and (isinstance(num_tokens, bool) or not isinstance(num_tokens, int)):
            raise TypeError(f"num_tokens must be an int or None, got {brief(num_tokens)}.")
        if num_tokens is not None and bounds[-1] > num_tokens:
            raise ValueError(
                f"cu_seqlens ends at {bounds[-1]}, beyond the {num_tokens} tokens of the buffer."
            )
        if cu_groups is not None and group_size is not None:
            raise ValueError("Give either cu_groups or group_size, not both.")
        if cu_groups is None:
            group_bounds = _block_groups(counts, group_size)
        else:
            group_bounds = _cumulative(cu_groups, "cu_groups")
            missing = np.setdiff1d(bounds, group_bounds)
            if missing.size or group_bounds[-1] != bounds[-1]:
                raise ValueError(
                    "cu_groups must contain every boundary of cu_seqlens and end where it ends; "
                    f"missing {missing.tolist()[:4]}, ends at {group_bounds[-1]} instead of {bounds[-1]}."
                )
        grid = np.stack([counts, np.ones_like(counts), np.ones_like(counts)], axis=1)
        grouped = cu_groups is not None or group_size is not None
        return cls._build(grid, group_bounds, device, grouped)

    @classmethod
    def from_mask(
        cls, attention_mask: Tensor, group_size: int | None = None, device: torch.device | str | None = None
    ) -> tuple["PackedLayout", Padding]:
        """From the mask of a padded batch, a segment for each of its rows.

        Padding may lie on either side and between tokens. Tokens keep their order; token i of a row that is not padding
        gets the position (i, 0, 0). A device tensor is copied to the host once, here.

        Args:
            attention_mask: bool or integer `[batch, length]`, 1 for tokens and 0 for padding.
            group_size: tokens to a group; None is one group to a segment.
            device: where the layout lies, by default that of the mask.

        Returns:
            The layout, and the `Padding` whose `pack` and `unpack` go between `[batch, length, ...]` and
            `[tokens, ...]`.

        Raises:
            TypeError: not a tensor of bool or integers.
            ValueError: not two-dimensional, or a number that is neither 0 nor 1.
        """
        if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
            raise TypeError(
                "attention_mask must be a bool or integer tensor [batch, length], 1 for tokens and 0 for padding, got "
                f"{brief(attention_mask)}."
            )
        if attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must have the shape [batch, length], True for tokens and False for padding, "
                f"got {list(attention_mask.shape)}."
            )
        mask = attention_mask.detach().cpu().numpy()
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError(
                f"attention_mask must be 1 for tokens and 0 for padding, got {mask[(mask != 0) & (mask != 1)][0]}."
            )
        device = attention_mask.device if device is None else device
        layout = cls.from_lengths(mask.astype(np.int64).sum(1), group_size, device)
        with torch.inference_mode(False):
            rows = torch.from_numpy(np.flatnonzero(mask)).to(device)
        return layout, Padding(rows, (mask.shape[0], mask.shape[1]))

    @classmethod
    def from_grid_thw(
        cls,
        grid_thw: Tensor | Sequence[Sequence[int]],
        group: str | int = "frame",
        device: torch.device | str | None = None,
        *,
        segment_prefix: int = 0,
        frame_prefix: int = 0,
    ) -> "PackedLayout":
        """From the Qwen-VL convention: `[segments, 3]` of (frames, height, width) counted in tokens.

        Tokens of a segment lie in the order (t, y, x), x fastest. **Prefix tokens**, CLS and registers, lie in front of
        each segment, of each frame or both; a segment without patches has none. They belong to the group of the patch
        that follows, so that they are near to the first frame, or each to its own; for other groups give
        `from_cu_seqlens` its `cu_groups`. Their y and x are 0, and t is that of their frame, so that a rotation by
        positions leaves those of a segment as they are.

        Args:
            grid_thw: integer tensor or nested sequence `[segments, 3]`.
            group: "frame", "rows:N" (bands of N rows within a frame) or an int (blocks of that many tokens, prefix
                tokens included).
            device: where the layout lies; by default that of `grid_thw`.
            segment_prefix: tokens in front of each segment: 1 for a CLS token of an image or a clip, 1 + 4 for CLS and
                four registers. The first of them are the rows `cu_seqlens[:-1]`.
            frame_prefix: tokens in front of each frame.

        Raises:
            ValueError: a malformed grid or group, or a prefix that is not an int >= 0.
        """
        if device is None and isinstance(grid_thw, Tensor):
            device = grid_thw.device
        grid = _host_ints(grid_thw, "grid_thw")
        if grid.shape == (0,):  # an empty list
            grid = grid.reshape(0, 3)
        if grid.ndim != 2 or grid.shape[1] != 3:
            raise ValueError(f"grid_thw must have the shape [segments, 3], got {tuple(grid.shape)}.")
        if (grid < 0).any():
            raise ValueError(f"grid_thw must not be negative, got {int(grid.min())}.")
        if (grid > MAX_TOKENS).any():
            raise ValueError(f"grid_thw must hold numbers up to {MAX_TOKENS}, got {int(grid.max())}.")
        prefix = _Prefix(segment_prefix, frame_prefix)
        if (
            grid.astype(float).prod(1).sum() > MAX_TOKENS
            or prefix.lengths(grid.astype(float)).sum() > MAX_TOKENS
        ):
            total = sum(prefix.length(*size) for size in grid.tolist())
            raise ValueError(f"A packed buffer holds at most {MAX_TOKENS} tokens, grid_thw asks for {total}.")
        return cls._build(grid, _grid_groups(grid, group, prefix), device, prefix=prefix)

    @classmethod
    def _build(
        cls,
        grid: np.ndarray,
        group_bounds: np.ndarray,
        device: torch.device | str | None,
        grouped: bool = True,
        prefix: "_Prefix | None" = None,
    ) -> "PackedLayout":
        prefix = _Prefix() if prefix is None else prefix
        counts = prefix.lengths(grid)
        bounds = _cumsum(counts)
        height, width = (np.repeat(grid[:, axis], counts) for axis in (1, 2))
        frame, index = prefix.places(_ragged_arange(counts), height * width)
        patch = np.maximum(index, 0)  # a prefix token has the place of the first patch
        positions = np.stack([frame, patch // width % height, patch % width], 1)
        # An empty group on a boundary belongs to the later segment; being empty, it makes no difference.
        segment_groups = np.searchsorted(group_bounds[:-1], bounds, side="left")
        segment_groups[-1] = len(group_bounds) - 1
        numbers = (bounds, group_bounds, segment_groups, positions, grid)
        rows = [np.flatnonzero(index >= 0), np.flatnonzero(index < 0)] if prefix else []
        with torch.inference_mode(False):  # a layout made in a validation step may serve training later
            host = [torch.from_numpy(array.astype(np.int32)) for array in numbers]
            host += [torch.from_numpy(array) for array in rows]
            on_device = [tensor if device is None else tensor.to(device) for tensor in host]
        named = dict(zip(("patch_rows", "prefix_rows"), on_device[5:], strict=False))
        return cls(*on_device[:5], *host[:3], grouped=grouped, **named)

    def to(self, device: torch.device | str | int) -> "PackedLayout":
        """The same layout on another device.

        Raises:
            TypeError: `device` is not a device or the name of one; a layout has no dtype to change.
        """
        if not isinstance(device, (torch.device, str, int)) or isinstance(device, bool):
            raise TypeError(f"device must be a torch.device or the name of one, got {brief(device)}.")
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and not name.startswith("host_")
        }
        with torch.inference_mode(False):
            return PackedLayout(**values | {name: value.to(device) for name, value in moved.items()})

    @property
    def device(self) -> torch.device:
        """Where `cu_seqlens` and its companions lie."""
        return self.cu_seqlens.device

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(self.host_cu_seqlens.diff().tolist())

    @cached_property
    def group_lengths(self) -> tuple[int, ...]:
        """Tokens of each group."""
        return tuple(self.host_cu_groups.diff().tolist())

    @property
    def num_tokens(self) -> int:
        """Packed tokens; a buffer may have more rows (slack), which every op leaves zero."""
        return self.positions.shape[0]

    @property
    def num_segments(self) -> int:
        """Segments, empty ones included."""
        return self.host_cu_seqlens.shape[0] - 1

    @property
    def num_groups(self) -> int:
        """Groups, empty ones included."""
        return self.host_cu_groups.shape[0] - 1

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment, 0 if there is none."""
        return max(self.lengths, default=0)

    @property
    def token_segments(self) -> Tensor:
        """int64 `[tokens]`: the segment of each token, on the layout's device."""
        return self._owners(self.cu_seqlens)

    @property
    def token_groups(self) -> Tensor:
        """int64 `[tokens]`: the group of each token, on the layout's device."""
        return self._owners(self.cu_groups)

    @torch.inference_mode(False)
    def _owners(self, bounds: Tensor) -> Tensor:
        rows = torch.arange(self.num_tokens, dtype=bounds.dtype, device=bounds.device)
        return torch.searchsorted(bounds, rows, right=True) - 1

    def __repr__(self) -> str:
        return (
            f"PackedLayout({self.num_segments} segments, {self.num_groups} groups, "
            f"{self.num_tokens} tokens, longest {self.max_seqlen}, device={str(self.device)!r})"
        )


@dataclass(frozen=True)
class PackingPlan:
    """Which items share a row of a token budget.

    Attributes:
        rows: item indices of each row, in the order in which they were placed.
        budget: tokens a row can hold.
        fill: share of the rows' tokens in use, in [0, 1].
    """

    rows: tuple[tuple[int, ...], ...]
    budget: int
    fill: float


def plan_packing(lengths: Sequence[int] | Tensor, budget: int) -> PackingPlan:
    """Bin-pack items into as few rows of `budget` tokens as first-fit decreasing finds (Johnson, 1973).

    Deterministic: equal lengths keep their order. At most 11/9 of the optimal number of rows, plus one.

    Raises:
        ValueError: an item is longer than the budget, or a number is negative.
    """
    counts = _host_ints(lengths, "lengths")
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError(f"lengths must be a flat list of numbers >= 0, got {brief(counts.tolist())}.")
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise ValueError(f"budget must be an int >= 0, got {brief(budget)}.")
    if counts.size and counts.max() > budget:
        raise ValueError(f"Item {int(counts.argmax())} has {counts.max()} tokens; the budget is {budget}.")
    rows: list[list[int]] = []
    free = np.zeros(len(counts), dtype=np.int64)
    room = min(budget, np.iinfo(np.int64).max)
    for item in np.argsort(-counts, kind="stable"):
        fits = np.flatnonzero(free[: len(rows)] >= counts[item])
        if fits.size:
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            free[row] = room
        rows[row].append(int(item))
        free[row] -= counts[item]
    fill = sum(counts.tolist()) / (len(rows) * budget) if rows and budget else 0.0
    return PackingPlan(tuple(map(tuple, rows)), budget, fill)


def _shape_of(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def brief(value: object) -> str:
    """A value as messages name it: in one line, and not a long one."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    words = " ".join(repr(value).split())
    return words if len(words) <= 80 else words[:77] + "..."


def _host_ints(values: Tensor | Sequence, name: str) -> np.ndarray:
    if isinstance(values, Tensor) and values.is_meta:
        raise ValueError(f"{name} must have values, got {brief(values)} on the device meta.")
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        raise TypeError(f"{name} must be a tensor or nested list of int32 or int64 numbers.") from None
    if array.size == 0 and not isinstance(values, Tensor):
        array = array.astype(np.int64)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"{name} must hold int32 or int64 numbers, got {array.dtype}.")
    return array.astype(np.int64)


def _cumulative(values: Tensor | Sequence[int], name: str) -> np.ndarray:
    bounds = _host_ints(values, name)
    if bounds.ndim != 1 or bounds.size == 0:
        raise ValueError(f"{name} must be one-dimensional with at least one entry, got shape {bounds.shape}.")
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}.")
    falls = np.flatnonzero(bounds[1:] < bounds[:-1])
    if falls.size:
        i = int(falls[0])
        raise ValueError(
            f"{name} must not decrease, but entry {i} is {bounds[i]} and {i + 1} is {bounds[i + 1]}."
        )
    return bounds


def _block_groups(counts: np.ndarray, group_size: int | None) -> np.ndarray:
    if group_size is None:
        return _cumsum(counts[counts != 0])
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a positive int or None, got {brief(group_size)}.")
    size = min(group_size, MAX_TOKENS)
    blocks = -(-counts // size)
    within = _ragged_arange(blocks)
    return _cumsum(np.minimum(size, np.repeat(counts, blocks) - within * size))


@dataclass(frozen=True)
class _Prefix:
    """How many tokens lie in front of each segment and of each frame; a segment without patches has none."""

    segment: int = 0
    frame: int = 0

    def __post_init__(self) -> None:
        for name, value in (("segment_prefix", self.segment), ("frame_prefix", self.frame)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
                raise ValueError(f"{name} must be an int from 0 to {MAX_TOKENS}, got {brief(value)}.")

    def __bool__(self) -> bool:
        return bool(self.segment or self.frame)

    def length(self, frames: int, height: int, width: int) -> int:
        """Tokens of one segment."""
        patches = frames * height * width
        return patches and self.segment + frames * self.frame + patches

    def lengths(self, grid: np.ndarray) -> np.ndarray:
        """Tokens of each segment."""
        patches = grid.prod(axis=1)
        return np.where(patches > 0, self.segment + grid[:, 0] * self.frame + patches, 0).astype(grid.dtype)

    def places(self, index: np.ndarray, frame_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frame of tokens by their index in the segment, and their place in it; below 0 are prefix tokens."""
        index = index - self.segment
        step = frame_size + self.frame
        within = np.where(index < 0, index, index % step - self.frame)
        return np.maximum(index, 0) // step, within


def _grid_groups(grid: np.ndarray, group: str | int, prefix: _Prefix) -> np.ndarray:
    if isinstance(group, int) and not isinstance(group, bool) and group > 0:
        return _block_groups(prefix.lengths(grid), group)
    frames, height, width = grid[grid.all(axis=1)].T  # an empty segment has no groups
    band_rows = re.fullmatch("rows:0*([1-9][0-9]*)", group) if isinstance(group, str) else None
    if group == "frame":
        rows = np.maximum(height, 1)
    elif band_rows is not None:
        rows = np.full_like(height, MAX_TOKENS if len(band_rows[1]) > 10 else int(band_rows[1]))
    else:
        raise ValueError(
            f'group must be "frame", "rows:N" with N >= 1, or a positive int, got {brief(group)}.'
        )
    bands = -(-height // rows)
    per_segment = frames * bands
    band = _ragged_arange(per_segment) % np.repeat(np.maximum(bands, 1), per_segment)
    left = np.repeat(height, per_segment) - band * np.repeat(rows, per_segment)
    sizes = np.minimum(np.repeat(rows, per_segment), left) * np.repeat(width, per_segment)
    sizes[band == 0] += prefix.frame
    sizes[np.cumsum(per_segment) - per_segment] += prefix.segment
    return _cumsum(sizes)


def _ragged_arange(counts: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of `counts`, joined."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def _check_lengths(counts: np.ndarray) -> None:
    if (counts < 0).any():
        raise ValueError(f"Lengths must not be negative, got {int(counts.min())}.")
    if counts.sum(dtype=float) > MAX_TOKENS:  # a sum of int64 may wrap around
        raise ValueError(f"A packed buffer holds at most {MAX_TOKENS} tokens, got {sum(counts.tolist())}.")


def _cumsum(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
