"""Hybrid attention in vision towers: exact at the start, trainable, and undone without a trace."""

import copy

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import vot_kernels
from tests.integrations.tiny import VISION_LANGUAGE, image_and_text, qwen2, qwen2_5_vl, qwen3_vl, spread
from tests.marks import COMPUTING
from vot_kernels import PackedLayout, packed_attention
from vot_kernels.integrations import attention
from vot_kernels.integrations.hybrid import FAR_WEIGHT
from vot_kernels.ops import dispatch
from vot_kernels.testing import make_tensor, shifted

GRID = torch.tensor([[3, 8, 8], [1, 4, 4], [2, 8, 12], [3, 2, 4]])  # a clip, an image, two clips
WEIGHTS = ["blocks.0.attn.far_weight", "blocks.1.attn.far_weight"]


@pytest.fixture(params=COMPUTING)
def backend(request, monkeypatch):
    """What "auto" takes, for tests that compare bits of different ops."""
    for op in ("flash_attn_varlen_func", "hybrid_attention"):
        if request.param == "torch":
            monkeypatch.setitem(
                dispatch.CAPABILITIES[op], "cpp", lambda _: ["this test is about PyTorch's backend"]
            )


def tower(kind: str) -> nn.Module:
    return VISION_LANGUAGE[kind]().model.visual


def patches() -> torch.Tensor:
    return make_tensor(int(GRID.prod(1).sum()), 3 * 2 * 14 * 14)


def seen(model: nn.Module, grid=GRID) -> torch.Tensor:
    return model(patches(), grid_thw=grid).last_hidden_state


def frame_encoder() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
    )
    return spread(SiglipVisionModel(config))


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_the_start_is_exact_bit_for_bit(kind, backend):
    model = tower(kind)
    with torch.no_grad():
        stock = seen(model)
        with vot_kernels.patched(model):
            exact = seen(model)
        report = vot_kernels.patch(model, attention="hybrid")
        assert torch.equal(seen(model), exact)
        assert [row.after for row in report.modules] == ["hybrid_attention"] * 2 + ["linear"]
        vot_kernels.unpatch(model)
        assert torch.equal(seen(model), stock)
    assert not any(name.endswith(FAR_WEIGHT) for name in model.state_dict())
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_the_start_is_exact_bit_for_bit_for_any_mix_of_small_frames(backend):
    exact, hybrid = tower("qwen3_vl"), tower("qwen3_vl")
    vot_kernels.patch(exact)
    vot_kernels.patch(hybrid, attention="hybrid", window=0, far="zero")
    numbers = torch.Generator().manual_seed(shifted(0))
    for _ in range(50):
        clips = int(torch.randint(1, 5, (), generator=numbers))
        frames = torch.randint(1, 5, (clips, 1), generator=numbers)
        grid = torch.cat([frames, 2 * torch.randint(1, 5, (clips, 2), generator=numbers)], 1)
        x = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=numbers)
        with torch.no_grad():
            found, expected = (model(x, grid).last_hidden_state for model in (hybrid, exact))
        assert torch.equal(found, expected), grid.tolist()


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_training_leaves_the_start_and_sees_other_frames(kind):
    """The loss falls by the far weights alone, and a frame's tokens then depend on the other frames of its clip."""
    model = tower(kind).requires_grad_(False)
    vot_kernels.patch(model, attention="hybrid")
    weights = dict(model.named_parameters())
    assert [name for name, p in weights.items() if p.requires_grad] == WEIGHTS
    optimizer = torch.optim.SGD([weights[name] for name in WEIGHTS], lr=1.0)
    target, losses = make_tensor(*seen(model).shape), []
    for _ in range(4):
        loss = (seen(model) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name in WEIGHTS:  # a small step downhill, whatever the size of the gradient
            weights[name].grad.div_(weights[name].grad.abs().max()).mul_(0.01)
        optimizer.step()
    assert losses[-1] < losses[0] and all((weights[name] != 0).all() for name in WEIGHTS)
    x = patches().requires_grad_()
    model(x, grid_thw=GRID).last_hidden_state[:64].sum().backward()  # the first frame
    touched = x.grad.abs().amax(1) > 0
    assert touched[: 3 * 64].all() and not touched[3 * 64 :].any()


def test_a_negative_weight_counts_as_its_size():
    model = tower("qwen3_vl")
    vot_kernels.patch(model, attention="hybrid", far=0.3)
    with torch.no_grad():
        expected = seen(model)
        for layer in model.blocks:
            layer.attn.far_weight.neg_()
        assert torch.equal(seen(model), expected)


def test_window_none_is_softmax_attention_over_the_clip(monkeypatch):
    model, calls = tower("qwen3_vl"), []
    op = attention.HybridLayer.attend
    monkeypatch.setattr(
        attention.HybridLayer, "attend", lambda *x: calls.append((*x[2:5], op(*x))) or calls[-1][-1]
    )
    vot_kernels.patch(model, attention="hybrid", window=None)
    assert not any(name.endswith(FAR_WEIGHT) for name in model.state_dict())
    seen(model)
    layout = PackedLayout.from_lengths(GRID.prod(1))
    for q, k, v, out in calls:
        assert torch.allclose(out, packed_attention(q, k, v, layout), atol=1e-5)
    assert len(calls) == 2


def test_without_a_far_part_it_has_no_parameters_and_stays_exact(backend):
    model = tower("qwen3_vl")
    with torch.no_grad():
        with vot_kernels.patched(model):
            exact = seen(model)
        with vot_kernels.patched(model, attention="hybrid", far=None):
            assert torch.equal(seen(model), exact)
            assert not set(WEIGHTS) & set(model.state_dict())


def test_frames_per_row_of_an_image_encoder(backend):
    model, frames = frame_encoder(), make_tensor(6, 3, 24, 24)
    with torch.no_grad():
        with vot_kernels.patched(model):
            exact = model(frames).last_hidden_state
        report = vot_kernels.patch(model, attention="hybrid", frames=3)
        assert torch.equal(model(frames).last_hidden_state, exact)
        for name, parameter in model.named_parameters():
            if name.endswith(FAR_WEIGHT):
                parameter.fill_(1.0)
        moved = frames.clone()
        moved[5] += 1
        change = (model(moved).last_hidden_state - model(frames).last_hidden_state).abs().amax((1, 2))
    assert (change[:3] == 0).all() and (change[3:] > 0).all()
    assert [row.kind for row in report.left] == ["SiglipMultiheadAttentionPoolingHead"]
    with pytest.raises(ValueError, match=r"^The batch must have whole clips of 3 frames, got 4 frames\.$"):
        model(frames[:4])


def test_some_layers_and_the_language_model_stay_exact():
    model = qwen2_5_vl()
    report = vot_kernels.patch(model, attention="hybrid", layers=[1])
    notes = {row.name: (row.after, row.note) for row in report.modules}
    assert notes["model.visual.blocks.1.attn"] == ("hybrid_attention", "")
    assert notes["model.visual.blocks.0.attn"][1] == "exact, since it is not among the layers"
    text = notes["model.language_model.layers.0.self_attn"]
    assert text == ("flash_attn_varlen_func", "exact, since its rows are no frames")
    assert model(**image_and_text()).logits.isfinite().all()


def test_a_checkpointed_layer_finds_its_clips_after_another_forward():
    """The current batch is another one when the backward recomputes a layer of the previous batch."""
    model = tower("qwen3_vl").train()
    vot_kernels.patch(model, attention="hybrid", far=0.5)
    other = GRID[:1]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = seen(model).square().sum()
        model(patches()[: int(other.prod())], grid_thw=other)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), expected))


