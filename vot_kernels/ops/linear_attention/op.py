"""Normalised linear attention over packed segments, bidirectional or causal.

    o_i = sum_j phi(q_i).phi(k_j) v_j / Z_i,   Z_i = sum_j phi(q_i).phi(k_j)

over all tokens j of the segment, or those up to i (Katharopoulos et al., 2020, eq. 5). The causal form works
on chunks: the states of earlier chunks by a scan, the own chunk by a small triangular product. It may forget: with a
decay per head every weight is times exp(log_decay_h (i - j)), as in retention (Sun et al., 2023), but normalised.
Here stand the op and its `torch` backend; the launchers of the `triton` backend are in `_linear_triton.py`.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.attention_options import FEATURE_MAPS
from vot_kernels.ops.checks import check_choice, check_device, check_qkv, check_tensor
from vot_kernels.ops.dispatch import select
from vot_kernels.ops.linear_attention import reference
from vot_kernels.ops.linear_attention.triton import linear_attention_backward, linear_attention_forward
from vot_kernels.ops.parts.group_states.torch import (
    StatePlan,
    apply_states,
    feature_map,
    feature_map_backward,
    group_states,
    plan_states,
    scan_states,
)
from vot_kernels.ops.parts.range_attention.blocks import (
    append_column,
    fold_heads,
    head_chunks,
    repeat_heads,
    to_heads,
    to_tokens,
)
from vot_kernels.packing import PackedLayout

_CHUNK = 64  # tokens: triangular products cost as much as the states do at about head_dim
_SCALE = 2.0**32  # of values and normaliser: for a subnormal Z, products would lose digits and 1 / Z overflow
_feature_map = feature_map  # the public function has an argument of that name


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    feature_map: str = "softmax",
    causal: bool = False,
    log_decay: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear attention of every token to its own segment, normalised to weights that sum to 1.

    Args:
        q: `[tokens, heads, head_dim]`, float16, bfloat16, float32 or float64; sums and exponentials in float32
            at least (docs/attention.md says what each backend rounds).
            Rows past the layout's tokens are slack: never read, output and gradient 0.
        k, v: `[tokens, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        layout: which rows belong to which segment; its groups play no part.
        feature_map: phi, on q and k as given: "softmax" over head_dim, "elu" (elu + 1) or "relu".
        causal: a token sees itself and the tokens before it.
        log_decay: `[heads]`, at most 0 and differentiable; needs `causal`. The token n places back weighs
            exp(n * log_decay) times as much: 0 forgets nothing, as None does, and with -inf a token sees itself
            alone. Values above 0 are refused where looking is free: on CPU tensors, and not in compiled code.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        `[tokens, heads, head_dim]` in the dtype of q; 0 where the weights are all 0 (relu).

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.
    """
    check_qkv(q, k, v, layout)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_choice("causal", causal, (False, True))
    if log_decay is not None:
        _check_decay(log_decay, q, causal)
    chosen = select("linear_attention", backend, q)
    if chosen == "reference":
        return reference.linear_attention(
            q, k, v, layout, feature_map=feature_map, causal=causal, log_decay=log_decay
        )[0]
    bounds = (layout.cu_seqlens, layout.host_cu_seqlens)
    return _linear_attention_fwd(q, k, v, *bounds, feature_map, causal, chosen, log_decay)[0]


def _check_decay(log_decay: Tensor, q: Tensor, causal: bool) -> None:
    """`[heads]`, floating point, on the device of q, at most 0, of causal attention."""
    check_tensor("log_decay", log_decay, [q.shape[1]])
    check_device("q", q, log_decay=log_decay)
    if not log_decay.is_floating_point():
        raise TypeError(f"log_decay must be floating point, got {log_decay.dtype}.")
    if not causal:
        raise ValueError("log_decay needs causal=True, for it counts tokens back, got causal=False.")
    readable = log_decay.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (log_decay > 0).any():
        raise ValueError(f"log_decay must be at most 0, got {float(log_decay.detach().max()):g}.")


