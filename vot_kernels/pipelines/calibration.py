"""Fits the confidence of answers to how often they were right, on the rows of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.extras import imports_for
from vot_kernels.files import atomic_write, check_output, read_json_lines
from vot_kernels.reasoning.calibration import (
    FILE,
    Calibration,
    calibration_error,
    calibrations_text,
    logit,
    read_calibrations,
)

MIN_QUESTIONS = 40
_FOLDS = 5


def fit_calibration(confidences: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Fit a calibration to answers to held-out questions.

    As in Platt (1999, "Probabilistic outputs for support vector machines"), an answer that was right counts as a
    little wrong and the other way round, as if one more of each had been seen. So answers that were all right do not
    make a calibration certain. Nor does a calibration turn the order of confidences: where the fit would, for few
    answers tell it, all get the same one.

    Raises:
        ValueError: there are fewer than 40 answers.
    """
    if len(right) < MIN_QUESTIONS:
        raise ValueError(f"A calibration needs {MIN_QUESTIONS} answers, got {len(right)}.")
    with imports_for("A calibration", "train"):
        from sklearn.linear_model import LogisticRegression
    hits = np.asarray(right, bool)
    share = np.where(hits, (hits.sum() + 1) / (hits.sum() + 2), 1 / ((~hits).sum() + 2))
    features = np.array([[logit(c)] for c in confidences])
    labels = np.repeat([True, False], len(hits))
    model = LogisticRegression().fit(
        np.concatenate([features, features]), labels, sample_weight=np.concatenate([share, 1 - share])
    )
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < 0:
        slope, offset = 0.0, logit(float(share.mean()))
    return Calibration(slope, offset, len(right))


def calibration_errors(confidences: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    """Return the expected calibration error of the raw confidences and of calibrated ones.

    Each fifth of the answers is calibrated by the other four, so none by itself. Raises what `fit_calibration` raises.
    """
    fold = np.arange(len(right)) % _FOLDS
    values, hits = np.asarray(confidences, float), np.asarray(right, bool)
    calibrated = np.zeros(len(values))
    for n in range(_FOLDS):
        fitted = fit_calibration(values[fold != n].tolist(), hits[fold != n].tolist())
        calibrated[fold == n] = [fitted(value) for value in values[fold == n]]
    return {
        "raw": calibration_error(confidences, right),
        "calibrated": calibration_error(calibrated.tolist(), right),
    }


def answered(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[bool]]:
    """Return confidence, and whether the answer was right, of the rows of `evaluate_digitworld` that have an answer."""
    given = [row for row in rows if row["answers"].get("vot") and row["in_domain"]]
    return [row["confidence"] for row in given], [
        row["answers"]["vot"] == row["question"]["answer"] for row in given
    ]


def calibrate(rows_file: Path, folder: Path) -> Calibration:
    """Fit the confidence of one language model, on the rows of an evaluation, and keep it with a checkpoint.

    Args:
        rows_file: the file of rows that `vot eval digitworld` writes.
        folder: of the perception checkpoint; its calibration.json gets, or changes, the entry of the language model.

    Raises:
        ValueError: the rows have no language model, or too few answers.
    """
    check_output(folder / FILE, "", rows_file)
    settings, *rows = read_json_lines(rows_file, mend=False) or [None]
    if not isinstance(settings, dict) or not isinstance(settings.get("settings"), dict):
        raise ValueError(f"{rows_file} must have rows of `vot eval digitworld`, got none.")
    name = settings["settings"].get("llm")
    if name is None:
        raise ValueError(f"{rows_file} has no answers of a language model with VoT.")
    calibration = fit_calibration(*answered(rows))
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(calibrations_text({**read_calibrations(folder), name: calibration}))
    return calibration
