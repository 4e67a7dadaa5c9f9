"""What must hold for every call: correct values and gradients, in any memory layout and any surrounding context."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.calls import Call, Draw
from vot_kernels.testing import move_by_roundings

PASSES = ("values", "strided", "slack", "inference", "autocast")


class WrongResult(AssertionError):
    """An op returned something other than it should."""


def check(call: Call, draw: Draw) -> None:
    """Check the call as it is, and in one more context.

    Raises:
        WrongResult: see the message.
    """
    outputs, gradients = run_with_gradients(call.run, call.tensors)
    low, low_gradients = run_with_gradients(lambda x, _: call.exact(x), call.tensors)
    doubles = [None if x is None else x.double() for x in call.tensors]
    exact, exact_gradients = run_with_gradients(lambda x, _: call.exact(x), doubles)
    coarsest = max(torch.finfo(x.dtype).eps for x in call.tensors if x is not None)
    numbers = [x.abs()[x.isfinite()].max() for x in (*exact, *exact_gradients) if x.isfinite().any()]
    floor = coarsest * max((float(x) for x in numbers), default=0.0)
    if coarsest == torch.finfo(torch.float64).eps:  # then the reference in the same dtype is the exact one
        floor *= 8
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient {i}" for i in range(len(gradients))]
    results = (outputs + gradients, low + low_gradients, exact + exact_gradients)
    nearby: list[list[float]] = []
    for i, (name, *parts) in enumerate(zip(names, *results, strict=True)):
        try:
            compare(name, *parts, floor)
        except WrongResult:
            nearby = nearby or errors_nearby(call)
            known = max(errors[i] for errors in nearby)
            compare(
                name,
                *parts,
                floor,
                max(known, error_of_lse(call, outputs, parts[2]) if i >= len(outputs) else 0),
            )
    surrounding = draw.pick(PASSES[1:])
    SURROUNDINGS[surrounding](call, outputs, gradients, floor)


def errors_nearby(call: Call) -> list[list[float]]:
    """Errors of the reference in the dtypes of the inputs, a few roundings away: it may have been lucky with these.

    The reference of float64 inputs is the exact one; there the effect of the roundings is the error.
    """
    found = []
    wide = all(x is None or x.dtype == torch.float64 for x in call.tensors)
    for seed in range(8):
        moved = [None if x is None else move_by_roundings(x, seed) for x in call.tensors]
        doubles = [None if x is None else x.double() for x in (call.tensors if wide else moved)]
        low, exact = (run_with_gradients(lambda x, _: call.exact(x), xs) for xs in (moved, doubles))
        found.append([distance(a, b) for a, b in zip(low[0] + low[1], exact[0] + exact[1], strict=True)])
    return found


def error_of_lse(call: Call, outputs: list[Tensor], gradient: Tensor) -> float:
    """What the rounding of lse does to a gradient: the backward has its weights from it, as exp(score - lse)."""
    if call.op not in ("hybrid_attention", "packed_attention", "flash_attn_varlen_func"):
        return 0.0
    lse = outputs[1][outputs[1].isfinite()]
    if not lse.numel() or not gradient.numel():
        return 0.0
    return torch.finfo(lse.dtype).eps / 2 * float(lse.abs().max()) * float(gradient.abs().max())


def run_with_gradients(
    function: Callable[[Sequence[Tensor | None], str], list[Tensor]], tensors: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed random weighting of them."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(leaves, "auto")
    return [x.detach() for x in outputs], backward(outputs, leaves)


def backward(outputs: Sequence[Tensor], leaves: Sequence[Tensor | None]) -> list[Tensor]:
    loss = torch.zeros((), dtype=torch.float64)
    for i, out in enumerate(outputs):
        # A longer output gets the same numbers followed by more of them.
        weights = torch.from_numpy(np.random.default_rng(i).standard_normal(out.shape))
        loss = loss + (torch.where(out.isfinite(), out, 0).double() * weights).sum()
    wanted = [leaf for leaf in leaves if leaf is not None]
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in wanted]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))


def compare(
    name: str, found: Tensor, same_dtype: Tensor, exact: Tensor, floor: float, plain_error: float = 0.0
) -> None:
    """Check the tolerance rule of the tests, wide enough for any seed: a wrong result is far outside of it.

    `floor` is one rounding of the coarsest input at the size of the largest result, `plain_error` an error that plain
    PyTorch is known to make besides that of `same_dtype`.

    Raises:
        WrongResult: shapes, infinities or numbers differ.
    """
    if found.shape != exact.shape or found.dtype != same_dtype.dtype:
        raise WrongResult(
            f"{name} is {list(found.shape)} {found.dtype}, not {list(exact.shape)} {same_dtype.dtype}"
        )
    allowed = 4 * max(plain_error, distance(same_dtype, exact)) + 64 * floor
    error = distance(found, exact)
    if not error <= allowed:
        raise WrongResult(f"{name} is off by {error:.3g} where {allowed:.3g} is allowed")


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where one is NaN or infinite and the other is not."""
    a, b = a.double(), b.double()
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def strided(call: Call, outputs: list[Tensor], gradients: list[Tensor], floor: float) -> None:
    """Return the tensors in another layout: elements apart from each other, and rows in another order of memory."""

    def spread(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        wide = x.new_full((*x.shape, 2), torch.nan)
        wide[..., 0] = x
        return wide[..., 0]

    found, found_gradients = run_with_gradients(
        lambda x, b: call.run([spread(t) for t in x], b), call.tensors
    )
    for i, (a, b) in enumerate(zip([*found, *found_gradients], [*outputs, *gradients], strict=True)):
        compare(f"strided result {i}", a, b, b, floor)


def slack(call: Call, outputs: list[Tensor], gradients: list[Tensor], floor: float) -> None:
    """Add rows of NaN past the last segment: the other rows must not change, and these must be zero (lse: -inf)."""
    if call.packed_rows is None:
        return
    rows = call.tensors[0].shape[0]
    longer = [
        torch.cat([x, x.new_full((3, *x.shape[1:]), torch.nan)])
        if x is not None and _is_packed(call, i)
        else x
        for i, x in enumerate(call.tensors)
    ]
    found, found_gradients = run_with_gradients(call.run, longer)
    for i, (a, b) in enumerate(zip([*found, *found_gradients], [*outputs, *gradients], strict=True)):
        if a.shape != b.shape:
            spare = a[rows:]
            if not ((spare == 0) | (spare == -torch.inf)).all():
                raise WrongResult(f"slack rows of result {i} are not zero")
            a = a[:rows]
        compare(f"result {i} beside slack rows", a, b, b, floor)


def _is_packed(call: Call, i: int) -> bool:
    """Whether tensor i has a row per packed token."""
    if call.op == "rope_qk_norm":
        return i < 2
    return i == 0 if call.op == "size_aware_embedding" else i in (0, 1, 2, 4, 5)


def inference(call: Call, outputs: list[Tensor], gradients: list[Tensor], floor: float) -> None:
    """Under inference_mode the outputs are the same, and what was cached there can be used in training later."""
    with torch.inference_mode():
        found = call.run([None if x is None else x.clone() for x in call.tensors], "auto")
    for i, (a, b) in enumerate(zip(found, outputs, strict=True)):
        compare(f"output {i} under inference_mode", a, b, b, floor)
    again = run_with_gradients(call.run, call.tensors)
    for i, (a, b) in enumerate(zip([*again[0], *again[1]], [*outputs, *gradients], strict=True)):
        compare(f"result {i} after inference_mode", a, b, b, floor)


def autocast(call: Call, outputs: list[Tensor], gradients: list[Tensor], floor: float) -> None:
    """Under autocast the op computes on inputs cast to bfloat16; gradients come in the leaf's dtype."""
    if any(x is not None and x.dtype == torch.float64 for x in call.tensors):
        return
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in call.tensors]
    with torch.autocast("cpu", torch.bfloat16):
        found = call.run(leaves, "auto")
    floor = max(
        floor,
        torch.finfo(torch.bfloat16).eps
        * max((float(x.abs().max()) for x in outputs if x.numel()), default=0.0),
    )
    given = [x.bfloat16() if x is not None and i in call.autocasts else x for i, x in enumerate(call.tensors)]
    expected, expected_gradients = run_with_gradients(call.run, given)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        compare(f"output {i} under autocast", a.detach(), b, b, floor)
    for i, (a, b) in enumerate(zip(backward(found, leaves), expected_gradients, strict=True)):
        compare(f"gradient {i} under autocast", a.to(b.dtype), b, b, floor)


SURROUNDINGS: dict[str, Callable[[Call, list[Tensor], list[Tensor], float], None]] = {
    "strided": strided,
    "slack": slack,
    "inference": inference,
    "autocast": autocast,
}


def is_a_sentence(message: str) -> bool:
    """Whether an error message is one readable sentence, or a few, and not internal text of a library."""
    strange = re.search(
        r"Traceback|aten::|\[Triggered|\bc10\b|<class|object has no attribute|unexpected keyword", message
    )
    return (
        bool(message)
        and message.rstrip()[-1:] in ".)"
        and "\n" not in message
        and len(message) < 500
        and not strange
    )
