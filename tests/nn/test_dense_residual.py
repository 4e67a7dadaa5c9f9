"""Depth-weighted averaging: identity at first, the formula later, and no state kept longer than needed."""

import pytest
import torch

from vot_kernels.nn.dense_residual import DenseResidual
from vot_kernels.testing import make_tensor

SETTINGS = [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (4, 5), (9, 9)]
BLOCKS = 6


def run(dense, x, blocks, memories=None):
    memory = dense.start(x)
    for index, block in enumerate(blocks, start=1):
        x = dense(block(x), index, memory)
        if memories is not None:
            memories.append(set(memory))
    return x


def make_blocks():
    return [torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh()).double() for _ in range(BLOCKS)]


def randomised(dense):
    dense.double()
    for i, weight in enumerate(dense.weights.values()):
        weight.data = make_tensor(*weight.shape, seed=i, dtype=torch.float64)
    return dense


@pytest.mark.parametrize(("dilation", "period"), SETTINGS)
def test_identity_at_first(dilation, period):
    blocks, x = make_blocks(), make_tensor(7, 5, dtype=torch.float64)
    expected = torch.nn.Sequential(*blocks)(x)
    dense = DenseResidual(BLOCKS, dilation, period)
    assert torch.equal(run(dense, x, blocks), expected)
    randomised(dense).reset_parameters()
    assert torch.equal(run(dense, x, blocks), expected)


@pytest.mark.parametrize(("dilation", "period"), SETTINGS)
def test_the_formula(dilation, period):
    """Keeping every state and summing by hand."""
    blocks, x = make_blocks(), make_tensor(7, 5, dtype=torch.float64)
    dense = randomised(DenseResidual(BLOCKS, dilation, period))
    states, y = [x], x
    for index, block in enumerate(blocks, start=1):
        states.append(block(y))
        y = states[-1]
        if index % period == 0:
            read = [i for i in range(index + 1) if (index - i) % dilation == 0]
            assert len(read) == len(dense.weights[str(index)])
            y = sum(w * states[i] for w, i in zip(dense.weights[str(index)], read, strict=True))
    torch.testing.assert_close(run(dense, x, blocks), y)


@pytest.mark.parametrize(("dilation", "period"), SETTINGS)
def test_memory_holds_what_a_later_block_reads_and_nothing_else(dilation, period):
    dense, memories = DenseResidual(BLOCKS, dilation, period), []
    run(dense, torch.ones(2, 5, dtype=torch.float64), make_blocks(), memories)
    for index, kept in enumerate(memories, start=1):
        later = [block for block in range(index + 1, BLOCKS + 1) if block % period == 0]
        wanted = {i for i in range(index + 1) for block in later if (block - i) % dilation == 0}
        assert kept == wanted
    assert memories[-1] == set()


def test_finite_differences():
    blocks, dense = make_blocks(), randomised(DenseResidual(BLOCKS, 2, 2))
    x = make_tensor(3, 5, dtype=torch.float64).requires_grad_()
    weights = list(dense.weights.values())
    assert torch.autograd.gradcheck(lambda x, *_: run(dense, x, blocks), (x, *weights))
    gradients = torch.autograd.grad(run(dense, x, blocks).square().sum(), weights)
    assert all((g != 0).all() for g in gradients)


def test_saves_and_loads():
    dense = randomised(DenseResidual(BLOCKS, 2, 3))
    other = DenseResidual(BLOCKS, 2, 3).double()
    other.load_state_dict(dense.state_dict())
    blocks, x = make_blocks(), make_tensor(7, 5, dtype=torch.float64)
    assert torch.equal(run(other, x, blocks), run(dense, x, blocks))


def test_a_bad_argument_is_named():
    with pytest.raises(ValueError, match="dilation must be an int >= 1, got 0"):
        DenseResidual(3, dilation=0)
    with pytest.raises(ValueError, match="period must be an int >= 1"):
        DenseResidual(3, period=0)
    with pytest.raises(ValueError, match="num_blocks must be an int >= 0"):
        DenseResidual(-1)
    with pytest.raises(ValueError, match="block must be from 1 to 3, got 0"):
        DenseResidual(3)(torch.ones(1), 0, {})
