"""Normalised linear attention over packed segments, bidirectional or causal.

    o_i = sum_j phi(q_i).phi(k_j) v_j / Z_i,   Z_i = sum_j phi(q_i).phi(k_j)

over all tokens j of the segment, or those up to i (Katharopoulos et al., 2020, eq. 5). The causal form works
on chunks: the states of earlier chunks by a scan, the own chunk by a small triangular product. Here stand the op
and its `torch` backend; the launchers of the `triton` backend are in `_linear_triton.py`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops._blocks import append_column, fold_heads, head_chunks, repeat_heads, to_heads, to_tokens
from vot_kernels.ops._group_states import (
    StatePlan,
    apply_states,
    feature_map_backward,
    group_states,
    plan_states,
    scan_states,
)
from vot_kernels.ops._linear_triton import linear_attention_backward, linear_attention_forward
from vot_kernels.ops._validation import check_choice, check_qkv
from vot_kernels.ops.dispatch import select
from vot_kernels.packing import PackedLayout
from vot_kernels.reference import attention as reference
from vot_kernels.reference.attention import FEATURE_MAPS, feature_map

_CHUNK = 64  # tokens: triangular products cost as much as the states do at about head_dim
_feature_map = feature_map  # the public function has an argument of that name


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    feature_map: str = "softmax",
    causal: bool = False,
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
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        `[tokens, heads, head_dim]` in the dtype of q; 0 where the weights are all 0 (relu).

    Raises:
        TypeError, ValueError: one sentence on what was given and what is allowed.
    """
    check_qkv(q, k, v, layout)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    check_choice("causal", causal, (False, True))
    chosen = select("linear_attention", backend, q)
    if chosen == "reference":
        return reference.linear_attention(q, k, v, layout, feature_map=feature_map, causal=causal)[0]
    bounds = (layout.cu_seqlens, layout.host_cu_seqlens)
    return _linear_attention_fwd(q, k, v, *bounds, feature_map, causal, chosen)[0]


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
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward 1 / Z `[tokens, heads]`, 0 where Z is 0."""
    if backend == "triton":
        return linear_attention_forward(q, k, v, cu_seqlens, host_cu_seqlens, feature_map, causal)
    plan = _plan(host_cu_seqlens.numpy().tobytes(), causal, q.device)
    out = q.new_empty(q.shape)
    inverse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for heads, kv_heads in head_chunks(q, k, plan.state_size(q)):
        part = _forward(plan, q[:, heads], k[:, kv_heads], v[:, kv_heads], feature_map, causal)
        to_tokens(part[0], out[:, heads])
        to_tokens(part[1], inverse[:, heads, None])
    return out, inverse


def _forward(
    plan: "_LinearPlan", q: Tensor, k: Tensor, v: Tensor, feature_map: str, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output `[heads, tokens, d]` and 1 / Z `[heads, tokens, 1]` of some heads."""
    query, key, value = (to_heads(x, plan.num_tokens) for x in (q, k, v))
    repeats = query.shape[0] // key.shape[0]
    query, key, value = (
        _feature_map(query, feature_map),
        _feature_map(key, feature_map),
        append_column(value, 1.0),
    )
    states = scan_states(group_states(key, value, plan.states), plan.states)
    sums = apply_states(query, repeat_heads(states, repeats), plan.states)
    if causal:
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
        for chunks, _ in plan.own.groups:
            weights = (chunks.take(query) @ chunks.take(key).transpose(-1, -2)).tril_()
            chunks.add(sums, weights @ chunks.take(value))
    inverse = _inverse(sums[..., -1:])
    return sums[..., :-1] * inverse, inverse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. With g_i = [do_i, -do_i.o_i] / Z_i the far formulas of hybrid attention hold."""
    if backend == "triton":
        tensors = (grad, out, inverse, q, k, v, cu_seqlens, host_cu_seqlens)
        return linear_attention_backward(*tensors, feature_map, causal)
    plan = _plan(host_cu_seqlens.numpy().tobytes(), causal, q.device)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for heads, kv_heads in head_chunks(q, k, plan.state_size(q)):
        inputs = (
            grad[:, heads],
            out[:, heads],
            inverse[:, heads],
            q[:, heads],
            k[:, kv_heads],
            v[:, kv_heads],
        )
        parts = _backward(plan, *inputs, feature_map, causal)
        for part, rows in zip(parts, (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]), strict=True):
            to_tokens(part, rows)
    return dq, dk, dv


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Head-major dq, dk, dv of some heads."""
    tokens = plan.num_tokens
    query, key, value, do, o = (to_heads(x, tokens) for x in (q, k, v, grad, out))
    repeats = query.shape[0] // key.shape[0]
    phi_q, phi_k, value = (
        _feature_map(query, feature_map),
        _feature_map(key, feature_map),
        append_column(value, 1.0),
    )
    weighted = torch.cat([do, -(do * o).sum(-1, keepdim=True)], -1).mul_(to_heads(inverse[..., None], tokens))
    states = scan_states(group_states(phi_k, value, plan.states), plan.states)
    d_phi_q = apply_states(weighted, repeat_heads(states, repeats).transpose(-1, -2), plan.states)
    d_states = fold_heads(group_states(phi_q, weighted, plan.states), repeats)
    d_states = scan_states(d_states, plan.states, transposed=True)
    d_phi_k = apply_states(value, d_states.transpose(-1, -2), plan.states)
    dv = apply_states(phi_k, d_states, plan.states)
    if causal:
        near_k, near_v = repeat_heads(phi_k, repeats), repeat_heads(value, repeats)
        own_k, own_v = torch.zeros_like(near_k), torch.zeros_like(near_v)
        for chunks, _ in plan.own.groups:
            phi, g = chunks.take(phi_q), chunks.take(weighted)
            weights = (phi @ chunks.take(near_k).transpose(-1, -2)).tril_()
            d_weights = (g @ chunks.take(near_v).transpose(-1, -2)).tril_()
            chunks.add(d_phi_q, d_weights @ chunks.take(near_k))
            chunks.put(own_k, d_weights.transpose(-1, -2) @ phi)
            chunks.put(own_v, weights.transpose(-1, -2) @ g)
        d_phi_k, dv = d_phi_k + fold_heads(own_k, repeats), dv + fold_heads(own_v, repeats)
    return (
        feature_map_backward(query, phi_q, d_phi_q, feature_map),
        feature_map_backward(key, phi_k, d_phi_k, feature_map),
        dv[..., :-1],
    )


