"""Comparators, input makers, packings and NaN poison for the tests and the benchmarks.

The tolerance rule: an implementation may err against float64 at most twice as much as plain PyTorch of the
same dtype does, plus a few roundings of that dtype. It scales with the problem and leaves no room for a
result that is merely of the right size. Plain PyTorch may be lucky if terms cancel to the last bit: a result that errs
more is judged by the worst error of plain PyTorch on the inputs and on copies that differ by roundings. In float64,
plain PyTorch is the exact result and shows no error: its errors in float32 on such copies are scaled down instead.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vot_kernels.packing import PackedLayout

# Lengths of segments that break careless indexing: nothing, one token, empty neighbours, one around the
# usual block sizes, one long among many short.
PACKINGS: dict[str, tuple[int, ...]] = {
    "no_segments": (),
    "one_empty": (0,),
    "one_token": (1,),
    "empty_neighbours": (0, 5, 0),
    "all_empty": (0, 0, 0),
    "around_blocks": (15, 16, 17, 31, 32, 33),
    "equal": (24, 24, 24),
    "long_among_short": (1, 2, 67, 1, 3, 0, 2),
}

_FLOAT64_PER_FLOAT32 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

SEED_SHIFT = int(os.environ.get("VOT_TEST_SEED", "0"))


class ToleranceError(AssertionError):
    """Two results differ by more than the tolerance rule allows."""


def make_qkv(
    tokens: int,
    heads: int = 2,
    head_dim: int = 16,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q `[tokens, heads, head_dim]` and k, v `[tokens, kv_heads, head_dim]`."""
    kv = heads if kv_heads is None else kv_heads
    shapes = [(tokens, heads, head_dim), (tokens, kv, head_dim), (tokens, kv, head_dim)]
    q, k, v = (make_tensor(*s, seed=seed + i, dtype=dtype, device=device) for i, s in enumerate(shapes))
    for x in (q, k, v):
        x.requires_grad_(requires_grad)
    return q, k, v


def shifted(seed: int) -> int:
    """`seed` shifted by VOT_TEST_SEED, which gives the whole suite other random numbers; 0 shifts nothing."""
    return seed + 100_003 * SEED_SHIFT


