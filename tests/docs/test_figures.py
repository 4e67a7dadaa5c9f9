"""The figures in the README and the docs are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks.report.readme import PAGES, TABLES, changed_tables, render

README = Path(__file__).parents[2] / "README.md"


def test_every_table_is_what_the_results_give():
    text = "".join(page.read_text() for page in PAGES)
    assert changed_tables(text) == [], "run python -m benchmarks.report"
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in text] == []


def test_an_edited_figure_is_noticed():
    text = README.read_text()
    place = text.index(" ×**", text.index("<!-- table: cpu -->"))
    edited = text[:place] + "9" + text[place:]
    assert changed_tables(edited) == ["cpu"]
    assert render(edited) == text


def test_an_unknown_table_is_refused():
    with pytest.raises(
        ValueError,
        match="'speed'.*cpu, .*, perception, questions, vlm, temporal-context, linearize, when, long-video",
    ):
        render("<!-- table: speed -->\n<!-- end -->")