@torch.library.custom_op("vot_kernels::linear_attention_fwd", mutates_args=())
def _linear_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    host_cu_seqlens: Tensor,
    feature_map: str,
    causal: bool,
    backend: str = "torch",
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward 1 / Z `[tokens, heads]`, 0 where Z is 0; of the torch backend 1 / (Z _SCALE)."""
    if backend == "triton":
        return linear_attention_forward(q, k, v, cu_seqlens, host_cu_seqlens, feature_map, causal, log_decay)
    plan = _plan(host_cu_seqlens.numpy().tobytes(), causal, q.device)
    out = q.new_empty(q.shape)
    inverse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, kv_heads in _head_chunks(plan, q, k, log_decay):
        decay = _cut_decay(plan, log_decay, heads, inverse)
        part = _forward(plan, q[:, heads], k[:, kv_heads], v[:, kv_heads], feature_map, causal, decay)
        to_tokens(part[0], out[:, heads])
        to_tokens(part[1], inverse[:, heads, None])
    return out, inverse


def _forward(
    plan: "_LinearPlan",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    causal: bool,
    decay: "_Decay | None",
) -> tuple[Tensor, Tensor]:
    """Output `[heads, tokens, d]` and 1 / (Z _SCALE) `[heads, tokens, 1]` of some heads."""
    query, key, value = (to_heads(x, plan.num_tokens) for x in (q, k, v))
    repeats = query.shape[0] // key.shape[0]
    query, key, value = (
        _feature_map(query, feature_map),
        _feature_map(key, feature_map),
        append_column(value, 1.0).mul_(_SCALE),
    )
    if decay is None:
        states = scan_states(group_states(key, value, plan.states), plan.states)
        sums = apply_states(query, repeat_heads(states, repeats), plan.states)
    if causal:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
    if decay is not None:
        states = group_states(key * decay.to_end, value, plan.states)
        states = scan_states(states, plan.states, log_step=decay.log_step)
        sums = apply_states(query * decay.from_start, states, plan.states)
    if causal:
        for chunks, _ in plan.own.groups:
            weights = (chunks.take(query) @ chunks.take(key).transpose(-1, -2)).tril_()
            if decay is not None:
                weights = weights * decay.triangle(chunks.length)
            chunks.add(sums, weights @ chunks.take(value))
    total = sums[..., -1:]
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    return sums[..., :-1] / total, total.reciprocal().masked_fill_(nothing, 0)


@_linear_attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute)


@torch.library.custom_op("vot_kernels::linear_attention_bwd", mutates_args=())
def _linear_attention_bwd(
    grad: Tensor,
    out: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    host_cu_seqlens: Tensor,
    feature_map: str,
    causal: bool,
    backend: str = "torch",
    log_decay: Tensor | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and that of log_decay, empty without one or if not wanted.

    With g_i = [do_i, -do_i.o_i] / Z_i the far formulas of hybrid attention hold. The torch backend divides phi(q_i)
    by Z_i instead: the products of g_i and [v_j, 1] cancel, and rounded quotients would not.
    """
    wanted = log_decay is not None and decay_gradient
    d_decay = _new_decay_gradient(q, log_decay, decay_gradient)
    if backend == "triton":
        tensors = (grad, out, inverse, q, k, v, cu_seqlens, host_cu_seqlens)
        dq, dk, dv, found = linear_attention_backward(*tensors, feature_map, causal, log_decay, wanted)
        return dq, dk, dv, d_decay if found is None else found.to(d_decay.dtype)
    plan = _plan(host_cu_seqlens.numpy().tobytes(), causal, q.device)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for heads, kv_heads in _head_chunks(plan, q, k, log_decay):
        inputs = (
            grad[:, heads],
            out[:, heads],
            inverse[:, heads],
            q[:, heads],
            k[:, kv_heads],
            v[:, kv_heads],
        )
        decay = _cut_decay(plan, log_decay, heads, inverse)
        *parts, d_log = _backward(plan, *inputs, feature_map, causal, decay)
        for part, rows in zip(parts, (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]), strict=True):
            to_tokens(part, rows)
        if d_log is not None and wanted:
            d_decay[heads] = d_log.to(d_decay.dtype)
    return dq, dk, dv, d_decay


def _new_decay_gradient(q: Tensor, log_decay: Tensor | None, wanted: bool) -> Tensor:
    """Room for it, empty if there is none."""
    if log_decay is None or not wanted:
        return q.new_empty(0)
    return log_decay.new_empty(log_decay.shape)


