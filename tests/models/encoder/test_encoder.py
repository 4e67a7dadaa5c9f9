"""The encoder: packing changes nothing, every part can be turned off, streaming equals the whole clip."""

import inspect

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig

from vot_kernels.models.encoder import PRESETS, VotEncoder, VotEncoderConfig, VotImageProcessor
from vot_kernels.models.encoder.cost import describe_preset, encoder_cost
from vot_kernels.testing import shifted

GRIDS = [(1, 3, 4), (4, 2, 3), (1, 1, 1), (3, 4, 2)]
SWITCHES = {
    "no aoe": {"aoe_every": 0},
    "all aoe": {"aoe_every": 1},
    "shared expert": {"aoe_every": 1, "shared_expert_size": 16},
    "softmax": {"attention": "softmax"},
    "linear": {"attention": "linear"},
    "no full layer": {"full_attention_every": 0},
    "window per layer": {"window": [0, None, 2]},
    "no dense residual": {"dense_residual": False},
    "sparse dense residual": {"residual_dilation": 2, "residual_period": 2},
    "no size embedding": {"size_embedding": False},
    "no beta": {"learned_beta": False},
    "no qk norm": {"qk_norm": False},
    "no rope": {"rope": False},
    "rows": {"group": "rows:2"},
    "blocks": {"group": 5},
    "causal": {"causal": "group"},
    "grouped heads": {"num_key_value_heads": 1},
    "elu": {"feature_map": "elu"},
}


def tiny(**overrides) -> VotEncoderConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return VotEncoderConfig(
        **{**sizes, "patch_size": 2, "expert_rank": 8, "full_attention_every": 3, **overrides}
    )


def make(config: VotEncoderConfig, seed: int = 0) -> VotEncoder:
    torch.manual_seed(shifted(seed))
    model = VotEncoder(config).double().eval()
    for name, parameter in model.named_parameters():  # leave no part at its neutral start
        if "beta" in name or "residual" in name or "size_embedding" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def make_fresh(config: VotEncoderConfig, seed: int) -> VotEncoder:
    torch.manual_seed(seed)
    return VotEncoder(config)


def inputs(grids, seed: int = 1, numbers: int = 12):
    generator = torch.Generator().manual_seed(shifted(seed))
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(1).sum()), numbers, generator=generator, dtype=torch.float64)
    return pixels, grid, torch.arange(1.0, len(grids) + 1).double()


