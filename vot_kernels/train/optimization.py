"""Optimisation: the learning rate, the parameters with weight decay, the numbers of products, one update."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn


def cosine_schedule(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate at `step`: linear to `peak` over `warmup` steps, then half a cosine to 0 at `steps`."""
    return peak * min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def parameter_groups(
    model: nn.Module, weight_decay: float, undecayed: Sequence[str] = (), untrained: Sequence[str] = ()
) -> list[dict]:
    """Return groups for AdamW: matrices decay; vectors, scalars, and names with a part of `undecayed` do not.

    Names that begin with one of `untrained` are left out.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and not any(part in name for part in undecayed)

    named = [(n, p) for n, p in model.named_parameters() if not n.startswith(tuple(untrained))]
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


def check_optimised(
    parameters: Mapping[str, nn.Parameter],
    wanted: Collection[str],
    optimizer: torch.optim.Optimizer,
    what: str,
) -> None:
    """Check after a backward pass that of all parameters exactly the wanted ones have a gradient and are optimised.

    Raises:
        RuntimeError: it is not so; the message names the first parameters that differ, and what the stage trains.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for state, found in (
        ("have a gradient", {name for name, p in parameters.items() if p.grad is not None}),
        ("are optimised", {name for name, p in parameters.items() if id(p) in owned}),
    ):
        if found != set(wanted):
            raise RuntimeError(
                f"The stage trains {what}, but of the parameters that {state} "
                f"{sorted(set(wanted) - found)[:4]} are missing and {sorted(found - set(wanted))[:4]} are too many."
            )


def in_precision(model: nn.Module, precision: str) -> torch.autocast:
    """Return the context in which matrix products have a precision of the settings: float32 or bfloat16."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def update(model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float, clip: float) -> None:
    """Clip the gradients to the norm `clip`, take a step, and drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
