"""What a run would take, measured on one batch: parameters, operations, memory and time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vot_kernels.train.vlm.model import train_only

_DRAWN = 8  # tokens that are drawn to see how long one takes


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        inputs: of the model, with labels, in one pass forward and back.
        passes: so many of these passes make a step.
        prompts: inputs of `generate`, if the step draws replies.
        tokens: drawn per reply, at most.
    """

    inputs: Mapping[str, Tensor]
    passes: int = 1
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def estimate(model: Any, parts: Sequence[str], steps: int, work: Work) -> str:
    """Return a text about a run of `steps` steps that trains `parts` of the model; the weights stay as they are."""
    trained = train_only(model, parts)
    model.train()
    inputs = _on(model, work.inputs)
    _pass(model, inputs)  # the first one also compiles and allocates
    counter = FlopCounterMode(display=False)
    with counter:
        _pass(model, inputs)
    saved = _saved_bytes(model, inputs)
    start = time.perf_counter()
    _pass(model, inputs)
    seconds = work.passes * (time.perf_counter() - start) + _drawing_seconds(model, work)
    weights = sum(_bytes(p) for p in model.parameters())
    extra = 3 * sum(_bytes(p) for p in trained.values())  # gradients and two moments
    count = sum(p.numel() for p in trained.values())
    operations = work.passes * counter.get_total_flops()
    drawn = f", and up to {work.tokens} tokens of each reply to draw" if work.tokens else ""
    return "\n".join(
        [
            f"parameters  {count:,} trained ({', '.join(parts)}) of {sum(p.numel() for p in model.parameters()):,}",
            f"operations  {operations / 1e9:.2f} GFLOP of torch's matrix products a step{drawn}",
            f"memory      {weights / 1e6:.0f} MB weights + {extra / 1e6:.0f} MB gradients and moments "
            f"+ {saved / 1e6:.0f} MB activations",
            f"time        {seconds:.2f} s a step, {_duration(steps * seconds)} for {steps} steps, as measured here",
        ]
    )


def _pass(model: Any, inputs: Mapping[str, Tensor]) -> None:
    model(**inputs, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def _saved_bytes(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """Return the bytes that a pass forward keeps for the way back, besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, use_cache=False).loss
    del loss
    return sum(kept.values())


@torch.no_grad()
def _drawing_seconds(model: Any, work: Work) -> float:
    """Return the seconds that it takes to draw the replies of a step, none of which ends early."""
    if not work.tokens:
        return 0.0
    prompts = _on(model, work.prompts)

    def draw(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start

    model.eval()
    draw(1)
    first, more = draw(1), draw(1 + _DRAWN)
    model.train()
    return first + (work.tokens - 1) * max(0.0, more - first) / _DRAWN


def _on(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