def make_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Standard normal numbers that depend on `shape` and `shifted(seed)` alone, drawn in float64 and rounded once."""
    generator = torch.Generator().manual_seed(shifted(seed))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def make_experts(
    tokens: int = 33,
    dim: int = 24,
    experts: int = 6,
    rank: int = 8,
    hidden: int = 20,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """x, w_down, w_up, w_p and w_o of `vot_kernels.aoe`, scaled so that every activation is of order one."""
    shapes = (
        ((tokens, dim), 1),
        ((experts, rank, dim), dim),
        ((experts, hidden, rank), rank),
        ((experts, hidden, dim), dim),
        ((experts, hidden, dim), hidden),
    )
    return [
        (make_tensor(*shape, seed=seed + i) * fan_in**-0.5).to(device, dtype)
        for i, (shape, fan_in) in enumerate(shapes)
    ]


def make_moe(
    tokens: int = 33,
    dim: int = 24,
    experts: int = 6,
    hidden: int = 20,
    top_k: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """x, w_gate_up, w_down, topk_idx and topk_weights of `vot_kernels.moe`, activations of order one."""
    x = make_tensor(tokens, dim, seed=seed)
    w_gate_up = make_tensor(experts, 2 * hidden, dim, seed=seed + 1) * dim**-0.5
    w_down = make_tensor(experts, dim, hidden, seed=seed + 2) * hidden**-0.5
    best = make_tensor(tokens, experts, seed=seed + 3).topk(top_k, dim=-1)
    tensors = (x, w_gate_up, w_down, best.values.softmax(-1))
    x, w_gate_up, w_down, weights = (t.to(device, dtype) for t in tensors)
    return [x, w_gate_up, w_down, best.indices.to(device), weights]


def check_selection(
    x: Tensor, w_down: Tensor, norms: Tensor, indices: Tensor, bias: Tensor | None = None
) -> None:
    """The parity rule of Autonomy-of-Experts: near-ties may fall either way, anything else may not.

    Norms come from a wide accumulator: they err by at most 1e-5 of themselves plus 2e-7 of their terms, which cancel
    if the rank is small. Each token chose different experts, and every chosen expert has one of the largest scores,
    to 1e-5 of the norms.

    Raises:
        ToleranceError: one of these does not hold.
    """
    exact, terms = (
        torch.einsum("td,nrd->tnr", a, b).norm(dim=-1)
        for a, b in ((x.double(), w_down.double()), (x.double().abs(), w_down.double().abs()))
    )
    score = exact if bias is None else exact + bias.double()
    if not ((norms - exact).abs() <= 1e-5 * exact + 2e-7 * terms).all():
        raise ToleranceError("the norms do not come from a float32 accumulator")
    slack = 1e-5 * torch.maximum(exact, score.abs()).amax(1, keepdim=True)
    best = score.sort(1, descending=True).values[:, : indices.shape[1]]
    if not (score.gather(1, indices) >= best - slack).all():
        raise ToleranceError("an expert was chosen before one with a larger score")
    if indices.shape[1] > 1 and (indices.sort(1).values.diff(dim=1) == 0).any():
        raise ToleranceError("a token chose one expert twice")


def with_slack(x: Tensor, rows: int, value: float = float("nan")) -> Tensor:
    """`x` with `rows` more rows of `value` at its end: poison past the packed tokens."""
    return torch.cat([x, x.new_full((rows, *x.shape[1:]), value)])


def spread(x: Tensor) -> Tensor:
    """The same numbers as every second one of a tensor that is otherwise poison; it requires grad if `x` does."""
    poison = float("nan") if x.is_floating_point() else -(2**30)
    wide = x.new_full((*x.shape, 2), poison)
    wide[..., 0] = x.detach()
    return wide[..., 0].requires_grad_(x.requires_grad)


def poison_segment(x: Tensor, layout: PackedLayout, segment: int, value: float = float("nan")) -> Tensor:
    """A copy of `x` in which the rows of one segment are `value`."""
    begin, end = layout.host_cu_seqlens[segment : segment + 2].tolist()
    x = x.clone()
    x[begin:end] = value
    return x


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialized holds NaN (integers: the maximum), so that a gap shows."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64; inf where one is NaN or infinite and the other is not.

    Equal infinities differ by 0. NaN never equals anything.
    """
    if actual.shape != expected.shape:
        raise ToleranceError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    a = actual.detach().double()
    b = expected.detach().to(a.device, torch.float64)
    error = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(error.max()) if error.numel() else 0.0


def assert_close_to_exact(
    actual: Tensor,
    same_dtype: Tensor,
    exact: Tensor,
    *,
    roundings: float | None = None,
    floor: float = 0.0,
    name: str = "result",
) -> None:
    """The tolerance rule: error of `actual` <= 2 * error of `same_dtype` + `roundings` * eps * magnitude.

    Args:
        actual: the result under test.
        same_dtype: plain PyTorch on the same inputs in the same dtype.
        exact: the same in float64.
        roundings: granted on top, each eps of the dtype of `actual` times the largest magnitude of `exact`.
            By default 4; 16 in float64, where plain PyTorch is the exact result and seems to err by nothing.
        floor: the least magnitude to assume, for results in which larger terms cancel.
        name: what to call it in the message.

    Raises:
        ToleranceError: shapes differ, or the error is too large or not a number.
    """
    assert_within(actual, exact, max_error(same_dtype, exact), roundings, floor, name)


def assert_within(
    actual: Tensor, exact: Tensor, plain_error: float, roundings: float | None, floor: float, name: str
) -> None:
    """The tolerance rule of `assert_close_to_exact`, given the error of plain PyTorch in the dtype of `actual`."""
    error, allowed = max_error(actual, exact), 2 * plain_error
    if roundings is None:
        roundings = 16.0 if actual.dtype == torch.float64 else 4.0
    finite = exact.detach().double()
    finite = finite[finite.isfinite()].abs()
    magnitude = max(floor, float(finite.max()) if finite.numel() else 0.0)
    if allowed == torch.inf:
        raise ToleranceError(f"{name}: the {actual.dtype} computation to compare with is not finite")
    allowed += roundings * torch.finfo(actual.dtype).eps * magnitude
    if not error <= allowed:
        raise ToleranceError(
            f"{name}: error {error:.3g} against float64 exceeds {allowed:.3g} "
            f"(magnitude {magnitude:.3g}, {actual.dtype})"
        )


