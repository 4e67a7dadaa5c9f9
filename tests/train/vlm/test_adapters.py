"""A model of adapters: what is kept of a run, and what it becomes beside its language model."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vot_kernels.data.digitworld import generate_episode
from vot_kernels.integrations.patching import patched
from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.train.checkpoint import folder_fingerprint
from vot_kernels.train.projector.stage import describe
from vot_kernels.train.sft.run import run as run_sft
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.vlm import adapters
from vot_kernels.train.vlm import model as vlm
from vot_kernels.train.vlm.conversations import encode


@pytest.fixture(scope="module")
def parts():
    """A new model, the same with adapters that have learnt something, and the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm, "_TOKENIZER_EPISODES", 6)
        whole, processor = vlm.build_model("nano", BUNDLED_CHECKPOINT, seed=0)
    adapted = vlm.add_lora(copy.deepcopy(whole), 0)
    torch.manual_seed(1)
    for parameter in vlm.train_only(adapted, ("projector", "graph", "lora")).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return whole, adapted, processor


@pytest.fixture(autouse=True)
def published(parts, monkeypatch):
    """The language model, which is not fetched."""
    monkeypatch.setattr(adapters, "build_model", lambda *_: (copy.deepcopy(parts[0]), parts[2]))
    monkeypatch.setattr(adapters, "ensure_smollm2", lambda: None)


@pytest.fixture
def run(parts, tmp_path):
    """The folder of a finished run."""
    _, adapted, processor = parts
    vlm.save_half(copy.deepcopy(adapted).merge_and_unload(), processor, tmp_path / "run" / "model")
    trained = vlm.train_only(adapted, ("projector", "graph", "lora"))
    (tmp_path / "run" / "model" / "training.json").write_text(json.dumps({"trained": ["lora"], "seed": 7}))
    (tmp_path / "run" / "checkpoint-3").mkdir()
    learnt = {name: p.detach().contiguous() for name, p in trained.items()}
    save_file(learnt, tmp_path / "run" / "checkpoint-3" / "model.safetensors")
    return tmp_path / "run"


@pytest.fixture
def folder(run, tmp_path):
    adapters.export_adapters(run, tmp_path / "kept")
    return tmp_path / "kept"


@torch.no_grad()
def logits(model, processor):
    batch = encode(processor, [describe(generate_episode("test", 0), np.random.default_rng(0))])
    with patched(model):
        return model(**batch, use_cache=False).logits


def test_adapters_and_their_language_model_are_the_model_again(parts, folder):
    model, processor = adapters.load_adapters(folder)
    wanted = logits(copy.deepcopy(parts[1]).merge_and_unload().eval(), processor)
    new = logits(parts[0].eval(), processor)
    error = (logits(model, processor) - wanted).abs().max()
    assert error < 0.02 * (new - wanted).abs().max()  # half precision, beside what was learnt


def test_a_stage_that_begins_with_adapters_knows_them(folder):
    kept = load_file(folder / "adapters.safetensors")
    before = folder_fingerprint(folder)
    save_file(kept | {name: t + 1 for name, t in list(kept.items())[:1]}, folder / "adapters.safetensors")
    assert folder_fingerprint(folder) != before


def test_what_is_kept_is_small_and_says_how_it_was_made(folder):
    records = {"config.json", "generation_config.json", "training.json"}
    assert {f.name for f in folder.iterdir()} == {"adapters.safetensors", *records}
    kept = load_file(folder / "adapters.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float16}
    assert {vlm.part_of(name) for name in kept} == {"lora", "projector", "graph"}
    assert json.loads((folder / "training.json").read_text())["seed"] == 7


@pytest.mark.parametrize("damage", ["missing", "extra"])
def test_damaged_adapters_are_one_sentence(folder, damage):
    kept = load_file(folder / "adapters.safetensors")
    name = sorted(kept)[0]
    if damage == "missing":
        del kept[name]
    else:
        kept["what.is.this"] = torch.zeros(1)
    save_file(kept, folder / "adapters.safetensors")
    with pytest.raises(
        ValueError, match="has no weights" if damage == "missing" else "among them what.is.this"
    ):
        adapters.load_adapters(folder)


def test_runs_without_adapters_are_one_sentence(run, tmp_path):
    (run / "model" / "training.json").write_text(json.dumps({"trained": ["text"]}))
    with pytest.raises(ValueError, match="trained no adapters"):
        adapters.export_adapters(run, tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="has no finished run"):
        adapters.export_adapters(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_adapters_that_are_not_all_that_was_learnt_are_refused(parts, run, tmp_path):
    """A run that began with merged adapters has adapters of its own beside them."""
    _, adapted, processor = parts
    merged = copy.deepcopy(adapted).merge_and_unload()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            if name.endswith("q_proj.weight"):
                weight += 0.05 * torch.randn_like(weight)
    vlm.save_half(merged, processor, tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").replace(run / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="began with a model whose own adapters are merged into it"):
        adapters.export_adapters(run, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_stage_trains_the_adapters_on_that_it_begins_with(folder, tmp_path):
    """So that those of its result are all that was learnt, in every stage before it, too."""
    settings = SftTraining(
        text="lora", steps=1, batch_size=1, warmup=1, learning_rate=1e-6, frames=0.0, questions=1
    )
    run_sft(tmp_path / "next", folder, settings, eval_clips=1)
    adapters.export_adapters(tmp_path / "next", tmp_path / "then")
    before, after = (load_file(f / "adapters.safetensors") for f in (folder, tmp_path / "then"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-2, atol=1e-4)