@_linear_attention_bwd.register_fake
def _(
    grad: Tensor, out: Tensor, inverse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return (*_linear_attention_bwd(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


_linear_attention_fwd.register_autograd(_differentiate, setup_context=_save)


@dataclass(frozen=True, eq=False)
class _LinearPlan:
    """Packed rows, the states to scan, and the chunks that see themselves in part (causal only)."""

    num_tokens: int
    states: StatePlan
    own: StatePlan

    def state_size(self, q: Tensor) -> int:
        """Numbers in the states of one head."""
        return self.states.num_slots * q.shape[2] * (q.shape[2] + 1)


@lru_cache(maxsize=32)
def _plan(cu_seqlens: bytes, causal: bool, device: torch.device) -> _LinearPlan:
    bounds = np.frombuffer(cu_seqlens, dtype=np.int32).astype(np.int64)
    if not causal:  # one state per segment, which every token of it reads
        first = np.arange(len(bounds))
        states = plan_states(first, bounds, 0, None, device)
        return _LinearPlan(int(bounds[-1]), states, states)
    lengths = np.diff(bounds)
    chunks = -(-lengths // _CHUNK)
    first = np.concatenate([[0], np.cumsum(chunks)])
    within = np.arange(first[-1]) - np.repeat(first[:-1], chunks)
    starts = np.repeat(bounds[:-1], chunks) + within * _CHUNK
    groups = np.append(starts, bounds[-1])
    earlier, own = (plan_states(first, groups, offset, None, device) for offset in (1, 0))
    return _LinearPlan(int(bounds[-1]), earlier, own)


def _inverse(total: Tensor) -> Tensor:
    """1 / Z, and 0 where Z is 0."""
    return torch.where(total == 0, 0, total.reciprocal())
