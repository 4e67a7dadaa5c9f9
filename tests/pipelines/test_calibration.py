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


@pytest.mark.parametrize("right", [[True] * 39, [True] * 50, [False] * 50])
def test_too_few_answers_are_one_sentence(right):
    with pytest.raises(ValueError, match="needs 40 answers, right ones and wrong ones"):
        fit_calibration([0.5] * len(right), right)


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