@pytest.mark.parametrize("overrides", SWITCHES.values(), ids=SWITCHES.keys())
def test_packed_equals_one_by_one(overrides):
    model = make(tiny(**overrides))
    pixels, grid, fps = inputs(GRIDS)
    packed = model(pixels, grid, fps)
    parts = pixels.split(grid.prod(1).tolist())
    alone = [model(part, grid[i : i + 1], fps[i : i + 1]) for i, part in enumerate(parts)]
    torch.testing.assert_close(
        packed.last_hidden_state, torch.cat([out.last_hidden_state for out in alone]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        packed.pooler_output, torch.cat([out.pooler_output for out in alone]), rtol=1e-6, atol=1e-6
    )


def test_packed_gradients_equal_one_by_one():
    model = make(tiny())
    pixels, grid, fps = inputs(GRIDS)
    weight = torch.randn(len(pixels), 32, dtype=torch.float64)

    def gradients(chunks):
        model.zero_grad()
        for rows, clips in chunks:
            out = model(pixels[rows], grid[clips], fps[clips]).last_hidden_state
            (out * weight[rows]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    bounds = np.concatenate([[0], grid.prod(1).cumsum(0).numpy()])
    together = gradients([(slice(None), slice(None))])
    alone = gradients(
        [(slice(a, b), slice(i, i + 1)) for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    )
    assert together.keys() == alone.keys()
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("poison", [1e3, float("nan")])
def test_a_poisoned_image_leaves_the_others_bit_equal(poison):
    model = make(tiny(aoe_every=0))
    clean, dirty, others = poisoned_pair(model, poison)
    assert torch.equal(clean[others], dirty[others])


@pytest.mark.parametrize("poison", [1e3, float("nan")])
def test_a_poisoned_image_leaves_the_others_alone_with_experts(poison):
    # The poisoned tokens change how many rows each expert's matrix product has, hence its last bit, not more.
    clean, dirty, others = poisoned_pair(make(tiny(aoe_every=1)), poison)
    torch.testing.assert_close(clean[others], dirty[others], rtol=1e-12, atol=1e-12)


def poisoned_pair(model, poison):
    pixels, grid, fps = inputs(GRIDS)
    clean = model(pixels, grid, fps).last_hidden_state
    pixels[12:36] *= poison  # the second clip
    dirty = model(pixels, grid, fps).last_hidden_state
    assert not torch.equal(clean[12:36], dirty[12:36])
    return clean, dirty, torch.cat([torch.arange(12), torch.arange(36, len(pixels))])


def test_positions_restart_and_matter():
    model = make(tiny(size_embedding=False))
    pixels, _, _ = inputs([(1, 2, 3), (1, 2, 3)])
    twice = torch.cat([pixels[:6], pixels[:6]])
    out = model(twice, torch.tensor([(1, 2, 3), (1, 2, 3)])).last_hidden_state
    torch.testing.assert_close(out[:6], out[6:], rtol=1e-9, atol=1e-9)
    flipped = model(pixels[:6].flip(0), torch.tensor([(1, 2, 3)])).last_hidden_state.flip(0)
    assert (flipped - out[:6]).abs().max() > 1e-3


def test_every_parameter_learns():
    model = make(tiny(aoe_every=1, shared_expert_size=16))
    pixels, grid, fps = inputs(GRIDS)
    out = model(pixels, grid, fps, output_balance=True)
    (out.pooler_output.square().sum() + out.last_hidden_state.square().sum() + out.balance_loss).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # The last depth-weighted average of each block's own sources is read, so none may be left out.
    assert silent == []


def test_compiles_once_for_all_packings():
    counter = CompileCounterWithBackend("eager")
    model = make(tiny(num_hidden_layers=2, full_attention_every=2)).train()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    # PyTorch takes sizes that are equal in the first call to be equal always: here clips, frames, tokens and
    # widths all differ. A batch of one clip would be compiled once more, as any size of 1 is.
    for grids in [[*GRIDS, (3, 2, 2), (0, 3, 3)], [(2, 3, 4), (1, 2, 2)], [(1, 1, 1)] * 7, [(3, 2, 2)] * 3]:
        pixels, grid, fps = inputs(grids)
        found, wanted = (
            run(pixels, grid, fps, layout=model.layout(grid), output_hidden_states=True)
            for run in (compiled, model)
        )
        torch.testing.assert_close(found.to_tuple(), wanted.to_tuple(), rtol=1e-12, atol=1e-12)
        losses = [out.pooler_output.square().sum() + out.balance_loss for out in (found, wanted)]
        first, second = (torch.autograd.grad(loss, model.patch_embedding.weight) for loss in losses)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_balance_is_returned_in_training_or_if_asked_for():
    model = make(tiny(aoe_every=1))
    pixels, grid, fps = inputs(GRIDS)
    quiet = model(pixels, grid, fps)
    assert quiet.balance_loss is None and quiet.expert_load is None
    for out in (model(pixels, grid, fps, output_balance=True), model.train()(pixels, grid, fps)):
        assert out.expert_load.shape == (3, 4)
        torch.testing.assert_close(out.expert_load.sum(1), torch.full((3,), 2.0).double())
        assert out.balance_loss.shape == () and out.balance_loss.requires_grad
        assert torch.equal(out.last_hidden_state, quiet.last_hidden_state)
    assert model(pixels, grid, fps, output_balance=False).balance_loss is None


def test_balance_without_experts_is_0():
    model = make(tiny(aoe_every=0)).train()
    out = model(*inputs(GRIDS))
    assert out.balance_loss == 0 and out.expert_load is None


def test_return_dict_false_gives_a_tuple():
    model = make(tiny())
    arguments = inputs(GRIDS)
    named = model(*arguments, output_hidden_states=True)
    found = model(*arguments, output_hidden_states=True, return_dict=False)
    assert isinstance(found, tuple) and len(found) == 3
    for value, expected in zip(found, named.to_tuple(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    model.config.return_dict = False
    assert isinstance(model(*arguments), tuple)
    assert model(*arguments, return_dict=True).keys() == {"last_hidden_state", "pooler_output"}


def test_a_learned_part_changes_the_output():
    pixels, grid, fps = inputs(GRIDS)
    model = make(tiny())
    before = model(pixels, grid, fps).last_hidden_state
    assert (model(pixels, grid, fps * 7).last_hidden_state - before).abs().max() > 1e-4  # frames per second
    model.blocks[0].attention.beta.data.fill_(-torch.inf)
    assert (model(pixels, grid, fps).last_hidden_state - before).abs().max() > 1e-4  # the far part


@pytest.mark.parametrize(
    "overrides", [{}, {"window": 0}, {"window": 2}, {"aoe_every": 0, "dense_residual": False}]
)
def test_streaming_equals_the_whole_clip(overrides):
    model = make(tiny(causal="group", full_attention_every=0, **overrides))
    pixels, grid, fps = inputs([(7, 3, 2)])
    with torch.no_grad():
        whole = model(pixels, grid, fps).last_hidden_state
        state = model.start_stream()
        frames = []
        for frame in pixels.split(6):
            out, state = model.stream(frame, (3, 2), state, fps=1.0)
            frames.append(out)
    torch.testing.assert_close(torch.cat(frames), whole, rtol=1e-6, atol=1e-6)


def test_causal_frames_do_not_see_later_ones():
    # This is without experts, because other frames change how many rows each expert's product has, hence its last bit.
    model = make(tiny(causal="group", aoe_every=0))
    pixels, grid, fps = inputs([(5, 2, 2)])
    before = model(pixels, grid, fps).last_hidden_state
    pixels[12:] += 1.0
    after = model(pixels, grid, fps).last_hidden_state
    assert torch.equal(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_stream_state_does_not_grow():
    model = make(tiny(causal="group", full_attention_every=0, num_hidden_layers=2)).float()

    def numbers(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.untyped_storage().nbytes()
        if isinstance(value, list | tuple):
            return sum(map(numbers, value))
        return sum(map(numbers, vars(value).values())) if hasattr(value, "__dict__") else 0

    state = model.start_stream()
    sizes = []
    with torch.no_grad():
        for frame in range(300):
            _, state = model.stream(torch.randn(2, 12), (1, 2), state)
            if frame in (3, 299):
                sizes.append(numbers(state))
    assert sizes[0] == sizes[1] > 0


def test_streaming_is_refused_where_memory_would_grow():
    with pytest.raises(ValueError, match="full_attention_every=0"):
        VotEncoder(tiny(causal="group")).start_stream()
    with pytest.raises(ValueError, match='causal="group"'):
        VotEncoder(tiny()).start_stream()
    with pytest.raises(TypeError, match="needs HybridAttention, got LinearAttention"):
        VotEncoder(tiny(attention="linear")).blocks[0].step(torch.zeros(2, 32), None, None)


def test_save_and_load(tmp_path):
    model = make(tiny(aoe_every=1, shared_expert_size=16)).float()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = VotEncoder.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = inspect.signature(VotEncoderConfig.__init__).parameters.keys() - {"self", "kwargs"}
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in ours)
    pixels, grid, fps = inputs(GRIDS)
    args = (pixels.float(), grid, fps.float())
    assert torch.equal(model(*args).last_hidden_state, again(*args).last_hidden_state)
    AutoConfig.register("vot_encoder", VotEncoderConfig, exist_ok=True)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VotEncoderConfig)


def test_every_part_begins_as_it_wants_to():
    model = make_fresh(tiny(aoe_every=1, shared_expert_size=16, full_attention_every=0), 0)
    assert (model.size_embedding.fc2.weight == 0).all() and (model.size_embedding.fc2.bias == 0).all()
    assert (model.size_embedding.fc1.weight != 0).all()
    for block in model.blocks:
        assert (block.attention.beta == 0).all()
        norms = torch.linalg.vector_norm(block.mlp.w_down, dim=(1, 2))
        torch.testing.assert_close(norms, torch.full((4,), 8**0.5))
    assert [weight.tolist() for weight in model.residual.weights.values()][0] == [0.0, 1.0]


@pytest.mark.parametrize("overrides", [{"aoe_every": 1, "shared_expert_size": 16}, {}])
def test_a_missing_weight_is_initialised_and_all_others_are_loaded(overrides, tmp_path):
    config = tiny(num_hidden_layers=2, full_attention_every=0, **overrides)
    model = make(config).float()
    for tensor in (*model.parameters(), *model.buffers()):  # nothing is as it was initialised
        tensor.data.add_(1.0)
    state = model.state_dict()
    one, other = (make_fresh(config, seed).state_dict() for seed in (0, 1))
    constant = {name: value for name, value in one.items() if torch.equal(value, other[name])}
    assert {"blocks.0.attention.beta", "blocks.1.mlp.selection_bias", "size_embedding.fc2.weight"} < set(
        constant
    )
    for missing in state:
        kept = {name: value for name, value in state.items() if name != missing}
        loaded = VotEncoder.from_pretrained(None, config=config, state_dict=kept).state_dict()
        assert loaded.keys() == state.keys()
        assert [name for name in kept if not torch.equal(loaded[name], kept[name])] == [], missing
        assert loaded[missing].isfinite().all() and not torch.equal(loaded[missing], state[missing]), missing
        if missing in constant:
            assert torch.equal(loaded[missing], constant[missing]), missing


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames it to activation checkpointing
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_gradient_checkpointing_gives_equal_gradients(options):
    model = make(tiny()).train()
    pixels, grid, fps = inputs(GRIDS)

    def gradients():
        model.zero_grad()
        out = model(pixels, grid, fps)
        (out.pooler_output.square().sum() + out.last_hidden_state.sum() + out.balance_loss).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    calls = []
    handle = model.blocks[1].attention_norm.register_forward_hook(lambda *_: calls.append(1))
    wanted, plain = gradients(), len(calls)
    model.gradient_checkpointing_enable(options)
    found = gradients()
    handle.remove()
    assert model.is_gradient_checkpointing
    assert plain == 1 and len(calls) == 3  # the block ran again in the backward
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_configuration_of_an_earlier_version_says_frame(tmp_path):
    config = tiny(causal="frame", full_attention_every=0)
    assert config.causal == "group"
    config.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert '"causal": "group"' in saved
    (tmp_path / "config.json").write_text(saved.replace('"causal": "group"', '"causal": "frame"'))
    assert VotEncoderConfig.from_pretrained(tmp_path).causal == "group"
    assert VotEncoder(config).blocks[0].attention.causal == "group"


def test_presets():
    sizes = {name: encoder_cost(VotEncoderConfig.preset(name), (1, 4, 4)).parameters for name in PRESETS}
    assert sizes["nano"] <= 1_500_000
    assert list(sizes.values()) == sorted(sizes.values())
    assert "GFLOP" in describe_preset("nano")["text"]
    with pytest.raises(ValueError, match="nano, small, base, large"):
        VotEncoderConfig.preset("huge")


def test_cost_of_attention_counts_pairs():
    config = tiny(num_hidden_layers=1, window=[1], full_attention_every=0)
    cost = encoder_cost(config, (4, 1, 2))  # four groups of two tokens: reach 2, 3, 3, 2 groups
    pairs = 2 * (4 + 6 + 6 + 4)
    far = 4 * 8 * 32 * 16
    assert cost.attention_flops == 4 * pairs * 32 + far
    assert cost.dense_attention_flops == 4 * 8 * 8 * 32


def test_cost_of_experts_counts_the_chosen_and_the_shared():
    """Per token 2 FLOPs a weight: W_down of all experts, the rest of the chosen, the whole shared expert."""
    plain, shared = (tiny(num_hidden_layers=1, aoe_every=1, shared_expert_size=size) for size in (0, 16))
    costs = [encoder_cost(config, (4, 1, 2)) for config in (plain, shared)]
    hidden = [VotEncoder(config).blocks[0].mlp.w_p.shape[1] for config in (plain, shared)]
    assert hidden[0] > hidden[1]  # together they have the parameters of a dense block
    chosen = [2 * width * (8 + 32 + 32) for width in hidden]  # rank, and twice the width of a token
    change = 3 * 32 * 16 + chosen[1] - chosen[0]
    assert costs[1].linear_flops - costs[0].linear_flops == 2 * 8 * change
    experts = [4 * width * (8 + 32 + 32) for width in hidden]
    assert costs[1].parameters - costs[0].parameters == 3 * 32 * 16 + experts[1] - experts[0]


def test_the_backend_of_the_experts_reaches_every_layer():
    model = make(tiny(aoe_every=1))
    pixels, grid, fps = inputs(GRIDS)
    before = model(pixels, grid, fps).last_hidden_state
    model.set_experts_backend("reference")
    assert {block.mlp.backend for block in model.blocks} == {"reference"}
    assert {block.attention.backend for block in model.blocks} == {"auto"}
    torch.testing.assert_close(model(pixels, grid, fps).last_hidden_state, before)
    with pytest.raises(ValueError, match="backend must be one of 'auto', .* got 'gpu'"):
        model.set_experts_backend("gpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 33}, "multiple"),
        ({"attention": "magic"}, "attention must be"),
        ({"causal": "token"}, "causal must be"),
        ({"causal": "group", "group": 4}, 'group="frame"'),
        ({"window": [1, 1]}, r"window must have an entry for each of the \d layers, got 2"),
        (
            {"shared_expert_size": 48},
            "shared_expert_size must be from 0 to intermediate_size - 1, 47, got 48",
        ),
    ],
)
def test_bad_configurations(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_bad_inputs():
    model = make(tiny())
    pixels, grid, _ = inputs(GRIDS)
    with pytest.raises(ValueError, match=r"pixel_values must have the shape \[61, 12\]"):
        model(pixels[:-1], grid)


class TestProcessor:
    def test_mixed_sizes(self):
        processor = VotImageProcessor(patch_size=8, max_pixels=64 * 64, min_pixels=32 * 32)
        wide = np.zeros((3, 100, 300, 3), np.uint8)
        small = np.zeros((20, 10, 3), np.uint8)
        batch = processor([wide, small], fps=[8.0, 0.0])
        grids = batch["image_grid_thw"].tolist()
        assert grids[0][0] == 3 and grids[1][0] == 1
        assert all(32 * 32 * 0.6 <= h * w * 64 <= 64 * 64 for _, h, w in grids)
        assert batch["pixel_values"].shape == (sum(t * h * w for t, h, w in grids), 192)
        assert grids[0][2] / grids[0][1] == pytest.approx(3, rel=0.35)

    def test_values_and_order(self):
        processor = VotImageProcessor(patch_size=2, min_pixels=1, max_pixels=64)
        image = np.zeros((4, 4, 3), np.uint8)
        image[:2, 2:] = 255  # the second patch is white
        batch = processor([image])
        assert torch.equal(batch["pixel_values"].mean(1), torch.tensor([-1.0, 1.0, -1.0, -1.0]))

    def test_size_limits_hold_for_extreme_shapes(self):
        processor = VotImageProcessor(patch_size=8, max_pixels=64 * 64)
        for height, width in [(1, 5000), (5000, 1), (7, 9), (64, 64), (719, 1281)]:
            h, w = processor.target_size(height, width)
            assert h % 8 == w % 8 == 0 and 0 < h * w <= 64 * 64

    def test_save_and_load(self, tmp_path):
        VotImageProcessor(patch_size=4, max_pixels=123).save_pretrained(tmp_path)
        again = VotImageProcessor.from_pretrained(tmp_path)
        assert (again.patch_size, again.max_pixels) == (4, 123)

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            ([], {}, "at least one"),
            (np.zeros((4, 4), np.uint8), {}, "must be uint8"),
            (np.zeros((4, 4, 3), np.float32), {}, "float32"),
            ([np.zeros((4, 4, 3), np.uint8)], {"fps": [1.0, 2.0]}, "one per input .1., got 2 numbers"),
            ([np.zeros((4, 4, 3), np.uint8)], {"return_tensors": "np"}, "return_tensors"),
        ],
    )
    def test_bad_inputs(self, images, options, message):
        with pytest.raises(ValueError, match=message):
            VotImageProcessor(patch_size=2)(images, **options)


@pytest.mark.parametrize("attention", ["hybrid", "softmax", "linear"])
def test_trains_under_autocast(attention):
    torch.manual_seed(shifted(0))
    model = VotEncoder(tiny(aoe_every=2, attention=attention)).train()
    pixels, grid, fps = inputs(GRIDS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            pooled = model(pixels.float(), grid, fps.float()).pooler_output
        loss = (pooled.float() - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
