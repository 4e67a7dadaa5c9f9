"""What `--dry-run` measures is what a step of training computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.train.estimate import Work, estimate
from vot_kernels.train.projector.run import STAGE as PROJECTOR
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.sft.run import STAGE as SFT
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.vlm.model import build_model

SHORT: dict[str, Any] = {"steps": 1, "batch_size": 2, "warmup": 0}


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return build_model("nano", BUNDLED_CHECKPOINT, 0)


def operations(work: Work) -> int:
    with FlopCounterMode(display=False) as counter:
        work.loss().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (PROJECTOR, ProjectorTraining(**SHORT)),
        (SFT, SftTraining(**SHORT)),
        (SFT, SftTraining(frames=0.0, questions=2, **SHORT)),
        (SFT, SftTraining(thoughts="short", precision="bfloat16", **SHORT)),
    ],
    ids=["projector", "sft", "graphs alone", "short thoughts in bfloat16"],
)
def test_an_estimate_does_what_a_step_does(stage, settings, vlm, tmp_path: Path):
    model, processor = vlm
    work = stage.work(model.train(), processor, settings)
    expected, losses = work.loss().item(), []
    with FlopCounterMode(display=False) as counter:
        stage.train(tmp_path, model, processor, settings, report=lambda step, terms: losses.append(terms))
    model.train()
    assert losses[0]["reply"] == pytest.approx(expected, rel=1e-5)
    assert operations(work) == counter.get_total_flops() > 0


def test_the_text_says_what_torch_counts(vlm):
    """Also of a step in parts; the weights stay as they are."""
    model, processor = vlm
    before = [p.clone() for p in model.parameters()]
    work = SFT.work(model.train(), processor, SftTraining(accumulation=2, **SHORT))
    trained = list(model.get_submodule("model.projector").parameters())
    text = estimate(model, trained, "projector", 7, work)
    assert f"{sum(p.numel() for p in trained):,} trained (projector) of" in text
    assert f"operations  {2 * operations(work) / 1e9:.2f} GFLOP" in text and "for 7 steps" in text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model.zero_grad(set_to_none=True)


def test_fewer_questions_and_no_frames_are_less_work(vlm):
    model, processor = vlm
    whole = SFT.work(model, processor, SftTraining(**SHORT))
    less = SFT.work(model, processor, SftTraining(frames=0.0, questions=2, **SHORT))
    assert operations(less) < 0.7 * operations(whole)


def test_a_step_in_two_parts_is_two_passes(vlm):
    model, processor = vlm
    work = SFT.work(model, processor, SftTraining(accumulation=2, **SHORT))
    assert work.passes == 2
    assert operations(work) < operations(SFT.work(model, processor, SftTraining(**SHORT)))
