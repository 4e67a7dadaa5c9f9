"""A model of transformers, which spreads its experts over ranks by itself, with those computed by `moe`."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from tests.distributed.ranks import Case, shared_folder
from vot_kernels.integrations.transformers import register_experts
from vot_kernels.testing import shifted

CONFIG = Qwen3MoeConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
)


def saved(group: ProcessGroup) -> Path:
    """The folder of a model with random weights, which all ranks know."""
    folder = shared_folder(group)
    if dist.get_rank(group) == 0:
        torch.manual_seed(shifted(0))
        Qwen3MoeForCausalLM(CONFIG).save_pretrained(folder)
    dist.barrier(group)
    return folder


def expert_parallel_of_transformers(group: ProcessGroup, implementation: str) -> None:
    """Logits and the gradients of a rank's experts are those of the eager model in one process."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # as torchrun does
    folder, name = saved(group), register_experts()
    alone = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    config = DistributedConfig(tp_size=size, ep_size=size, ep_implementation=implementation)
    spread = Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation=name, distributed_config=config
    )
    ids = torch.arange(2 * 17).mul(7).remainder(96).view(2, 17)
    wanted, found = (model.train()(ids, labels=ids) for model in (alone, spread))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-10)
    for out in (wanted, found):
        out.loss.backward()
    for one, other in zip(alone.model.layers, spread.model.layers, strict=True):
        for weight in ("gate_up_proj", "down_proj"):
            gradient = getattr(other.mlp.experts, weight).grad.to_local()
            own = getattr(one.mlp.experts, weight).grad.chunk(size)[rank]
            torch.testing.assert_close(gradient, own, rtol=0, atol=1e-10)


CASES: dict[str, Case] = {
    name: partial(expert_parallel_of_transformers, implementation=name)
    for name in ("all_reduce", "all_to_all")
}
