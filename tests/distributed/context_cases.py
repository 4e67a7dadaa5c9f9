"""A whole encoder on rows that are spread over ranks, against the same encoder in one process."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.distributed.ranks import Case
from vot_kernels import distributed
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import make_tensor, max_error

GRID = torch.tensor([[7, 2, 3], [1, 3, 2], [3, 2, 2]])  # a clip, an image and a clip
FPS = torch.tensor([4.0, 0.0, 2.0])
EXACT = 1e-10


def make(**options) -> VotEncoder:
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"patch_size": 2, "num_experts": 4, "expert_rank": 8, "full_attention_every": 3}
    encoder = VotEncoder(VotEncoderConfig(**sizes, **more, **options)).double()
    for name, parameter in encoder.named_parameters():  # leave no part at its neutral start
        if "beta" in name or "residual" in name or "size_embedding" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return encoder


def pixels(encoder: VotEncoder) -> torch.Tensor:
    rows = int(GRID.prod(1).sum())
    return make_tensor(rows, encoder.config.patch_numbers, seed=3, dtype=torch.float64)


def losses(out, rows: slice, ranks: int) -> dict[str, torch.Tensor]:
    """Two losses of a rank's rows and the pooled clips, whose sums over the ranks are those of one process."""
    hidden, pooled = (
        make_tensor(*shape, seed=seed, dtype=torch.float64)
        for seed, shape in ((5, (int(GRID.prod(1).sum()), 32)), (6, (len(GRID), 32)))
    )
    return {
        "hidden": (out.last_hidden_state * hidden[rows]).sum(),
        "pooled": (out.pooler_output * pooled).sum() / ranks,
    }


def encoder(group: ProcessGroup, experts: bool = False, **options) -> None:
    single = make(**options)
    model = distributed.context_parallel(copy.deepcopy(single), group)
    if experts:
        distributed.expert_parallel(model, group)
    x, layout = pixels(single), model.layout(GRID)
    rows = layout.rows
    for name in ("hidden", "pooled"):
        out = model(x[rows], GRID, fps=FPS, layout=layout)
        whole = single(x, GRID, fps=FPS)
        assert max_error(out.last_hidden_state, whole.last_hidden_state[rows]) < EXACT
        assert max_error(out.pooler_output, whole.pooler_output) < EXACT
        for each, found in (
            (model, losses(out, rows, group.size())),
            (single, losses(whole, slice(None), 1)),
        ):
            each.zero_grad()
            found[name].backward()
        compare(model, single, group, EXACT)


def compare(model: VotEncoder, single: VotEncoder, group: ProcessGroup, tolerance: float) -> None:
    for (name, found), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        grad = torch.zeros_like(found) if found.grad is None else found.grad.clone()
        whole = torch.zeros_like(expected) if expected.grad is None else expected.grad
        if grad.shape != whole.shape:  # a part of the experts, which has gone through all ranks' tokens
            mine = distributed.expert_slice(whole.shape[0], group.rank(), group.size())
            whole = whole[mine]
        else:
            dist.all_reduce(grad, group=group)
        size = max(1.0, float(whole.abs().max()) if whole.numel() else 0.0)
        assert max_error(grad, whole) < tolerance * size, name


def sharded_parameters(group: ProcessGroup) -> None:
    """With fully_shard over the same ranks, which takes the mean of the ranks' gradients."""
    single = make()
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("cp",))
    model = distributed.context_parallel(copy.deepcopy(single), mesh["cp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, layout = pixels(single), model.layout(GRID)
    out = model(x[layout.rows], GRID, fps=FPS, layout=layout)
    losses(out, layout.rows, group.size())["hidden"].backward()
    losses(single(x, GRID, fps=FPS), slice(None), 1)["hidden"].backward()
    for (name, found), expected in zip(model.named_parameters(), single.parameters(), strict=True):
        if expected.grad is not None:
            grad = found.grad.full_tensor() * group.size()
            assert max_error(grad, expected.grad) < EXACT * max(1.0, float(expected.grad.abs().max())), name


def refused(group: ProcessGroup) -> None:
    model = distributed.context_parallel(make(), group)
    with pytest.raises(ValueError, match="spread over ranks already"):
        distributed.context_parallel(model, group)
    with pytest.raises(TypeError, match="encoder must be a VotEncoder, got Linear"):
        distributed.context_parallel(torch.nn.Linear(1, 1), group)
    x = pixels(model)
    with pytest.raises(TypeError, match="takes the layout that its own `layout` makes, got a PackedLayout"):
        model(x, GRID, layout=PackedLayout.from_grid_thw(GRID))


CASES: dict[str, Case] = {
    "encoder": encoder,
    "causal": partial(encoder, causal="group"),
    "linear": partial(encoder, attention="linear"),
    "experts too": partial(encoder, experts=True),
    "fully_shard": sharded_parameters,
    "errors": refused,
}
