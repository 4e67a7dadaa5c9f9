"""The ops and modules over several ranks: attention on the rows of each, experts spread over them."""

from vot_kernels.distributed.attention import hybrid_attention, linear_attention, packed_attention
from vot_kernels.distributed.context import ShardedLayout, context_parallel
from vot_kernels.distributed.experts import aoe, balance_over_ranks, expert_parallel, expert_slice, moe
from vot_kernels.distributed.sharding import assign, shard

__all__ = [
    "ShardedLayout",
    "aoe",
    "assign",
    "balance_over_ranks",
    "context_parallel",
    "expert_parallel",
    "expert_slice",
    "hybrid_attention",
    "linear_attention",
    "moe",
    "packed_attention",
    "shard",
]
