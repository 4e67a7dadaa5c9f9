"""Feed-forward modules of other packages as Autonomy-of-Experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, Dinov2Config, LlamaConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from vot_kernels.nn import AutonomyOfExperts, BiasedExperts, SwiGLU, convert_mlp
from vot_kernels.testing import make_tensor, max_error

DIM, HIDDEN = 16, 40
SIZES = {"hidden_size": DIM, "intermediate_size": HIDDEN}


def llama(**options):
    return LlamaMLP(LlamaConfig(**SIZES, num_attention_heads=2, **options))


def qwen2_5_vl(act="silu"):
    return Qwen2_5_VLMLP(Qwen2_5_VLVisionConfig(**SIZES, hidden_act=act), bias=True)


def sequential(activation=None, *more, bias=True):
    first, last = nn.Linear(DIM, HIDDEN, bias), nn.Linear(HIDDEN, DIM, bias)
    return nn.Sequential(first, activation or nn.SiLU(), *more, last)


class TimmLike(nn.Module):
    """The shape of a vision transformer's MLP in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(HIDDEN, DIM), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


EXACT = {
    "qwen2_5_vl": qwen2_5_vl,
    "llama with biases": lambda: llama(mlp_bias=True),
    "dinov2": lambda: Dinov2SwiGLUFFN(Dinov2Config(hidden_size=DIM, mlp_ratio=4)),
    "clip, QuickGELU": lambda: CLIPMLP(
        CLIPVisionConfig(**SIZES, num_attention_heads=2, hidden_act="quick_gelu")
    ),
    "no gate, SiLU": sequential,
    "no gate, no biases": lambda: nn.Sequential(
        nn.Linear(DIM, HIDDEN, False), nn.SiLU(), nn.Linear(HIDDEN, DIM, False)
    ),
    "SwiGLU": lambda: SwiGLU(DIM, HIDDEN),
    "llama": llama,
}
GELU = {
    "siglip, tanh": lambda: SiglipMLP(SiglipVisionConfig(**SIZES, hidden_act="gelu_pytorch_tanh")),
    "qwen3_vl": lambda: Qwen3VLVisionMLP(Qwen3VLVisionConfig(**SIZES, hidden_act="gelu")),
    "timm": TimmLike,
    "sequential": lambda: sequential(nn.GELU(), nn.Dropout(0.2)),
    "a gate of GELU": lambda: qwen2_5_vl("gelu"),
}


def randomised(module):
    """Activations and biases of order one."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(make_tensor(*parameter.shape, seed=seed) * scale)
    return module.double().eval()


def error(layer, module, x):
    with torch.no_grad():
        return float((layer(x) - module(x)).norm() / module(x).norm())


@pytest.mark.parametrize("name", EXACT)
def test_all_experts_at_full_rank_are_the_module(name):
    module, x = randomised(EXACT[name]()), make_tensor(200, DIM, seed=9, dtype=torch.float64)
    plain = name in ("SwiGLU", "llama")
    layer, report = convert_mlp(module, 4, 4, DIM if plain else DIM + 1, calibration=x, sharpness=1e-4)
    assert isinstance(layer, AutonomyOfExperts if plain else BiasedExperts)
    assert error(layer, module, x) < 1e-3 and abs(report.output_error - error(layer, module, x)) < 1e-9
    assert layer(x[None]).shape == (1, 200, DIM)
    y, aux = layer(x, return_aux=True)
    assert torch.equal(y, layer(x)) and aux.load.sum() == 4


@pytest.mark.parametrize("name", GELU)
def test_gelu_is_silu_with_other_weights_but_for_a_little(name):
    module, x = randomised(GELU[name]()), make_tensor(200, DIM, seed=9, dtype=torch.float64)
    layer, report = convert_mlp(module, 4, 4, DIM + 1, calibration=x, sharpness=1e-4)
    assert 1e-3 < error(layer, module, x) < 0.05
    assert abs(report.output_error - error(layer, module, x)) < 1e-9 and report.low_rank_error < 1e-6


def test_few_experts_of_low_rank_report_their_error_and_learn():
    module, x = randomised(qwen2_5_vl()).float(), make_tensor(400, DIM, seed=9)
    options = {"num_experts": 4, "top_k": 2, "rank": 8, "shared_hidden": 8, "sharpness": 1.0}
    layer, report = convert_mlp(module, **options, calibration=x)
    assert 0.05 < report.output_error < 1 and abs(report.output_error - error(layer, module, x)) < 1e-4
    assert convert_mlp(module, **options)[1].output_error is None
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.mse_loss(layer(x), module(x).detach()).backward()
        optimizer.step()
    assert layer.bias.grad.abs().max() > 0
    assert error(layer, module, x) < 0.9 * report.output_error
    assert set(layer.state_dict()) > {"bias", "experts.w_down", "experts.shared.down.weight"}


def test_the_modules_of_the_project_and_of_transformers_agree():
    x, ours, theirs = make_tensor(30, DIM), SwiGLU(DIM, HIDDEN), llama()
    theirs.gate_proj.weight, theirs.up_proj.weight = map(nn.Parameter, ours.gate_up.weight.detach().chunk(2))
    theirs.down_proj.weight = ours.down.weight
    a, first = convert_mlp(ours, 4, 4, DIM, sharpness=1e-4)
    b, second = convert_mlp(theirs, 4, 4, DIM, sharpness=1e-4)
    torch.testing.assert_close(a(x), ours(x), rtol=1e-3, atol=1e-4)
    assert torch.equal(a(x), b(x)) and torch.equal(first.groups, second.groups)


class Residual(SwiGLU):
    def forward(self, x):
        return x + super().forward(x)


def with_norm():
    module = TimmLike()
    module.norm = nn.LayerNorm(HIDDEN)
    return module


def without_activation():
    module = TimmLike()
    del module.act
    return module


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "names: gate_proj, up_proj, down_proj; fc1, fc2; .* got Linear"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), TypeError, "got Sequential"),
        (without_activation, TypeError, "TimmLike must name its activation act_fn"),
        (
            lambda: llama(hidden_act="relu"),
            ValueError,
            "must be SiLU, GELU or QuickGELU, got ReLU.*fit a SwiGLU",
        ),
        (lambda: sequential(nn.Tanh()), ValueError, "activation of Sequential must be SiLU.*got Tanh"),
        (lambda: Residual(DIM, HIDDEN), ValueError, "Residual must compute what its linear layers"),
        (with_norm, ValueError, "TimmLike must compute what its linear layers"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_sentence(build, error, message):
    with pytest.raises(error, match=message) as caught:
        convert_mlp(build(), 2, 1, 2)
    assert "\n" not in str(caught.value)


def test_wrong_widths_are_refused():
    module = randomised(sequential())
    with pytest.raises(ValueError, match=r"calibration must have the shape \[tokens, 16\], got \[5, 3\]"):
        convert_mlp(module, 2, 1, 2, calibration=torch.zeros(5, 3, dtype=torch.float64))
    layer, _ = convert_mlp(module, 2, 1, 2)
    with pytest.raises(ValueError, match=r"x must have the shape \[..., 16\], got \[5, 3\]"):
        layer(torch.zeros(5, 3, dtype=torch.float64))
    x = make_tensor(5, DIM, dtype=torch.float64)
    assert max_error(layer(x)[:2], layer(x[:2])) < 1e-12