def test_weights_are_copied_saved_and_loaded(tmp_path):
    model = qwen3_vl()
    vot_kernels.patch(model.model.visual, attention="hybrid", far=0.5)
    weights = model.state_dict()
    assert sum(name.endswith(FAR_WEIGHT) for name in weights) == 2
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.visual.blocks[0].attn.far_weight.zero_()
        assert (model.model.visual.blocks[0].attn.far_weight == 0.5).all()
        expected = seen(model.model.visual)
    vot_kernels.unpatch(copied.model.visual)
    assert torch.equal(seen(model.model.visual), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    vot_kernels.patch(loaded.model.visual, attention="hybrid")
    loaded.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(seen(loaded.model.visual), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "linear"}, "attention must be one of 'exact', 'hybrid', got 'linear'"),
        ({"window": 1}, 'are for attention="hybrid" alone'),
        ({"attention": "hybrid", "far": -1.0}, 'far must be a weight >= 0, "zero" or None, got -1.0'),
        ({"attention": "hybrid", "layers": "some"}, "layers must be"),
        ({"attention": "hybrid", "layers": [2]}, r"layers must be within 0 to 1, got \[2\]"),
        ({"attention": "hybrid", "frames": 0}, "frames must be a positive int or None, got 0"),
        ({"attention": "hybrid", "window": -1}, "window must be"),
        ({"attention": "hybrid", "feature_map": "exp"}, "feature_map must be one of"),
    ],
)
def test_bad_options_are_one_sentence_and_change_nothing(options, words):
    model = tower("qwen3_vl")
    with pytest.raises(ValueError, match=words):
        vot_kernels.patch(model, **options)
    assert model.config._attn_implementation == "sdpa" and not set(WEIGHTS) & set(model.state_dict())


def test_what_cannot_be_hybrid_says_why():
    with pytest.raises(ValueError, match="No attention of Qwen2ForCausalLM can be hybrid: its rows are no"):
        vot_kernels.patch(qwen2(), attention="hybrid")
    with pytest.raises(ValueError, match="nothing says which frames make a clip: give frames"):
        vot_kernels.patch(frame_encoder(), attention="hybrid")


def test_padding_is_refused_in_a_hybrid_layer():
    model = tower("qwen3_vl")
    vot_kernels.patch(model, attention="hybrid")
    q, mask = make_tensor(1, 2, 4, 16), torch.tensor([[True, True, True, False]])
    with pytest.raises(ValueError, match="Hybrid attention is for bidirectional attention of frames without"):
        attention.attention_forward(model.blocks[0].attn, q, q, q, mask)
