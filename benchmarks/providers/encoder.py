"""The encoder on a packed batch, against the same network on a padded batch, image by image, and exact."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.core import Provider, needs
from benchmarks.problems.encoder import Encoder, OneByOne, apply, served_by
from vot_kernels.ops.dispatch import describe_backends
from vot_kernels.packing import PackedLayout


class Packed(nn.Module):
    """The encoder unchanged."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, grid: Tensor, layout: PackedLayout) -> Tensor:
        """Return `[patches, hidden_size]`."""
        return self.encoder(pixels, grid, layout=layout).last_hidden_state


@dataclass(frozen=True, eq=False)
class _Padding:
    """A packed layout, the padded one, the padded rows that hold tokens, and the keys that attention may see."""

    packed: PackedLayout
    padded: PackedLayout
    rows: Tensor
    mask: Tensor | None  # [clips, 1, 1, longest], None where all clips are equally long
    clips: int


class Padded(nn.Module):
    """The same network with every clip padded to the longest, so that all layers run on all rows."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, padding: _Padding) -> Tensor:
        """Return `[patches, hidden_size]` without the padding."""
        encoder = self.encoder
        embedded = encoder._embed(pixels, padding.packed, None)
        x = embedded.new_zeros(padding.padded.num_tokens, embedded.shape[1])
        x = x.index_copy(0, padding.rows, embedded)
        history = encoder.residual.start(x)
        for i, block in enumerate(encoder.blocks):
            x = x + self._attention(block.attention, block.attention_norm(x), padding)
            x = encoder.residual(x + block.mlp(block.mlp_norm(x)), i + 1, history)
        return encoder.norm(x)[padding.rows]

    def _attention(self, attention: nn.Module, x: Tensor, padding: _Padding) -> Tensor:
        parts = attention.project(x, padding.padded)
        q, k, v = (part.unflatten(0, (padding.clips, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=padding.mask)
        return attention.out(out.transpose(1, 2).flatten(2).flatten(0, 1))


def _layout(problem: Encoder, dtype: torch.dtype, device: torch.device) -> PackedLayout:
    return PackedLayout.from_grid_thw(problem.grid, problem.config().group, device)


def _padding(problem: Encoder, dtype: torch.dtype, device: torch.device) -> _Padding:
    packed = _layout(problem, dtype, device)
    lengths, clips, longest = torch.tensor(packed.lengths), len(problem.grid), packed.max_seqlen
    inside = torch.arange(longest) < lengths[:, None]
    rows = inside.flatten().nonzero().squeeze(1).to(device)
    padded = PackedLayout.from_lengths([longest] * clips, device=device)
    positions = padded.positions.new_zeros(clips * longest, 3).index_copy(0, rows, packed.positions)
    mask = None if bool(inside.all()) else inside[:, None, None].to(device)
    return _Padding(packed, replace(padded, positions=positions), rows, mask, clips)


def _packed(
    serve: Callable[[], AbstractContextManager[None]],
    problem: Encoder,
    layout: PackedLayout,
    pixels: Tensor,
    *weights: Tensor,
) -> Tensor:
    with serve():
        return apply(problem, Packed, weights, pixels, torch.tensor(problem.grid), layout)


def _padded(problem: Encoder, padding: _Padding, pixels: Tensor, *weights: Tensor) -> Tensor:
    return apply(problem, Padded, weights, pixels, padding)


def _one_by_one(problem: Encoder, prepared: None, pixels: Tensor, *weights: Tensor) -> Tensor:
    return apply(problem, OneByOne, weights, pixels, torch.tensor(problem.grid))


def _exact(problem: Encoder) -> Encoder | None:
    """Return the same problem with exact softmax in every layer; None if every layer has it already."""
    return None if problem.attention == "softmax" else replace(problem, attention="softmax")


def _no_kernel(problem: Encoder, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    """Ops without a Triton kernel for these inputs fall back to PyTorch, but at least one op must have a kernel."""
    backends = describe_backends(device, dtype)
    if device.type == "cuda" and any(not backends[op]["triton"] for op in problem.ops):
        return None
    return "; ".join(dict.fromkeys(reason for op in problem.ops for reason in backends[op]["triton"])) or (
        "on a CPU, Triton's kernels are interpreted"
    )


def _refuses(
    backend: str, problem: Encoder, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    """Every op must be served by this backend."""
    backends = describe_backends(device, dtype)
    return "; ".join(dict.fromkeys(why for op in problem.ops for why in backends[op][backend])) or None


def _cannot_pad(problem: Encoder, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    if problem.attention != "softmax":
        return "padding can be masked exactly in exact softmax attention alone"
    return _single(problem, dtype, device, direction)


def _single(problem: Encoder, dtype: torch.dtype, device: torch.device, direction: str) -> str | None:
    return "there is one clip alone" if len(problem.grid) == 1 else None


def _is_exact(
    problem: Encoder | None, dtype: torch.dtype, device: torch.device, direction: str
) -> str | None:
    return "attention is exact softmax already" if problem is None else None


_common: dict[str, Any] = {
    "suites": ("encoder",),
    "missing": needs("transformers"),
}

PROVIDERS = (
    Provider(
        "vot-kernels triton",
        run=partial(_packed, nullcontext),
        prepare=_layout,
        refuses=_no_kernel,
        ours=True,
        **_common,
    ),
    *(
        Provider(
            f"vot-kernels {backend}",
            run=partial(_packed, partial(served_by, backend)),
            prepare=_layout,
            refuses=partial(_refuses, backend),
            ours=True,
            **_common,
        )
        for backend in ("cpp", "torch")
    ),
    Provider("padded batch SDPA", run=_padded, prepare=_padding, refuses=_cannot_pad, **_common),
    Provider("one by one", run=_one_by_one, refuses=_single, **_common),
    Provider(
        "exact SDPA",
        run=_padded,
        prepare=_padding,
        refuses=_is_exact,
        solves=_exact,
        instead="exact softmax in every layer",
        **_common,
    ),
)
