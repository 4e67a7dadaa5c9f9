"""Which backend serves an op: capability as data, each refusal a readable sentence.

One predicate per (op, backend) answers dispatch, error messages and `vot_kernels.info` alike. A kernel is
added by putting its predicate into `CAPABILITIES`, and nothing else changes here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("triton", "torch", "reference")  # in order of preference

OPS = (
    "hybrid_attention",
    "packed_attention",
    "linear_attention",
    "aoe",
    "dense_residual",
    "rope_qk_norm",
    "size_aware_embedding",
    "pack_patches",
)


@dataclass(frozen=True)
class Inputs:
    """What a backend may look at before it accepts a call.

    Attributes:
        device: where the tensors lie.
        dtype: of the tensors that are computed on.
    """

    device: torch.device
    dtype: torch.dtype


Predicate = Callable[[Inputs], list[str]]


def _no_kernel(inputs: Inputs) -> list[str]:
    return ["no Triton kernel for this op in this version"]


def _floating(inputs: Inputs) -> list[str]:
    supported = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if inputs.dtype in supported:
        return []
    return [f"dtype {inputs.dtype} is not one of float16, bfloat16, float32, float64"]


CAPABILITIES: dict[str, dict[str, Predicate]] = {
    op: {"triton": _no_kernel, "torch": _floating, "reference": _floating} for op in OPS
}


def select(op: str, backend: str, tensor: Tensor) -> str:
    """The backend that serves `op` for inputs like `tensor`.

    Args:
        op: a name of `OPS`.
        backend: a name of `BACKENDS`, or "auto" for the first that accepts the inputs.
        tensor: the op's main input; its device and dtype decide.

    Raises:
        ValueError: an unknown backend, or none fits; the message lists every reason of every candidate.
    """
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {known}, got {backend!r}.")
    candidates = BACKENDS if backend == "auto" else (backend,)
    inputs = Inputs(tensor.device, tensor.dtype)
    refusals = []
    for name in candidates:
        reasons = CAPABILITIES[op][name](inputs)
        if not reasons:
            return name
        refusals.append(f"{name} ({'; '.join(reasons)})")
    raise ValueError(f"No backend can serve {op} for these inputs: {', '.join(refusals)}.")


def describe_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, list[str]]]:
    """Per op and backend, why it cannot serve such inputs; an empty list means that it can.

    Backends stand in order of preference, so "auto" uses the first with an empty list.
    The device defaults to "cuda" where there is one, else "cpu".
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = Inputs(torch.device(device), dtype)
    return {op: {name: CAPABILITIES[op][name](inputs) for name in BACKENDS} for op in OPS}
