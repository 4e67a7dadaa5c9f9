"""What a run would take, measured on one batch: parameters, operations, memory and time."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_DRAWN = 8  # tokens that are drawn to see how long one takes


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        loss: returns what is differentiated in one pass, computed as a step of training does.
        passes: so many of these passes make a step.
        prompts: inputs of `generate`, if the step draws replies.
        tokens: drawn per reply, at most.
    """

    loss: Callable[[], Tensor]
    passes: int = 1
    prompts: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def estimate(model: Any, trained: Iterable[nn.Parameter], what: str, steps: int, work: Work) -> str:
    """Return a text about a run of so many steps; the weights stay as they are.

    Args:
        model: in training.
        trained: its parameters that the run trains.
        what: what these are called.
        steps: of the run.
        work: what each of them computes.
    """
    model.train()
    _pass(model, work)  # the first one also compiles and allocates
    with _Operations() as counter:
        _pass(model, work)
    saved = _saved_bytes(model, work)
    start = time.perf_counter()
    _pass(model, work)
    seconds = work.passes * (time.perf_counter() - start) + _drawing_seconds(model, work)
    weights, whole = sum(_bytes(p) for p in model.parameters()), sum(p.numel() for p in model.parameters())
    learnt = list(trained)
    extra = 3 * sum(_bytes(p) for p in learnt)  # gradients and two moments
    count = sum(p.numel() for p in learnt)
    operations = work.passes * counter.total
    drawn = f", and up to {work.tokens} tokens of each reply to draw" if work.tokens else ""
    return "\n".join(
        [
            f"parameters  {count:,} trained ({what}) of {whole:,}",
            f"operations  {operations / 1e9:.2f} GFLOP of torch's matrix products a step{drawn}",
            f"memory      {weights / 1e6:.0f} MB weights + {extra / 1e6:.0f} MB gradients and moments "
            f"+ {saved / 1e6:.0f} MB activations",
            f"time        {seconds:.2f} s a step, {_duration(steps * seconds)} for {steps} steps, as measured here",
        ]
    )


class _Operations(TorchDispatchMode):
    """Counts the operations of torch's matrix products.

    torch's own counter also says in which module they are, and fails where a pass has parts without gradients.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _pass(model: Any, work: Work) -> None:
    work.loss().backward()
    model.zero_grad(set_to_none=True)


def _saved_bytes(model: Any, work: Work) -> int:
    """Return the bytes that a pass forward keeps for the way back, besides the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = work.loss()
    del value
    return sum(kept.values())


@torch.no_grad()
def _drawing_seconds(model: Any, work: Work) -> float:
    """Return the seconds that it takes to draw the replies of a step, none of which ends early."""
    if not work.tokens:
        return 0.0
    prompts = {name: value.to(model.device) for name, value in work.prompts.items()}

    def draw(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start

    model.eval()
    draw(1)
    first, more = draw(1), draw(1 + _DRAWN)
    model.train()
    return first + (work.tokens - 1) * max(0.0, more - first) / _DRAWN


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
