"""Attention over several ranks against one process; each case runs on every rank."""

import itertools
from functools import partial

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

import vot_kernels
from tests.distributed.ranks import Case, joined, shared
from vot_kernels import distributed
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import check_against_reference, make_qkv, make_tensor, max_error

HEADS, KV_HEADS, DIM = 4, 2, 16
LAYOUTS = {
    "one video": PackedLayout.from_lengths((60,), group_size=5),
    "segments across ranks": PackedLayout.from_lengths((17, 0, 40, 3, 22), group_size=4),
    "few groups": PackedLayout.from_lengths((4, 3), group_size=4),
    "one group": PackedLayout.from_lengths((6,), group_size=6),
    "empty groups": PackedLayout.from_cu_seqlens(
        [0, 12, 15, 30], [0, 4, 4, 9, 12, 12, 15, 20, 20, 20, 26, 30]
    ),
    "nothing": PackedLayout.from_lengths((0, 0), group_size=4),
}


def rows_of(layout: PackedLayout, world_size: int) -> list[slice]:
    return [distributed.shard(layout, rank, world_size, token_cost=4) for rank in range(world_size)]


def check(run, single, inputs, tolerance: float | None) -> None:
    """Results and gradients of the ranks equal those of one process: to 1e-10, or by the tolerance rule."""
    if tolerance is None:
        check_against_reference(run, single, inputs)
        return
    found, expected = (_with_gradients(function, inputs) for function in (run, single))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error, size = max_error(a, b), max(1.0, float(b.detach().abs().max()) if b.numel() else 0.0)
        assert error <= tolerance * size, f"result {i} differs by {error:.3g}"


def _with_gradients(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    [out] = function(*leaves)
    weights = make_tensor(*out.shape, seed=77, dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)]


def attention(group: ProcessGroup, op: str, layout: str, dtype: torch.dtype, backend: str, **options) -> None:
    packing, size = LAYOUTS[layout], group.size()
    shards = rows_of(packing, size)
    own, counts = shards[group.rank()], [rows.stop - rows.start for rows in shards]
    weighted = [name for name in ("beta", "far_weight") if options.pop(name, False)]
    inputs = [*make_qkv(packing.num_tokens, HEADS, DIM, kv_heads=KV_HEADS, dtype=dtype)]
    if weighted == ["beta"]:
        inputs.append(torch.tensor([0.5, -1.0, 3.0, -0.3], dtype=dtype))
    elif weighted:
        inputs.append(torch.tensor([0.5, 0.0, 3.0, 1.3], dtype=dtype))

    def run(q, k, v, *weight):
        local = (shared(x, group)[own] for x in (q, k, v))
        named = dict(zip(weighted, weight, strict=True))
        out = getattr(distributed, op)(*local, packing, group=group, backend=backend, **options, **named)
        return [joined(out, counts, group)]

    def single(q, k, v, *weight):
        named = dict(zip(weighted, weight, strict=True))
        served = "torch" if q.dtype == torch.float64 else backend  # the exact result is in float64
        return [getattr(vot_kernels, op)(q, k, v, packing, backend=served, **options, **named)]

    check(run, single, inputs, 1e-10 if dtype == torch.float64 else None)


def hybrid_cases() -> dict[str, Case]:
    cases = {}
    options = [(0, "group"), (1, None), (3, "token"), (None, None), (None, "group"), (None, "token")]
    more = [(0, None), (1, "group"), (1, "token"), (3, None)]
    for layout in LAYOUTS:
        for window, causal in options + (more if layout == "segments across ranks" else []):
            weight = {} if window is None else {"beta": True}
            cases[f"{layout}, window {window}, causal {causal}"] = partial(
                attention,
                op="hybrid_attention",
                layout=layout,
                window=window,
                causal=causal,
                dtype=torch.float64,
                backend="torch",
                **weight,
            )
    return cases


