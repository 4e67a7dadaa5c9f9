"""Attention modules of other packages as HybridAttention: the same outputs and gradients, or a sentence."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    LlamaConfig,
    SiglipVisionConfig,
    VideoMAEConfig,
    ViTConfig,
)
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.videomae.modeling_videomae import VideoMAEAttention
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.models.vjepa2.configuration_vjepa2 import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from tests.rounding import nearly_equal
from vot_kernels import PackedLayout
from vot_kernels.nn import HybridAttention, LinearAttention, RotaryEmbedding
from vot_kernels.nn.rotary import rotate
from vot_kernels.testing import make_tensor, max_error

DIM, HEADS, LENGTHS = 48, 3, (5, 3, 9)
HEAD_DIM = DIM // HEADS
PREFIX = 2  # tokens in front that DINOv3 does not rotate
VISION = {"hidden_size": DIM, "num_attention_heads": HEADS}
QWEN = {"num_heads": HEADS}


class TimmLike(nn.Module):
    """The shape of a vision transformer's attention in timm."""

    def __init__(self, bias: bool = True, norm: Any = nn.Identity, scale: float = HEAD_DIM**-0.5) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = HEADS, HEAD_DIM, scale
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=bias)
        self.q_norm, self.k_norm = norm(HEAD_DIM), norm(HEAD_DIM)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(weights) @ v).transpose(1, 2).flatten(2)))


def separate_weights(**options) -> nn.MultiheadAttention:
    """With a weight of its own for each of q, k and v, as torch has it where their widths differ."""
    module = nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options)
    weights = module.in_proj_weight.chunk(3)
    module.in_proj_weight, module._qkv_same_embed_dim = None, False
    for name, weight in zip("qkv", weights, strict=True):
        setattr(module, f"{name}_proj_weight", nn.Parameter(weight.detach().clone()))
    return module


