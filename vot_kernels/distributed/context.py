"""A whole encoder on rows that are spread over ranks: every rank runs all layers on its own rows."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vot_kernels.distributed.attention import hybrid_attention, linear_attention
from vot_kernels.distributed.collectives import Group, all_reduce, group_of, rank_of, size_of
from vot_kernels.distributed.sharding import shard
from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.nn.linear_attention import LinearAttention
from vot_kernels.ops.attention_options import Window
from vot_kernels.packing import PackedLayout

if TYPE_CHECKING:
    from vot_kernels.models.encoder import VotEncoder


@dataclass(frozen=True, eq=False)
class ShardedLayout(PackedLayout):
    """The layout of a rank's rows: all segments and groups, of which those on other ranks are empty.

    Attributes:
        whole: the layout of all ranks' rows.
        rows: which of these are the rank's.
    """

    whole: PackedLayout = field(kw_only=True)
    rows: slice = field(kw_only=True)

    @classmethod
    def of(cls, whole: PackedLayout, rows: slice) -> "ShardedLayout":
        """Cut `rows` out of `whole`; positions and sizes stay those of the whole segments."""
        values = {entry.name: getattr(whole, entry.name) for entry in fields(PackedLayout)}
        for name in ("cu_seqlens", "cu_groups"):
            cut = values[f"host_{name}"].clamp(rows.start, rows.stop) - rows.start
            values |= {f"host_{name}": cut, name: cut.to(whole.device)}
        return cls(**values | {"positions": whole.positions[rows]}, whole=whole, rows=rows)


def context_parallel(encoder: "VotEncoder", group: Group, *, window: Window = 1) -> "VotEncoder":
    """Let a `VotEncoder` run on rows that are spread over ranks, in place, for videos beyond one GPU.

    Each rank calls the encoder with the whole `image_grid_thw` and `fps`, and with its own rows of `pixel_values`:

        context_parallel(encoder, mesh["cp"])
        layout = encoder.layout(image_grid_thw, device)     # once per packing
        out = encoder(pixel_values[layout.rows], image_grid_thw, layout=layout)

    `last_hidden_state` then has the rank's rows, and `pooler_output` is the whole clips' on all ranks. A gradient of a
    parameter is the rank's share: their sum over the ranks is that of the sum of the ranks' losses, and DDP or
    `fully_shard` over the same ranks reduce it with all others. A loss of `pooler_output` that all ranks compute counts
    once for each. `balance_loss` and `expert_load` are those of the rank's own rows, unless `expert_parallel` has
    spread the experts over the same ranks.

    Args:
        encoder: with the same weights on all ranks. Call this before `fully_shard` or DDP.
        group: a ProcessGroup, or one dimension of a DeviceMesh.
        window: for the balance of the rows, see `shard`; that of most layers.

    Returns:
        The encoder.

    Raises:
        TypeError: `encoder` is no VotEncoder.
        ValueError: a linear layer decays, or the encoder is parallel already.
    """
    from vot_kernels.models.encoder import VotEncoder

    if not isinstance(encoder, VotEncoder):
        raise TypeError(f"encoder must be a VotEncoder, got {type(encoder).__name__}.")
    process_group = group_of(group)
    if encoder.pooling.reduce is not None:
        raise ValueError("The rows of this encoder are spread over ranks already.")
    layers = [x for x in encoder.modules() if isinstance(x, HybridAttention | LinearAttention)]
    if any(isinstance(layer, LinearAttention) and layer.log_decay is not None for layer in layers):
        raise ValueError("Linear attention over ranks has no decay, but a layer of this encoder has one.")
    for layer in layers:
        op = _attend if isinstance(layer, HybridAttention) else _attend_linearly
        layer.spread = partial(op, process_group)
    encoder.pooling.reduce = partial(_reduced, process_group)
    # An attribute of the instance hides the method, so that a call without a layout gets the rank's as well.
    encoder.layout = partial(_sharded, encoder.layout, process_group, window, encoder.config.causal)  # type: ignore[method-assign]
    return encoder


def _sharded(
    make: Any,
    group: ProcessGroup,
    window: Window,
    causal: str | None,
    image_grid_thw: Any,
    device: Any = None,
) -> ShardedLayout:
    whole = make(image_grid_thw, device)
    return ShardedLayout.of(whole, shard(whole, rank_of(group), size_of(group), window=window, causal=causal))


def _whole(layout: PackedLayout) -> PackedLayout:
    if not isinstance(layout, ShardedLayout):
        raise TypeError(
            "An encoder whose rows are spread over ranks takes the layout that its own `layout` makes, got a "
            f"{type(layout).__name__}."
        )
    return layout.whole


def _attend(
    group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, **options: Any
) -> Tensor:
    return hybrid_attention(q, k, v, _whole(layout), group=group, reduce_gradients=False, **options)


def _attend_linearly(
    group: ProcessGroup, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, **options: Any
) -> Tensor:
    options.pop("log_decay", None)
    return linear_attention(q, k, v, _whole(layout), group=group, **options)


def _reduced(group: ProcessGroup, x: Tensor, largest: bool) -> Tensor:
    """The sum of `x` over the ranks, or the largest, which has no gradient."""
    if not largest:
        return _Sum.apply(x, group)
    return all_reduce(x, group, "largest scores of the pooling", dist.ReduceOp.MAX)


class _Sum(torch.autograd.Function):
    """The sum over the ranks, which all of them go on with; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group, "sum of the pooling")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return all_reduce(d_sum, ctx.group, "sum of the gradients of the pooling"), None