def other_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    single, half = torch.float32, torch.bfloat16
    for op, (layout, causal) in itertools.product(
        ("packed_attention", "linear_attention"),
        itertools.product(("segments across ranks", "few groups"), (False, True)),
    ):
        cases[f"{op}, {layout}, causal {causal}"] = partial(
            attention, op=op, layout=layout, causal=causal, dtype=torch.float64, backend="torch"
        )
    for backend, dtype, op in itertools.product(
        ("torch", "cpp"), (single, half), ("hybrid_attention", "packed_attention", "linear_attention")
    ):
        if (backend, op) == ("cpp", "linear_attention"):
            continue
        weight = {"beta": True} if op == "hybrid_attention" else {}
        cases[f"{op}, {backend}, {dtype}"] = partial(
            attention, op=op, layout="segments across ranks", dtype=dtype, backend=backend, **weight
        )
    options = {"op": "hybrid_attention", "layout": "one video", "dtype": torch.float64, "backend": "torch"}
    cases["left window"] = partial(attention, **options, window=(2, 0), beta=True)
    cases["right window"] = partial(attention, **options, window=(0, 4), beta=True)
    cases["far weight"] = partial(attention, **options, far_weight=True)
    cases["no weight"] = partial(attention, **options)
    for name in ("elu", "relu"):
        cases[name] = partial(attention, **options, feature_map=name, beta=True)
    return cases


CASES = hybrid_cases() | other_cases()


def refused(
    group: ProcessGroup, sentence: str, layouts: list[PackedLayout], cuts: list[int], **options
) -> None:
    """Every rank gets the sentence, those whose own layout and rows are right too."""
    q, k, v = make_qkv(cuts[group.rank()], HEADS, DIM, kv_heads=KV_HEADS)
    with pytest.raises(ValueError, match=sentence):
        distributed.hybrid_attention(q, k, v, layouts[group.rank()], group=group, **options)


def own_rows_refused(group: ProcessGroup) -> None:
    """Later calls exchange nothing, so a rank's rows are compared with what it had at first."""
    layout = PackedLayout.from_lengths((16,), group_size=4)
    distributed.packed_attention(*make_qkv(8, HEADS, DIM), layout, group=group)
    with pytest.raises(
        ValueError, match="q must have the 8 rows with which rank . first used this layout, got 9"
    ):
        distributed.packed_attention(*make_qkv(9, HEADS, DIM), layout, group=group)


def mesh_dimension(group: ProcessGroup) -> None:
    """A dimension of a mesh serves as the group, and a whole mesh is refused."""
    mesh = init_device_mesh("cpu", (1, group.size()), mesh_dim_names=("dp", "cp"))
    layout = PackedLayout.from_lengths((16,), group_size=4)
    q, k, v = make_qkv(16, HEADS, DIM)
    own = distributed.shard(layout, group.rank(), group.size())
    local = [x[own] for x in (q, k, v)]
    found = distributed.hybrid_attention(*local, layout, group=mesh["cp"], window=0)
    assert max_error(found, distributed.hybrid_attention(*local, layout, group=group, window=0)) == 0
    with pytest.raises(
        ValueError, match=r"one dimension of a DeviceMesh, such as mesh\['dp'\], got a mesh of 2"
    ):
        distributed.hybrid_attention(*local, layout, group=mesh)


_TWO = [PackedLayout.from_lengths((16,), group_size=4) for _ in range(2)]
_OTHER = [_TWO[0], PackedLayout.from_lengths((8, 8), group_size=4)]
ERRORS: dict[str, Case] = {
    "layouts": partial(
        refused,
        sentence="same layout and options, but rank 0 has 1 segments, 4 groups and 16 tokens .* and "
        "rank 1 has 2 segments, 4 groups and 16 tokens",
        layouts=_OTHER,
        cuts=[8, 8],
    ),
    "too few rows": partial(
        refused, sentence="make up the 16 tokens of the layout", layouts=_TWO, cuts=[8, 4]
    ),
    "inside a group": partial(refused, sentence="cut inside of a group at row 6", layouts=_TWO, cuts=[6, 10]),
    "other rows later": own_rows_refused,
    "mesh": mesh_dimension,
}