MODULES = {
    "qwen2_vl": lambda: VisionAttention(Qwen2VLVisionConfig(embed_dim=DIM, **QWEN)),
    "qwen2_5_vl": lambda: Qwen2_5_VLVisionAttention(Qwen2_5_VLVisionConfig(hidden_size=DIM, **QWEN)),
    "qwen3_vl": lambda: Qwen3VLVisionAttention(Qwen3VLVisionConfig(hidden_size=DIM, **QWEN)),
    "siglip": lambda: SiglipAttention(SiglipVisionConfig(**VISION)),
    "vit": lambda: ViTAttention(ViTConfig(**VISION)),
    "vit without qkv biases": lambda: ViTAttention(ViTConfig(**VISION, qkv_bias=False)),
    "videomae": lambda: VideoMAEAttention(
        VideoMAEConfig(**VISION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "clip": lambda: CLIPAttention(CLIPVisionConfig(**VISION)),
    "dinov2": lambda: Dinov2Attention(Dinov2Config(**VISION)),
    "dinov3": lambda: DINOv3ViTAttention(DINOv3ViTConfig(**VISION, key_bias=False)),
    "timm": TimmLike,
    "timm with norms": lambda: TimmLike(norm=nn.LayerNorm),
    "timm without biases": lambda: TimmLike(bias=False, norm=nn.RMSNorm, scale=0.4),
    "torch": lambda: nn.MultiheadAttention(DIM, HEADS, batch_first=True),
    "torch without biases": lambda: nn.MultiheadAttention(DIM, HEADS, bias=False, batch_first=True),
    "torch, separate weights": separate_weights,
    "torch, separate weights without biases": lambda: separate_weights(bias=False),
}
PREFIX = 2  # tokens in front that DINOv3 does not rotate


@dataclass
class Case:
    """A module with large random weights, tokens of three segments, and the angles by which they are rotated."""

    module: nn.Module
    x: torch.Tensor
    angles: torch.Tensor
    layout = PackedLayout.from_lengths(LENGTHS)

    @property
    def given(self) -> dict[str, Any]:
        """What the converted module is called with."""
        positions = (self.angles.cos(), self.angles.sin())
        return (
            {"position_embeddings": positions}
            if isinstance(self.module, (*PACKED, DINOv3ViTAttention))
            else {}
        )

    def original(self) -> torch.Tensor:
        """Packed if the module takes that, else segment by segment."""
        if isinstance(self.module, PACKED):
            return self.module(self.x, self.layout.cu_seqlens, **self.given)
        pairs = zip(self.x.split(LENGTHS), self.angles.split(LENGTHS), strict=True)
        return torch.cat([batched(self.module, x[None], angles)[0] for x, angles in pairs])


PACKED = (VisionAttention, Qwen2_5_VLVisionAttention, Qwen3VLVisionAttention)


def batched(module: nn.Module, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """A batch `[batch, length, dim]` through a module that takes one."""
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x, need_weights=False)[0]
    if isinstance(module, DINOv3ViTAttention):
        found = module(x, position_embeddings=(angles[PREFIX:].cos(), angles[PREFIX:].sin()))
    else:
        found = module(x)
    return found[0] if isinstance(found, tuple) else found


def randomised(module: nn.Module) -> nn.Module:
    if hasattr(module, "config"):
        module.config._attn_implementation = "eager"
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(make_tensor(*parameter.shape, seed=seed) * (0.2 if parameter.ndim > 1 else 1))
    return module


def make(name: str) -> Case:
    module = randomised(MODULES[name]())
    angles = make_tensor(sum(LENGTHS), HEAD_DIM // 2, seed=50).repeat(1, 2)
    if name == "dinov3":
        for segment in angles.split(LENGTHS):
            segment[:PREFIX] = 0
    return Case(module, make_tensor(sum(LENGTHS), DIM, seed=51).requires_grad_(), angles)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.detach().abs().max())
    assert largest > 1e-2 and max_error(found, expected) < 1e-5 * largest


def gradients(y: torch.Tensor, module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad((y * make_tensor(*y.shape, seed=52)).sum(), [x, *parameters])
    return dict(zip(("x", *names), found, strict=True))


def stacked(found: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The gradients of the original's q, k and v in the order of a converted module, zeros where one has no bias."""
    whole = [g for name, g in found.items() if name in (f"qkv.{kind}", f"in_proj_{kind}")]
    if whole:
        return whole[0]
    names = [("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")]
    parts = [
        next((found[n] for name in pair for n in (f"{name}.{kind}", f"{name}_{kind}") if n in found), None)
        for pair in names
    ]
    return torch.cat([torch.full((DIM,), torch.nan) if part is None else part for part in parts])


@pytest.mark.parametrize("name", MODULES)
def test_without_a_window_outputs_and_gradients_are_those_of_the_original(name):
    case = make(name)
    attention = HybridAttention.from_attention(case.module)
    found, expected = attention(case.x, case.layout, **case.given), case.original()
    assert_equal(found, expected)
    ours, theirs = gradients(found, attention, case.x), gradients(expected, case.module, case.x)
    assert_equal(ours["x"], theirs["x"])
    assert_equal(ours["qkv.weight"], stacked(theirs, "weight"))
    out = next(n for n in theirs if n.endswith(("proj.weight", "dense.weight")) and n[0] not in "qkv")
    assert_equal(ours["out.weight"], theirs[out])
    for norm in {n for n in theirs if "norm" in n} - {
        "k_norm.bias"
    }:  # softmax does not see it: 0 but for rounding
        assert_equal(ours[norm], theirs[norm])
    if "qkv.bias" in ours:
        bias = stacked(theirs, "bias")
        known = ~bias.isnan()
        assert known.any()
        assert_equal(ours["qkv.bias"][known], bias[known])


@pytest.mark.parametrize("name", ["siglip", "timm with norms", "torch", "dinov3"])
def test_a_padded_batch_is_packed_by_its_mask(name):
    """Keys of padding are left out by each original in its own way; here the rows are gone."""
    case = make(name)
    attention = HybridAttention.from_attention(case.module)
    mask = torch.tensor([[i < n for i in range(max(LENGTHS))] for n in LENGTHS])
    layout, padding = PackedLayout.from_mask(mask)
    x = torch.full((*mask.shape, DIM), torch.nan).masked_scatter(mask[..., None], case.x.detach())
    found = padding.unpack(attention(padding.pack(x), layout, **case.given))
    assert_equal(found[mask], case.original())
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("name", ["vit", "clip", "timm", "torch"])
def test_a_batch_of_equal_lengths(name):
    module = make(name).module
    attention, x = HybridAttention.from_attention(module), make_tensor(4, 7, DIM)
    found = attention(x.flatten(0, 1), PackedLayout.from_lengths([7] * 4))
    assert_equal(found.unflatten(0, (4, 7)), batched(module, x, x))


def test_a_causal_module_with_shared_keys():
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    module = LlamaAttention(config, 0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention = HybridAttention.from_attention(module, causal="token")
    assert (attention.num_heads, attention.num_kv_heads, attention.qkv.bias) == (6, 2, None)
    x, angles = make_tensor(9, DIM), make_tensor(9, 4).repeat(1, 2)
    expected, _ = module(x[None], (angles.cos()[None], angles.sin()[None]), None)
    assert_equal(attention(x, PackedLayout.from_lengths([9]), (angles.cos(), angles.sin())), expected[0])
    with pytest.raises(ValueError, match='LlamaAttention is causal, so causal must be "token"'):
        HybridAttention.from_attention(module)


def test_weights_are_copies_with_their_dtype_and_freezing():
    module = make("vit").module.to(torch.bfloat16).eval()
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        projection.requires_grad_(False)
    before = module.q_proj.weight.clone()
    state = torch.get_rng_state()
    with torch.no_grad():  # changes nothing
        attention = HybridAttention.from_attention(module, window=1, beta_init=-3.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not attention.training and not attention.qkv.weight.requires_grad
    assert attention.out.weight.requires_grad and attention.beta.requires_grad
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert (attention.beta == -3).all()
    with torch.no_grad():
        attention.qkv.weight.zero_()
    assert torch.equal(module.q_proj.weight, before)
    with torch.no_grad():
        assert HybridAttention.from_attention(make("vit").module).qkv.weight.requires_grad


def test_positions_come_with_the_call_or_from_a_rotary():
    case = make("qwen2_vl")
    attention = HybridAttention.from_attention(case.module)
    with pytest.raises(ValueError, match=r"give position_embeddings=\(cos, sin\), each \[tokens, head_dim\]"):
        attention(case.x, case.layout)
    with pytest.raises(
        ValueError, match=r"cos of position_embeddings must have the shape \[17, 16\], got \[17, 8\]"
    ):
        attention(case.x, case.layout, position_embeddings=(case.angles[:, :8].cos(), case.angles.sin()))
    rotary = RotaryEmbedding()
    own = HybridAttention.from_attention(case.module, rotary=rotary)
    assert own.rotary is rotary and own(case.x, case.layout).shape == case.x.shape
    assert max_error(own(case.x, case.layout), attention(case.x, case.layout, **case.given)) > 1e-2


def test_linear_attention_takes_positions_with_the_call():
    attention, layout, x = LinearAttention(DIM, HEADS), PackedLayout.from_lengths([9]), make_tensor(9, DIM)
    angles = make_tensor(9, HEAD_DIM // 2).repeat(1, 2)
    found = attention(x, layout, position_embeddings=(angles.cos(), angles.sin()))
    attention.rotary = lambda q, k, _: rotate(q, k, (angles.cos(), angles.sin()))
    assert torch.equal(attention(x, layout), found)
    still = attention(x, layout, (torch.ones(9, HEAD_DIM), torch.zeros(9, HEAD_DIM)))
    assert torch.equal(still, changed(attention, rotary=None)(x, layout))


def test_a_stream_has_the_scale_and_the_positions_of_the_whole():
    module = randomised(TimmLike(scale=0.7))
    attention = HybridAttention.from_attention(module, window=1, causal="group", beta_init=0.5)
    assert attention.scale == 0.7
    x, angles, state, outputs = make_tensor(12, DIM), make_tensor(12, HEAD_DIM // 2).repeat(1, 2), None, []
    positions = (angles.cos(), angles.sin())
    with torch.no_grad():
        for start in range(0, 12, 4):
            rows = slice(start, start + 4)
            layout, given = PackedLayout.from_lengths([4]), tuple(t[rows] for t in positions)
            out, state = attention.step(x[rows], layout, state, position_embeddings=given)
            outputs.append(out)
        whole = attention(x, PackedLayout.from_lengths([12], group_size=4), positions)
    assert_equal(torch.cat(outputs), whole)


class WithPositions(TimmLike):
    """Rotates by itself, which its parts do not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.linspace(1, 2, x.shape[1])[:, None])


class InterleavedRows(TimmLike):
    """q, k and v of a head lie side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, HEAD_DIM)).permute(3, 0, 2, 1, 4)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class WithRope(TimmLike):
    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        return super().forward(x * rope)


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


REFUSED = {
    "no attention": (
        lambda: nn.Linear(DIM, DIM),
        "looks for nn.MultiheadAttention.* but Linear has no parts",
    ),
    "a block": (
        lambda: nn.TransformerEncoderLayer(DIM, HEADS),
        "has self_attn .MultiheadAttention., linear1",
    ),
    "no heads": (
        lambda: changed(TimmLike(), num_heads=None),
        "must give its number of heads as num_heads or num_attention",
    ),
    "dropout": (
        lambda: changed(TimmLike(), attn_drop=nn.Dropout(0.1)),
        "set attn_drop to 0.*attn_drop is 0.1",
    ),
    "dropout in torch": (lambda: nn.MultiheadAttention(DIM, HEADS, dropout=0.2), "set dropout to 0"),
    "a bias table": (lambda: changed(TimmLike(), table=nn.Parameter(torch.ones(3))), "of other kinds, table"),
    "a norm after": (lambda: changed(TimmLike(), norm=nn.LayerNorm(DIM)), "norm.weight, norm.bias"),
    "a norm over all heads": (
        lambda: changed(TimmLike(), q_norm=nn.LayerNorm(DIM)),
        r"q_norm.*\[16\], got \[48\]",
    ),
    "bias_k": (lambda: nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True), "of other kinds, bias_k, bias_v"),
    "zeros": (lambda: nn.MultiheadAttention(DIM, HEADS, add_zero_attn=True), "add_zero_attn"),
    "other keys": (lambda: nn.MultiheadAttention(DIM, HEADS, kdim=24), "self-attention of one width"),
    "a sliding window": (lambda: changed(TimmLike(), sliding_window=4), "sliding window of 4 tokens"),
    "quantised": (lambda: changed(TimmLike(), proj=nn.Identity()), r"has qkv \(Linear\).*proj \(Identity\)"),
    "positions of its own": (WithPositions, "WithPositions has the parts .* computes something else.*rotary"),
    "rows in another order": (InterleavedRows, "InterleavedRows has the parts .* computes something else"),
    "an unknown argument": (WithRope, "forward of WithRope needs rope.*rotary"),
    "V-JEPA 2": (
        lambda: VJEPA2RopeAttention(VJEPA2Config(hidden_size=DIM, num_attention_heads=HEADS)),
        "VJEPA2RopeAttention has the parts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_same_is_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        HybridAttention.from_attention(randomised(build()))


def test_no_module_is_a_type_error_and_the_comparison_can_be_left_out():
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got dict"):
        HybridAttention.from_attention({})
    assert HybridAttention.from_attention(WithPositions(), check=False).head_dim == HEAD_DIM
    assert HybridAttention.from_attention(TimmLike().to("meta")).qkv.weight.is_meta
    rotated = HybridAttention.from_attention(WithRope(), rotary=RotaryEmbedding())
    assert isinstance(rotated.rotary, RotaryEmbedding)


# The starting far weight.

GROUPED = PackedLayout.from_lengths([96, 128], group_size=16)


def tokens(kind: str, seed: int) -> torch.Tensor:
    """Independent tokens, or frames that drift away from a scene, as the patches of a video do."""
    noise = make_tensor(14, 16, DIM, seed=seed)
    if kind == "noise":
        return noise.flatten(0, 1)
    scene = make_tensor(1, 16, DIM, seed=seed + 1)
    return nn.functional.layer_norm(scene + 0.3 * noise.cumsum(0), [DIM]).flatten(0, 1)


def windowed(feature_map: str, **options) -> tuple[HybridAttention, HybridAttention]:
    """Converted with a window, and without."""
    module = randomised(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    with torch.no_grad():
        module.in_proj_weight[: 2 * DIM] *= (
            0.6  # so sharp that a token sees several others, as in trained towers
        )
    converted = HybridAttention.from_attention(module, window=1, feature_map=feature_map, **options)
    return converted, HybridAttention.from_attention(module, causal=options.get("causal"))


@pytest.mark.parametrize("kind", ["noise", "video"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_a_fitted_beta_comes_closer_to_the_original(feature_map, kind):
    """It is better than 0 and -inf, also on other tokens, unless these are few and far tokens carry little."""
    attention, original = windowed(feature_map)
    seen, unseen = tokens(kind, 60), tokens(kind, 70)

    def errors():
        expected = [original(x, GROUPED) for x in (seen, unseen)]
        found = [attention(x, GROUPED) for x in (seen, unseen)]
        return [float((y - e).norm() / e.norm()) for y, e in zip(found, expected, strict=True)]

    before = []
    with torch.no_grad():
        for beta in (0.0, -torch.inf):
            attention.beta.fill_(beta)
            before.append(errors())
        assert attention.fit_beta(seen, GROUPED) is attention.beta
        on_seen, on_unseen = errors()
    better = [min(pair) for pair in zip(*before, strict=True)]
    assert on_seen < better[0]
    assert kind == "video" or on_unseen < 0.97 * better[1]


def test_beta_by_hand():
    """All tokens of another group look alike, q.k = 0, so that one beta makes far tokens exact."""
    attention = HybridAttention(16, 1, window=0, feature_map="elu", qk_norm=False)
    layout = PackedLayout.from_lengths([32, 24], group_size=4)
    with torch.no_grad():
        attention.qkv.weight.copy_(
            torch.eye(16).repeat(3, 1) * torch.tensor([6.0, 6.0, 1.0]).repeat_interleave(16)[:, None]
        )
        x = torch.eye(16)[layout.token_groups]
        beta = attention.fit_beta(x, layout)
        # phi is 7 at the own place and 1 at the 15 others: phi(q).phi(k) = 7 + 7 + 14, where exp(q.k) is 1.
        assert abs(float(beta) + torch.tensor(28.0).log()) <= 1 / 128 + 1e-6
        beta.fill_(-float(torch.tensor(28.0).log()))
        exact = changed(attention, window=None)(x, layout)
        assert nearly_equal(changed(attention, window=0)(x, layout), exact)


@pytest.mark.parametrize("causal", [None, "group"])
def test_no_other_beta_is_better_for_a_head(causal):
    """The heads' outputs show it, with the identity as output projection."""
    attention, original = windowed("softmax", causal=causal)
    for module in (attention, original):
        module.double()
        nn.init.eye_(module.out.weight)
    x = tokens("video", 60).double()
    expected = original(x, GROUPED)

    def errors(betas):
        with torch.no_grad():
            attention.beta.copy_(betas)
            return (attention(x, GROUPED) - expected).unflatten(1, (HEADS, -1)).square().sum((0, 2))

    best = attention.fit_beta(x, GROUPED).clone()
    least = errors(best)
    for change in (-3, -0.5, -0.02, 0.02, 0.5, 3):
        assert (errors(best + change) > least).logical_or(best < -16).all()


def test_fitting_needs_far_tokens_and_a_beta():
    attention, _ = windowed("elu")
    with pytest.raises(ValueError, match="At least one token of x must have far tokens"):
        attention.fit_beta(make_tensor(32, DIM), PackedLayout.from_lengths([32], group_size=16))
    for options in ({"window": None}, {"window": 1, "beta_init": None}):
        with pytest.raises(
            ValueError, match=f"needs a window and a learned beta, got window={options['window']}"
        ):
            HybridAttention(DIM, HEADS, **options).fit_beta(make_tensor(32, DIM), GROUPED)
