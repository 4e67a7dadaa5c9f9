"""A clip of any length through a `VotEncoder` in bounded memory: chunk by chunk, layer by layer.

A layer that attends in both directions needs the whole clip before its first output. It is computed in two passes over
chunks of frames, between which activations lie in files:

1. **Project.** Queries, keys and values of each chunk are written, and for the far part sums of states,
   `phi(k)ᵀ [v, 1]`: about three per chunk, of its first frames, its last ones, and those between.
2. **Attend.** A chunk reads the keys and values of its own frames and of those in the window around them. The states
   of all frames beyond are joined to that under the one normaliser. Nothing is subtracted: the frames of the window are
   left out of the sum.

The result is that of `VotEncoder.forward`, up to rounding. Operations are those of one pass, too; a layer of exact
attention reads all chunks for each, so its time grows with the square of the clip, and its memory does not.
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vot_kernels.models.encoder.modeling import VotEncoder, VotEncoderBlock
from vot_kernels.nn.hybrid_attention import HybridAttention, magnitude
from vot_kernels.nn.pooling import PackedAttentionPooling
from vot_kernels.ops.attention_options import window_sides
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.flash_attention import flash_attn_varlen_func
from vot_kernels.ops.hybrid_attention import hybrid_attention
from vot_kernels.ops.parts.group_states.torch import feature_map, join_far, log_weight
from vot_kernels.ops.parts.range_attention.blocks import append_column, repeat_heads, to_heads
from vot_kernels.packing import PackedLayout

CHUNK = 32
"""Frames in a chunk, where nothing else is said."""
Report = Callable[[int, int], None]


class LongClip(NamedTuple):
    """An encoded clip.

    Attributes:
        tokens: `[tokens, hidden_size]`, read from `file` where it is used.
        pooled: `[hidden_size]`.
        file: the tokens' numbers in a file of the folder, row by row.
    """

    tokens: Tensor
    pooled: Tensor
    file: Path


class LongEncoding:
    """Encodes one clip whose frames arrive in chunks.

        encoding = LongEncoding(encoder, folder, grid_hw=(8, 8))
        for pixel_values in chunks:  # [frames * 8 * 8, C * tp * p * p] each
            encoding.add(pixel_values)
        tokens, pooled, _ = encoding.run(fps=8.0)

    Args:
        encoder: the encoder; no gradients are computed.
        folder: an empty folder for the activations, which the caller deletes. They take per token
            about (6 + 2 · blocks) · hidden_size numbers.
        grid_hw: height and width of a frame in patches.
        chunk: frames held at a time, at least 1.

    Raises:
        ValueError: the encoder's groups are no frames, a layer attends linearly, or a number is below 1.
    """

    def __init__(
        self,
        encoder: VotEncoder,
        folder: str | os.PathLike[str],
        grid_hw: tuple[int, int],
        chunk: int = CHUNK,
    ) -> None:
        _check(encoder, grid_hw, chunk)
        self.encoder, self.folder = encoder, Path(folder)
        self.frames, self.grid_hw, self.chunk = 0, grid_hw, chunk
        self._patches = self._file("patches", encoder.config.hidden_size)

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid_hw[0] * self.grid_hw[1]

    @torch.no_grad()
    def add(self, pixel_values: Tensor) -> None:
        """Embed the patches of the next frames, any number of them.

        Args:
            pixel_values: `[frames * height * width, C * tp * p * p]`.

        Raises:
            ValueError: these are no whole frames.
        """
        frames, rest = divmod(len(pixel_values), self.per_frame)
        if rest:
            raise ValueError(
                f"pixel_values must be whole frames of {self.per_frame} patches, got {len(pixel_values)} patches."
            )
        part = slice(self.frames, self.frames + frames)
        embedding = self.encoder.patch_embedding
        self._write(self._patches, part, embedding(pixel_values.to(embedding.weight)))
        self.frames += frames

    @torch.no_grad()
    def run(self, fps: float = 0.0, report: Report = lambda done, total: None) -> LongClip:
        """Run all layers over the frames that were added.

        Args:
            fps: frames per second, 0 for images.
            report: called with the chunks done, of how many.

        Raises:
            ValueError: there are no frames.
        """
        if not self.frames:
            raise ValueError("A clip must have at least one frame, but none was added.")
        blocks = [block for block in self.encoder.blocks if isinstance(block, VotEncoderBlock)]
        steps, total = count(1), 2 * (len(blocks) + 1) * len(self._chunks())

        def tick() -> None:
            report(next(steps), total)

        x, residual = self._embed(fps, tick), self.encoder.residual
        kept = {0: x}
        for n, block in enumerate(blocks, 1):
            x = kept[n] = self._layer(block, x, n, tick)
            if residual is not None and n in residual.sources:
                x = self._mixed(n, [kept[i] for i in residual.sources[n]])
        return self._finish(x, tick)

    def _embed(self, fps: float, tick: Callable[[], None]) -> "_Rows":
        """Write the patches with the embedding of the clip's size, which is known by now."""
        size = self.encoder.size_embedding
        embedded = self._file("0", *self._patches.shape)
        rate = torch.tensor([fps], device=self.encoder.device)
        for part in self._chunks():
            rows = self._read(self._patches, part)
            self._write(embedded, part, rows if size is None else size(rows, self._layout(part), rate))
            tick()
        return embedded

    def _layer(self, block: VotEncoderBlock, x: "_Rows", number: int, tick: Callable[[], None]) -> "_Rows":
        """Write what a block makes of the whole clip."""
        assert isinstance(block.attention, HybridAttention)
        memory = _Memory(self, block.attention)
        for part in self._chunks():
            memory.project(part, block.attention_norm(self._read(x, part)))
            tick()
        y = self._file(str(number), *x.shape)
        for part in self._chunks():
            rows = self._read(x, part)
            rows = rows + block.attention.out(memory.attend(part).flatten(1))
            self._write(y, part, rows + block.mlp(block.mlp_norm(rows)))
            tick()
        return y

    def _mixed(self, block: int, states: list["_Rows"]) -> "_Rows":
        """Write the weighted sum of the states that the dense residual makes after a block."""
        residual = self.encoder.residual
        assert residual is not None
        mixed = self._file(f"{block}-mixed", *states[0].shape)
        for part in self._chunks():
            memory = {i: self._read(x, part) for i, x in zip(residual.sources[block], states, strict=True)}
            self._write(mixed, part, residual(memory[block], block, memory))
        return mixed

    def _finish(self, x: "_Rows", tick: Callable[[], None]) -> LongClip:
        """Write the tokens after the last norm, and pool them."""
        tokens = self._file("tokens", *x.shape)
        pooled = _Pooled(self.encoder.pooling)
        for part in self._chunks():
            rows = self.encoder.norm(self._read(x, part))
            self._write(tokens, part, rows)
            pooled.add(rows)
            tick()
        shape = (self.frames * self.per_frame, *tokens.shape)
        mapped = torch.from_file(str(tokens.path), True, math.prod(shape), dtype=tokens.dtype)
        return LongClip(mapped.view(shape), pooled.result(), tokens.path)

    def _chunks(self) -> list[slice]:
        return [slice(a, min(a + self.chunk, self.frames)) for a in range(0, self.frames, self.chunk)]

    def _layout(self, part: slice) -> PackedLayout:
        """The layout of some frames, with their positions in the whole clip and its size."""
        layout = self.encoder.layout(
            torch.tensor([[part.stop - part.start, *self.grid_hw]]), self.encoder.device
        )
        positions = layout.positions + layout.positions.new_tensor([part.start, 0, 0])
        sizes = layout.sizes.new_tensor([[self.frames, *self.grid_hw]])
        return replace(layout, positions=positions, sizes=sizes)

    def _file(self, name: str, *shape: int) -> "_Rows":
        """Return a file of a row for each token."""
        return _Rows(self.folder / name, shape, self.encoder.dtype, self.encoder.device)

    def _read(self, x: "_Rows", part: slice) -> Tensor:
        """Return the rows of some frames."""
        return x.read(part.start * self.per_frame, part.stop * self.per_frame)

    def _write(self, x: "_Rows", part: slice, rows: Tensor) -> None:
        x.write(part.start * self.per_frame, rows)


