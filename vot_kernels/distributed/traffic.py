"""How many bytes a rank receives in one call of an op, as functions of sizes alone.

Counted are numbers that come from other ranks: a rank that gathers n bytes from each of P ranks receives (P - 1) n of
them, one that takes its share of a sum over P ranks as many, and a sum that all ranks keep is a share and a gathering.
The backward sends gradients back along the same ways. Ring attention and Ulysses are counted in the same manner.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

_STATE_BYTES = 4  # states are float32


class Traffic(NamedTuple):
    """Bytes that a rank receives in one call.

    Attributes:
        forward, backward: in the forward and in the backward.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Video:
    """One segment whose frames are its groups, and the heads of one layer.

    Attributes:
        frames, frame_tokens: how many frames it has, and tokens in a frame.
        heads, kv_heads, head_dim: of the attention.
        itemsize: bytes of a number of q, k and v, at most 4.
    """

    frames: int
    frame_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2

    @property
    def frame_bytes(self) -> int:
        """Keys and values of a frame."""
        return 2 * self.frame_tokens * self.kv_heads * self.head_dim * self.itemsize

    @property
    def state_bytes(self) -> int:
        """Sums of states, of any number of tokens."""
        return self.kv_heads * self.head_dim * (self.head_dim + 1) * _STATE_BYTES

    def bounds(self, ranks: int) -> list[int]:
        """The first frame of each rank and the number of frames, as evenly as can be."""
        return [self.frames * rank // ranks for rank in range(ranks + 1)]


def near_bytes(video: Video, ranks: int, rank: int, window: tuple[int, int]) -> int:
    """Keys and values of the frames near to those of a rank, which `hybrid_attention` receives in the forward."""
    bounds, (left, right) = video.bounds(ranks), window
    if bounds[rank] == bounds[rank + 1]:
        return 0
    frames = min(left, bounds[rank]) + min(right, video.frames - bounds[rank + 1])
    return frames * video.frame_bytes


def far_bytes(video: Video, ranks: int, rank: int, window: tuple[int, int]) -> int:
    """Sums of states that `hybrid_attention` receives in the forward: one of each rank that has far frames."""
    bounds, (left, right) = video.bounds(ranks), window
    first, last = bounds[rank] - left, bounds[rank + 1] + right
    if bounds[rank] == bounds[rank + 1]:
        return 0
    others = [pair for pair in pairwise(bounds) if pair[0] < pair[1]]
    return sum(begin < first or end > last for begin, end in others) * video.state_bytes


def hybrid_attention(video: Video, ranks: int, rank: int, window: tuple[int, int] = (1, 1)) -> Traffic:
    """`distributed.hybrid_attention` without a mask, apart from the sum of the gradients of beta.

    The backward receives gradients of what was sent: of the frames that are near to those of other ranks, and of the
    states that other ranks read.
    """
    bounds = video.bounds(ranks)
    forward = near_bytes(video, ranks, rank, window) + far_bytes(video, ranks, rank, window)
    near = far = 0
    for other, (begin, end) in enumerate(pairwise(bounds)):
        if other == rank or begin == end:
            continue
        low, high = begin - window[0], end + window[1]
        own = bounds[rank], bounds[rank + 1]
        near += max(0, min(own[1], begin) - max(own[0], low)) + max(0, min(own[1], high) - max(own[0], end))
        far += own[0] < min(own[1], low) or own[1] > max(own[0], high)
    return Traffic(forward, near * video.frame_bytes + far * video.state_bytes)


def exact_attention(video: Video, ranks: int, rank: int) -> Traffic:
    """`distributed.packed_attention`: the keys and values of all other ranks, and gradients of the own by each."""
    bounds = video.bounds(ranks)
    own = bounds[rank + 1] - bounds[rank]
    others = sum(begin < end for begin, end in pairwise(bounds)) - (own > 0)
    received = (video.frames - own) * video.frame_bytes if own else 0
    return Traffic(received, others * own * video.frame_bytes)


def ring_attention(video: Video, ranks: int) -> Traffic:
    """Ring attention (Liu et al., arXiv 2310.01889): keys and values travel round; in the backward with gradients."""
    others = (video.frames - video.frames // ranks) * video.frame_bytes
    return Traffic(others, 2 * others)


def ulysses(video: Video, ranks: int) -> Traffic | None:
    """DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): q, k, v change from rows to heads, the output back.

    None where it has more ranks than key heads.
    """
    if video.kv_heads % ranks:
        return None
    rows = -(-video.frames // ranks) * video.frame_tokens
    numbers = rows * 2 * (video.heads + video.kv_heads) * video.head_dim * (ranks - 1) // ranks
    return Traffic(numbers * video.itemsize, numbers * video.itemsize)


def gathered_experts(
    rows: int, ranks: int, dim: int, num_experts: int, top_k: int, itemsize: int = 2
) -> Traffic:
    """`distributed.aoe` in the form "gather", with `rows` tokens and equally many experts on each rank.

    Forward: tokens gathered, norms (float32) gathered, sums scattered. Backward: gradients of the sums gathered, those
    of tokens scattered, and those of the chosen norms summed on all ranks.
    """
    others, tokens = ranks - 1, rows * ranks
    norms = others * tokens * (num_experts // ranks) * 4
    chosen = 2 * others * tokens * top_k * 4 // ranks
    return Traffic(2 * others * rows * dim * itemsize + norms, 2 * others * rows * dim * itemsize + chosen)


def exchanged_experts(there: int, back: int, dim: int, top_k: int, itemsize: int = 2) -> Traffic:
    """`distributed.aoe` in the form "exchange", apart from the counts and the sum of the gradients of w_down.

    Args:
        there: tokens of other ranks that come to this one's experts: each token at most once.
        back: results that come back, one for each other rank to which a token of this one went.
        dim, top_k, itemsize: width, choices and bytes of a number of a token. With each go its choices, as int64, and
            its weights, as float32.
    """
    token, weights, ids = dim * itemsize, top_k * 4, top_k * 8
    return Traffic(there * (token + weights + ids) + back * token, there * token + back * (token + weights))
