"""The linear part of attention to rows of other ranks: ranks exchange sums of states, and never the rows.

The state of some rows is the sum of phi(k_j) [v_j, 1]^T, float32 or wider `[kv_heads, width, head_dim + 1]`. Each rank
sends each other one the state of those of its rows that are far from all rows of the other. Nothing is subtracted:
what a receiver has near is left out of the sum that is made for it. Tensors are head-major, as in `ops/parts`.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vot_kernels.distributed.collectives import exchange
from vot_kernels.distributed.sharding import Transfer
from vot_kernels.ops.parts.range_attention.blocks import fold_heads, repeat_heads


@dataclass(frozen=True, eq=False)
class FarPlan:
    """What a rank sends, what it receives, and which of its rows read that.

    Attributes:
        transfer: the far rows that ranks ask each other for, of which only the states travel.
        first_end: the rank's rows up to here are in its first segment, which earlier ranks may share.
        last_begin: its rows from here on are in its last segment, which later ranks may share.
        rows: how many rows it has.
        pieces: wanted rows (begin, end), which do not overlap.
        members: 1 where a state to send, in the order of the ranks, contains a piece, else 0: `[states, pieces]`.
    """

    transfer: Transfer
    first_end: int
    last_begin: int
    rows: int
    pieces: tuple[tuple[int, int], ...]
    members: Tensor

    @classmethod
    def of(
        cls, transfer: Transfer, first_end: int, last_begin: int, rows: int, device: torch.device
    ) -> "FarPlan":
        """Cut the wanted rows wherever one of the ranges begins or ends, so that each is summed once."""
        wanted = [bounds for bounds in transfer.wanted if bounds[0] < bounds[1]]
        cuts = sorted({cut for bounds in wanted for cut in bounds})
        pieces = tuple(
            (begin, end) for begin, end in pairwise(cuts) if any(a <= begin and end <= b for a, b in wanted)
        )
        inside = [[float(a <= begin and end <= b) for begin, end in pieces] for a, b in wanted]
        members = torch.tensor(inside, device=device).view(len(wanted), len(pieces))
        return cls(transfer, first_end, last_begin, rows, pieces, members)

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """How many states go to each rank: 1 or 0."""
        return tuple(int(count > 0) for count in self.transfer.sent)

    @cached_property
    def received(self) -> tuple[int, ...]:
        """How many states come from each rank: 1 or 0."""
        return tuple(int(count > 0) for count in self.transfer.received)

    @cached_property
    def readers(self) -> tuple[tuple[slice, slice], ...]:
        """Rows of this rank, with the received states that they read."""
        states = sum(self.received)
        before = sum(self.received[: self.transfer.rank])
        pairs = (
            (slice(0, self.first_end), slice(0, before)),
            (slice(self.last_begin, self.rows), slice(before, states)),
        )
        return tuple(pair for pair in pairs if pair[1].start < pair[1].stop)


def far_states(keys: Tensor, values: Tensor, plan: FarPlan, group: ProcessGroup) -> Tensor:
    """The states that this rank receives `[states, kv_heads, width, head_dim + 1]`.

    keys are phi(k) `[kv_heads, rows, width]`, values are [v, 1].
    """
    shape = keys.shape[0], keys.shape[2], values.shape[2]
    pieces = keys.new_empty(len(plan.pieces), *shape)
    for piece, (begin, end) in zip(pieces, plan.pieces, strict=True):
        torch.matmul(keys[:, begin:end].transpose(1, 2), values[:, begin:end], out=piece)
    states = (plan.members.to(keys.dtype) @ pieces.flatten(1)).view(-1, *shape)
    return exchange(states, plan.sent, plan.received, group, "exchange of far states")


def far_states_backward(
    d_states: Tensor, keys: Tensor, values: Tensor, plan: FarPlan, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The gradients of keys and values, given those of the received states."""
    d_sent = exchange(d_states, plan.received, plan.sent, group, "exchange of gradients of far states")
    d_pieces = (plan.members.to(keys.dtype).T @ d_sent.flatten(1)).view(-1, *d_states.shape[1:])
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    for d_piece, (begin, end) in zip(d_pieces, plan.pieces, strict=True):
        rows = slice(begin, end)
        torch.matmul(values[:, rows], d_piece.transpose(1, 2), out=d_keys[:, rows])
        torch.matmul(keys[:, rows], d_piece, out=d_values[:, rows])
    return d_keys, d_values


def read_states(queries: Tensor, states: Tensor, plan: FarPlan) -> Tensor:
    """phi(q) times the states that each row reads: `[heads, rows, head_dim + 1]`."""
    sums = queries.new_zeros(*queries.shape[:2], states.shape[3])
    for rows, some in plan.readers:
        sums[:, rows] += queries[:, rows] @ _repeated(states[some].sum(0), queries)
    return sums


def read_states_backward(
    d_sums: Tensor, queries: Tensor, weight: Tensor, states: Tensor, plan: FarPlan
) -> tuple[Tensor, Tensor]:
    """The gradients of phi(q) and of the received states, where sums were multiplied by `weight` `[heads, rows, 1]`."""
    d_queries, d_states = torch.zeros_like(queries), torch.zeros_like(states)
    weighted = queries * weight
    repeats = queries.shape[0] // states.shape[1]
    for rows, some in plan.readers:
        state = _repeated(states[some].sum(0), queries)
        d_queries[:, rows] += d_sums[:, rows] @ state.transpose(1, 2)
        d_states[some] = fold_heads(weighted[:, rows].transpose(1, 2) @ d_sums[:, rows], repeats)
    return d_queries.mul_(weight), d_states


def _repeated(state: Tensor, queries: Tensor) -> Tensor:
    return repeat_heads(state, queries.shape[0] // state.shape[0])