class _Rows:
    """Rows of one shape in a file. It is read and written, not mapped, so that it takes no memory of the process."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.path, self.shape, self.dtype, self.device = path, shape, dtype, device
        self.size = math.prod(shape) * dtype.itemsize
        self.handle = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed with the object)

    def write(self, begin: int, rows: Tensor) -> None:
        """Write rows from the `begin`-th on."""
        raw = rows.to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy()
        self.handle.seek(begin * self.size)
        self.handle.write(raw.data)

    def read(self, begin: int, end: int) -> Tensor:
        """Read rows `begin` to `end` - 1, which have been written."""
        raw = bytearray((end - begin) * self.size)
        self.handle.seek(begin * self.size)
        self.handle.readinto(raw)
        return torch.frombuffer(raw, dtype=self.dtype).view(-1, *self.shape).to(self.device)


class _Memory:
    """Queries, keys and values of one layer in files, and the states of its chunks."""

    def __init__(self, clip: LongEncoding, attention: HybridAttention) -> None:
        self.clip, self.attention = clip, attention
        self.left, self.right = window_sides(attention.window, attention.causal)
        heads, width = attention.num_heads, attention.head_dim
        shapes = {
            "q": (heads, width),
            "k": (attention.num_kv_heads, width),
            "v": (attention.num_kv_heads, width),
        }
        self.files = {name: clip._file(name, *shape) for name, shape in shapes.items()}
        self.states = _States(self)

    def project(self, part: slice, x: Tensor) -> None:
        """Write what a chunk asks and answers."""
        q, k, v = self.attention.project(x, self.clip._layout(part))
        for name, rows in (("q", q), ("k", k), ("v", v)):
            self.clip._write(self.files[name], part, rows)
        if self.left is not None and self.right is not None:
            self.states.add(part, k, v)

    def read(self, name: str, part: slice) -> Tensor:
        """Return queries, keys or values of some frames."""
        return self.clip._read(self.files[name], part)

    def attend(self, part: slice) -> Tensor:
        """Return the attention of a chunk to the whole clip, `[tokens, heads, head_dim]`."""
        return self._exactly(part) if self.left is None or self.right is None else self._near_and_far(part)

    def _near_and_far(self, part: slice) -> Tensor:
        left, right = self.left or 0, self.right or 0
        around = slice(max(0, part.start - left), min(self.clip.frames, part.stop + right))
        layout, own = self.clip._layout(around), self._rows(part, around)
        q, k, v = (self.read(name, around) for name in "qkv")
        out, lse = self._local(q, k, v, layout)
        out, lse, queries = (to_heads(x[own], own.stop - own.start) for x in (out, lse[..., None], q))
        state = self.states.outside(around)
        if state is None:
            return out.transpose(0, 1).to(q.dtype)
        queries = feature_map(queries, self.attention.feature_map)
        sums = queries @ repeat_heads(state, queries.shape[0] // state.shape[0])
        joint, _ = join_far(out, lse, sums, log_weight(self._log_weight(), queries))
        return joint.transpose(0, 1).to(q.dtype)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        attention = self.attention
        return hybrid_attention(
            q,
            k,
            v,
            layout,
            window=attention.window,
            beta=attention.beta,
            far_weight=None if attention.far_weight is None else magnitude(attention.far_weight),
            feature_map=attention.feature_map,
            causal=attention.causal,
            scale=attention.scale,
            return_lse=True,
            backend=attention.backend,
        )

    def _log_weight(self) -> Tensor | None:
        weight = self.attention.far_weight
        return self.attention.beta if weight is None else magnitude(weight).log()

    def _exactly(self, part: slice) -> Tensor:
        """Exact attention: the chunks' results are joined by their normalisers."""
        q = self.read("q", part)
        out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf)
        for other in self.clip._chunks():
            if self.attention.causal is not None and other.start >= part.stop:
                break
            found, found_lse = self._to_chunk(q, part, other)
            joint = torch.logaddexp(lse, found_lse)
            out = out * (lse - joint).exp()[..., None] + found * (found_lse - joint).exp()[..., None]
            lse = joint
        return out

    def _to_chunk(self, q: Tensor, part: slice, other: slice) -> tuple[Tensor, Tensor]:
        k, v = self.read("k", other), self.read("v", other)
        if other == part:
            return self._local(q, k, v, self.clip._layout(part))
        queries, keys = (torch.tensor([0, len(x)], dtype=torch.int32, device=q.device) for x in (q, k))
        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            queries,
            keys,
            len(q),
            len(k),
            softmax_scale=self.attention.scale,
            return_attn_probs=True,
            backend=self.attention.backend,
        )
        return out, lse.T

    def _rows(self, part: slice, around: slice) -> slice:
        """The rows of `part` among those of `around`."""
        tokens = self.clip.per_frame
        return slice((part.start - around.start) * tokens, (part.stop - around.start) * tokens)


