"""The choice of a backend for an op. Capabilities are data, and each refusal is a readable sentence.

The same predicate per (function, backend) serves dispatch, error messages and `vot_kernels.info`. A new kernel adds
its predicate to `CAPABILITIES`; nothing else changes here.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vot_kernels.cpp.library import why_not_cpp
from vot_kernels.ops.checks import check_choice
from vot_kernels.ops.launch import is_interpreted, why_not_triton

BACKENDS = ("triton", "cpp", "torch", "reference")  # in order of preference

OPS = (
    "hybrid_attention",
    "packed_attention",
    "linear_attention",
    "aoe",
    "moe",
    "dense_residual",
    "rope_qk_norm",
    "size_aware_embedding",
    "pack_patches",
)

# Maps every public function to its folder of `vot_kernels/ops`.
FUNCTIONS = {op: op for op in OPS} | {
    "hybrid_attention_step": "hybrid_attention",
    "flash_attn_func": "flash_attention",
    "flash_attn_varlen_func": "flash_attention",
}


class Inputs(NamedTuple):
    """The properties of a call that decide whether a backend accepts it.

    Attributes:
        device: device of the tensors.
        dtype: dtype of the tensors to compute with.
        head_dim: size of the last dimension; None if not known yet, in which case it leads to no refusal.
        width: size of the last dimension of given features, or None without features.
        given: names of optional arguments that were given and that not every backend takes.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None
    width: int | None = None
    given: tuple[str, ...] = ()


Predicate = Callable[[Inputs], list[str]]


def _no_kernel(inputs: Inputs) -> list[str]:
    return ["no Triton kernel for this op in this version"]


def _no_cpp_kernel(inputs: Inputs) -> list[str]:
    return ["no C++ kernel for this op in this version"]


def _floating(inputs: Inputs) -> list[str]:
    supported = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if inputs.dtype in supported:
        return []
    return [f"dtype {inputs.dtype} is not one of float16, bfloat16, float32, float64"]


def _pixels(inputs: Inputs) -> list[str]:
    """Accept values that are moved, not computed with."""
    if inputs.dtype == torch.uint8 or inputs.dtype.is_floating_point:
        return []
    return [f"dtype {inputs.dtype} is neither uint8 nor floating"]


def _kernel(inputs: Inputs) -> list[str]:
    """Accept half or single precision on CUDA, or in Triton's interpreter."""
    reasons = _streaming_kernel(inputs)
    if inputs.dtype == torch.bfloat16 and is_interpreted(inputs.device):
        reasons.append("Triton's interpreter multiplies bfloat16 wrongly")
    return reasons


def _streaming_kernel(inputs: Inputs) -> list[str]:
    """Accept half or single precision on CUDA, or in Triton's interpreter, for kernels without matrix products."""
    reasons = why_not_triton(inputs.device)
    if inputs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {inputs.dtype} is not one of float16, bfloat16, float32")
    return reasons


def _pixel_kernel(inputs: Inputs) -> list[str]:
    """Accept what `_streaming_kernel` accepts, and uint8."""
    return why_not_triton(inputs.device) if inputs.dtype == torch.uint8 else _streaming_kernel(inputs)


def _sum_kernel(inputs: Inputs) -> list[str]:
    """Accept what `_streaming_kernel` accepts, with a norm rows of up to 4096 elements."""
    reasons = _streaming_kernel(inputs)
    if "norm_weight" in inputs.given and inputs.head_dim is not None and inputs.head_dim > 4096:
        reasons.append(f"rows of {inputs.head_dim} elements are above 4096, the most that a norm takes")
    return reasons


def _head_kernel(inputs: Inputs) -> list[str]:
    """Accept what `_streaming_kernel` accepts, with a head_dim of up to 256."""
    reasons = _streaming_kernel(inputs)
    if inputs.head_dim is not None and inputs.head_dim > 256:
        reasons.append(f"head_dim {inputs.head_dim} is not from 2 to 256")
    return reasons


def _attention_kernel(inputs: Inputs) -> list[str]:
    """Accept what `_kernel` accepts, with a head_dim of 16 to 256."""
    reasons = _kernel(inputs)
    if inputs.head_dim is not None and not 16 <= inputs.head_dim <= 256:
        reasons.append(f"head_dim {inputs.head_dim} is not from 16 to 256")
    if inputs.width is not None and not 16 <= inputs.width <= 256:
        reasons.append(f"feature width {inputs.width} is not from 16 to 256")
    return reasons


def _compiled(inputs: Inputs) -> list[str]:
    """C++: half or single precision, on the CPU, where the library is there."""
    reasons = []
    if inputs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {inputs.dtype} is not one of float16, bfloat16, float32")
    if (problem := why_not_cpp(inputs.device.type)) is not None:
        reasons.append(problem)
    return reasons


def _compiled_experts(inputs: Inputs) -> list[str]:
    """C++: single precision, on the CPU, where the library is there."""
    reasons = [] if inputs.dtype == torch.float32 else [f"dtype {inputs.dtype} is not float32"]
    if (problem := why_not_cpp(inputs.device.type)) is not None:
        reasons.append(problem)
    return reasons


