"""The figures in the README and the docs are those of the committed results."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.report.readme import PAGES, RESULTS, TABLES, changed_tables, render
from vot_kernels.files import read_json_lines
from vot_kernels.scene_graph import Interval

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
        match="'speed'.*cpu, .*, perception, questions, .*, vlm, reader, .*, temporal-context, .*, long-video",
    ):
        render("<!-- table: speed -->\n<!-- end -->")


def test_scores_of_questions_follow_from_their_rows():
    """Rows without their scene graphs are committed beside the scores that were made of them."""
    scores = read("digitworld-when.json")["localisation"]["scores"]
    rows = read_json_lines(RESULTS / "digitworld-when.rows.jsonl")[1:]
    for system in rows[0]["answers"]:
        found = [
            Interval(*row["answers"][system]).iou(Interval(**row["question"]["interval"]))
            if row["answers"][system]
            else 0.0
            for row in rows
        ]
        assert sum(found) / len(found) == pytest.approx(scores[system]["all"]["miou"]), system
    for name in ("vlm", "reader"):
        accuracy = read(f"digitworld-{name}.json")["accuracy"]
        rows = read_json_lines(RESULTS / f"digitworld-{name}.rows.jsonl")[1:]
        for system in ("vlm", "vlm_verified", "rules"):
            right = [row["answers"][system] == row["question"]["answer"] for row in rows]
            assert sum(right) / len(right) == pytest.approx(accuracy[system]["all"]), (name, system)


def test_no_blind_baseline_is_far_off_chance():
    """All but shuffled frames, which are enough to count hits, within the noise of so many questions."""
    result = read("digitworld-blind.json")
    rows = read_json_lines(RESULTS / "digitworld-blind.rows.jsonl")[1:]
    assert len(rows) == result["settings"]["videos"]
    kinds = Counter(row["question"]["kind"] for row in rows)
    right = Counter(
        row["question"]["kind"] for row in rows if row["answers"]["rules"] == row["question"]["answer"]
    )
    for kind, count in kinds.items():
        assert right[kind] / count == pytest.approx(result["accuracy"]["rules"][kind])
        chance = 0.2 if kind == "count" else 0.5
        for name in ("majority", "question_only", "single_frame", "shuffled_frames"):
            if (name, kind) != ("shuffled_frames", "count"):
                deviation = abs(result["accuracy"][name][kind] - chance)
                assert deviation <= 2.5 * (chance * (1 - chance) / count) ** 0.5, (name, kind)


def read(name):
    return json.loads((RESULTS / name).read_text())
