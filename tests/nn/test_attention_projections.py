"""The projections of attention: what is fused there equals its parts."""

import pytest
import torch
from torch import nn

from vot_kernels.nn.attention_projections import AttentionProjections
from vot_kernels.nn.rotary import RotaryEmbedding
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import check_against_reference, make_tensor

GRID = [(2, 3, 4), (1, 1, 1), (1, 5, 2)]
ROTARY = RotaryEmbedding()


def projections(rotary=ROTARY):
    """Return modules by dtype, with scales of the norms that differ from channel to channel."""
    options = {"num_kv_heads": 1, "head_dim": 12, "qk_norm": True, "bias": True, "rotary": rotary}
    return {
        dtype: AttentionProjections(24, 2, **options).to(dtype) for dtype in (torch.float32, torch.float64)
    }


def projecting(modules):
    """Return a function of x, the projection's weight and bias, and the scales of both norms."""

    def project(x, *tensors):
        names = ("qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.weight")
        layout = PackedLayout.from_grid_thw(GRID)
        module = Projecting(modules[x.dtype])
        values = {f"of.{name}": value for name, value in zip(names, tensors, strict=True)}
        return torch.func.functional_call(module, values, (x, layout))

    return project


class Projecting(nn.Module):
    """`project` as a module's call."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x, layout):
        return self.of.project(x, layout)


def test_norms_and_rotation_in_one_pass_equal_those_one_after_the_other():
    tensors = [make_tensor(35, 24), make_tensor(48, 24, seed=1), make_tensor(48, seed=2)]
    scales = [1 + 0.3 * make_tensor(12, seed=3), 1 + 0.3 * make_tensor(12, seed=4)]
    apart = projections(lambda q, k, layout: ROTARY(q, k, layout))
    assert all(module._joint_norms(torch.device("cpu")) for module in projections().values())
    check_against_reference(projecting(projections()), projecting(apart), [*tensors, *scales])


@pytest.mark.parametrize(
    "change",
    [
        {"q_norm": nn.Identity()},
        {"k_norm": nn.LayerNorm(12)},
        {"k_norm": nn.RMSNorm(12, eps=1e-5)},
        {"q_norm": nn.RMSNorm(12, eps=1e-6, elementwise_affine=False)},
        {"q_norm": nn.RMSNorm(12), "k_norm": nn.RMSNorm(12)},
    ],
    ids=["none", "another kind", "another eps", "no scale", "eps of the dtype"],
)
def test_other_norms_are_applied_as_they_are(change):
    module = projections()[torch.float32]
    for name, norm in change.items():
        setattr(module, name, norm)
    x, layout = make_tensor(35, 24), PackedLayout.from_grid_thw(GRID)
    q, k, _ = module.project(x, layout)
    heads = module.qkv(x).unflatten(-1, (4, 12))
    wanted = ROTARY(module.q_norm(heads[:, :2]), module.k_norm(heads[:, 2:3]), layout)
    assert torch.equal(q, wanted[0]) and torch.equal(k, wanted[1])
