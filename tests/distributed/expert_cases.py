"""Experts spread over ranks against one process; each case runs on every rank."""

import itertools
from functools import partial

import pytest
import torch
from torch.distributed import ProcessGroup

import vot_kernels
from tests.distributed.attention_cases import check
from tests.distributed.ranks import Case, joined, shared
from vot_kernels import distributed
from vot_kernels.nn import AutonomyOfExperts
from vot_kernels.ops.parts.experts.slots import Experts
from vot_kernels.testing import make_experts, make_moe, make_tensor, max_error

TOKENS = {"even": (9, 9, 9, 9), "uneven": (3, 11, 0, 19), "none": (0, 0, 0, 0)}


def parts(group: ProcessGroup, tokens: str, experts: int) -> tuple[list[int], slice, slice]:
    """How many tokens each rank has, and this rank's tokens and experts."""
    counts = list(TOKENS[tokens][: group.size()])
    start = sum(counts[: group.rank()])
    own = slice(start, start + counts[group.rank()])
    return counts, own, distributed.expert_slice(experts, group.rank(), group.size())


def aoe(group: ProcessGroup, tokens: str, form: str, dtype: torch.dtype, experts: int = 6, **options) -> None:
    """y, and where a part of the loss goes through them, norms, weights and the balance loss."""
    counts, own, mine = parts(group, tokens, experts)
    inputs = make_experts(sum(counts), experts=experts, dtype=dtype)
    if options.pop("bias", False):
        options["bias"] = make_tensor(experts, seed=5)
    aux = options.get("return_aux", False)
    asked = options.pop("asked", False)  # whether ranks ask each other for their numbers of tokens

    def run(x, *weights):
        x, *weights = (shared(t, group) for t in (x, *weights))
        local = [w if form == "exchange" and i == 0 else w[mine] for i, w in enumerate(weights)]
        if (
            form == "exchange"
        ):  # its gradient is reduced by the op, so that the sum of `shared` must not see it again
            local[0] = local[0] / group.size() + (local[0] - local[0] / group.size()).detach()
        found = distributed.aoe(
            x[own],
            *local,
            2,
            group=group,
            num_experts=experts,
            form=form,
            tokens=None if asked else counts,
            **options,
        )
        if not aux:
            return [joined(found, counts, group)]
        y, found = found
        whole = [joined(t, counts, group) for t in (y, found.norms, found.weights)]
        # every rank has the whole loss, and its gradient is that of its own tokens
        return [torch.cat([*(t.flatten().to(y.dtype) for t in whole), found.balance_loss[None].to(y.dtype)])]

    def single(x, *weights):
        backend = "torch"
        found = vot_kernels.aoe(x, *weights, 2, backend=backend, **options)
        if not aux:
            return [found]
        y, found = found
        tensors = (y, found.norms, found.weights, found.balance_loss[None])
        return [torch.cat([t.flatten().to(y.dtype) for t in tensors])]

    check(run, single, inputs, 1e-10 if dtype == torch.float64 else None)


def moe(group: ProcessGroup, tokens: str, form: str, dtype: torch.dtype, experts: int = 6) -> None:
    counts, own, mine = parts(group, tokens, experts)
    x, w_gate_up, w_down, ids, weights = make_moe(sum(counts), experts=experts, dtype=dtype)

    def run(x, w_gate_up, w_down, weights):
        x, w_gate_up, w_down, weights = (shared(t, group) for t in (x, w_gate_up, w_down, weights))
        given = (x[own], w_gate_up[mine], w_down[mine], ids[own], weights[own])
        options = {"num_experts": experts, "form": form, "tokens": counts, "backend": "torch"}
        return [joined(distributed.moe(*given, group=group, **options), counts, group)]

    def single(x, w_gate_up, w_down, weights):
        return [vot_kernels.moe(x, w_gate_up, w_down, ids, weights, backend="torch")]

    check(run, single, [x, w_gate_up, w_down, weights], 1e-10 if dtype == torch.float64 else None)


