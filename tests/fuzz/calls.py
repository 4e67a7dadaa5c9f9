"""Random calls of the public ops: valid ones with what they should return, and broken ones.

A call is drawn from a seed and an index alone, so a failure is reproduced by its two numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vot_kernels
from vot_kernels import PackedLayout
from vot_kernels.ops.aoe.reference import aoe as aoe_reference
from vot_kernels.ops.dense_residual.reference import dense_residual as dense_residual_reference
from vot_kernels.ops.flash_attention.reference import cross_attention
from vot_kernels.ops.hybrid_attention.reference import hybrid_attention as hybrid_reference
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_reference
from vot_kernels.ops.moe.reference import moe as moe_reference
from vot_kernels.ops.pack_patches.reference import pack_patches as pack_patches_reference
from vot_kernels.ops.rope_qk_norm import default_sections
from vot_kernels.ops.rope_qk_norm.reference import rope_qk_norm as rope_reference
from vot_kernels.ops.size_aware_embedding import size_features
from vot_kernels.ops.size_aware_embedding.reference import size_aware_embedding as size_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 2, 3, 5, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256)


@dataclass
class Call:
    """One call of a public op.

    Attributes:
        op: its name in `vot_kernels`.
        tensors: floating inputs, each differentiated; None for an argument that is not given.
        run: computes the outputs from such tensors on a backend.
        exact: the reference's outputs for such tensors.
        options: the other choices, for the report.
        packed_rows: rows that belong to segments, for ops on packed rows: later rows are slack.
        autocasts: which of the tensors `torch.autocast` casts.
    """

    op: str
    tensors: list[Tensor | None]
    run: Callable[[Sequence[Tensor | None], str], list[Tensor]]
    exact: Callable[[Sequence[Tensor | None]], list[Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    packed_rows: int | None = None
    autocasts: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join("None" if x is None else f"{list(x.shape)} {x.dtype}" for x in self.tensors)
        return f"{self.op}({shapes}; {self.options})"


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int, index: int) -> None:
        self.numbers = np.random.default_rng([seed, index])
        self.generator = torch.Generator().manual_seed(int(self.numbers.integers(2**62)))

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.numbers.integers(len(options)))]

    def whole(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return int(self.numbers.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self.numbers.random() < share)

    def tensor(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype)

    def lengths(self, most: int = 60) -> list[int]:
        count = self.whole(0, 5)
        return [0 if self.chance(0.2) else self.whole(1, most) for _ in range(count)]

    def layout(self) -> PackedLayout:
        if self.chance(0.3):
            grid = [[self.whole(0, 4), self.whole(0, 5), self.whole(1, 5)] for _ in range(self.whole(0, 4))]
            return PackedLayout.from_grid_thw(grid, self.pick(["frame", "rows:1", "rows:2", 1, 3]))
        return PackedLayout.from_lengths(self.lengths(), group_size=self.pick([None, 1, 2, 4, 7, 16]))

    def heads(self) -> tuple[int, int]:
        """Query heads and key heads."""
        kv_heads = self.pick([1, 1, 2, 3])
        return kv_heads * self.pick([1, 1, 2, 4]), kv_heads

    def qkv(self, rows: int, keys: int, dtype: torch.dtype) -> list[Tensor | None]:
        heads, kv_heads = self.heads()
        head_dim = self.pick(HEAD_DIMS)
        scale = self.pick([1.0, 1.0, 0.1, 4.0])
        shapes = ((rows, heads), (keys, kv_heads), (keys, kv_heads))
        return [self.tensor(*shape, head_dim, dtype=dtype, scale=scale) for shape in shapes]


def hybrid_attention(draw: Draw) -> Call:
    layout, dtype = draw.layout(), draw.pick(DTYPES)
    tensors = draw.qkv(layout.num_tokens, layout.num_tokens, dtype)
    causal = draw.pick([None, "group", "token"])
    left = draw.whole(0, 3)
    window = draw.pick([None, left, (left, 0 if causal else draw.whole(0, 3))])
    if not layout.grouped:
        causal, window = draw.pick([None, "token"]), None
    options = {"causal": causal, "window": window, "feature_map": draw.pick(["softmax", "elu", "relu"])}
    options["scale"] = draw.pick([None, None, 0.3, 1.0, -0.5, 0.0])
    heads, kv_heads = tensors[0].shape[1], tensors[1].shape[1]
    beta = draw.tensor(heads, dtype=torch.float32) if draw.chance(0.6) else None
    if beta is not None and draw.chance(0.2):
        beta[0] = -torch.inf
    tensors.append(beta)
    width = draw.pick([1, 4, 16])
    given = draw.chance(0.2)
    for count in (heads, kv_heads):
        tensors.append(draw.tensor(layout.num_tokens, count, width, dtype=dtype).abs() if given else None)
    far = "beta"
    if beta is not None and draw.chance(0.3):
        far, tensors[3] = "far_weight", beta.exp()

    def arguments(x: Sequence[Tensor | None]) -> tuple[Any, dict[str, Any]]:
        return (*x[:3], layout), {far: x[3], "q_features": x[4], "k_features": x[5], **options}

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        positional, named = arguments(x)
        return list(vot_kernels.hybrid_attention(*positional, **named, return_lse=True, backend=backend))

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        positional, named = arguments(x)
        return list(hybrid_reference(*positional, **named))

    shown = {**options, "lengths": layout.lengths, "groups": layout.group_lengths, far: tensors[3]}
    return Call("hybrid_attention", tensors, run, exact, shown, layout.num_tokens, (0, 1, 2, 4, 5))


def hybrid_attention_step(draw: Draw) -> Call:
    """A stream of groups, whose outputs are those of one segment."""
    groups, dtype = [draw.whole(1, 20) for _ in range(draw.whole(1, 5))], draw.pick(DTYPES)
    layout = PackedLayout.from_cu_seqlens([0, sum(groups)], np.cumsum([0, *groups]).tolist())
    tensors = draw.qkv(layout.num_tokens, layout.num_tokens, dtype)
    options = {"window": draw.whole(0, 3), "feature_map": draw.pick(["softmax", "elu", "relu"])}
    options["scale"] = draw.pick([None, None, 0.3, -0.5, 0.0])
    heads, kv_heads = tensors[0].shape[1], tensors[1].shape[1]
    tensors.append(draw.tensor(heads, dtype=torch.float32) if draw.chance(0.6) else None)
    width = draw.pick([1, 4, 16])
    given = draw.chance(0.2)
    for count in (heads, kv_heads):
        tensors.append(draw.tensor(layout.num_tokens, count, width, dtype=dtype).abs() if given else None)

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        given = [None if t is None else t.detach() for t in x]  # steps are for inference
        parts = [(None,) * len(groups) if t is None else t.split(groups) for t in (*given[:3], *given[4:])]
        outputs, state = [], None
        for q, k, v, q_features, k_features in zip(*parts, strict=True):
            features = {"q_features": q_features, "k_features": k_features}
            out, state = vot_kernels.hybrid_attention_step(
                q, k, v, state, beta=given[3], **features, **options, backend=backend
            )
            outputs.append(out)
        return [torch.cat(outputs)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        x = [None if t is None else t.detach() for t in x]
        features = {"q_features": x[4], "k_features": x[5]}
        return [hybrid_reference(*x[:3], layout, causal="group", beta=x[3], **features, **options)[0]]

    shown = {**options, "groups": groups}
    return Call("hybrid_attention_step", tensors, run, exact, shown, None, (0, 1, 2, 4, 5))


def packed_attention(draw: Draw) -> Call:
    layout, dtype = draw.layout(), draw.pick(DTYPES)
    tensors = draw.qkv(layout.num_tokens, layout.num_tokens, dtype)
    options = {"causal": draw.chance(0.5), "scale": draw.pick([None, None, 0.3, -1.0, 0.0])}

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return list(vot_kernels.packed_attention(*x, layout, **options, return_lse=True, backend=backend))

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        causal = "token" if options["causal"] else None
        return list(hybrid_reference(*x, layout, window=None, causal=causal, scale=options["scale"]))

    shown = {**options, "lengths": layout.lengths}
    return Call("packed_attention", tensors, run, exact, shown, layout.num_tokens, (0, 1, 2))


def linear_attention(draw: Draw) -> Call:
    layout, dtype = draw.layout(), draw.pick(DTYPES)
    tensors = draw.qkv(layout.num_tokens, layout.num_tokens, dtype)
    options = {"causal": draw.chance(0.6), "feature_map": draw.pick(["softmax", "elu", "relu"])}
    decays = options["causal"] and draw.chance(0.4)
    decay = -torch.rand(tensors[0].shape[1], generator=draw.generator) if decays else None
    tensors.append(decay)

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.linear_attention(*x[:3], layout, log_decay=x[3], **options, backend=backend)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        return [linear_reference(*x[:3], layout, log_decay=x[3], **options)[0]]

    shown = {**options, "lengths": layout.lengths, "decay": decay}
    return Call("linear_attention", tensors, run, exact, shown, layout.num_tokens, (0, 1, 2))


def flash_attn_varlen_func(draw: Draw) -> Call:
    lengths = draw.lengths()
    key_lengths = [0 if draw.chance(0.2) else draw.whole(1, 60) for _ in lengths]
    tensors = draw.qkv(sum(lengths), sum(key_lengths), draw.pick(DTYPES))
    cu_q, cu_k = (torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (lengths, key_lengths))
    causal = draw.chance(0.5)
    window = (draw.pick([-1, 0, 1, 5, 100]), draw.pick([-1, 0, 2, 100]))
    scale = draw.pick([None, None, 0.3, -0.7, 0.0])

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        longest = max(lengths, default=0), max(key_lengths, default=0)
        options = {"softmax_scale": scale, "causal": causal, "window_size": window, "backend": backend}
        found = vot_kernels.flash_attn_varlen_func(
            *x, cu_q, cu_k, *longest, **options, return_attn_probs=True
        )
        return [found[0], found[1].t().detach()]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        q, k, v = x
        left, right = (None if side == -1 else side for side in window)
        factor = q.shape[2] ** -0.5 if scale is None else scale
        nothing = q[:0] + (k.sum() + v.sum()) * 0
        pieces = [(nothing, nothing[..., 0].to(torch.promote_types(q.dtype, torch.float32)))]
        for row, row_end, key, key_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            rows, keys = q[row:row_end], slice(key, key_end)
            if key == key_end:
                pieces.append((torch.zeros_like(rows), torch.full_like(rows[..., 0], -torch.inf)))
            elif row < row_end:
                pieces.append(cross_attention(rows, k[keys], v[keys], left, 0 if causal else right, factor))
        out, lse = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return [out, lse.detach()]  # flash-attn's lse has no gradient either

    shown = {"lengths": lengths, "keys": key_lengths, "causal": causal, "window": window, "scale": scale}
    return Call("flash_attn_varlen_func", tensors, run, exact, shown, None, (0, 1, 2))


def flash_attn_func(draw: Draw) -> Call:
    batch, rows, keys = draw.whole(0, 3), draw.whole(0, 20), draw.whole(0, 20)
    q, k, v = draw.qkv(batch * rows, batch * keys, draw.pick(DTYPES))
    tensors = [q.unflatten(0, (batch, rows)), *(x.unflatten(0, (batch, keys)) for x in (k, v))]
    causal = draw.chance(0.5)

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.flash_attn_func(*x, causal=causal, backend=backend)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        q, k, v = x
        if not batch or not rows or not keys:
            return [torch.zeros_like(q) + (q.sum() + k.sum() + v.sum()) * 0]
        side, scale = 0 if causal else None, q.shape[-1] ** -0.5
        return [
            torch.stack([cross_attention(*item, None, side, scale)[0] for item in zip(q, k, v, strict=True)])
        ]

    return Call("flash_attn_func", tensors, run, exact, {"causal": causal}, None, (0, 1, 2))


def aoe(draw: Draw) -> Call:
    tokens, dim, rank, hidden = (
        draw.pick([0, 1, 7, 40]),
        draw.whole(1, 40),
        draw.whole(1, 12),
        draw.whole(1, 40),
    )
    experts = draw.whole(1, 9)
    dtype, top_k = draw.pick(DTYPES), draw.whole(1, experts)
    shapes = [
        (tokens, dim),
        (experts, rank, dim),
        (experts, hidden, rank),
        (experts, hidden, dim),
        (experts, hidden, dim),
    ]
    tensors: list[Tensor | None] = [
        draw.tensor(*shape, dtype=dtype, scale=shape[-1] ** -0.5) for shape in shapes
    ]
    options = {"weighting": draw.pick(["topk_softmax", "softmax_topk"])}
    chosen: list[Tensor] = []

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        y, aux = vot_kernels.aoe(*x, top_k, **options, return_aux=True, backend=backend)
        chosen[:] = [aux.indices]
        return [y, aux.weights]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        y, _, _, weights, *_ = aoe_reference(
            *x, top_k, **options, indices=chosen[0]
        )  # near-ties fall either way
        return [y, weights]

    return Call("aoe", tensors, run, exact, {**options, "top_k": top_k}, None, (0, 1, 2, 3, 4))


def moe(draw: Draw) -> Call:
    tokens, dim, hidden, experts = (
        draw.pick([0, 1, 7, 40]),
        draw.whole(1, 40),
        draw.whole(1, 40),
        draw.whole(1, 9),
    )
    dtype, top_k = draw.pick(DTYPES), draw.whole(0, 4)
    shapes = [(tokens, dim), (experts, 2 * hidden, dim), (experts, dim, hidden)]
    tensors: list[Tensor | None] = [
        draw.tensor(*shape, dtype=dtype, scale=shape[-1] ** -0.5) for shape in shapes
    ]
    indices = torch.randint(-1, experts + 1, (tokens, top_k), generator=draw.generator)
    tensors.append(draw.tensor(tokens, top_k, dtype=draw.pick([dtype, torch.float32])).abs())

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.moe(*x[:3], indices, x[3], backend=backend)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        return [moe_reference(*x[:3], indices, x[3])]

    return Call("moe", tensors, run, exact, {"top_k": top_k}, None, (0, 1, 2))


def dense_residual(draw: Draw) -> Call:
    shape = [draw.whole(0, 9) for _ in range(draw.whole(0, 3))]
    dtype = draw.pick(DTYPES)
    count = draw.whole(1, 5)
    tensors: list[Tensor | None] = [draw.tensor(*shape, dtype=dtype) for _ in range(count)]
    tensors.append(draw.tensor(count, dtype=draw.pick([dtype, torch.float32])))

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.dense_residual(x[:-1], x[-1], backend=backend)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        return [dense_residual_reference(x[:-1], x[-1])]

    return Call("dense_residual", tensors, run, exact)


def rope_qk_norm(draw: Draw) -> Call:
    dtype = draw.pick(DTYPES)
    rows, (heads, kv_heads), head_dim = draw.whole(0, 30), draw.heads(), 2 * draw.whole(1, 40)
    tensors: list[Tensor | None] = [
        draw.tensor(rows, count, head_dim, dtype=dtype) for count in (heads, kv_heads)
    ]
    for _ in range(2):
        tensors.append(1 + 0.3 * draw.tensor(head_dim, dtype=dtype) if draw.chance(0.7) else None)
    positions = torch.randint(0, 300, (draw.whole(0, rows), 3), generator=draw.generator)
    options = {"theta": draw.pick([10000.0, 100.0]), "eps": 1e-6}

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        q, k, q_weight, k_weight = x
        named = {"q_weight": q_weight, "k_weight": k_weight, **options, "backend": backend}
        return list(vot_kernels.rope_qk_norm(q, k, positions, **named))

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        q, k, q_weight, k_weight = x
        sections = default_sections(head_dim // 2)
        weights = {"q_weight": q_weight, "k_weight": k_weight}
        return list(rope_reference(q, k, positions, **weights, sections=sections, **options))

    return Call("rope_qk_norm", tensors, run, exact, options, positions.shape[0])


def size_aware_embedding(draw: Draw) -> Call:
    layout, dtype, octaves = draw.layout(), draw.pick(DTYPES), draw.whole(1, 4)
    dim, hidden = draw.whole(1, 20), draw.whole(1, 20)
    shapes = [(layout.num_tokens, dim), (hidden, 12 * octaves), (hidden,), (dim, hidden), (dim,)]
    tensors: list[Tensor | None] = [draw.tensor(*shape, dtype=dtype, scale=0.5) for shape in shapes]
    fps = draw.pick([None, 8.0, 0.0])

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.size_aware_embedding(x[0], layout, *x[1:], fps=fps, backend=backend)]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        features = size_features(layout.sizes, fps, octaves=octaves)
        return [size_reference(x[0], layout.cu_seqlens, features, *x[1:])]

    shown = {"lengths": layout.lengths, "fps": fps}
    return Call("size_aware_embedding", tensors, run, exact, shown, layout.num_tokens)


def pack_patches(draw: Draw) -> Call:
    patch, frames, channels, dtype = draw.whole(1, 4), draw.whole(1, 3), draw.whole(1, 3), draw.pick(DTYPES)
    tensors: list[Tensor | None] = []
    for _ in range(draw.whole(1, 4)):
        clip = () if draw.chance(0.5) else (frames * draw.whole(1, 3),)
        tensors.append(
            draw.tensor(*clip, channels, patch * draw.whole(1, 4), patch * draw.whole(1, 4), dtype=dtype)
        )

    def run(x: Sequence[Tensor | None], backend: str) -> list[Tensor]:
        return [vot_kernels.pack_patches(x, patch, temporal_patch_size=frames)[0]]

    def exact(x: Sequence[Tensor | None]) -> list[Tensor]:
        return [pack_patches_reference(x, patch, temporal_patch_size=frames)[0]]

    return Call("pack_patches", tensors, run, exact, {"patch": patch, "frames": frames})


MAKERS: dict[str, Callable[[Draw], Call]] = {
    maker.__name__: maker
    for maker in (
        hybrid_attention,
        hybrid_attention_step,
        packed_attention,
        linear_attention,
        flash_attn_varlen_func,
        flash_attn_func,
        aoe,
        moe,
        dense_residual,
        rope_qk_norm,
        size_aware_embedding,
        pack_patches,
    )
}
