"""Conversion of a block's feed-forward to Autonomy-of-Experts, with or without a gate or biases.

A feed-forward that is not a SwiGLU without biases becomes one on tokens with a constant 1 appended. A bias is the
column of that 1; a layer without a gate, act(x W₁ᵀ) W₂ᵀ, has the 1 as its value. With s the sigmoid,

    GELU(u) ≈ u s(1.702 u) = SiLU(1.702 u) / 1.702

(Hendrycks and Gimpel, 2016), to 0.021, so that GELU is SiLU with other weights.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vot_kernels.nn.aoe_conversion import ConversionReport, convert_swiglu, output_error
from vot_kernels.nn.autonomy_of_experts import AoEAux, AutonomyOfExperts
from vot_kernels.ops.checks import check_tensor

_GATED = ("gate_proj", "up_proj", "down_proj")
_PAIRS = (("fc1", "fc2"), ("linear_fc1", "linear_fc2"), ("weights_in", "weights_out"), ("gate_up", "down"))
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
_EXTRA = 8  # columns for the 1, so that rows are multiples of 8 elements, which load in full width
_GELU = 1.702


class BiasedExperts(nn.Module):
    """Autonomy-of-Experts with biases: its tokens get a constant 1 and zeros, its output a bias.

    Args:
        experts: experts whose width is `dim` plus the columns for the 1 and the zeros.
        dim: width of the tokens.
        bias: `[dim]`, added to the output, or None.

    Attributes:
        experts: the `AutonomyOfExperts` within, for `update_selection_bias`.
    """

    def __init__(self, experts: AutonomyOfExperts, dim: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.experts, self.dim = experts, dim
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor, return_aux: bool = False) -> Tensor | tuple[Tensor, AoEAux]:
        """Map `[..., dim]` to `[..., dim]`; with `return_aux` return (y, aux), as `AutonomyOfExperts` does.

        Raises:
            ValueError: x has another width.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have the shape [..., {self.dim}], got {list(x.shape)}.")
        y, aux = self.experts(_with_one(x, self.experts.w_down.shape[2]), return_aux=True)
        y = y[..., : self.dim] if self.bias is None else y[..., : self.dim] + self.bias
        return (y, aux) if return_aux else y


def convert_mlp(
    module: nn.Module, num_experts: int, top_k: int, rank: int, **options: Any
) -> tuple[AutonomyOfExperts | BiasedExperts, ConversionReport]:
    """Convert the feed-forward of a block to Autonomy-of-Experts by `convert_swiglu`, and report the errors.

    It takes `gate_proj`, `up_proj` and `down_proj` (Llama, Qwen, the tower of Qwen2.5-VL); `fc1` and `fc2`, or
    `linear_fc1` and `linear_fc2` (ViT, CLIP, SigLIP, DINOv2, Qwen3-VL, timm); `weights_in` and `weights_out` (SwiGLU
    of DINOv2); a `vot_kernels.nn.SwiGLU`; and `nn.Sequential` of a linear layer, an activation and a linear layer. The
    activation is SiLU, GELU in any form, or QuickGELU. A copy of the module is compared with what was found in it on a
    few random tokens.

    For any other activation, fit a SwiGLU to the outputs of the layer on tokens that it sees, and convert that.

    Args:
        module: the feed-forward module, which is not changed.
        num_experts, top_k, rank, options: see `convert_swiglu`. With biases or without a gate, `rank` and the factors
            are those of gates that also read a constant 1.

    Returns:
        `AutonomyOfExperts` for a SwiGLU without biases, else `BiasedExperts`; and the report, whose `output_error` is
        measured against the module, GELU included, and whose other errors are within SwiGLU.

    Raises:
        TypeError: a module of another kind.
        ValueError: another activation, a module that computes something other than its parts suggest, or an input that
            `convert_swiglu` refuses.
    """
    parts = _take_apart(module)
    factor = _factor(parts.activation, module)
    _compare(module, parts, factor)
    gate, up, down = parts.gate, parts.up, parts.down
    biases = [b for _, b in (gate, down, *([] if up is None else [up])) if b is not None]
    if up is not None and factor == 1 and not biases:
        return convert_swiglu(gate[0], up[0], down[0], num_experts, top_k, rank, **options)
    w_gate, w_up, w_down = _widened(parts, factor)
    dim, wide = down[0].shape[0], w_gate.shape[1]
    tokens = options.pop("calibration", None)
    if tokens is not None:
        check_tensor("calibration", tokens, ["tokens", dim])
    padded = None if tokens is None else _with_one(tokens, wide)
    experts, report = convert_swiglu(
        w_gate, w_up, w_down, num_experts, top_k, rank, calibration=padded, **options
    )
    layer = BiasedExperts(experts, dim, down[1])
    if tokens is None:
        return layer, report
    exact = copy.deepcopy(module).double().eval()
    return layer, replace(report, output_error=output_error(layer, exact, tokens, w_gate.shape[0]))