class _States:
    """The states of a layer's frames, in pieces that lie wholly inside or outside of any chunk's window.

    Pieces are added in order of time, and then the chunks ask for what lies outside of their windows, in the same
    order. So the sum of all frames before a window is carried along, and that of all frames after it is read from a
    file, which is written from the end.
    """

    def __init__(self, memory: _Memory) -> None:
        self.memory = memory
        self.begins: list[int] = []  # first frame of each piece
        self.before: tuple[int, Tensor | None] = (0, None)  # pieces that are summed, and their sum
        self.after: _Rows | None = None

    def add(self, part: slice, k: Tensor, v: Tensor) -> None:
        """Add the frames of a chunk."""
        keys = feature_map(to_heads(k, len(k)), self.memory.attention.feature_map)
        values = append_column(to_heads(v, len(v)), 1.0)
        if not self.begins:
            shape = (keys.shape[0], keys.shape[2], values.shape[2])
            folder = self.memory.clip.folder
            self.pieces, self._suffixes = (
                _Rows(folder / name, shape, keys.dtype, keys.device) for name in ("states", "states-after")
            )
        tokens = self.memory.clip.per_frame
        for begin, end in pairwise(self._cuts(part)):
            rows = slice((begin - part.start) * tokens, (end - part.start) * tokens)
            self.pieces.write(len(self.begins), keys[:, rows].transpose(1, 2) @ values[:, rows])
            self.begins.append(begin)

    def outside(self, window: slice) -> Tensor | None:
        """Return the state of the seen frames that lie outside of a window, None if there are none."""
        done, state = self.before
        first = bisect_left(self.begins, window.start)
        for piece in range(done, first):
            state = self._piece(piece) if state is None else state + self._piece(piece)
        self.before = first, state
        last = bisect_left(self.begins, window.stop)
        if self.memory.attention.causal is not None or last == len(self.begins):
            return state
        later = self._sums_after().read(last, last + 1)[0]
        return later if state is None else state + later

    def _piece(self, number: int) -> Tensor:
        return self.pieces.read(number, number + 1)[0]

    def _sums_after(self) -> _Rows:
        """Return for each piece the sum of it and all that follow."""
        if self.after is None:
            total: Tensor | None = None
            for number in reversed(range(len(self.begins))):
                total = self._piece(number) if total is None else total + self._piece(number)
                self._suffixes.write(number, total)
            self.after = self._suffixes
        return self.after

    def _cuts(self, part: slice) -> list[int]:
        """Return where in a chunk the windows of chunks begin or end, and its own ends."""
        chunk, left, right = self.memory.clip.chunk, self.memory.left or 0, self.memory.right or 0
        cuts = {part.start, part.stop}
        for shift in (
            -left,
            right,
        ):  # of multiples of the chunk; the last chunk may be shorter, but ends the clip
            first = -(-(part.start - shift) // chunk) * chunk
            cuts.update(bound + shift for bound in range(first, part.stop - shift + 1, chunk))
        return sorted(cuts)


class _Pooled:
    """Attention pooling of tokens that arrive in parts."""

    def __init__(self, pooling: PackedAttentionPooling) -> None:
        self.pooling = pooling
        self.top: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add tokens `[tokens, dim]`."""
        score = self.pooling.score(x)
        score = score.to(accumulator(score.dtype))
        value = self.pooling.value(x).unflatten(-1, (score.shape[1], -1))
        top = score.amax(0)
        if self.top is None:
            self.top, self.total = top, torch.zeros_like(top)
            self.sum = value.new_zeros(value.shape[1:])
        joint = torch.maximum(self.top, top)
        shrink, weight = (self.top - joint).exp(), (score - joint).exp()
        self.total = self.total * shrink + weight.sum(0)
        weighted = torch.einsum("th,thd->hd", weight.to(value.dtype), value)
        self.sum = self.sum * shrink[:, None].to(value.dtype) + weighted
        self.top = joint

    def result(self) -> Tensor:
        """Return the pooled vector `[dim]`."""
        return self.pooling.out((self.sum / self.total[:, None].to(self.sum.dtype)).flatten())


def _check(encoder: VotEncoder, grid_hw: tuple[int, int], chunk: int) -> None:
    if encoder.config.group != "frame":
        raise ValueError(
            f'A long clip is cut between frames, so group must be "frame", got {encoder.config.group!r}.'
        )
    if encoder.config.attention == "linear":
        raise ValueError("A long clip needs an encoder of hybrid attention, got one of linear attention.")
    for name, value in (("grid_hw", min(grid_hw)), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
