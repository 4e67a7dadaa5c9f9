"""`patch(padding=False)`: an encoder whose layers see no padding returns the same for every patch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Idefics3VisionConfig, Siglip2Config, Siglip2Model, SmolVLMVisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

import vot_kernels
from tests.integrations.tiny import qwen2_5_vl, spread
from vot_kernels.testing import make_tensor

OUTPUT, GRADIENT = 2e-5, 2e-4  # relative to the largest number
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
REAL = torch.tensor([[2, 4], [4, 4], [1, 3]])  # patches of each image, of up to 4 x 4


def siglip2():
    """A tower of mixed sizes, its inputs, and which rows are patches."""
    mask = torch.arange(16)[None] < REAL.prod(1)[:, None]
    config = Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=16)
    inputs = {"pixel_values": make_tensor(3, 16, 48), "spatial_shapes": REAL}
    return spread(Siglip2VisionModel(config)), inputs | {"pixel_attention_mask": mask.int()}, mask


def idefics3(kind=Idefics3VisionTransformer, config=Idefics3VisionConfig):
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    for image, (height, width) in zip(mask, REAL, strict=True):
        image[:height, :width] = True
    inputs = {"pixel_values": make_tensor(3, 3, 16, 16), "patch_attention_mask": mask}
    return spread(kind(config(**SIZES, patch_size=4, image_size=16))), inputs, mask.flatten(1)


def smolvlm():
    return idefics3(SmolVLMVisionTransformer, SmolVLMVisionConfig)


TOWERS = [siglip2, idefics3, smolvlm]


def run(model, inputs, real):
    """What a tower returns for patches, and the gradients of its parameters."""
    model.zero_grad()
    out = model(**inputs)
    found = [out.last_hidden_state[real]]
    found += [out.pooler_output] if getattr(out, "pooler_output", None) is not None else []
    sum((x * make_tensor(*x.shape)).sum() for x in found).backward()  # squares behind a norm are constant
    return [x.detach() for x in found], {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def rows_of_layers(model):
    """The number of rows that each layer of the encoder is given, filled by each forward."""
    seen = []
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    return seen


@pytest.mark.parametrize("tower", TOWERS)
def test_layers_see_patches_alone_and_say_the_same(tower):
    model, inputs, real = tower()
    rows = rows_of_layers(model)
    expected, gradients = run(model, inputs, real)
    assert rows == [48, 48]
    with vot_kernels.patched(model, padding=False) as report:
        rows.clear()
        found, found_gradients = run(model, inputs, real)
        assert rows == [27, 27]
        assert not model.encoder(**embedded(model, inputs)).last_hidden_state[~real].any()
    assert [(m.name, m.before, m.after) for m in report.replaced][-1] == (
        "encoder", "all rows", "rows of tokens alone"
    )  # fmt: skip
    assert "all rows -> rows of tokens alone (torch)" in str(report)
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).abs().max() <= OUTPUT * wanted.abs().max()
    assert found_gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        if not name.endswith("k_proj.bias"):  # softmax cancels it
            assert (found_gradients[name] - wanted).abs().max() <= GRADIENT * wanted.abs().max(), name
    again, _ = run(model, inputs, real)
    assert all(torch.equal(x, wanted) for x, wanted in zip(again, expected, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def embedded(model, inputs):
    """What the tower hands to its encoder."""
    given = []
    handle = model.encoder.register_forward_pre_hook(
        lambda m, a, k: given.append(k), with_kwargs=True, prepend=True
    )
    model(**inputs)
    handle.remove()
    return given[0]


@pytest.mark.parametrize("tower", TOWERS)
def test_states_of_every_layer_keep_their_rows(tower):
    model, inputs, real = tower()
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    with vot_kernels.patched(model, padding=False):
        found = model(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for x, exact in zip(found, wanted, strict=True):
        assert x.shape == exact.shape
        assert (x[real] - exact[real]).abs().max() <= OUTPUT * exact[real].abs().max()


def test_texts_are_pooled_from_padding_as_always():
    """SigLIP 2 takes the last place of a text, whatever lies there."""
    text = SIZES | {"vocab_size": 20, "max_position_embeddings": 8, "projection_size": 32}
    config = Siglip2Config(text_config=text, vision_config=SIZES | {"patch_size": 4, "num_patches": 16})
    model, mask = spread(Siglip2Model(config)), torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    inputs = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": mask}
    wanted = model.text_model(**inputs)
    with vot_kernels.patched(model, padding=False) as report:
        found = model.text_model(**inputs)
    assert [m.name for m in report.replaced if m.before == "all rows"] == ["vision_model.encoder"]
    for name in ("last_hidden_state", "pooler_output"):
        assert (found[name] - wanted[name]).abs().max() <= OUTPUT * wanted[name].abs().max()


def test_a_batch_without_padding_is_as_always():
    model, inputs, _ = siglip2()
    full = inputs | {
        "pixel_attention_mask": torch.ones(3, 16, dtype=torch.int32),
        "spatial_shapes": torch.full((3, 2), 4),
    }
    with vot_kernels.patched(model):
        wanted = model(**full).last_hidden_state
    with vot_kernels.patched(model, padding=False):
        assert torch.equal(model(**full).last_hidden_state, wanted)


def test_a_compiled_tower_computes_all_rows():
    model, inputs, real = siglip2()
    wanted = model(**inputs).last_hidden_state[real]
    with vot_kernels.patched(model, padding=False), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        found = compiled(**inputs).last_hidden_state[real]
    assert (found - wanted).abs().max() <= OUTPUT * wanted.abs().max()


def test_checkpointed_layers_have_the_same_gradients():
    model, inputs, real = siglip2()
    with vot_kernels.patched(model, padding=False):
        _, wanted = run(model, inputs, real)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, found = run(model, inputs, real)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_no_padding_either(copied):
    model, inputs, _ = siglip2()
    vot_kernels.patch(model, padding=False)
    twin = copied(model)
    rows = rows_of_layers(twin)
    assert torch.equal(twin(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert rows == [27, 27]


def test_what_cannot_be_says_so_and_changes_nothing():
    model = siglip2()[0]
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"padding=False is for attention=\"exact\""):
        vot_kernels.patch(model, "hybrid", frames=1, padding=False)
    with pytest.raises(ValueError, match="padding must be one of False, True, got 'no'"):
        vot_kernels.patch(model, padding="no")
    with pytest.raises(ValueError, match="padding=False needs an image encoder .* Qwen2_5_VL.* has none"):
        vot_kernels.patch(qwen2_5_vl(), padding=False)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_image_of_padding_alone_is_zero():
    model, inputs, real = siglip2()
    with vot_kernels.patched(model, padding=False):
        inputs["pixel_attention_mask"][2] = 0
        out = nn.Module.__call__(model.encoder, **embedded(model, inputs)).last_hidden_state
    assert not out[2].any() and out[:2][real[:2]].all()


def test_a_batch_of_padding_alone_is_as_with_padding():
    model, inputs, _ = siglip2()
    inputs["pixel_attention_mask"][:] = 0
    out = []
    for padding in (True, False):
        with torch.no_grad(), vot_kernels.patched(model, padding=padding):
            out.append(model(**inputs).last_hidden_state)
    assert out[0].isfinite().all() and torch.equal(*out)