def _compiled_pixels(inputs: Inputs) -> list[str]:
    problem = why_not_cpp(inputs.device.type)
    return _pixels(inputs) + ([] if problem is None else [problem])


def _compiled_attention(inputs: Inputs) -> list[str]:
    """`_compiled`, with a head_dim and a feature width of up to 256."""
    reasons = _compiled(inputs)
    if inputs.head_dim is not None and inputs.head_dim > 256:
        reasons.append(f"head_dim {inputs.head_dim} is not from 1 to 256")
    if inputs.width is not None and not 1 <= inputs.width <= 256:
        reasons.append(f"feature width {inputs.width} is not from 1 to 256")
    return reasons


def _compiled_linear_attention(inputs: Inputs) -> list[str]:
    reasons = _compiled_attention(inputs)
    if "log_decay" in inputs.given:
        reasons.append("C++ kernels take no log_decay")
    return reasons


def _no_reference_of_a_step(inputs: Inputs) -> list[str]:
    return ['the reference for the steps of a whole stream is hybrid_attention(causal="group")']


CAPABILITIES: dict[str, dict[str, Predicate]] = {
    name: {"triton": _no_kernel, "cpp": _no_cpp_kernel, "torch": _floating, "reference": _floating}
    for name in FUNCTIONS
}
for _op in (
    "hybrid_attention",
    "packed_attention",
    "linear_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
):
    CAPABILITIES[_op]["triton"] = _attention_kernel
CAPABILITIES["hybrid_attention_step"]["reference"] = _no_reference_of_a_step
for _op in ("aoe", "moe"):
    CAPABILITIES[_op] |= {"triton": _kernel, "cpp": _compiled_experts}
for _op in ("dense_residual", "rope_qk_norm", "size_aware_embedding"):
    CAPABILITIES[_op] |= {"triton": _streaming_kernel, "cpp": _compiled}
CAPABILITIES["rope_qk_norm"]["triton"] = _head_kernel
CAPABILITIES["dense_residual"]["triton"] = _sum_kernel
for _op in (
    "hybrid_attention",
    "hybrid_attention_step",
    "packed_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
):
    CAPABILITIES[_op]["cpp"] = _compiled_attention
CAPABILITIES["linear_attention"]["cpp"] = _compiled_linear_attention
CAPABILITIES["pack_patches"] |= {
    "triton": _pixel_kernel,
    "cpp": _compiled_pixels,
    "torch": _pixels,
    "reference": _pixels,
}


def check_backend(backend: object) -> None:
    """Check that `backend` is "auto" or a name of `BACKENDS`."""
    check_choice("backend", backend, ("auto", *BACKENDS))


def select(
    op: str, backend: str, tensor: Tensor, features: Tensor | None = None, given: tuple[str, ...] = ()
) -> str:
    """Return the backend that serves `op` for inputs like `tensor`.

    Args:
        op: a name of `FUNCTIONS`.
        backend: a name of `BACKENDS`, or "auto" for the first that accepts the inputs; "auto" never selects Triton's
            interpreter, which is for tests.
        tensor: the op's main input; its device, dtype and last dimension decide the choice.
        features: features given in place of a feature map, if any.
        given: names of optional arguments that were given and that not every backend takes.

    Raises:
        ValueError: `backend` is unknown, or no backend fits; the message lists every reason of every candidate.
    """
    check_backend(backend)
    candidates = BACKENDS if backend == "auto" else (backend,)
    head_dim = tensor.shape[-1] if tensor.ndim else None
    width = None if features is None else features.shape[-1]
    inputs = Inputs(tensor.device, tensor.dtype, head_dim, width, given)
    refusals = []
    for name in candidates:
        reasons = CAPABILITIES[op][name](inputs)
        interpreted = name == "triton" and tensor.device.type == "cpu"
        if not reasons and not (interpreted and backend == "auto"):
            return name
        refusals.append(f"{name} ({'; '.join(reasons)})")
    raise ValueError(f"No backend can serve {op} for these inputs: {', '.join(refusals)}.")


_LOADED: dict[tuple[str, str], ModuleType] = {}


def load(op: str, backend: str) -> ModuleType:
    """Import and return the module of a backend that `select` chose, `vot_kernels/ops/<op>/<backend>.py`."""
    if (op, backend) not in _LOADED:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
        _LOADED[op, backend] = import_module(
            f".{op}.{backend}", __package__
        )  # its own lookup takes microseconds
    return _LOADED[op, backend]


def describe_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, list[str]]]:
    """Say for each public function and backend why it cannot serve such inputs; an empty list means that it can.

    Backends are in order of preference, so "auto" uses the first one with an empty list (other than "triton" for CPU
    tensors). The device defaults to "cuda" if one is available, else to "cpu".
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = Inputs(torch.device(device), dtype)
    return {op: {name: CAPABILITIES[op][name](inputs) for name in BACKENDS} for op in FUNCTIONS}
