"""An encoder needs to be told nothing to run on the C++ kernels."""

from importlib import import_module

import pytest
import torch
from torch.func import functional_call

from benchmarks.problems.encoder import Encoder, served_by
from tests.marks import cpp
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.ops.dispatch import OPS, load
from vot_kernels.testing import check_against_reference, make_tensor, shifted

GRID = torch.tensor([[3, 2, 2], [1, 1, 3], [1, 4, 5]])
OF_AN_ENCODER = set(Encoder("nano", ()).ops)


@pytest.fixture
def served(monkeypatch):
    """The (op, backend) of every forward and backward that is run, as they come."""
    calls = []

    def noted(name, backend):
        calls.append((name, backend))
        return load(name, backend)

    for op in OPS:
        module = import_module(f"vot_kernels.ops.{op}.op")
        if hasattr(module, "load"):  # packed_attention calls another op
            monkeypatch.setattr(module, "load", noted)
    return calls


def encoder(attention, dtype=torch.float32):
    torch.manual_seed(shifted(0))
    return VotEncoder(VotEncoderConfig.preset("nano", attention=attention)).eval().to(dtype)


def pixels(like):
    return make_tensor(int(GRID.prod(1).sum()), like.config.patch_numbers)


@cpp
@pytest.mark.parametrize("attention", ["softmax", "hybrid"])
def test_every_op_of_an_encoder_is_served_by_cpp(attention, served):
    model = encoder(attention)
    x = pixels(model).requires_grad_()
    out = model(x, GRID)
    forward = len(served)
    (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
    assert {op for op, _ in served[:forward]} == {op for op, _ in served[forward:]} == OF_AN_ENCODER
    assert {backend for _, backend in served} == {"cpp"}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@cpp
@pytest.mark.parametrize("attention", ["softmax", "hybrid"])
def test_cpp_agrees_with_the_torch_backend(attention):
    models = {dtype: encoder(attention, dtype) for dtype in (torch.float32, torch.float64)}
    weight = models[torch.float32].blocks[0].attention.qkv.weight

    def features(x, values):
        out = functional_call(models[x.dtype], {"blocks.0.attention.qkv.weight": values}, (x, GRID))
        return out.last_hidden_state, out.pooler_output

    def by_torch(x, values):
        with served_by("torch"):
            return features(x, values)

    check_against_reference(features, by_torch, [pixels(models[torch.float32]), weight])
