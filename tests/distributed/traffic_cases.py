"""The bytes that the collectives are handed, against those that `traffic` counts; each case runs on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.distributed.ranks import Case
from vot_kernels import distributed
from vot_kernels.distributed import collectives, traffic
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_experts, make_qkv


@contextmanager
def received(group: ProcessGroup) -> Iterator[list[int]]:
    """Collect the bytes that each collective brings from other ranks, read off the tensors it is handed."""
    found: list[int] = []
    rank, ranks = group.rank(), group.size()
    names = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in (*names, "all_to_all_single") if hasattr(dist, name)}

    def all_to_all(output, given, output_splits, input_splits, group):
        size = output[0].numel() * output.itemsize if len(output) else 0
        found.append(size * (sum(output_splits) - output_splits[rank]))
        return originals["all_to_all_single"](output, given, output_splits, input_splits, group=group)

    def counted(name):
        def call(output, given, group):
            most = max(output.numel(), given.numel())
            found.append(most * output.itemsize * (ranks - 1) // ranks)
            return originals[name](output, given, group=group)

        return call

    reduce = dist.all_reduce

    def all_reduce(x, how, group):
        found.append(2 * (ranks - 1) * x.numel() * x.itemsize // ranks)
        return reduce(x, how, group=group)

    try:
        for name in originals:
            setattr(dist, name, all_to_all if name == "all_to_all_single" else counted(name))
        dist.all_reduce = all_reduce
        yield found
    finally:
        dist.all_reduce = reduce
        for name, original in originals.items():
            setattr(dist, name, original)


def check(group: ProcessGroup, call, expected: traffic.Traffic) -> None:
    with received(group) as forward:
        out = call()
    with received(group) as backward:
        out.sum().backward()
    assert (sum(forward), sum(backward)) == expected, (forward, backward, expected)


def attention(group: ProcessGroup, frames: int, window: tuple[int, int] | None, dtype: torch.dtype) -> None:
    rank, ranks = group.rank(), group.size()
    video = traffic.Video(frames, 5, heads=4, kv_heads=2, head_dim=16, itemsize=dtype.itemsize)
    bounds = video.bounds(ranks)
    layout = PackedLayout.from_lengths((frames * 5,), group_size=5)
    rows = 5 * (bounds[rank + 1] - bounds[rank])
    q, k, v = make_qkv(rows, 4, 16, kv_heads=2, dtype=dtype, requires_grad=True)

    def call():
        return distributed.hybrid_attention(q, k, v, layout, group=group, window=window)

    call()  # the first call compares the layouts
    if window is None:
        expected = traffic.exact_attention(video, ranks, rank)
    else:
        expected = traffic.hybrid_attention(video, ranks, rank, window)
        forward = [count(video, ranks, rank, window) for count in (traffic.near_bytes, traffic.far_bytes)]
        assert sum(forward) == expected.forward
    check(group, call, expected)


def gathered(group: ProcessGroup) -> None:
    ranks = group.size()
    x, *weights = make_experts(7, experts=8)
    own = distributed.expert_slice(8, group.rank(), ranks)
    x, *weights = (t.requires_grad_() for t in (x, *(w[own] for w in weights)))
    options = {"group": group, "num_experts": 8, "tokens": [7] * ranks}
    expected = traffic.gathered_experts(7, ranks, 24, 8, 2, itemsize=4)
    check(group, lambda: distributed.aoe(x, *weights, 2, **options), expected)


def exchanged(group: ProcessGroup) -> None:
    """The choices of all ranks' tokens say how many come and go."""
    rank, ranks = group.rank(), group.size()
    everyone, *weights = make_experts(7 * ranks, experts=8)
    slices = [distributed.expert_slice(8, other, ranks) for other in range(ranks)]
    chosen = distributed.experts._norms(everyone, weights[0], 8, None).topk(2).indices
    goes = torch.stack([((chosen >= own.start) & (chosen < own.stop)).any(1) for own in slices])
    goes = goes.unflatten(1, (ranks, 7)).sum(2)  # [to, from]
    there, back = (int(counts.sum() - counts[rank]) for counts in (goes[rank], goes[:, rank]))
    x = everyone[7 * rank :][:7].requires_grad_()
    local = [weights[0], *(w[slices[rank]] for w in weights[1:])]
    options = {"group": group, "num_experts": 8, "form": "exchange", "reduce_gradients": False}
    counts = ranks * (ranks - 1) * 8  # each rank's count for each, int64
    expected = traffic.exchanged_experts(there, back, 24, 2, itemsize=4)
    expected = expected._replace(forward=expected.forward + counts)
    check(group, lambda: distributed.aoe(x, *local, 2, **options), expected)


CASES: dict[str, Case] = {"gathered experts": gathered, "exchanged experts": exchanged}
for _frames, _window in (
    (12, (1, 1)),
    (12, (0, 0)),
    (10, (2, 1)),
    (9, (5, 0)),
    (3, (1, 1)),
    (10, None),
    (2, None),
):
    for _dtype in (torch.float32, torch.bfloat16):
        CASES[f"{_frames} frames, window {_window}, {_dtype}"] = partial(
            attention, frames=_frames, window=_window, dtype=_dtype
        )

assert collectives.dist is dist  # whose functions are replaced while counting
