"""Attention over packed tokens whose rows are spread over ranks: each rank has some, and all have the layout.

**Near part.** A rank receives the keys and values of the rows near to its own, the groups of the window, by one
exchange with its neighbours, and runs the ordinary op on them and its own. **Far part.** It receives sums of states of
all rows beyond (see `far`), which it joins to that result under one normaliser. With `window=None` all rows of the
segment are near, and the result over those of other ranks is joined to the rank's own by their normalisers.

The backward feeds each part the joint normaliser, as the backward of one process does, and sends the gradients of
what was received back by the transposed exchanges.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vot_kernels.distributed.collectives import Group, all_reduce, exchange, group_of, rank_of
from vot_kernels.distributed.far import (
    FarPlan,
    far_states,
    far_states_backward,
    read_states,
    read_states_backward,
)
from vot_kernels.distributed.sharding import Reach, Transfer, agreed_bounds, reaches
from vot_kernels.ops.attention_options import CAUSAL_MODES, TOKEN_CAUSAL_MODES, Causal, Window, window_sides
from vot_kernels.ops.autocast import autocasts
from vot_kernels.ops.checks import (
    check_causal,
    check_choice,
    check_groups,
    check_options,
    check_per_head,
    check_qkv,
    check_scale,
)
from vot_kernels.ops.dispatch import load, select
from vot_kernels.ops.dtypes import accumulator
from vot_kernels.ops.flash_attention.op import _flash_attention_bwd, _flash_attention_fwd
from vot_kernels.ops.hybrid_attention.geometry import Geometry
from vot_kernels.ops.hybrid_attention.op import _hybrid_attention_bwd, _hybrid_attention_fwd, _some_log_weight
from vot_kernels.ops.linear_attention.op import _linear_attention_bwd, _linear_attention_fwd
from vot_kernels.ops.linear_attention.torch import least_normaliser
from vot_kernels.ops.parts.group_states.torch import (
    far_weight,
    feature_map,
    feature_map_backward,
    join_far,
    log_weight,
)
from vot_kernels.ops.parts.plans import remember
from vot_kernels.ops.parts.range_attention.blocks import append_column, to_heads
from vot_kernels.packing import PackedLayout

BACKENDS = ("auto", "triton", "cpp", "torch")
LINEAR_BACKENDS = (
    "auto",
    "triton",
    "torch",
)  # whose backward reads the joint result; C++ makes its own again


@autocasts("q", "k", "v")
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    group: Group,
    window: Window = 1,
    beta: Tensor | None = None,
    far_weight: Tensor | None = None,
    feature_map: str = "softmax",
    causal: Causal = None,
    scale: float | None = None,
    reduce_gradients: bool = True,
    backend: str = "auto",
) -> Tensor:
    """`vot_kernels.hybrid_attention` for the rows of this rank; what a rank sends does not grow with the video.

    Every rank of the group must make the call, and its backward, even if it has no rows: there its loss must contain
    the empty output. At the first call with a layout the ranks compare theirs.

    Args:
        q: `[rows, heads, head_dim]`, this rank's rows, for example those of `shard`: ranks have contiguous rows in
            order, cut at group boundaries, any number of them.
        k, v: `[rows, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: of the tokens of all ranks, the same on all of them.
        group: a ProcessGroup, or one dimension of a DeviceMesh.
        window, causal, scale: as for `vot_kernels.hybrid_attention`. With `window=None` ranks receive the keys and
            values of all rows of the segments that they share.
        beta, far_weight, feature_map: likewise; beta or far_weight is the same on all ranks.
        reduce_gradients: whether the gradient of beta or far_weight is summed over the ranks. False leaves each rank
            its share, for DDP and FSDP, which reduce it with those of all other parameters.
        backend: "auto", "triton", "cpp" or "torch".

    Returns:
        `[rows, heads, head_dim]` in the dtype of q.

    Raises:
        TypeError, ValueError: as `vot_kernels.hybrid_attention`; `group` is no group; or the ranks' layouts, options
            or rows do not fit together.
        RuntimeError: another rank has ended or does not answer.
    """
    process_group = group_of(group)
    check_qkv(q, k, v)
    _check_layout(layout)
    check_options(q, k, beta, feature_map, None, None)
    check_per_head("far_weight", far_weight, q)
    if beta is not None and far_weight is not None:
        raise ValueError("Give either beta or far_weight, which is exp(beta), not both.")
    causal = check_causal(causal, CAUSAL_MODES)
    check_groups(layout, window, causal)
    scale = check_scale("scale", scale, q.shape[2])
    weighs = far_weight is not None
    check_choice("backend", backend, BACKENDS)
    served = select("hybrid_attention", backend, q)
    call = _Call(process_group, feature_map, scale, weighs, reduce_gradients, served)
    plan = _plan_of(layout, q, process_group, window, causal)
    if plan.exact:
        return _ExactAttention.apply(q, k, v, plan, call)
    weight = far_weight if weighs else beta
    if weight is not None:  # the ranks' parts of its gradient are summed before they are rounded
        weight = weight.to(accumulator(weight.dtype))
    return _HybridAttention.apply(q, k, v, weight, plan, call)


@autocasts("q", "k", "v")
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    group: Group,
    causal: Causal = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`vot_kernels.packed_attention` for the rows of this rank: exact attention within each segment.

    It is `hybrid_attention` with `window=None`: ranks receive the keys and values of all rows of the segments that
    they share, and the memory for these grows with the segment. Arguments, result and errors are those of
    `hybrid_attention`; `causal` is False, True or "token".
    """
    causal = check_causal(causal, TOKEN_CAUSAL_MODES)
    options = {"causal": causal, "scale": scale, "backend": backend}
    return hybrid_attention(q, k, v, layout, group=group, window=None, **options)  # type: ignore[arg-type]


@autocasts("q", "k", "v")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    group: Group,
    feature_map: str = "softmax",
    causal: Causal = False,
    backend: str = "auto",
) -> Tensor:
    """`vot_kernels.linear_attention` for the rows of this rank, without decay: ranks exchange states alone.

    Half precision is computed in float32 and rounded once. Arguments, result and errors are those of
    `hybrid_attention`; `causal` is False, True or "token", and `backend` is "auto", "triton" or "torch".
    """
    process_group = group_of(group)
    check_qkv(q, k, v)
    _check_layout(layout)
    check_options(q, k, None, feature_map, None, None)
    causal = check_causal(causal, TOKEN_CAUSAL_MODES)
    wide = accumulator(q.dtype)
    query, key, value = (x.to(wide) for x in (q, k, v))
    check_choice("backend", backend, LINEAR_BACKENDS)
    served = select("linear_attention", backend, query)
    call = _Call(process_group, feature_map, backend=served if served in LINEAR_BACKENDS else "torch")
    plan = _plan_of(layout, q, process_group, None, causal)
    return _LinearAttention.apply(query, key, value, plan, call).to(q.dtype)


def _check_layout(layout: object) -> None:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout must be a PackedLayout, got {type(layout).__name__}.")


@dataclass(frozen=True)
class _Call:
    """The options of a call that play no part in its plan."""

    group: ProcessGroup
    feature_map: str
    scale: float = 1.0
    weighs: bool = False
    reduce_gradients: bool = False
    backend: str = "torch"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a rank exchanges and computes, for one packing and its cuts.

    Attributes:
        own: layout of the rank's rows alone.
        near: layout of these with the near rows of other ranks around them.
        reach: the rank's rows and those they depend on.
        halo: the near rows of other ranks.
        far: their far rows, with a window, and where nothing is near, all of them.
        window: near groups on either side, None for all.
        causal: None, "group" or "token".
        query_bounds, key_bounds: cumulative lengths, int32, of the rank's rows and of the received ones, cut so that
            those that share a segment belong together; for exact attention.
    """

    own: PackedLayout
    near: PackedLayout
    reach: Reach
    halo: Transfer
    far: FarPlan
    window: tuple[int, int] | None
    causal: str | None
    query_bounds: Tensor
    key_bounds: Tensor

    @property
    def exact(self) -> bool:
        """Whether all rows of a segment are near."""
        return self.window is None

    @property
    def rows(self) -> int:
        """The rank's rows."""
        return self.reach.end - self.reach.begin

    def geometry(self) -> Geometry:
        """Which rows of `near`, or of `own` in exact attention, see each other."""
        return Geometry.of(self.own if self.exact else self.near, self.window, self.causal)


def _plan_of(
    layout: PackedLayout, q: Tensor, group: ProcessGroup, window: Window, causal: str | None
) -> Plan:
    left, right = window_sides(window, causal)
    sides = None if left is None or right is None else (left, right)
    bounds = agreed_bounds(layout, q, group, sides, causal)
    tensors = layout.host_cu_seqlens, layout.host_cu_groups, layout.cu_seqlens
    return _make_plan(*tensors, bounds, rank_of(group), sides, causal)


@remember
def _make_plan(
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    on_device: Tensor,
    bounds: tuple[int, ...],
    rank: int,
    window: tuple[int, int] | None,
    causal: str | None,
) -> Plan:
    """The plan of one rank; `on_device` names the device of its layouts."""
    layout = PackedLayout.from_cu_seqlens(cu_seqlens, cu_groups)
    found = reaches(layout, bounds, window, causal)
    near = [(range(r.near_begin, r.begin), range(r.end, r.near_end)) for r in found]
    far = [(range(r.segment_begin, r.near_begin), range(r.near_end, r.segment_end)) for r in found]
    if window is None:  # of linear attention, which has nothing near; hybrid attention has nothing far
        far = near
    reach, segments = found[rank], cu_seqlens.numpy()
    rows = reach.end - reach.begin
    inner = segments[(segments > reach.begin) & (segments < reach.end)] - reach.begin
    first_end, last_begin = (int(inner[0]), int(inner[-1])) if len(inner) else (rows, 0)
    own, around = (
        _part(layout, begin, end, on_device.device)
        for begin, end in ((reach.begin, reach.end), (reach.near_begin, reach.near_end))
    )
    halo = Transfer.of(near, bounds, rank)
    before, received = halo.before, sum(halo.received)
    shared = ([0, rows], [0, received])
    if first_end < rows:
        shared = ([0, first_end, last_begin, rows], [0, before, before, received])
    others = [torch.tensor(x, dtype=torch.int32, device=on_device.device) for x in shared]
    return Plan(
        own,
        around,
        reach,
        halo,
        FarPlan.of(Transfer.of(far, bounds, rank), first_end, last_begin, rows, on_device.device),
        window,
        causal,
        others[0],
        others[1],
    )


def _part(layout: PackedLayout, begin: int, end: int, device: torch.device) -> PackedLayout:
    """The layout of some rows, which begin and end with groups."""
    segments, groups = layout.host_cu_seqlens.numpy(), layout.host_cu_groups.numpy()
    inner = segments[(segments > begin) & (segments < end)].tolist()
    bounds = [begin, *inner, end] if begin < end else [begin]
    cuts = groups[(groups >= begin) & (groups <= end)] if begin < end else groups[:1] * 0 + begin
    shifted = ([row - begin for row in bounds], (cuts - begin).tolist())
    return PackedLayout.from_cu_seqlens(*shifted, device=device)


def _with_halo(x: Tensor, halo: Tensor, plan: Plan) -> Tensor:
    """The rows of this rank between those that it received."""
    before = plan.halo.before
    return torch.cat([halo[:before], x, halo[before:]])


def _own(x: Tensor, plan: Plan) -> Tensor:
    """This rank's rows of those of `plan.near`."""
    return x[plan.halo.before :][: plan.rows]


def _padded(x: Tensor, plan: Plan) -> Tensor:
    """The rank's rows with zeros where those of other ranks lie."""
    received = sum(plan.halo.received)
    return _with_halo(x, x.new_zeros(received, *x.shape[1:]), plan) if received else x


def _receive_halo(k: Tensor, v: Tensor, plan: Plan, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The keys and values of the near rows of other ranks."""
    if plan.halo.idle:
        return k[:0], v[:0]
    wanted = torch.cat([torch.stack([k[begin:end], v[begin:end]], 1) for begin, end in plan.halo.wanted])
    found = exchange(wanted, plan.halo.sent, plan.halo.received, group, "exchange of near keys and values")
    return found[:, 0], found[:, 1]


def _return_halo(
    dk: Tensor, dv: Tensor, d_halo: tuple[Tensor, Tensor], plan: Plan, group: ProcessGroup
) -> None:
    """Send the gradients of received rows back, and add those that come back to dk and dv."""
    if plan.halo.idle:
        return
    sent, received = plan.halo.received, plan.halo.sent
    found = exchange(
        torch.stack(d_halo, 1), sent, received, group, "exchange of gradients of keys and values"
    )
    for part, (begin, end) in zip(found.split(list(received)), plan.halo.wanted, strict=True):
        dk[begin:end] += part[:, 0]
        dv[begin:end] += part[:, 1]


class _HybridAttention(torch.autograd.Function):
    """Hybrid attention with a window. The arguments are q, k, v, beta or the far weight, the plan and the call."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, plan: Plan, call: _Call
    ) -> Tensor:
        halo = _receive_halo(k, v, plan, call.group)
        keys, values = (_with_halo(x, rows, plan) for x, rows in zip((k, v), halo, strict=True))
        query = _padded(q, plan)
        local, lse = _hybrid_attention_fwd(query, keys, values, beta, *_options(plan, call))
        out, states = _own(local, plan), q.new_empty(0)
        if not plan.far.transfer.idle:
            states = far_states(*_key_features(k, v, call), plan.far, call.group)
        if plan.far.readers:
            query_features = feature_map(to_heads(q, plan.rows), call.feature_map)
            sums = read_states(query_features, states, plan.far)
            weight = log_weight(_log(beta, call), query_features)
            near = to_heads(out, plan.rows), to_heads(_own(lse, plan)[..., None], plan.rows)
            joint, joint_lse = join_far(*near, sums, weight)
            out = joint.transpose(0, 1).to(q.dtype, memory_format=torch.contiguous_format)
            _own(lse, plan).copy_(joint_lse[..., 0].T)
        ctx.save_for_backward(query, keys, values, beta, local, out, lse, states)
        ctx.plan, ctx.call = plan, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, beta, local, out, lse, states = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        d_lse = None
        if plan.far.readers:  # gives the local op the joint result in do.o, even where it makes its own again
            wide = d_out.to(lse.dtype)
            d_lse = _padded((wide * (_own(local, plan).to(lse.dtype) - out)).sum(-1), plan)
        saved = (query, keys, values, beta)
        given = (_padded(d_out, plan), d_lse, local, lse, *saved)
        dq, dk, dv, d_beta, *_ = _hybrid_attention_bwd(*given, *_options(plan, call))
        own = tuple(_own(x, plan) for x in (dq, dk, dv))
        d_halo = tuple(_outer(x, plan) for x in (dk, dv))
        _return_halo(own[1], own[2], d_halo, plan, call.group)  # type: ignore[arg-type]
        if not plan.far.transfer.idle:
            rows = tuple(_own(x, plan) for x in saved[:3])
            d_beta_far = _far_backward(d_out, out, _own(lse, plan), rows, beta, states, plan, call, own)
            d_beta = None if beta is None else d_beta + d_beta_far
        if beta is None or not ctx.needs_input_grad[3]:
            return *own, None, None, None
        if call.reduce_gradients:
            d_beta = all_reduce(d_beta, call.group, "sum of the gradients of beta")
        return *own, d_beta, None, None


def _options(plan: Plan, call: _Call) -> tuple[Any, ...]:
    """The arguments of the local op after its tensors."""
    return None, None, *plan.geometry(), call.feature_map, call.scale, call.weighs, None, call.backend


def _outer(x: Tensor, plan: Plan) -> Tensor:
    """The rows of other ranks among those of `plan.near`."""
    before = plan.halo.before
    return torch.cat([x[:before], x[before + plan.rows :]])


def _log(beta: Tensor | None, call: _Call) -> Tensor | None:
    return beta.to(accumulator(beta.dtype)).log() if call.weighs and beta is not None else beta


def _key_features(k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """phi(k) and [v, 1], head-major."""
    key, value = (to_heads(x, x.shape[0]) for x in (k, v))
    return feature_map(key, call.feature_map), append_column(value, 1.0)


def _far_backward(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: tuple[Tensor, ...],
    beta: Tensor | None,
    states: Tensor,
    plan: Plan,
    call: _Call,
    grads: tuple[Tensor, ...],
) -> Tensor:
    """Add what the far rows of other ranks contribute to the gradients of q, k and v; return that of beta."""
    query, d_rows, rows, joint = (to_heads(x, plan.rows) for x in (inputs[0], d_out, out, lse[..., None]))
    log = beta
    if call.weighs and beta is not None:
        log = _some_log_weight(beta, lse)
    queries, weight = feature_map(query, call.feature_map), far_weight(log_weight(log, query), joint)
    d_sums = torch.cat([d_rows, -(d_rows * rows).sum(-1, keepdim=True)], -1)
    d_queries = _states_backward(d_sums, queries, weight, inputs, states, plan, call, grads)
    grads[0].add_(feature_map_backward(query, queries, d_queries, call.feature_map).transpose(0, 1))
    d_beta = (queries * d_queries).sum((1, 2))
    if call.weighs and log is not None:
        root = (-log / 2).exp()
        d_beta = d_beta * root * root
    return d_beta if beta is None else d_beta.to(beta.dtype)


def _states_backward(
    d_sums: Tensor,
    queries: Tensor,
    weight: Tensor,
    inputs: tuple[Tensor, ...],
    states: Tensor,
    plan: Plan,
    call: _Call,
    grads: tuple[Tensor, ...],
) -> Tensor:
    """Add to the gradients of k and v what goes through the states; return the gradient of phi(q)."""
    d_queries, d_states = read_states_backward(d_sums, queries, weight, states, plan.far)
    keys, values = _key_features(inputs[1], inputs[2], call)
    d_keys, d_values = far_states_backward(d_states, keys, values, plan.far, call.group)
    key = to_heads(inputs[1], plan.rows)
    grads[1].add_(feature_map_backward(key, keys, d_keys, call.feature_map).transpose(0, 1))
    grads[2].add_(d_values[..., :-1].transpose(0, 1))
    return d_queries


class _ExactAttention(torch.autograd.Function):
    """Softmax attention to all rows of the segment, which are received. The arguments are q, k, v, plan and call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, call: _Call) -> Tensor:
        keys, values = _receive_halo(k, v, plan, call.group)
        out, lse = _hybrid_attention_fwd(q, k, v, None, *_options(plan, call))
        if keys.shape[0]:
            other, other_lse = _flash_attention_fwd(q, keys, values, *_others(plan, call))
            joint = torch.logaddexp(lse, other_lse)
            here, there = ((x - joint).exp_()[..., None] for x in (lse, other_lse))
            total = here + there
            out = (out * (here / total)).addcmul_(other, there / total).to(q.dtype)
            lse = joint
        ctx.save_for_backward(q, k, v, keys, values, out, lse)
        ctx.plan, ctx.call = plan, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keys, values, out, lse = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        d_out = d_out.contiguous()
        saved = (d_out, None, out, lse, q, k, v, None)
        dq, dk, dv, *_ = _hybrid_attention_bwd(*saved, *_options(plan, call))
        d_halo = keys, values
        if keys.shape[0]:
            found = _flash_attention_bwd(d_out, out, lse, q, keys, values, *_others(plan, call))
            dq, d_halo = dq + found[0], found[1:]
        _return_halo(dk, dv, d_halo, plan, call.group)
        return dq, dk, dv, None, None


def _others(plan: Plan, call: _Call) -> tuple[Any, ...]:
    """The arguments of the op that attends to received rows, after its tensors."""
    return plan.query_bounds, plan.key_bounds, None, None, call.scale, False, call.backend


class _LinearAttention(torch.autograd.Function):
    """Linear attention: the states of all other rows of the segment are received. The arguments are as above."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, call: _Call) -> Tensor:
        own, scale = plan.own, load("linear_attention", call.backend).SCALE
        bounds = own.cu_seqlens, own.host_cu_seqlens, plan.causal, call.feature_map, call.backend
        out, inverse = _linear_attention_fwd(q, k, v, None, *bounds)
        states = q.new_empty(0)
        if not plan.far.transfer.idle:
            states = far_states(*_key_features(k, v, call), plan.far, call.group)
        if plan.far.readers:
            sums = read_states(feature_map(to_heads(q, plan.rows), call.feature_map), states, plan.far)
            sums = sums.mul_(scale).transpose(0, 1)
            here = torch.where(inverse > 0, inverse.reciprocal(), 0)[..., None]
            total = here + sums[..., -1:]
            nothing = total < least_normaliser(total.dtype)
            total = total.masked_fill(nothing, 1)
            out = (out * here + sums[..., :-1]) / total
            inverse = total.reciprocal().masked_fill_(nothing, 0)[..., 0]
        ctx.save_for_backward(q, k, v, out, inverse, states)
        ctx.plan, ctx.call, ctx.bounds, ctx.scale = plan, call, bounds, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, inverse, states = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        d_out = d_out.contiguous()
        dq, dk, dv, _ = _linear_attention_bwd(d_out, out, inverse, q, k, v, None, *ctx.bounds, False)
        if not plan.far.transfer.idle:
            query, d_rows, rows, weight = (
                to_heads(x, plan.rows) for x in (q, d_out, out, inverse[..., None] * ctx.scale)
            )
            queries = feature_map(query, call.feature_map)
            d_sums = torch.cat([d_rows, -(d_rows * rows).sum(-1, keepdim=True)], -1)
            grads = (dq, dk, dv)
            d_queries = _states_backward(d_sums, queries, weight, (q, k, v), states, plan, call, grads)
            dq.add_(feature_map_backward(query, queries, d_queries, call.feature_map).transpose(0, 1))
        return dq, dk, dv, None, None
