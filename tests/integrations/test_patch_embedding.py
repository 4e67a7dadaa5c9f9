"""Convolutions that embed patches as linear layers: found by their shape, equal, and given back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import vot_kernels
from vot_kernels.integrations.patch_embedding import embed_patches, patch_embeddings
from vot_kernels.testing import make_tensor

SHAPES = {
    "one patch a row, in time": ((5, 3, 2, 4, 4), (7, 3, 2, 4, 4)),
    "one patch a row": ((5, 3, 4, 6), (7, 3, 4, 6)),
    "no patch": ((0, 3, 2, 4, 4), (7, 3, 2, 4, 4)),
    "images": ((2, 3, 8, 12), (7, 3, 4, 4)),
    "clips": ((2, 3, 4, 8, 12), (7, 3, 2, 4, 4)),
    "a part of a patch left over": ((2, 3, 9, 12), (7, 3, 4, 4)),
    "an image without a batch": ((3, 8, 12), (7, 3, 4, 4)),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution(shape, with_bias):
    x, weight = (make_tensor(*s, seed=i, dtype=torch.float64) for i, s in enumerate(SHAPES[shape]))
    bias = make_tensor(7, seed=2, dtype=torch.float64) if with_bias else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    convolve = functional.conv2d if weight.ndim == 4 else functional.conv3d
    results = [embed_patches(x, weight, bias), convolve(x, weight, bias, stride=weight.shape[2:])]
    factor = make_tensor(*results[1].shape, seed=3, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * factor).sum(), leaves) for y in results]
    for found, expected in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_wrong_channels_fail_as_in_the_convolution():
    x, weight = make_tensor(2, 1, 4, 4), make_tensor(7, 4, 2, 2)  # as many numbers in a row as the weight has
    with pytest.raises(RuntimeError, match="channels"):
        embed_patches(x, weight, None)


class Tower(nn.Module):
    """Convolutions of which the first two embed patches."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 8, 4, stride=4)
        self.clip = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), padding="valid", bias=False)
        self.others = nn.ModuleList(
            [
                nn.Conv2d(3, 8, 4, stride=2),
                nn.Conv2d(3, 8, 4, stride=4, padding=1),
                nn.Conv2d(3, 8, 2, stride=2, dilation=2),
                nn.Conv2d(4, 8, 4, stride=4, groups=2),
                nn.Conv2d(8, 8, 2, stride=2),
                nn.Conv2d(3, 8, 1),
            ]
        )

    def forward(self, image, clip):
        return self.image(image).sum((2, 3)) + self.clip(clip).sum((2, 3, 4))


@pytest.fixture
def tower():
    return Tower()


def numbers(tower):
    return tower(make_tensor(2, 3, 8, 8), make_tensor(2, 3, 2, 4, 4, seed=1)).detach()


def test_they_are_found_by_their_shape(tower):
    assert [name for name, _ in patch_embeddings(tower)] == ["image", "clip"]


def test_the_report_and_back(tower, monkeypatch):
    before, keys, kinds = numbers(tower), list(tower.state_dict()), [type(m) for m in tower.modules()]
    report = vot_kernels.patch(tower)
    assert [(row.name, row.before, row.after) for row in report.modules] == [
        ("image", "conv", "linear"),
        ("clip", "conv", "linear"),
    ]
    assert list(tower.state_dict()) == keys and [type(m) for m in tower.modules()] == kinds
    with monkeypatch.context() as patching:
        for name in ("conv2d", "conv3d"):  # what torch.nn.Conv calls is the same function
            patching.setattr(functional, name, None)
        torch.testing.assert_close(numbers(tower), before)
    with pytest.raises(ValueError, match="patched already"):
        vot_kernels.patch(tower)
    vot_kernels.unpatch(tower)
    assert torch.equal(numbers(tower), before) and "_conv_forward" not in vars(tower.clip)


def test_copies_and_pickles_are_patched_by_themselves(tower):
    before = numbers(tower)
    vot_kernels.patch(tower)
    after = numbers(tower)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(numbers(other), after)
        vot_kernels.unpatch(other)
        assert torch.equal(numbers(other), before)
    assert vars(tower.clip)["_conv_forward"] is embed_patches


def test_they_can_be_left_alone(tower):
    with pytest.raises(ValueError, match="found none at all"):
        vot_kernels.patch(tower, embeddings=False)


def test_a_convolution_of_its_own_stays(tower):
    tower.clip._conv_forward = lambda x, weight, bias: x
    report = vot_kernels.patch(tower)
    assert [(row.name, row.reason) for row in report.left] == [("clip", "it has a computation of its own")]
    tower.image._conv_forward = own = lambda x, weight, bias: x
    vot_kernels.unpatch(tower)
    assert vars(tower.image)["_conv_forward"] is own


def test_autocast_computes_in_its_dtype(tower):
    with torch.autocast("cpu", torch.bfloat16), vot_kernels.patched(tower):
        assert tower.clip(make_tensor(2, 3, 2, 4, 4)).dtype == torch.bfloat16


def test_it_compiles_in_one_graph_and_takes_any_number_of_patches(tower):
    counter = CompileCounterWithBackend("aot_eager")
    vot_kernels.patch(tower)
    compiled = torch.compile(tower.clip, backend=counter, fullgraph=True, dynamic=True)
    for number in (5, 9, 12):
        x = make_tensor(number, 3, 2, 4, 4)
        torch.testing.assert_close(compiled(x), tower.clip(x))
    assert counter.frame_count == 1
