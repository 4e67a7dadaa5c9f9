"""Experts that are spread over ranks. There is no router: every rank finds by itself which experts a token chooses.

Two forms give the same result:

- "gather": ranks gather all tokens, take the norms of their own experts, gather these, choose, apply their own
  experts, and scatter the sums. Sizes are fixed, so that nothing waits for the device.
- "exchange": ranks have W_down of all experts, choose for their own tokens, and send each token to the ranks of its
  experts and back. It sends less where top_k is small against the number of ranks, and reads how much on the host.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vot_kernels.distributed.collectives import (
    Group,
    all_gather,
    all_reduce,
    exchange,
    group_of,
    rank_of,
    reduce_scatter,
    size_of,
)
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts
from vot_kernels.ops.aoe import AoEAux
from vot_kernels.ops.aoe import aoe as local_aoe
from vot_kernels.ops.aoe import torch as composition
from vot_kernels.ops.aoe.op import WEIGHTINGS
from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import check_alike, check_choice, check_device, check_floating, check_tensor
from vot_kernels.ops.moe import moe as local_moe
from vot_kernels.ops.parts.experts.slots import Experts, norms_backward
from vot_kernels.packing import brief

FORMS = ("gather", "exchange")


def expert_slice(num_experts: int, rank: int, world_size: int) -> slice:
    """The experts of a rank: contiguous, and as many as those of any other rank, or one more.

    Raises:
        ValueError: a number is no int, or `rank` is not from 0 to world_size - 1.
    """
    if not all(type(x) is int for x in (num_experts, rank, world_size)) or not 0 <= rank < world_size:
        raise ValueError(
            "num_experts, rank and world_size must be ints and rank from 0 to world_size - 1, got "
            f"{brief(num_experts)}, {brief(rank)} and {brief(world_size)}."
        )
    return slice(num_experts * rank // world_size, num_experts * (rank + 1) // world_size)


@autocasts("x", "w_down", "w_up", "w_p", "w_o")
def aoe(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_p: Tensor,
    w_o: Tensor,
    top_k: int,
    *,
    group: Group,
    num_experts: int,
    form: str = "gather",
    tokens: Sequence[int] | None = None,
    weighting: str = "topk_softmax",
    bias: Tensor | None = None,
    return_aux: bool = False,
    reduce_gradients: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AoEAux]:
    """`vot_kernels.aoe` for the tokens of this rank, with experts that are spread over the ranks.

    Every rank must make the call and its backward, even without tokens or experts. Gradients of weights are those of
    the sum of all ranks' losses.

    Args:
        x: `[rows, dim]`, this rank's tokens, any number of them.
        w_down: `[own experts, rank, dim]`, those of `expert_slice`; in the form "exchange" of all experts, the same
            on all ranks.
        w_up, w_p, w_o: `[own experts, hidden, rank]`, `[own experts, hidden, dim]` twice.
        top_k: experts per token, 1 to num_experts.
        group: a ProcessGroup, or one dimension of a DeviceMesh.
        num_experts: of all ranks together.
        form: "gather" or "exchange".
        tokens: how many rows each rank has, for "gather"; with None the ranks ask each other, which waits for the
            device.
        weighting: as for `vot_kernels.aoe`.
        bias: `[num_experts]`, the same on all ranks.
        return_aux: also return an `AoEAux` of this rank's tokens. Its `load` and the value of its `balance_loss` are
            those of all ranks' tokens; the sum of the ranks' balance losses has the gradient of one of them.
        reduce_gradients: in the form "exchange", whether the gradient of `w_down` is summed over the ranks. False
            leaves each rank its share, for DDP and FSDP.
        backend: "auto" or "torch"; the experts are computed by PyTorch.

    Returns:
        y `[rows, dim]` in the dtype of x, or (y, AoEAux).

    Raises:
        TypeError, ValueError: as `vot_kernels.aoe`; `group` is no group; or a weight has other experts than the rank.
        RuntimeError: another rank has ended or does not answer.
    """
    process_group = group_of(group)
    _validate(x, Experts(w_down, w_up, w_p, w_o), top_k, process_group, num_experts, form, weighting, bias)
    check_choice("backend", backend, ("auto", "torch"))
    gathers = form == "gather"
    counts = _counts(x, tokens, process_group) if gathers else []
    over = process_group if gathers else None  # the ranks among which the norms of a token are spread
    if gathers:
        x = _Gather.apply(x, counts, process_group)
    elif reduce_gradients:
        w_down = _Shared.apply(w_down, process_group)
    norms = _norms(x, w_down, num_experts, over)
    scores = norms if bias is None else norms + bias
    indices = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    if return_aux or weighting == "softmax_topk":
        norms = _AllNorms.apply(x, w_down, norms, num_experts, over)
        weights = composition._mixing_weights(norms, indices, weighting)
    else:
        weights = _ChosenNorms.apply(x, w_down, norms, indices, num_experts, over).softmax(-1)
    own = expert_slice(num_experts, rank_of(process_group), size_of(process_group))
    if gathers:
        y = _bodies(x, Experts(w_down, w_up, w_p, w_o), indices - own.start, weights)
        y, rows = _Scatter.apply(y, counts, process_group), _own_rows(counts, process_group)
    else:
        local = Experts(w_down[own], w_up, w_p, w_o)
        y, rows = _sent_around(x, local, indices, weights, num_experts, process_group), slice(None)
    if not return_aux:
        return y
    return y, _aux(norms, indices, weights, rows, None if gathers else process_group)


@autocasts("x", "w_gate_up", "w_down")
def moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    group: Group,
    num_experts: int,
    form: str = "gather",
    tokens: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`vot_kernels.moe` for the tokens of this rank, with experts that are spread over the ranks.

    Args:
        x: `[rows, dim]`, this rank's tokens.
        w_gate_up, w_down: `[own experts, 2 * hidden, dim]` and `[own experts, dim, hidden]`, of `expert_slice`.
        topk_idx, topk_weights: `[rows, k]`; ids count the experts of all ranks.
        group, num_experts, form, tokens: as for `aoe`.
        backend: as for `vot_kernels.moe`.

    Returns:
        `[rows, dim]` in the dtype of x.

    Raises:
        TypeError, ValueError: as `vot_kernels.moe`; `group` is no group; or a weight has other experts than the rank.
        RuntimeError: another rank has ended or does not answer.
    """
    process_group = group_of(group)
    check_tensor("x", x, ["rows", "dim"])
    check_choice("form", form, FORMS)
    own = expert_slice(num_experts, rank_of(process_group), size_of(process_group))
    check_tensor("w_down", w_down, [own.stop - own.start, x.shape[1], "hidden"])
    check_tensor("w_gate_up", w_gate_up, [own.stop - own.start, 2 * w_down.shape[2], x.shape[1]])
    check_tensor("topk_idx", topk_idx, [x.shape[0], "k"])
    check_tensor("topk_weights", topk_weights, list(topk_idx.shape))

    def apply(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return local_moe(rows, w_gate_up, w_down, ids, weights, backend=backend)

    if form == "exchange":
        return _Dispatch(topk_idx, num_experts, process_group)(x, topk_weights, apply)
    counts = _counts(x, tokens, process_group)
    rows, weights = (_Gather.apply(t, counts, process_group) for t in (x, topk_weights))
    ids = _gathered(topk_idx, counts, process_group) - own.start
    return _Scatter.apply(apply(rows, ids, weights), counts, process_group)


def expert_parallel(
    model: nn.Module, group: Group, *, form: str = "gather", reduce_gradients: bool = True
) -> nn.Module:
    """Spread the experts of every `AutonomyOfExperts` of a model over the ranks, in place.

    Each layer keeps the parameters of its own experts (in the form "exchange", W_down of all) and calls `aoe` of this
    module, so all ranks must call it with the same weights. Its state dict then has the rank's own experts. FSDP over
    the same ranks must leave these parameters alone (`ignored_params`), because they are no replicas.

    Args:
        model: with the weights of all experts, the same on all ranks.
        group: a ProcessGroup, or one dimension of a DeviceMesh.
        form, reduce_gradients: see `aoe`.

    Returns:
        The model.

    Raises:
        ValueError: there is no such layer, an unknown form, or a layer is parallel already.
    """
    process_group = group_of(group)
    check_choice("form", form, FORMS)
    layers = [layer for layer in model.modules() if isinstance(layer, AutonomyOfExperts)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no AutonomyOfExperts, so there are no experts to spread."
        )
    if any(layer.spread is not None for layer in layers):
        raise ValueError("The experts of this model are spread over ranks already.")
    for layer in layers:
        count = layer.w_down.shape[0]
        own = expert_slice(count, rank_of(process_group), size_of(process_group))
        for name in ("w_up", "w_p", "w_o") if form == "exchange" else Experts._fields:
            full = getattr(layer, name)
            part = nn.Parameter(full.detach()[own].clone(), requires_grad=full.requires_grad)
            setattr(layer, name, part)
        layer.spread = partial(
            aoe, group=process_group, num_experts=count, form=form, reduce_gradients=reduce_gradients
        )
    return model


def balance_over_ranks(model: nn.Module, group: Group) -> nn.Module:
    """Let the experts of every `AutonomyOfExperts` of a replica count the tokens of all ranks, in place.

    This is for data parallel training, where ranks have replicas and average gradients: the `load` and `balance_loss`
    that the layers return are then those of all ranks' tokens, and the average of the gradients is that of one process.

    Args:
        model: a replica; all ranks call it equally often.
        group: a ProcessGroup, or one dimension of a DeviceMesh.

    Returns:
        The model.

    Raises:
        ValueError: its experts are spread over ranks.
    """
    process_group = group_of(group)
    layers = [layer for layer in model.modules() if isinstance(layer, AutonomyOfExperts)]
    if any(layer.spread is not None for layer in layers):
        raise ValueError("The experts of this model are spread over ranks already, which counts all tokens.")
    for layer in layers:
        layer.spread = partial(_replica, group=process_group)
    return model


def _replica(*arguments: Any, group: ProcessGroup, **options: Any) -> Tensor | tuple[Tensor, AoEAux]:
    """`vot_kernels.aoe` with the loads of all ranks."""
    result = local_aoe(*arguments, **options)
    if not isinstance(result, tuple):
        return result
    y, own = result
    aux = _aux(own.norms, own.indices, own.weights, slice(None), group)
    share = size_of(group) * aux.balance_loss  # its gradient, whose average is that of the whole
    return y, aux._replace(balance_loss=aux.balance_loss.detach() + (share - share.detach()))


def _validate(
    x: Tensor,
    experts: Experts,
    top_k: int,
    group: ProcessGroup,
    num_experts: int,
    form: str,
    weighting: str,
    bias: Tensor | None,
) -> None:
    check_tensor("x", x, ["rows", "dim"])
    check_floating("x", x)
    check_choice("form", form, FORMS)
    check_choice("weighting", weighting, WEIGHTINGS)
    own = expert_slice(num_experts, rank_of(group), size_of(group))
    count, dim = own.stop - own.start, x.shape[1]
    check_tensor("w_down", experts.w_down, [num_experts if form == "exchange" else count, "rank", dim])
    check_tensor("w_up", experts.w_up, [count, "hidden", experts.w_down.shape[1]])
    for name, weight in (("w_p", experts.w_p), ("w_o", experts.w_o)):
        check_tensor(name, weight, [count, experts.w_up.shape[1], dim])
    check_alike("x", x, **experts._asdict())
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be an int from 1 to the {num_experts} experts, got {brief(top_k)}.")
    if bias is not None:
        check_tensor("bias", bias, [num_experts])
        check_device("x", x, bias=bias)


def _first(num_experts: int, group: ProcessGroup) -> int:
    return expert_slice(num_experts, rank_of(group), size_of(group)).start


def _expert_counts(num_experts: int, group: ProcessGroup) -> list[int]:
    size = size_of(group)
    slices = [expert_slice(num_experts, rank, size) for rank in range(size)]
    return [own.stop - own.start for own in slices]


def _counts(x: Tensor, tokens: Sequence[int] | None, group: ProcessGroup) -> list[int]:
    """How many rows each rank has."""
    if tokens is None:
        mine = torch.tensor([x.shape[0]], device=x.device)
        return all_gather(mine, group, "count of tokens").tolist()
    counts = list(tokens)
    if len(counts) != size_of(group) or counts[rank_of(group)] != x.shape[0]:
        raise ValueError(
            f"tokens must have the number of rows of each of the {size_of(group)} ranks, {x.shape[0]} on rank "
            f"{rank_of(group)}, got {brief(counts)}."
        )
    return counts


def _own_rows(counts: list[int], group: ProcessGroup) -> slice:
    bounds = [0, *accumulate(counts)]
    return slice(bounds[rank_of(group)], bounds[rank_of(group) + 1])


def _gathered(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks, of which this one has `x`. Shorter parts travel with padding."""
    most = max(counts)
    padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])]) if x.shape[0] < most else x
    parts = all_gather(padded, group, "gathering of tokens").split(most) if most else [x] * len(counts)
    if min(counts) == most:
        return torch.cat(list(parts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _scattered(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """This rank's rows of the sum over the ranks: `_gathered` transposed."""
    most = max(counts)
    if not most:
        return x
    if min(counts) < most:
        padded = x.new_zeros(len(counts), most, *x.shape[1:])
        for part, rows, count in zip(padded, x.split(counts), counts, strict=True):
            part[:count] = rows
        x = padded.flatten(0, 1)
    return reduce_scatter(x, group, "scattering of sums")[: counts[rank_of(group)]]


class _Gather(torch.autograd.Function):
    """`_gathered` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _gathered(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_all: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(d_all, ctx.counts, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    """`_scattered` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return _scattered(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_own: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(d_own, ctx.counts, ctx.group), None, None


class _Shared(torch.autograd.Function):
    """A tensor that is the same on all ranks; its gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return all_reduce(d_x, ctx.group, "sum of the gradients of w_down"), None


class _Exchange(torch.autograd.Function):
    """`exchange` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (received, sent), group
        return exchange(x, sent, received, group, "exchange of tokens")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.splits
        what = "exchange of gradients of tokens"
        return exchange(d_x, sent, received, ctx.group, what), None, None, None


class _Bodies(torch.autograd.Function):
    """The experts of this rank, applied to the tokens that chose them: caches and values are computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
        ctx.save_for_backward(x, indices, weights, *experts)
        return composition.forward_chosen(x, Experts(*experts), weights, indices, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, weights, *experts = ctx.saved_tensors
        given = (x, Experts(*experts), weights, indices, weights)
        d_x, *d_experts, d_weights = composition.backward_chosen(d_y, *given)
        return d_x, None, d_weights, *d_experts


def _bodies(x: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> Tensor:
    return _Bodies.apply(x, indices, weights, *experts)


@torch.no_grad()
def _norms(x: Tensor, w_down: Tensor, num_experts: int, group: ProcessGroup | None) -> Tensor:
    """The norms of all experts `[tokens, num_experts]`; with a group, each rank takes those of its own."""
    norms = composition.all_norms(x, w_down)
    if group is None:
        return norms
    return _gathered(norms.T.contiguous(), _expert_counts(num_experts, group), group).T.contiguous()


class _ChosenNorms(torch.autograd.Function):
    """The norms of the chosen experts `[tokens, top_k]`; only these get a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_down: Tensor,
        norms: Tensor,
        indices: Tensor,
        num_experts: int,
        group: ProcessGroup | None,
    ) -> Tensor:
        chosen = norms.gather(1, indices)
        ctx.save_for_backward(x, w_down, chosen, indices)
        ctx.num_experts, ctx.group = num_experts, group
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_chosen: Tensor) -> tuple[Tensor | None, ...]:
        x, w_down, chosen, indices = ctx.saved_tensors
        if ctx.group is not None:  # each rank has the part that goes through its own experts' weights
            d_chosen = all_reduce(d_chosen, ctx.group, "sum of the gradients of norms")
            indices = indices - _first(ctx.num_experts, ctx.group)
        gradients = composition.chosen_norms_backward(x, w_down, d_chosen, chosen, indices)
        return *gradients, None, None, None, None


class _AllNorms(torch.autograd.Function):
    """The norms of all experts, each with a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_down: Tensor, norms: Tensor, num_experts: int, group: ProcessGroup | None
    ) -> Tensor:
        ctx.save_for_backward(x, w_down, norms)
        ctx.num_experts, ctx.group = num_experts, group
        return norms.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_norms: Tensor) -> tuple[Tensor | None, ...]:
        x, w_down, norms = ctx.saved_tensors
        if ctx.group is not None:
            counts = _expert_counts(ctx.num_experts, ctx.group)
            d_norms = _scattered(d_norms.T.contiguous(), counts, ctx.group).T
            norms = norms[:, _first(ctx.num_experts, ctx.group) :][:, : w_down.shape[0]]
        if not w_down.shape[0]:
            return torch.zeros_like(x), torch.zeros_like(w_down), None, None, None
        d_x, d_down = norms_backward(x, w_down, d_norms, norms, norms.dtype)
        return d_x.to(x.dtype), d_down.to(w_down.dtype), None, None, None


class _Dispatch:
    """Where the tokens of this rank go: to each rank that has one of their experts, once."""

    def __init__(self, indices: Tensor, num_experts: int, group: ProcessGroup) -> None:
        counts = _expert_counts(num_experts, group)
        bounds = torch.tensor([0, *accumulate(counts)], device=indices.device)
        chosen = (indices[:, :, None] >= bounds[:-1]) & (indices[:, :, None] < bounds[1:])
        to, self.rows = chosen.any(1).T.nonzero(as_tuple=True)  # in the order of the ranks
        matrix = all_gather(chosen.any(1).sum(0)[None], group, "count of tokens").tolist()
        self.sent, self.received = matrix[rank_of(group)], [row[rank_of(group)] for row in matrix]
        self.ids = indices[self.rows] - bounds[to, None]
        self.group = group

    def __call__(self, x: Tensor, weights: Tensor, apply: Any) -> Tensor:
        """The sum of what the ranks make of the tokens: apply(rows, ids, weights), ids counting own experts."""
        splits = self.sent, self.received, self.group
        ids = exchange(self.ids, self.sent, self.received, self.group, "exchange of choices")
        rows, weights_there = (_Exchange.apply(t[self.rows], *splits) for t in (x, weights))
        back = _Exchange.apply(apply(rows, ids, weights_there), self.received, self.sent, self.group)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.new_zeros(x.shape, dtype=wide).index_add(0, self.rows, back.to(wide)).to(x.dtype)


def _sent_around(
    x: Tensor, experts: Experts, indices: Tensor, weights: Tensor, num_experts: int, group: ProcessGroup
) -> Tensor:
    def apply(rows: Tensor, ids: Tensor, weights_there: Tensor) -> Tensor:
        return _bodies(rows, experts, ids, weights_there)

    return _Dispatch(indices, num_experts, group)(x, weights, apply)


def _aux(norms: Tensor, indices: Tensor, weights: Tensor, rows: slice, group: ProcessGroup | None) -> AoEAux:
    """The outcome for `rows` of these tokens, which with a group are this rank's alone."""
    with torch.no_grad():
        experts = norms.shape[1]
        chosen = torch.bincount(indices.flatten(), minlength=experts).to(norms.dtype)
        totals = torch.cat([chosen, norms.softmax(-1).sum(0), chosen.new_tensor([norms.shape[0]])])
        if group is not None:
            totals = all_reduce(totals, group, "sum of loads")
        tokens = totals[-1].clamp(min=1)
        load, mean = totals[:experts] / tokens, totals[experts:-1] / tokens
    own = norms[rows]
    share = experts * (load * own.softmax(-1).sum(0) / tokens).sum()
    balance_loss = share + (experts * (load * mean).sum() - share).detach()
    return AoEAux(own, indices[rows], weights[rows], load, balance_loss)
