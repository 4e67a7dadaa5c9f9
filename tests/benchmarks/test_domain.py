"""Known and foreign clips: the area under the curve by hand, and a small run of the command."""

import json

import pytest

from benchmarks import domain


def test_the_area_under_the_curve():
    found = domain.summarise({"natural": [3.0, 1.0], "test": [0.5, 1.0, 2.0], "long": [0.2]})
    assert found["splits"]["test"] == {
        "auroc": pytest.approx((3 + 1.5) / 6),  # 3.0 is further than all, 1.0 than one, and equal to one
        "foreign": pytest.approx(1 / 3),
        "clips": 3,
    }
    assert found["splits"]["long"]["auroc"] == 1 and found["natural"] == {"called_foreign": 0.5, "clips": 2}


def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(domain, "SPLITS", ("test",))
    monkeypatch.setattr(domain, "NATURAL", ("bikes.mp4",))
    monkeypatch.setattr(domain, "WINDOWS", 1)
    assert domain.main([str(tmp_path / "out.json"), "--clips", "2"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["splits"]["test"] == {"auroc": 1.0, "foreign": 0.0, "clips": 2}
    assert (
        result["natural"] == {"called_foreign": 1.0, "clips": 1}
        and "test: AUROC 1.0000" in capsys.readouterr().out
    )
    assert domain.main([str(tmp_path / "out.json"), "--clips", "0"]) == 2
