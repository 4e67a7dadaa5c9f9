"""The whole encoder on a batch of images and clips of mixed sizes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import counters
from benchmarks.core import Work
from vot_kernels.ops.dispatch import BACKENDS, CAPABILITIES

VERIFIED_TOKENS = (
    2048  # clips are verified whole: the first, the last, and the shortest up to this many tokens
)


@dataclass(frozen=True)
class Encoder:
    """Encoding with a preset of `VotEncoder`; inputs are the pixels `[patches, values]`, then all parameters.

    Attributes:
        preset: a preset of `VotEncoderConfig`.
        grid: (frames, height, width) in patches, of each image or clip.
        attention: "softmax" (exact) or "hybrid" in most layers.
        experts: Autonomy-of-Experts blocks as in the preset, else only dense blocks. In half precision
            rounding chooses other experts for tokens that are near a tie, and the results cannot be compared.
        seed: seed of the inputs, added to that of the run.
    """

    preset: str
    grid: tuple[tuple[int, int, int], ...]
    attention: str = "softmax"
    experts: bool = True
    seed: int = 0

    @property
    def op(self) -> str:
        return "encoder"

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that run in the encoder."""
        attention = ("hybrid_attention",)  # also serves exact softmax, with a window of None
        experts = ("aoe",) if self.experts else ()
        return *attention, *experts, "dense_residual", "rope_qk_norm", "size_aware_embedding"

    @property
    def lengths(self) -> list[int]:
        """The number of patches of each image or clip."""
        return [t * y * x for t, y, x in self.grid]

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def describe(self) -> str:
        frames = {t for t, _, _ in self.grid}
        what = f"{len(self.grid)} images" if frames == {1} else f"{len(self.grid)} clips"
        if len(self.grid) == 1:
            what = f"a clip of {self.grid[0][0]} frames"
        attention = "exact softmax" if self.attention == "softmax" else "hybrid attention"
        blocks = "" if self.experts else ", dense blocks"
        return f"{self.preset} encoder, {what}, {self.size:,} patches, {attention}{blocks}"

    def config(self) -> Any:
        """Return the `VotEncoderConfig`."""
        from vot_kernels.models.encoder import VotEncoderConfig

        changes = {} if self.experts else {"aoe_every": 0}
        return VotEncoderConfig.preset(self.preset, attention=self.attention, **changes)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Return the parameters of a fresh encoder, each changed a little, so that none is zero or the identity."""
        generator = torch.Generator().manual_seed(seed + self.seed)
        pixels = torch.randn(self.size, self.config().patch_numbers, generator=generator)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed + self.seed)
            fresh = new_encoder(self.config(), torch.device("cpu"))
        moved = [p + 0.02 * torch.randn(p.shape, generator=generator) for p in fresh.parameters()]
        return tuple(x.detach().to(device, dtype) for x in (pixels, *moved))

    def rows(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """Return all rows of the clips in `verified`."""
        if len(self.verified) == len(self.grid):
            return None
        begins = list(accumulate(self.lengths, initial=0))
        rows = [torch.arange(begins[i], begins[i + 1]) for i in self.verified]
        return torch.cat(rows).to(inputs[0].device)

    @property
    def verified(self) -> list[int]:
        """The clips that are verified, ascending; no other clip influences them."""
        return verified_clips(self.lengths)

    def oracle(self, inputs: Sequence[Tensor], rows: Tensor | None) -> Tensor:
        """Compute every clip alone: by the reference if it is small, else by the PyTorch backend."""
        pixels, *weights = inputs
        backend = "reference" if self.size <= 512 else "torch"
        parts = pixels.split(self.lengths)
        with served_by(backend):
            found = [
                apply(self, OneByOne, weights, parts[i], torch.tensor([self.grid[i]]))
                for i in (self.verified if rows is not None else range(len(self.grid)))
            ]
        return torch.cat(found)

    def small(self) -> "Encoder":
        """Return the nano encoder on the same number of clips, at most eight, each a few patches large."""
        largest = max(max(clip) for clip in self.grid)
        scale = max(1.0, largest / 6)
        grid = tuple(tuple(max(1, round(n / scale)) for n in clip) for clip in self.grid[:8])
        return replace(self, preset="nano", grid=grid)

    def work(self, direction: str, itemsize: int) -> Work:
        return counters.encoder(self, direction, itemsize)


def verified_clips(lengths: Sequence[int]) -> list[int]:
    """Return which clips of these lengths are verified, ascending: the first, the last, and short ones."""
    chosen = {0, len(lengths) - 1}
    total = sum(lengths[i] for i in chosen)
    for i in sorted(set(range(len(lengths))) - chosen, key=lambda i: lengths[i]):
        total += lengths[i]
        if total > VERIFIED_TOKENS:
            break
        chosen.add(i)
    return sorted(chosen)


class OneByOne(nn.Module):
    """An encoder that processes one clip after the other."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """Map `[patches, values]` and integer `[clips, 3]` to `[patches, hidden_size]`."""
        parts = zip(pixels.split(grid.prod(1).tolist()), grid, strict=True)
        return torch.cat([self.encoder(part, clip[None]).last_hidden_state for part, clip in parts])


def new_encoder(config: Any, device: torch.device) -> nn.Module:
    """Return a `VotEncoder` on a device, in evaluation mode."""
    from vot_kernels.models.encoder import VotEncoder

    with device:
        return VotEncoder(config).eval()


@cache
def _encoder_in(
    problem: Encoder, around: type[nn.Module], device: torch.device
) -> tuple[nn.Module, list[str]]:
    module = around(new_encoder(problem.config(), device))
    return module, [name for name, _ in module.named_parameters()]


def apply(problem: Encoder, around: type[nn.Module], weights: Sequence[Tensor], *arguments: Any) -> Tensor:
    """Return `around(encoder)(*arguments)` for an encoder with these weights, differentiable in them."""
    module, names = _encoder_in(problem, around, weights[0].device)
    return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), arguments)


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Serve whatever is left to "auto" by one backend."""
    before = {op: dict(table) for op, table in CAPABILITIES.items()}
    try:
        for table in CAPABILITIES.values():
            for other in set(BACKENDS) - {backend}:
                table[other] = lambda inputs, other=other: [f"only {backend} is asked for here, not {other}"]
        yield
    finally:
        for op, table in before.items():
            CAPABILITIES[op].update(table)
