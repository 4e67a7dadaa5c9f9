"""The figures in the README are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks.report import TABLES, render

README = Path(__file__).parents[2] / "README.md"


def test_every_table_is_what_the_results_give():
    text = README.read_text()
    assert render(text) == text, "run python -m benchmarks.report"
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)


def test_an_edited_figure_is_noticed():
    text = README.read_text()
    begin = text.index("<!-- table: cpu -->")
    place = text.index(" ×**", begin)
    assert render(text[:place] + "9" + text[place:]) == text


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="cpu, perception, questions"):
        render("<!-- table: gpu -->\n<!-- end -->")