_Affine = tuple[Tensor, Tensor | None]  # weight and bias


@dataclass(frozen=True)
class _Parts:
    """act(gate) · up, then down; without `up`, act(gate), then down."""

    gate: _Affine
    up: _Affine | None
    down: _Affine
    activation: Callable[[Tensor], Tensor]


def _take_apart(module: nn.Module) -> _Parts:
    linears, activation = _find(module)
    found = [
        (linear.weight.detach(), None if linear.bias is None else linear.bias.detach()) for linear in linears
    ]
    if len(found) == 2 and found[0][0].shape[0] == 2 * found[1][0].shape[1]:  # gate and values in one
        weight, bias = found[0]
        biases = (None, None) if bias is None else bias.chunk(2)
        found = [*zip(weight.chunk(2), biases, strict=True), found[1]]
    if activation is None and len(found) == 2:
        raise TypeError(
            f"{type(module).__name__} must name its activation {', '.join(_ACTIVATIONS)}, got none."
        )
    return _Parts(found[0], found[1] if len(found) == 3 else None, found[-1], activation or F.silu)


def _find(module: nn.Module) -> tuple[list[Any], Any]:
    """Return the linear layers in the order gate, values if separate, output; and the activation, None if not named."""
    if isinstance(module, nn.Sequential):
        parts = [part for part in module if not isinstance(part, (nn.Dropout, nn.Identity))]
        if len(parts) == 3 and all(isinstance(part, nn.Linear) for part in (parts[0], parts[2])):
            return [parts[0], parts[2]], parts[1]
    for names in (_GATED, *_PAIRS):
        linears = [getattr(module, name, None) for name in names]
        if all(isinstance(getattr(linear, "weight", None), Tensor) for linear in linears):
            return linears, next(
                (getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)), None
            )
    pairs = "; ".join(", ".join(names) for names in (_GATED, *_PAIRS))
    raise TypeError(
        f"module must have linear layers of one of these names: {pairs}; or be nn.Sequential of a linear layer, an "
        f"activation and a linear layer, got {type(module).__name__}."
    )


def _factor(activation: Callable[[Tensor], Tensor], module: nn.Module) -> float:
    """Return a, where the activation is u s(a u), or GELU, which nearly is."""
    probe = torch.linspace(-8, 8, 161)
    with torch.no_grad():
        values = activation(probe)
    for factor, bound in ((1.0, 1e-5), (_GELU, 0.022)):
        if float((values - probe * (factor * probe).sigmoid()).abs().max()) <= bound:
            return factor
    raise ValueError(
        f"The activation of {type(module).__name__} must be SiLU, GELU or QuickGELU, got {activation!r}; fit a SwiGLU "
        "to the outputs of the layer, and convert that."
    )


@torch.no_grad()
def _compare(module: nn.Module, parts: _Parts, factor: float) -> None:
    """Raise a ValueError unless the module computes what its parts do, except for GELU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, parts.gate[0].shape[1], generator=generator, dtype=torch.float64)

    def apply(part: _Affine, tokens: Tensor) -> Tensor:
        weight, bias = part
        return F.linear(tokens, weight.cpu().double(), None if bias is None else bias.cpu().double())

    hidden = apply(parts.gate, x)
    hidden = hidden * (factor * hidden).sigmoid()
    expected = apply(parts.down, hidden if parts.up is None else hidden * apply(parts.up, x))
    found = copy.deepcopy(module).to("cpu", torch.float64).eval()(x)
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    if not error <= (1e-4 if factor == 1 else 0.1):
        raise ValueError(
            f"{type(module).__name__} must compute what its linear layers and its activation do, but the "
            f"outputs on random tokens differ by {error:.2g} of their size."
        )


def _widened(parts: _Parts, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of a SwiGLU on tokens with a 1."""

    def widen(weight: Tensor, bias: Tensor | None) -> Tensor:
        column = weight.new_zeros(len(weight)) if bias is None else bias
        return F.pad(torch.cat([weight, column[:, None]], dim=1), (0, _EXTRA - 1))

    gate_weight, _ = parts.gate
    up = parts.up or (torch.zeros_like(gate_weight), gate_weight.new_ones(len(gate_weight)))
    return factor * widen(*parts.gate), widen(*up) / factor, F.pad(parts.down[0], (0, 0, 0, _EXTRA))


def _with_one(x: Tensor, width: int) -> Tensor:
    """Append a 1, and zeros up to `width`, to x `[..., dim]`."""
    return F.pad(F.pad(x, (0, 1), value=1.0), (0, width - x.shape[-1] - 1))
