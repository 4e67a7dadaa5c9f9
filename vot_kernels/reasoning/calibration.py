"""Confidence that means what it says: of answers with a confidence of 0.8, four in five are right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FILE = "calibration.json"
"""In the folder of a perception checkpoint, by the name of the language model that read its graphs."""


@dataclass(frozen=True)
class Calibration:
    """Maps a raw confidence to the share of answers of that confidence that were right.

    Attributes:
        slope, offset: the share is `sigmoid(slope * logit(raw) + offset)` (Platt, 1999).
        questions: number of held-out questions that it was fitted to.
    """

    slope: float
    offset: float
    questions: int

    def __call__(self, confidence: float) -> float:
        """Return the calibrated value of a raw confidence in [0, 1]; 0, no answer, stays 0."""
        if confidence <= 0:
            return 0.0
        return float(1 / (1 + np.exp(-(self.slope * logit(confidence) + self.offset))))


def logit(confidence: float) -> float:
    """Return log(p / (1 - p)) of a confidence, of which 0 and 1 count as 0.005 and 0.995."""
    p = min(max(confidence, 0.005), 0.995)
    return float(np.log(p / (1 - p)))


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Return the expected calibration error (Guo et al., 2017) in [0, 1].

    It is the mean distance, over answers, between the mean confidence and the share of right answers of their bin; bins
    are of equal width.

    Raises:
        ValueError: there are no answers, or not one confidence for each.
    """
    if not right or len(confidences) != len(right):
        raise ValueError(
            f"There must be one confidence for each answer, got {len(confidences)} and {len(right)}."
        )
    values, hits = np.asarray(confidences, float), np.asarray(right, float)
    place = np.minimum((values * bins).astype(int), bins - 1)
    apart = [abs(values[place == n].sum() - hits[place == n].sum()) for n in range(bins)]
    return float(sum(apart) / len(values))


def read_calibrations(folder: Path) -> dict[str, Calibration]:
    """Return the calibrations in a checkpoint's folder by language model; none if it has no such file."""
    file = folder / FILE
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: Calibration(**values) for name, values in found.items()}


def calibrations_text(calibrations: Mapping[str, Calibration]) -> str:
    """Return what `read_calibrations` reads."""
    return json.dumps({name: asdict(c) for name, c in calibrations.items()}, indent=1) + "\n"