def _backward(
    plan: "_LinearPlan",
    grad: Tensor,
    out: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    causal: bool,
    decay: "_Decay | None",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Head-major dq, dk, dv of some heads, and the gradient of their log_decay."""
    tokens = plan.num_tokens
    query, key, value, do, o = (to_heads(x, tokens) for x in (q, k, v, grad, out))
    repeats = query.shape[0] // key.shape[0]
    phi_q, phi_k, value = (
        _feature_map(query, feature_map),
        _feature_map(key, feature_map),
        append_column(value, 1.0),
    )
    inverse = to_heads(inverse[..., None], tokens)
    weights_q = phi_q * inverse
    g = torch.cat([do, -(do * o).sum(-1, keepdim=True)], -1)
    d_log = None
    if decay is None:
        states = scan_states(group_states(phi_k, value, plan.states), plan.states)
        d_phi_q = apply_states(g, repeat_heads(states, repeats).transpose(-1, -2), plan.states)
        d_states = fold_heads(group_states(weights_q, g, plan.states), repeats)
        d_states = scan_states(d_states, plan.states, transposed=True)
        d_phi_k = apply_states(value, d_states.transpose(-1, -2), plan.states)
        dv = apply_states(phi_k, d_states, plan.states)
    else:
        d_phi_q, d_phi_k, dv, d_log = _decayed_backward(plan, decay, weights_q, phi_k, value, g)
    if causal:
        near_k, near_v = repeat_heads(phi_k, repeats), repeat_heads(value, repeats)
        own_k, own_v = torch.zeros_like(near_k), torch.zeros_like(near_v)
        for chunks, _ in plan.own.groups:
            own_q, own_g = chunks.take(weights_q), chunks.take(g)
            weights = (own_q @ chunks.take(near_k).transpose(-1, -2)).tril_()
            d_weights = (own_g @ chunks.take(near_v).transpose(-1, -2)).tril_()
            if decay is not None and d_log is not None:
                triangle = decay.triangle(chunks.length)
                d_weights = d_weights * triangle
                d_log = d_log + decay.count(weights * d_weights)
                weights = weights * triangle
            chunks.add(d_phi_q, d_weights @ chunks.take(near_k))
            chunks.put(own_k, d_weights.transpose(-1, -2) @ own_q)
            chunks.put(own_v, weights.transpose(-1, -2) @ own_g)
        d_phi_k, dv = d_phi_k + fold_heads(own_k, repeats), dv + fold_heads(own_v, repeats)
    return (
        feature_map_backward(query, phi_q, d_phi_q, feature_map).mul_(inverse).mul_(_SCALE),
        feature_map_backward(key, phi_k, d_phi_k, feature_map).mul_(_SCALE),
        dv[..., :-1].mul_(_SCALE),
        None if d_log is None else d_log * _SCALE,
    )


def _decayed_backward(
    plan: "_LinearPlan", decay: "_Decay", weights_q: Tensor, phi_k: Tensor, value: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What comes through the states: gradients of phi(q) before its division by Z, phi(k), the values and log_decay.

    The distance i - j is that of i from the start of its chunk, plus that of j to the end of its own, plus the
    chunks between. The gradient of log_decay sums each by itself: places in the segment would cancel.
    """
    repeats = weights_q.shape[0] // phi_k.shape[0]
    phi_k, value = repeat_heads(phi_k, repeats), repeat_heads(value, repeats)
    near_q, near_k = weights_q * decay.from_start, phi_k * decay.to_end
    states = scan_states(group_states(near_k, value, plan.states), plan.states, log_step=decay.log_step)
    d_states = group_states(near_q, g, plan.states)
    d_states = scan_states(d_states, plan.states, transposed=True, log_step=decay.log_step)
    d_near_q = apply_states(g, states.transpose(-1, -2), plan.states)
    d_near_k = apply_states(value, d_states.transpose(-1, -2), plan.states)
    dv = apply_states(near_k, d_states, plan.states)
    before, after = (near_q * d_near_q).sum(-1), (near_k * d_near_k).sum(-1)
    between = _CHUNK * decay.log_step.exp() * (states * d_states).sum((1, 2, 3))
    d_log = (before * decay.places).sum(-1) + (after * (_CHUNK - decay.places)).sum(-1) + between
    d_phi_k = fold_heads(d_near_k * decay.to_end, repeats)
    return d_near_q * decay.from_start, d_phi_k, fold_heads(dv, repeats), d_log


@_linear_attention_bwd.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    inverse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    host_cu_seqlens: Tensor,
    feature_map: str,
    causal: bool,
    backend: str = "torch",
    log_decay: Tensor | None = None,
    decay_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_decay = _new_decay_gradient(q, log_decay, decay_gradient)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_decay


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *ctx.options, log_decay = inputs[5:]
    ctx.save_for_backward(*output, *inputs[:5], log_decay)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    *tensors, log_decay = ctx.saved_tensors
    wanted = log_decay is not None and ctx.needs_input_grad[8]
    *grads, d_decay = _linear_attention_bwd(grad, *tensors, *ctx.options, log_decay, wanted)
    return (*grads, *(None,) * 5, d_decay if wanted else None)


_linear_attention_fwd.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True, eq=False)
class _LinearPlan:
    """Packed rows, the states to scan, and the chunks that see themselves in part (causal only)."""

    num_tokens: int
    states: StatePlan
    own: StatePlan
    device: torch.device

    def state_size(self, q: Tensor) -> int:
        """Numbers in the states of one head."""
        return self.states.num_slots * q.shape[2] * (q.shape[2] + 1)

    @cached_property
    def places(self) -> Tensor:
        """The place of every token in its chunk `[tokens]` (causal only)."""
        places = np.arange(self.num_tokens)
        for chunks, _ in self.own.groups:
            places[chunks.starts[:, None] + np.arange(chunks.length)] = np.arange(chunks.length)
        return torch.from_numpy(places).to(self.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _Decay:
    """The factors of a decay, each the exponential of a distance >= 0 times log_decay: none exceeds 1.

    Attributes:
        log_decay: `[heads]`, in the dtype of the computation.
        places: `[tokens]`, the place of every token in its chunk.
    """

    log_decay: Tensor
    places: Tensor

    @property
    def log_step(self) -> Tensor:
        """`[heads]`, log of the decay over a chunk. Only the last one of a segment, which none follows, is short."""
        return _CHUNK * self.log_decay

    @cached_property
    def from_start(self) -> Tensor:
        """`[heads, tokens, 1]`: from the start of a query's chunk to the query."""
        return self._over(self.places)[..., None]

    @cached_property
    def to_end(self) -> Tensor:
        """`[heads, tokens, 1]`: from a key to the start of the next chunk."""
        return self._over(_CHUNK - self.places)[..., None]

    def triangle(self, length: int) -> Tensor:
        """`[heads, 1, length, length]`: from the keys to the queries of a chunk; 1 above the diagonal."""
        return self._over(self._distances(length))[:, None]

    def count(self, weights: Tensor) -> Tensor:
        """Sum of `[heads, chunks, length, length]` times the distances, `[heads]`."""
        return (weights.sum(1) * self._distances(weights.shape[-1])).sum((1, 2))

    def _distances(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.places.device)
        return (place[:, None] - place).clamp_(min=0)

    def _over(self, distance: Tensor) -> Tensor:
        """The decay `[heads, ...]` over distances; 1 over none, whatever the decay."""
        log_decay = self.log_decay.view(-1, *[1] * distance.ndim)
        return torch.where(distance == 0, 0, log_decay * distance).exp_()


def _cut_decay(plan: _LinearPlan, log_decay: Tensor | None, heads: slice, like: Tensor) -> _Decay | None:
    """The decay of some heads, if there is one, in the dtype of `like`."""
    return None if log_decay is None else _Decay(log_decay[heads].to(like.dtype), plan.places)


def _head_chunks(
    plan: _LinearPlan, q: Tensor, k: Tensor, log_decay: Tensor | None
) -> list[tuple[slice, slice]]:
    """Heads to work on at a time; with a decay, heads that share a key have states of their own."""
    shared = 1 if log_decay is None else q.shape[1] // k.shape[1]
    return head_chunks(q, k, shared * plan.state_size(q))


@lru_cache(maxsize=32)
def _plan(cu_seqlens: bytes, causal: bool, device: torch.device) -> _LinearPlan:
    bounds = np.frombuffer(cu_seqlens, dtype=np.int32).astype(np.int64)
    if not causal:  # one state per segment, which every token of it reads
        first = np.arange(len(bounds))
        states = plan_states(first, bounds, 0, None, device)
        return _LinearPlan(int(bounds[-1]), states, states, device)
    lengths = np.diff(bounds)
    chunks = -(-lengths // _CHUNK)
    first = np.concatenate([[0], np.cumsum(chunks)])
    within = np.arange(first[-1]) - np.repeat(first[:-1], chunks)
    starts = np.repeat(bounds[:-1], chunks) + within * _CHUNK
    groups = np.append(starts, bounds[-1])
    earlier, own = (plan_states(first, groups, offset, None, device) for offset in (1, 0))
    return _LinearPlan(int(bounds[-1]), earlier, own, device)
