"""The loop of every stage: parts of a step, measurements in between, the learning rate."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vot_kernels.train.config import Training
from vot_kernels.train.loop import Schedule, Validation, run_steps

ROWS = torch.arange(48.0).view(12, 4).sin()  # 12 rows, of which each step takes 4


def train(
    folder: Path, settings: Training, sizes: list[int], validate=None, stop_at=None
) -> tuple[nn.Module, list[dict]]:
    """Learn to return zeros from rows in parts of these sizes, over and over; return the model and its reports."""
    torch.manual_seed(0)
    model, reports = nn.Linear(4, 2).double(), []
    parts = [part for part in ROWS.double().split(sizes) if len(part)]

    def batches(start: int, stop: int):
        return (parts[n % len(parts)] for n in range(start, stop))

    def losses(index: int, rows: Tensor) -> dict[str, Tensor]:
        assert rows is parts[index % len(parts)]
        return {"error": model(rows).square().mean(), "size": 0.01 * model.weight.square().sum()}

    run_steps(
        folder,
        model,
        torch.optim.SGD(model.parameters(), lr=settings.learning_rate),
        Schedule.of(settings),
        batches,
        losses,
        signature={},
        stop_at=stop_at,
        report=lambda step, values: reports.append({"step": step} | values),
        rows=len,
        validation=Validation(model, settings, validate),
    )
    return model, reports


@dataclass(frozen=True)
class Rows(Training):
    """Settings of these tests."""

    steps: int = 6
    learning_rate: float = 0.1
    warmup: int = 0


@pytest.mark.parametrize(("parts", "sizes"), [(2, [2, 2] * 3), (4, [1] * 12), (2, [1, 3, 3, 1, 2, 2])])
def test_a_step_in_parts_is_the_step_as_a_whole(parts, sizes, tmp_path):
    """Also where parts have different numbers of rows."""
    whole, reports = train(tmp_path / "whole", Rows(), [4] * 3)
    cut, found = train(tmp_path / "parts", Rows(accumulation=parts), sizes)
    torch.testing.assert_close(cut.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, reports, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)
    assert reports[-1]["error"] < reports[0]["error"]


def test_a_run_in_parts_is_resumed_where_it_stopped(tmp_path):
    settings = Rows(accumulation=2)
    straight, _ = train(tmp_path / "straight", settings, [2] * 6)
    train(tmp_path / "resumed", settings, [2] * 6, stop_at=4)
    resumed, reports = train(tmp_path / "resumed", settings, [2] * 6)
    assert [values["step"] for values in reports] == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_held_out_metrics_come_when_they_are_due_and_change_nothing(tmp_path):
    seen = []

    def measure(model: nn.Module, clips: int) -> dict[str, float]:
        seen.append((model.training, clips, torch.rand(()).item()))
        return {"accuracy": 0.5}

    settings = Rows(validate_every=2, validation_clips=3)
    plain, _ = train(tmp_path / "plain", Rows(), [4] * 3)
    drawn = torch.rand(4)
    model, reports = train(tmp_path / "measured", settings, [4] * 3, measure)
    assert torch.equal(torch.rand(4), drawn)  # both began with the same seed, and measuring drew of its own
    assert [(training, clips) for training, clips, _ in seen] == [(False, 3)] * 3
    due = {values["step"] for values in reports if values.get("held_out/accuracy") == 0.5}
    assert due == {2, 4, 6} and model.training
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_part_of_the_model_that_is_frozen_stays_in_its_mode(tmp_path):
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()
    Validation(model, Rows(validate_every=1), lambda model, clips: {}).after(1)
    assert model[0].training and not model[1].training
