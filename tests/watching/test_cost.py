"""The estimate of what questions cost, against counts by hand."""

from dataclasses import replace

import pytest
import torch

from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import load_video
from vot_kernels.watching import cost
from vot_kernels.watching.cost import ANSWER_TOKENS, GRAPH_TOKENS, PROMPT_TOKENS, READ_TOKENS, Estimate, Run
from vot_kernels.watching.loading import load_video_language_model


@pytest.fixture(scope="module")
def clip():
    return load_video(digitworld_clip()[0], num_frames=4)


@pytest.mark.parametrize(
    ("family", "tower", "patches"),
    # Qwen-VL: 2 steps in time of 4 × 4 patches; SmolVLM: 4 frames of 4 × 4 patches
    [("qwen2_5_vl", "visual", 32), ("smolvlm2", "vision_model", 64)],
)
def test_it_is_what_one_counts(folder_of, clip, family, tower, patches, monkeypatch):
    monkeypatch.setattr(cost, "_rates", lambda device, dtype: (1e9, 1e8))
    reader = load_video_language_model(folder_of(family))
    found, seen = reader.estimate(clip), reader.about(clip)
    whole = sum(p.numel() for p in reader.model.parameters())
    looking = sum(p.numel() for p in getattr(reader.model.model, tower).parameters())
    head = len(seen._head)
    kept = head + 4 * (head + PROMPT_TOKENS)  # four prompts at once
    assert (found.parameters, found.weight_bytes, found.visual_tokens) == (
        whole,
        4 * whole,
        seen.visual_tokens,
    )
    assert found.cache_bytes == kept * 2 * 2 * 2 * 8 * 4  # keys and values, 2 layers, 2 heads of 8, 4 bytes
    clip_flop, prompt_flop = (
        2 * (whole - looking) * head + 2 * looking * patches,
        2 * (whole - looking) * READ_TOKENS,
    )
    assert (found.clip_flop, found.prompt_flop) == (clip_flop, prompt_flop)
    new = GRAPH_TOKENS + ANSWER_TOKENS
    assert found.seconds == pytest.approx((clip_flop + prompt_flop) / 1e9 + new * 4 * whole / 1e8)
    run = replace(found, run=Run(videos=2, questions=3, clips=9, graphs=6))
    new = 6 * GRAPH_TOKENS + 3 * ANSWER_TOKENS
    assert run.seconds == pytest.approx((9 * clip_flop + 3 * prompt_flop) / 1e9 + new * 4 * whole / 1e8)
    assert "for 3 questions about 2 videos (clips to read: 9, graphs to write: 6)" in str(run)


def test_half_precision_halves_the_memory(folder_of, clip):
    folder, dtypes = folder_of("smolvlm2"), ("float32", "bfloat16")
    whole, half = (load_video_language_model(folder, dtype=dtype).estimate(clip) for dtype in dtypes)
    assert half.weight_bytes * 2 == whole.weight_bytes and half.cache_bytes * 2 == whole.cache_bytes


def test_the_sentence_says_what_it_rests_on():
    text = str(Estimate(7_000_000_000, 14_000_000_000, 300_000_000, 1234, 2e13, 3e13, 2e11, 1e10))
    assert "14.0 GB of memory for 7.0 G parameters and 300 MB for keys and values" in text
    assert "about 23 min a question" in text and "1234 tokens of a clip" in text
    assert text.count("(measured)") == 2 and f"{GRAPH_TOKENS + ANSWER_TOKENS} new tokens" in text


@pytest.mark.parametrize(("seconds", "words"), [(0.1, "1 s"), (59, "59 s"), (90, "2 min"), (7200, "2.0 h")])
def test_only_a_long_run_is_announced(seconds, words):
    found = Estimate(1, 0, 0, 1, seconds * 1e9, 0, 1e9, 1e9)
    assert found.long == (seconds >= 20) and f"about {words} a question" in str(found)


def test_rates_are_measured():
    flop_per_s, bytes_per_s = cost._rates("cpu", str(torch.float32).removeprefix("torch."))
    assert 1e8 < flop_per_s < 1e15 and 1e7 < bytes_per_s < 1e14
