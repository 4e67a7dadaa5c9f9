import json

import numpy as np
import pytest

from vot_kernels.pipelines.calibration import calibrate, calibration_errors, fit_calibration
from vot_kernels.reasoning.calibration import read_calibrations


def overconfident(count, seed=0):
    """Return raw confidences of answers of which a smaller share is right."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.2, 0.99, count)
    return raw.tolist(), (rng.random(count) < raw**3).tolist()


def test_fitting_brings_the_error_down_on_answers_that_were_not_fitted():
    errors = calibration_errors(*overconfident(2000))
    assert errors["raw"] > 0.15 and errors["calibrated"] < 0.05


def test_too_few_answers_are_one_sentence():
    with pytest.raises(ValueError, match="needs 40 answers, got 39"):
        fit_calibration([0.5] * 39, [True] * 39)


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_leave_a_doubt(right):
    """As if one more of each had been seen."""
    confidences = np.linspace(0.1, 0.9, 50).tolist()
    calibration = fit_calibration(confidences, [right] * 50)
    expected = 51 / 52 if right else 1 / 52
    assert [calibration(c) for c in confidences] == pytest.approx([expected] * 50, abs=2e-3)
    errors = calibration_errors(confidences, [right] * 50)  # each fifth by 40 others
    assert errors["calibrated"] == pytest.approx(1 / 42, abs=3e-3)


def test_the_order_of_confidences_stays():
    confidences = np.linspace(0.1, 0.9, 50).tolist()
    calibration = fit_calibration(confidences, [c < 0.5 for c in confidences])
    assert calibration.slope == 0 and calibration(0.1) == calibration(0.9) == pytest.approx(0.5)


def rows_file(path, llm="some model", count=60):
    confidences, right = overconfident(count)
    rows = [
        {
            "question": {"answer": "yes"},
            "answers": {"vot": "yes" if hit else "no"},
            "confidence": confidence,
            "in_domain": True,
        }
        for confidence, hit in zip(confidences, right, strict=True)
    ]
    rows.append({**rows[0], "in_domain": False})
    rows.append({**rows[0], "answers": {"vot": ""}})
    lines = [{"settings": {} if llm is None else {"llm": llm}}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_calibrating_keeps_the_other_models(tmp_path):
    first = calibrate(rows_file(tmp_path / "rows.jsonl"), tmp_path)
    assert first.questions == 60  # neither the unknown clip nor the abstention
    calibrate(rows_file(tmp_path / "rows.jsonl", "another"), tmp_path)
    assert set(read_calibrations(tmp_path)) == {"some model", "another"}


def test_rows_without_a_language_model_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no answers of a language model"):
        calibrate(rows_file(tmp_path / "rows.jsonl", None), tmp_path)
