"""The models of transformers on the ops of this package: `patch` for their attention, and their experts on `moe`.

transformers 5 routes tokens itself and hands (hidden states, chosen experts, their weights) to a function that
is looked up by name, the model's `experts_implementation`. `register_experts` adds such a name:

    register_experts()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="vot_kernels")
    model.set_experts_implementation("vot_kernels")  # or on a model that is there already
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from vot_kernels.integrations.patching import patch, patched, unpatch
from vot_kernels.ops.checks import FLOAT_DTYPES
from vot_kernels.ops.moe import moe

__all__ = ["PackedExperts", "experts_forward", "patch", "patched", "register_experts", "unpatch"]

_SILU = (nn.SiLU, type(ACT2FN["silu"]), type(ACT2FN["swish"]))


def register_experts(name: str = "vot_kernels") -> str:
    """Make `experts_implementation=name` run a model's experts on `vot_kernels.moe`; again changes nothing.

    It serves SwiGLU experts without biases in the two layouts of transformers (`[experts, out, in]` and
    transposed), in training and inference, and skips the ids by which expert parallelism marks the experts of
    other ranks. Other experts raise one sentence with the reason in their first forward, as those of
    transformers do.

    Args:
        name: what to call it.

    Returns:
        The name.

    Raises:
        ValueError: the name means another implementation already.

    Source: transformers 5, `integrations/moe.py`.
    """
    taken = name == "eager" or (
        name in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[name] is not experts_forward
    )
    if taken:
        raise ValueError(f"name must not be that of another experts implementation, got {name!r}.")
    ExpertsInterface.register(name, experts_forward)
    return name


class PackedExperts(Protocol):
    """The weights of a transformers experts module, `[experts, out, in]`, or transposed if it says so."""

    gate_up_proj: Tensor
    down_proj: Tensor


def experts_forward(
    self: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum of the chosen experts of a transformers experts module.

    Args:
        self: the module, of a class decorated with transformers' `use_experts_implementation`.
        hidden_states: `[tokens, dim]`.
        top_k_index: integer `[tokens, k]`; ids from the module's number of experts on are skipped.
        top_k_weights: `[tokens, k]`.

    Returns:
        `[tokens, dim]` in the dtype of `hidden_states`.

    Raises:
        ValueError: the op cannot serve such experts; all reasons in one sentence.
    """
    reasons = list(expert_refusals(self))
    if reasons:
        raise ValueError(
            f"The experts implementation of vot_kernels cannot serve {type(self).__name__}: {', '.join(reasons)}; "
            'use experts_implementation="grouped_mm" or "eager".'
        )
    gate_up, down = self.gate_up_proj, self.down_proj
    if getattr(self, "is_transposed", False):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    # Eager linear layers compute in autocast's dtype, transformers' grouped ones in that of the weights.
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype
    y = moe(hidden_states.to(dtype), gate_up.to(dtype), down.to(dtype), top_k_index, top_k_weights)
    return y.to(hidden_states.dtype)


def expert_refusals(experts: object) -> Iterator[str]:
    """Why the op cannot serve `experts`; a version of transformers without an attribute means its default."""
    if not getattr(experts, "has_gate", True):
        yield "they have no gate"
    if getattr(experts, "has_bias", False):
        yield "they have biases"
    if not getattr(experts, "is_concatenated", True):
        yield "their gate and up rows are interleaved"
    if getattr(experts, "has_post_expert_norm", False):
        yield "they have a norm behind them"
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is not None and gate.__module__ != ExpertsInterface.__module__:  # else act_fn(gate) * up
        yield "they have a gate of their own"
    activation = getattr(experts, "act_fn", None)
    if not (isinstance(activation, _SILU) or activation is nn.functional.silu):
        name = getattr(activation, "__name__", type(activation).__name__)
        yield f"their activation is {name}, not SiLU"
    weight = getattr(experts, "gate_up_proj", None)
    if isinstance(weight, Tensor) and weight.dtype not in FLOAT_DTYPES:
        yield f"their weights are {weight.dtype}"
