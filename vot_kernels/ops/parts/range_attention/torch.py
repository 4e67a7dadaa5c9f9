"""Softmax attention of ranges of queries over ranges of keys: packed, windowed and near attention alike.

A *pass* gives every query at most one range of keys; several passes over disjoint keys are merged by their lse.
Blocks of equal shape are computed together, by PyTorch's fused CPU kernel or by tiled matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vot_kernels.ops.parts.range_attention.blocks import Blocks, bucket, fold_heads

_MAX_SCORES = 2**25  # entries of a score tile of the path with matrix products: 128 MiB in float32
_WINDOW_ROWS = 128  # queries that share a mask
_LEAST_KEYS = 16  # with fewer, torch's kernel takes a row of NaN scores for a row that sees nothing


@dataclass(frozen=True, eq=False)
class RangeBlocks:
    """Runs of queries and of their keys, all of one shape; causal aligns the two and hides later keys.

    With limits `[2, queries]`, query i of a run sees only its keys from limits[0, i] up to, but not including,
    limits[1, i].
    """

    queries: Blocks
    keys: Blocks
    causal: bool
    limits: Tensor | None = None

    def part(self, runs: slice) -> "RangeBlocks":
        """Select some of the runs."""
        queries, keys = (Blocks(x.starts[runs], x.length, x.device) for x in (self.queries, self.keys))
        return RangeBlocks(queries, keys, self.causal, self.limits)

    def mask(self, like: Tensor, repeats: int) -> Tensor | None:
        """Return `[repeats * queries, keys]` to add to the scores, or None without limits."""
        hidden = self.hidden(repeats)
        return None if hidden is None else like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def hidden(self, repeats: int) -> Tensor | None:
        """Return which keys the queries do not see, `[repeats * queries, keys]`, or None without limits."""
        if self.limits is None:
            return None
        low, high = self.limits[..., None]
        key = torch.arange(self.keys.length, device=self.limits.device)
        return ((key < low) | (key >= high)).repeat(repeats, 1)


RangePass = tuple[RangeBlocks, ...]


def plan_pass(ranges: np.ndarray, causal: bool, device: torch.device) -> RangePass:
    """Return the blocks of `ranges` `[n, 4]`: query begin and end, key begin and end. Empty ranges are dropped.

    Queries must ascend. Adjacent queries with the same keys become one range.
    """
    ranges = ranges[(ranges[:, 1] > ranges[:, 0]) & (ranges[:, 3] > ranges[:, 2])]
    if not causal:
        ranges = join_ranges(ranges)
    lengths = np.stack([ranges[:, 1] - ranges[:, 0], ranges[:, 3] - ranges[:, 2]], axis=1)
    return tuple(
        RangeBlocks(
            Blocks(ranges[rows, 0], int(lengths[rows[0], 0]), device),
            Blocks(ranges[rows, 2], int(lengths[rows[0], 1]), device),
            causal,
        )
        for rows in bucket(lengths)
    )


def join_ranges(ranges: np.ndarray) -> np.ndarray:
    """Make one range of adjacent queries with the same keys; `ranges` as of `plan_pass`."""
    if not len(ranges):
        return ranges
    new = np.any(np.diff(ranges[:, 2:], axis=0) != 0, axis=1) | (ranges[1:, 0] != ranges[:-1, 1])
    first = np.flatnonzero(np.concatenate([[True], new]))
    last = np.append(first[1:], len(ranges)) - 1
    return np.stack([ranges[first, 0], ranges[last, 1], ranges[first, 2], ranges[first, 3]], axis=1)


def plan_windows(ranges: np.ndarray, left: int, right: int | None, device: torch.device) -> RangePass:
    """Return blocks of `ranges` `[n, 4]` in which a query sees keys from `left` before to `right` after its position.

    The last query and the last key of a range have the same position. Long ranges are cut into blocks of few queries
    and the keys that these see, so that a mask is as large as a window, not as a range.
    """
    found = []
    for owner, (begin, end, key_begin, key_end) in enumerate(ranges.tolist()):
        everything, offset = end - begin + key_end - key_begin, key_end - end
        behind, ahead = min(left, everything), everything if right is None else min(right, everything)
        for first in range(max(begin, key_begin - ahead - offset), end, _WINDOW_ROWS):
            rows = min(_WINDOW_ROWS, end - first)
            low = max(key_begin, first + offset - behind)
            keys = min(key_end, first + rows + offset + ahead) - low
            # Evenly spaced blocks, as those of one range, are views. Blocks of several ranges are copied if they are
            # short.
            apart = owner if keys > 4 * _WINDOW_ROWS else -1
            place = first + offset - low
            found.append((first, low, rows, keys, place - behind, place + ahead, apart))
    plan = np.array(found, dtype=np.int64).reshape(-1, 7)
    plan = plan[plan[:, 3] > 0]
    blocks = []
    for members in bucket(plan[:, 2:]):
        rows, keys, low, high = plan[members[0], 2:6].tolist()
        runs = Blocks(plan[members, 0], rows, device), Blocks(plan[members, 1], keys, device)
        limits = np.arange(rows) + np.array([[low], [high + 1]])
        blocks.append(RangeBlocks(*runs, False, torch.from_numpy(limits).to(device)))
    return tuple(blocks)


def plan_limits(
    rows: np.ndarray, low: np.ndarray, high: np.ndarray, owners: np.ndarray, device: torch.device
) -> RangePass:
    """Return blocks of `rows` (ascending), each of which sees the keys from low up to high, one block per owner.

    Rows of one owner are adjacent. Blocks whose rows see keys at the same positions are computed together.
    """
    found: dict[tuple[int, bytes], list[tuple[int, int]]] = {}
    for begin, end in pairwise([*np.flatnonzero(np.diff(owners, prepend=-1)), len(rows)]):
        limits = np.stack([low[begin:end], high[begin:end]])
        seen = limits[:, limits[1] > limits[0]]
        if seen.size:
            key, keys = int(seen[0].min()), int(seen[1].max() - seen[0].min())
            pattern = (limits - key).clip(0, keys)
            found.setdefault((keys, pattern.tobytes()), []).append((int(rows[begin]), key))
    blocks = []
    for (keys, places_seen), starts in found.items():
        places = np.array(starts, dtype=np.int64)
        limits = np.frombuffer(places_seen, dtype=np.int64).reshape(2, -1)
        whole = bool((limits[0] == 0).all() and (limits[1] == keys).all())
        runs = Blocks(places[:, 0], limits.shape[1], device), Blocks(places[:, 1], keys, device)
        blocks.append(
            RangeBlocks(*runs, False, None if whole else torch.from_numpy(limits.copy()).to(device))
        )
    return tuple(blocks)


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, passes: Sequence[RangePass], scale: float
) -> tuple[Tensor, Tensor]:
    """Return output `[heads, tokens, d]` and lse `[heads, tokens, 1]` of head-major q, k and v (`[kv_heads, …]`).

    Queries without keys have output 0 and lse -inf.
    """
    q, scale, _ = _positive(q, scale)
    repeats = q.shape[0] // k.shape[0]
    results = []
    for blocks in passes:
        out, lse = _nothing(q, complete=sum(item.queries.num_rows for item in blocks) == q.shape[1])
        for item in blocks:
            mask = item.mask(q, repeats)
            o, part = _attend(*_operands(item, q, k, v), item.causal, scale, mask)
            item.queries.put(out, unfolded_rows(o, item, q.shape[0]))
            item.queries.put(lse, unfolded_rows(part[..., None], item, q.shape[0]))
        results.append((out, lse))
    out, lse = results[0] if results else _nothing(q, complete=False)
    for other, other_lse in results[1:]:
        joint = torch.logaddexp(lse, other_lse)
        safe = finite_pivot(joint)
        weight, other_weight = (lse - safe).exp_(), (other_lse - safe).exp_()
        # 1 up to the rounding of lse, or 0. In gradients, do.o cancels do.v: there a sum of 1 + 1e-5 would matter.
        total = (weight + other_weight).clamp_(min=0.5)
        out = out.mul_(weight.div_(total)).add_(other.mul_(other_weight.div_(total)))
        lse = joint
    return out, lse


def range_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    passes: Sequence[RangePass],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, given the *joint* out and lse: p = exp(s - lse) needs no other normaliser. All head-major.

    A gradient on lse enters as D = d_out.out - d_lse. The fused kernel forms D itself, so the term is
    one more column: v' = [v, 1], d_out' = [d_out, d_lse], out' = [out, 0] give d_out'.v' - d_out'.out'.
    """
    if d_lse is not None:
        d_out, out = torch.cat([d_out, d_lse], -1), _widen(out, 0.0)
        q, k, v = _widen(q, 0.0), _widen(k, 0.0), _widen(v, 1.0)
    q, scale, factor = _positive(q, scale)
    (heads, *_), (kv_heads, *_) = q.shape, k.shape
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for item in (item for blocks in passes for item in blocks):
        part_q, part_k, part_v = _attend_backward(
            folded_rows(item, d_out, kv_heads),
            *_operands(item, q, k, v),
            folded_rows(item, out, kv_heads),
            folded_rows(item, lse, kv_heads)[..., 0],
            item.causal,
            scale,
            item.mask(q, heads // kv_heads),
        )
        item.queries.add(dq, unfolded_rows(part_q, item, heads))
        for total, part in ((dk, part_k), (dv, part_v)):
            item.keys.add(total, fold_heads(part.transpose(0, 1), part.shape[1] // kv_heads))
    dq = dq if factor == 1 else dq.mul_(factor)
    if d_lse is not None:
        dq, dk, dv = (x[..., :-1] for x in (dq, dk, dv))
    return dq, dk, dv


def attend_rows(q: Tensor, k: Tensor, v: Tensor, blocks: RangePass, scale: float) -> tuple[Tensor, Tensor]:
    """Return output `[tokens, heads, d]` and lse `[tokens, heads]` of one pass without limits and with kv_heads =
    heads.

    It reads the tensors in any strides, and copies only the rows of `blocks` that are not evenly spaced. Queries
    without keys have output 0 and lse -inf.
    """
    q, scale, _ = _positive(q, scale)
    outs, lses = [], []
    for item in blocks:
        query, key, value = item.queries.take_rows(q), item.keys.take_rows(k), item.keys.take_rows(v)
        out, lse = _attend(query, key, value, item.causal, scale)
        outs.append((item.queries, out))
        lses.append((item.queries, lse[..., None]))
    return _joined(q.shape, outs, q, 0.0), _joined((*q.shape[:2], 1), lses, q, -torch.inf)[..., 0]


def attend_rows_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: RangePass, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of `attend_rows`, 0 for rows that are in no block; no two blocks may share keys."""
    q, scale, factor = _positive(q, scale)
    parts: list[list[tuple[Blocks, Tensor]]] = [[], [], []]
    for item in blocks:
        g, query, o, norm = (item.queries.take_rows(x) for x in (d_out, q, out, lse[..., None]))
        key, value = (item.keys.take_rows(x) for x in (k, v))
        found = _attend_backward(g, query, key, value, o, norm[..., 0], item.causal, scale)
        for part, runs, grad in zip(parts, (item.queries, item.keys, item.keys), found, strict=True):
            part.append((runs, grad))
    dq, dk, dv = (_joined(x.shape, part, x, 0.0) for x, part in zip((q, k, v), parts, strict=True))
    return dq if factor == 1 else dq.mul_(factor), dk, dv


def _joined(
    shape: Sequence[int], parts: Sequence[tuple[Blocks, Tensor]], like: Tensor, missing: float
) -> Tensor:
    """Join the `[runs, heads, length, width]` of blocks to `[tokens, heads, width]`; no copy if one block covers it."""
    covered = sum(runs.num_rows for runs, _ in parts)
    if covered == shape[0] and parts and all(runs.are_adjacent for runs, _ in parts):
        ordered = sorted(parts, key=lambda part: int(part[0].starts[0]))
        rows = [values.transpose(1, 2).flatten(0, 1) for _, values in ordered]
        return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
    total = like.new_empty(shape) if covered == shape[0] else like.new_full(shape, missing)
    for runs, values in parts:
        runs.put_rows(total, values)
    return total


def finite_pivot(lse: Tensor) -> Tensor:
    """Return lse with 0 in place of -inf, so that exp(x - pivot) is 0 and not NaN for rows that see nothing."""
    return lse.masked_fill(lse == -torch.inf, 0)


def _nothing(q: Tensor, complete: bool) -> tuple[Tensor, Tensor]:
    """Return out and lse of queries without keys; uninitialized if the complete result is about to be written."""
    out, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    return (out, lse) if complete else (out.zero_(), lse.fill_(-torch.inf))


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """Return q and scale with the same products and a scale above 0, and the factor applied to q.

    torch's kernel multiplies masked scores, which are -inf, by the scale.
    """
    if scale > 0:
        return q, scale, 1.0
    factor = -1.0 if scale < 0 else scale
    return q * factor, abs(scale) or 1.0, factor


def _operands(item: RangeBlocks, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `[runs, heads, length, d]` each; see `folded_rows`. Causal blocks, with keys = rows, repeat the keys."""
    key, value = (item.keys.take(x).transpose(0, 1) for x in (k, v))
    if item.causal and q.shape[0] > k.shape[0]:
        key, value = (x.repeat_interleave(q.shape[0] // k.shape[0], 1) for x in (key, value))
    return folded_rows(item, q, k.shape[0]), key, value


def folded_rows(item: RangeBlocks, x: Tensor, kv_heads: int) -> Tensor:
    """Return `[runs, kv_heads, repeats * length, d]` of `[heads, tokens, d]`: heads that share keys become rows of
    one.

    Where the position of a row in its block matters, heads stay separate: `[runs, heads, length, d]`.
    """
    rows = item.queries.take(x).transpose(0, 1)
    if item.causal or x.shape[0] == kv_heads:
        return rows
    return rows.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def unfolded_rows(rows: Tensor, item: RangeBlocks, heads: int) -> Tensor:
    """Invert `folded_rows`: `[heads, runs, length, d]`."""
    if rows.shape[1] != heads:
        rows = rows.unflatten(2, (-1, item.queries.length)).flatten(1, 2)
    return rows.transpose(0, 1)


def _widen(x: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=value)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and lse `[runs, heads, length]` of a batch of equal ranges."""
    if q.device.type != "cpu":
        return _attend_matmul(q, k, v, causal, scale, mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    if k.shape[2] < _LEAST_KEYS and not (q.sum() + k.sum()).isfinite():
        lost = _scores(q, k, slice(None), slice(None), causal, scale, mask).isnan().any(-1)
        out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    return out, lse


def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    return _attend_matmul_backward(d_out, q, k, v, out, lse, causal, scale, mask)


def _attend_matmul(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for runs, rows in _tiles(q, k):
        scores = _scores(q, k, runs, rows, causal, scale, mask)
        lse[runs, :, rows] = part = scores.logsumexp(-1)
        out[runs, :, rows] = scores.sub_(part[..., None]).exp_() @ v[runs]
    return out, lse


def _attend_matmul_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for runs, rows in _tiles(q, k):
        p = _scores(q, k, runs, rows, causal, scale, mask).sub_(lse[runs, :, rows, None]).exp_()
        g = d_out[runs, :, rows]
        delta = (g * out[runs, :, rows]).sum(-1, keepdim=True)
        ds = (g @ v[runs].transpose(-1, -2)).sub_(delta).mul_(p).mul_(scale)
        dq[runs, :, rows] = ds @ k[runs]
        dk[runs] += ds.transpose(-1, -2) @ q[runs, :, rows]
        dv[runs] += p.transpose(-1, -2) @ g
    return dq, dk, dv


def _scores(
    q: Tensor, k: Tensor, runs: slice, rows: slice, causal: bool, scale: float, mask: Tensor | None
) -> Tensor:
    scores = (q[runs, :, rows] @ k[runs].transpose(-1, -2)).mul_(scale)
    if mask is not None:
        scores += mask[rows]
    if causal:
        index = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(index > index[rows, None], -torch.inf)
    return scores


def _tiles(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Return slices of runs and of query rows whose scores stay within the memory budget."""
    runs, heads, length, _ = q.shape
    row_size = heads * k.shape[2]
    rows = max(1, min(length, _MAX_SCORES // row_size))
    batch = max(1, _MAX_SCORES // (row_size * rows))
    return [
        (slice(b, b + batch), slice(r, r + rows))
        for b in range(0, runs, batch)
        for r in range(0, length, rows)
    ]