def check_against_reference(
    run: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    *,
    roundings: float | None = None,
    floor: float = 0.0,
    gradients: bool = True,
    names: Sequence[str] | None = None,
) -> None:
    """Outputs and, if wanted, gradients of `run` obey the tolerance rule against `reference`.

    `run(*inputs)` and `reference(*inputs)` return tensors; the reference runs in float64 and again in the
    dtype of the inputs, and on inputs nearby if that allows too little (in float32 for float64). The gradients
    are taken of a fixed random weighting of all finite outputs.

    Args:
        run: the implementation under test.
        reference: the oracle, differentiable by autograd.
        inputs: floating tensors (differentiated), or None (passed through). Gradients are numbered without
            the None.
        roundings, floor: see `assert_close_to_exact`.
        gradients: compare the gradients of every input too.
        names: what to call the outputs.
    """
    doubles = [None if x is None else x.detach().double() for x in inputs]
    actual, actual_grads = _run_with_gradients(run, inputs, gradients)
    exact, exact_grads = _run_with_gradients(reference, doubles, gradients)
    if all(x is None or x.dtype == torch.float64 for x in inputs):
        low, low_grads = exact, exact_grads
    else:
        low, low_grads = _run_with_gradients(reference, inputs, gradients)
    if not len(actual) == len(low) == len(exact):
        raise ToleranceError(f"{len(actual)} outputs instead of {len(exact)}")
    labels = list(names) if names is not None else [f"output {i}" for i in range(len(actual))]
    labels += [f"gradient of input {i}" for i in range(len(actual_grads))]
    found = zip(labels, actual + actual_grads, low + low_grads, exact + exact_grads, strict=True)
    other_errors: list[list[float]] = []
    for i, (label, a, b, c) in enumerate(found):
        try:
            assert_close_to_exact(a, b, c, roundings=roundings, floor=floor, name=label)
        except ToleranceError:
            other_errors = other_errors or _errors_nearby(reference, inputs, gradients)
            nearby = max(errors[i] for errors in other_errors)
            if a.dtype == torch.float64:
                nearby *= _FLOAT64_PER_FLOAT32
            assert_within(a, c, max(max_error(b, c), nearby), roundings, floor, label)


def _errors_nearby(
    reference: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], gradients: bool
) -> list[list[float]]:
    """Errors of the reference in the dtype of the inputs, for inputs a few roundings away from them.

    Zeros, infinities, NaN and signs stay. Inputs in float64 are rounded to float32 first.
    """
    found = []
    narrow = [x.float() if x is not None and x.dtype == torch.float64 else x for x in inputs]
    for seed in range(8):
        moved = [None if x is None else move_by_roundings(x.detach(), seed) for x in narrow]
        doubles = [None if x is None else x.double() for x in moved]
        low, exact = (_run_with_gradients(reference, xs, gradients) for xs in (moved, doubles))
        found.append([max_error(a, b) for a, b in zip(low[0] + low[1], exact[0] + exact[1], strict=True)])
    return found


def move_by_roundings(x: Tensor, seed: int) -> Tensor:
    """Return x with every number moved by about two roundings; zeros, infinities, NaN and signs stay."""
    noise = make_tensor(*x.shape, seed=2000 + seed, dtype=torch.float64, device=x.device)
    return (x.double() * (1 + 2 * torch.finfo(x.dtype).eps * noise)).to(x.dtype)


def _run_with_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    # Not copies, which would lie in memory without gaps.
    leaves = [None if x is None else x.detach().requires_grad_(gradients) for x in inputs]
    outputs = list(function(*leaves))
    if not gradients:
        return outputs, []
    loss = torch.zeros((), dtype=torch.float64)
    for i, out in enumerate(outputs):
        weights = make_tensor(*out.shape, seed=1000 + i, device=out.device)
        finite = torch.where(out.isfinite(), out, 0)
        loss = loss + (finite.double() * weights.double()).sum().to(loss.device)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return [out.detach() for out in outputs], list(found)
