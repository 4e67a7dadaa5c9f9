import numpy as np
import pytest

from vot_kernels.reasoning.calibration import (
    Calibration,
    calibration_error,
    calibrations_text,
    read_calibrations,
)


def test_error_of_bins_worked_out_by_hand():
    # Two answers at 0.75, one of them right: 0.25 off. Two at 0.95, both right: 0.05 off.
    assert calibration_error([0.75, 0.75, 0.95, 0.95], [True, False, True, True]) == pytest.approx(0.15)
    assert calibration_error([1.0, 0.0], [True, False]) == 0


@pytest.mark.parametrize("given", [([], []), ([0.5], [True, False])])
def test_error_needs_one_confidence_for_each_answer(given):
    with pytest.raises(ValueError, match="one confidence for each answer"):
        calibration_error(*given)


def test_a_calibration_is_monotone_and_leaves_no_answer_at_zero():
    calibration = Calibration(slope=0.5, offset=1.0, questions=100)
    values = [calibration(c) for c in np.linspace(0.01, 1, 30)]
    assert values == sorted(values) and values[0] > 0 and values[-1] < 1
    assert calibration(0.0) == 0.0
    assert Calibration(1.0, 0.0, 1)(0.3) == pytest.approx(0.3)


def test_calibrations_are_kept_by_the_name_of_the_model(tmp_path):
    assert read_calibrations(tmp_path) == {}
    kept = {"one": Calibration(0.5, 1.0, 70), "two": Calibration(2.0, -1.0, 80)}
    (tmp_path / "calibration.json").write_text(calibrations_text(kept))
    assert read_calibrations(tmp_path) == kept
