"""What questions about videos cost, before they are asked: counted memory and work, and two measured rates."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

GRAPH_TOKENS = 512
"""Tokens of a graph that a model writes."""
ANSWER_TOKENS = 288
"""Tokens that a question makes it write: an analysis, proposals and ratings."""
READ_TOKENS = 3000
"""Tokens of prompts besides the clip that it reads for one question."""
PROMPT_TOKENS = 600
"""Tokens of one such prompt."""
LONG = 20.0
"""Seconds from which on a run is long."""


class Run(NamedTuple):
    """What is asked of a model.

    Attributes:
        videos, questions: how many there are.
        clips: how many clips it reads. A video longer than a window is several, and one more for each question.
        graphs: how many scene graphs it writes.
    """

    videos: int = 1
    questions: int = 1
    clips: int = 1
    graphs: int = 1

    def __str__(self) -> str:
        if self == (1, 1, 1, self.graphs):
            return "a question"
        asked = f"{_counted(self.questions, 'question')} about {_counted(self.videos, 'video')}"
        return f"for {asked} (clips to read: {self.clips:,}, graphs to write: {self.graphs:,})"


@dataclass(frozen=True)
class Estimate:
    """What questions about videos take.

    Attributes:
        parameters: of the whole model.
        weight_bytes, cache_bytes: of the weights, and of the keys and values of the clip and of prompts about it.
        visual_tokens: tokens of the prompt that stand for a clip.
        clip_flop, prompt_flop: floating-point operations to read a clip, and the prompts of a question.
        flop_per_s, bytes_per_s: measured rates of a matrix product and of reading memory.
        run: what is asked.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: int
    visual_tokens: int
    clip_flop: float
    prompt_flop: float
    flop_per_s: float
    bytes_per_s: float
    run: Run = Run()

    @property
    def flop(self) -> float:
        """Operations to read all clips and prompts."""
        return self.run.clips * self.clip_flop + self.run.questions * self.prompt_flop

    @property
    def new_tokens(self) -> int:
        """Tokens that are written."""
        return self.run.graphs * GRAPH_TOKENS + self.run.questions * ANSWER_TOKENS

    @property
    def seconds(self) -> float:
        """Seconds for all of it: reading is bound by arithmetic, each new token by reading all weights."""
        return self.flop / self.flop_per_s + self.new_tokens * self.weight_bytes / self.bytes_per_s

    @property
    def long(self) -> bool:
        """Whether that is so long that a user wants to know it before."""
        return self.seconds >= LONG

    def __str__(self) -> str:
        return (
            f"Estimate: {_size(self.weight_bytes)} of memory for {_count(self.parameters)} parameters and "
            f"{_size(self.cache_bytes)} for keys and values; about {_duration(self.seconds)} {self.run}. "
            f"It rests on {self.visual_tokens} tokens of a clip, {self.flop:.1e} operations to read clips and prompts "
            f"at {self.flop_per_s:.1e} a second (measured), and {self.new_tokens} new tokens, each of which reads "
            f"all weights at {_size(self.bytes_per_s)} a second (measured)."
        )


def estimate(model: Any, inputs: Any, visual_tokens: int, batch: int) -> Estimate:
    """Estimate what a graph of a clip and a question about it take.

    Args:
        model: a model for images or videos and text.
        inputs: what its processor made of the clip and the beginning of the prompt.
        visual_tokens: how many tokens of `inputs["input_ids"]` stand for the clip.
        batch: prompts that are computed at once, each with keys and values of its own.
    """
    parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    tower = _tower_parameters(model)
    head = inputs["input_ids"].shape[1]
    clip_flop = 2.0 * (parameters - tower) * head + 2.0 * tower * _patches(model, inputs)
    prompt_flop = 2.0 * (parameters - tower) * READ_TOKENS
    weight = next(model.parameters())
    flop_per_s, bytes_per_s = _rates(str(weight.device), str(weight.dtype).removeprefix("torch."))
    kept = head + batch * (head + PROMPT_TOKENS)  # the clip once, and once in each prompt
    cache_bytes = kept * _cache_width(model.config) * weight.element_size()
    flop, rates = (clip_flop, prompt_flop), (flop_per_s, bytes_per_s)
    return Estimate(parameters, weight_bytes, cache_bytes, visual_tokens, *flop, *rates)


def _tower_parameters(model: Any) -> int:
    """Parameters of the part that looks at pixels."""
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return 0
    found = (m for m in model.modules() if isinstance(getattr(m, "config", None), type(vision)))
    tower = next(found, None)  # its own modules have such a config, too, and come after it
    return sum(p.numel() for p in tower.parameters()) if tower is not None else 0


def _patches(model: Any, inputs: Any) -> int:
    """Patches of the clip, each of which passes through the tower."""
    for key in ("pixel_values_videos", "pixel_values"):
        pixels = inputs.get(key)
        if isinstance(pixels, Tensor):
            if pixels.ndim == 2:
                return len(pixels)
            patch = getattr(model.config.vision_config, "patch_size", 16)
            patch = patch if isinstance(patch, int) else patch[0]
            return pixels[..., 0, :, :].numel() // patch**2
    return int(inputs["input_ids"].shape[1])


def _cache_width(config: Any) -> int:
    """Numbers that the cache holds for each token."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width


@cache
def _rates(device: str, dtype: str) -> tuple[float, float]:
    """Measure operations per second of a matrix product, and bytes per second of reading memory, in a few ms."""
    kind = getattr(torch, dtype)
    side = 512
    a = torch.ones(side, side, device=device, dtype=kind)
    x = torch.ones(1 << 24, device=device, dtype=kind)
    product = _seconds(lambda: a @ a, device)
    reading = _seconds(lambda: x.sum(), device)
    return 2.0 * side**3 / product, x.numel() * x.element_size() / reading


def _seconds(work: Any, device: str) -> float:
    """The least of a few runs, after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return max(1e-9, min(once() for _ in range(3)))


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _count(number: float) -> str:
    return f"{number / 1e9:.1f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
