"""The benchmark of long embeddings runs, goes on where it was, and its table has a row for each length."""

import json

from benchmarks import long_encoding
from benchmarks.report import readme


def test_it_measures_each_length_once(tmp_path, monkeypatch):
    monkeypatch.setattr(long_encoding, "LENGTHS", {"windows": (6,), "bundled": (40,)})
    out = tmp_path / "long.json"
    assert long_encoding.main([str(out)]) == 0
    first = json.loads(out.read_text())
    assert [(row["encoder"], row["frames"]) for row in first["rows"]] == [("windows", 6), ("bundled", 40)]
    assert all(row["peak_mb"] > row["loaded_mb"] / 2 > 0 and row["tokens"] > 0 for row in first["rows"])
    monkeypatch.setattr(long_encoding, "measure", lambda *_: 1 / 0)
    assert long_encoding.main([str(out)]) == 0  # nothing is left to do
    assert json.loads(out.read_text()) == first
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    out.rename(tmp_path / "long-encoding.json")
    assert "| 40 |" in readme.long_encoding_table()