def module(group: ProcessGroup, form: str) -> None:
    """One call spreads the experts of a model; outputs, gradients and balance are those of the whole layer."""
    counts, own, mine = parts(group, "uneven", 5)
    torch.manual_seed(3)
    whole = AutonomyOfExperts(12, 5, 2, hidden=10, shared_hidden=6).double()
    torch.manual_seed(3)
    model = torch.nn.Sequential(AutonomyOfExperts(12, 5, 2, hidden=10, shared_hidden=6).double())
    distributed.expert_parallel(model, group, form=form)
    assert model[0].w_up.shape[0] == mine.stop - mine.start
    x, d_y = (make_tensor(sum(counts), 12, seed=seed, dtype=torch.float64) for seed in (1, 2))
    expected, aux = whole(x, return_aux=True)
    ((expected * d_y).sum() + aux.balance_loss).backward()
    found, found_aux = model[0](x[own], return_aux=True)
    ((found * d_y[own]).sum() + found_aux.balance_loss).backward()
    assert max_error(found, expected[own]) < 1e-10
    assert max_error(found_aux.load, aux.load) < 1e-10
    for name in Experts._fields:
        gradient = getattr(whole, name).grad
        gradient = gradient if form == "exchange" and name == "w_down" else gradient[mine]
        assert max_error(getattr(model[0], name).grad, gradient) < 1e-10, name
    model[0].update_selection_bias(found_aux.load)
    whole.update_selection_bias(aux.load)
    assert torch.equal(model[0].selection_bias, whole.selection_bias)
    with pytest.raises(ValueError, match="spread over ranks already"):
        distributed.expert_parallel(model, group)
    with pytest.raises(ValueError, match="Linear has no AutonomyOfExperts"):
        distributed.expert_parallel(torch.nn.Linear(1, 1), group)


def refused(group: ProcessGroup) -> None:
    x, *weights = make_experts(4)
    options = {"group": group, "num_experts": 6}
    with pytest.raises(ValueError, match=r"w_down must have the shape \[\d, rank, 24\], got \[6, 8, 24\]"):
        distributed.aoe(x, *weights, 2, **options)
    mine = distributed.expert_slice(6, group.rank(), group.size())
    weights = [w[mine] for w in weights]
    with pytest.raises(
        ValueError, match=r"tokens must have the number of rows of each of the \d ranks, 4 on"
    ):
        distributed.aoe(x, *weights, 2, tokens=[5] * group.size(), **options)
    with pytest.raises(ValueError, match="top_k must be an int from 1 to the 6 experts, got 7"):
        distributed.aoe(x, *weights, 7, **options)
    with pytest.raises(ValueError, match="form must be one of 'gather', 'exchange', got 'ring'"):
        distributed.aoe(x, *weights, 2, form="ring", **options)
    with pytest.raises(
        TypeError, match="group must be a ProcessGroup or one dimension of a DeviceMesh, got None"
    ):
        distributed.aoe(x, *weights, 2, group=None, num_experts=6)


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {"errors": refused}
    for form, (tokens, experts) in itertools.product(
        distributed.experts.FORMS, (("even", 6), ("uneven", 6), ("uneven", 3), ("none", 6))
    ):
        named = {"tokens": tokens, "form": form, "dtype": torch.float64, "experts": experts}
        found[f"aoe, {form}, {tokens}, {experts} experts"] = partial(aoe, **named)
        found[f"moe, {form}, {tokens}, {experts} experts"] = partial(moe, **named)
    for form in distributed.experts.FORMS:
        named = {"tokens": "uneven", "form": form}
        found[f"module, {form}"] = partial(module, form=form)
        found[f"aoe, {form}, float32"] = partial(aoe, dtype=torch.float32, **named)
        found[f"moe, {form}, float32"] = partial(moe, dtype=torch.float32, **named)
        found[f"aux, {form}"] = partial(aoe, dtype=torch.float64, return_aux=True, bias=True, **named)
        found[f"softmax first, {form}"] = partial(aoe, dtype=torch.float64, weighting="softmax_topk", **named)
    found["asked"] = partial(aoe, tokens="uneven", form="gather", dtype=torch.float64, asked=True)
    return found


CASES = cases()
