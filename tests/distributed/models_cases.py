"""Models of transformers over ranks: one spreads its experts, one is patched and sharded by torch."""

import os
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import vot_kernels
from tests.distributed.ranks import Case, shared_folder
from tests.integrations.tiny import VISION_LANGUAGE, image_and_text
from vot_kernels.integrations import attention
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


def sharded_by_torch(group: ProcessGroup) -> None:
    """A patched tower and language model under `fully_shard` have the gradients of one process."""
    inputs, model = image_and_text(), VISION_LANGUAGE["qwen3_vl"]()
    rows = inputs["attention_mask"].bool()
    model(**inputs).logits[rows].square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    vot_kernels.patch(model)
    visual = model.model.visual
    op = attention.flash_attn_varlen_func
    with mock.patch.object(attention, "flash_attn_varlen_func", side_effect=op) as calls:
        for block in [visual.patch_embed, *visual.blocks, *model.model.language_model.layers, model]:
            fully_shard(block)
        model(**inputs).logits[rows].square().mean().backward()
        assert calls.call_count == 4
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        vot_kernels.unpatch(model)
        model(**inputs)
        assert calls.call_count == 4
    assert found.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max()
        assert error <= 2e-4 * gradient.abs().max() or error <= 1e-6 * largest, (name, error)


CASES: dict[str, Case] = {
    "all_reduce": partial(expert_parallel_of_transformers, implementation="all_reduce"),
    "all_to_all": partial(expert_parallel_of_transformers, implementation="all_to_all"),
    "fully_shard": sharded_by_torch,
}
