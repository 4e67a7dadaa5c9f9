"""Files of questions and answers of `vot ask --batch`: what a line may say, what is refused at once."""

import json
import os
from pathlib import Path

import pytest

from tests.pipelines.mortal import Result
from vot_kernels.files import append_json_lines
from vot_kernels.pipelines.batch import answer_batch, jobs_of, read_questions
from vot_kernels.pipelines.sampling import Sampling
from vot_kernels.pipelines.workers import AnswerQuestions
from vot_kernels.scene_graph.interval import Interval

ASKED = {"video": "a.mp4", "question": "Who?"}


class Watched:
    """Stands for a VideoQA, and keeps which frames it was asked about."""

    def __init__(self):
        self.shown = []

    def ask(self, video, question, candidates, sampling):
        self.shown.append((Path(video).name, sampling))
        return Result(video, question, candidates, sampling)


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def loading(monkeypatch):
    """Loading a model fails the test."""
    from vot_kernels.cli.models import Models

    def load(models):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Models, "load", load)


def test_a_question_is_about_its_part_of_the_video(tmp_path):
    parts = [[0, 0.5], [0, 0.5], [1, 2], None]
    questions = write(tmp_path / "q.jsonl", *(ASKED | {"part": part} for part in parts), ASKED)
    wanted = [Sampling(4.0, start=0, end=0.5)] * 2 + [Sampling(4.0, start=1, end=2)] + [Sampling(4.0)] * 2
    watched, out = Watched(), tmp_path / "a.jsonl"
    video = tmp_path / "a.mp4"
    jobs = [(video, 2, wanted[0]), (video, 1, wanted[2]), (video, 2, wanted[3])]
    assert jobs_of(questions, out, Sampling(fps=4.0)) == jobs
    assert answer_batch(watched, questions, out, Sampling(fps=4.0)) == (5, 0, 0)
    assert watched.shown == [("a.mp4", sampling) for sampling in wanted]
    assert [row.get("part") for row in rows_of(out)] == [[0, 0.5], [0, 0.5], [1, 2], None, None]


def test_a_worker_asks_about_the_part_too():
    watched = Watched()
    column = {"id": ["1", "2", "3"], "video": ["a.mp4"] * 3, "question": ["Who?"] * 3, "candidates": [[]] * 3}
    answer = AnswerQuestions(lambda: watched)
    answer(column | {"part": [[0, 0.5], [], None]})
    answer(column)  # of a caller that has no parts
    assert [sampling for _, sampling in watched.shown] == [Sampling(start=0, end=0.5)] + [Sampling()] * 5
    bounded = AnswerQuestions(lambda: watched, sampling=Sampling(start=1))
    refused, *_ = map(json.loads, bounded(column | {"part": [[0, 0.5], [], []]})["answer"])
    assert refused["error"].startswith('"part" says which seconds are shown')


@pytest.mark.parametrize("range_", [Sampling(start=0.0), Sampling(end=1.0)])
def test_a_part_and_another_range_are_refused(tmp_path, range_):
    questions = write(tmp_path / "q.jsonl", ASKED, ASKED | {"part": [0, 0.5]})
    with pytest.raises(ValueError, match=r'q\.jsonl, line 2: "part" says .* cannot be given, too'):
        answer_batch(Watched(), questions, tmp_path / "a.jsonl", range_)
    with pytest.raises(ValueError, match="cannot be given"):
        range_.of_part(Interval(0, 1))
    assert range_.of_part(None) is range_ and not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"part": [0.5]}, r'line 1: "part" must be \[start, end\] in seconds'),
        ({"part": [2, 1]}, 'line 1: "part" must begin before it ends'),
        ({"part": "0–1"}, r'line 1: "part" must be \[start, end\]'),
        ({"id": 1.5}, 'line 1: "id" must be a string, got the number 1.5'),
        ({"id": True}, 'line 1: "id" must be a string'),
    ],
)
def test_a_line_is_held_to_what_vot_data_check_asks_for(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "q.jsonl", ASKED | line))


def test_questions_from_a_pipe_are_refused(vot, tmp_path, loading):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = vot("ask", "--batch", tmp_path / "pipe", "--out", tmp_path / "out.jsonl")
    assert code == 2 and "must be a regular file" in err


def test_a_file_that_another_run_writes_is_refused(vot, tmp_path, loading):
    out = tmp_path / "out.jsonl"
    with append_json_lines(out):
        code, _, err = vot("ask", "--batch", write(tmp_path / "q.jsonl", ASKED), "--out", out)
    assert code == 2 and "Another process is writing to" in err


def test_the_number_of_a_line_is_the_id_of_one_without(tmp_path):
    items = read_questions(write(tmp_path / "q.jsonl", ASKED | {"id": None}, ASKED, ASKED | {"id": 7}))
    assert [item["id"] for item in items] == ["1", "2", "7"]


def test_lines_that_are_not_utf8_are_named_and_a_mark_is_passed_over(vot, tmp_path, loading):
    path, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ASKED).encode() + b"\n")
    assert len(read_questions(path)) == 1
    with path.open("ab") as lines:
        lines.write(b'{"video": "a.mp4", "question": "caf\xe9?"}\n')
    code, _, err = vot("ask", "--batch", str(path), "--out", str(out))
    assert code == 2 and err == f"{path}, line 2: The line is not UTF-8: byte 36 cannot be read.\n"
    out.write_bytes(b'{"id": "caf\xe9"}\n')
    code, _, err = vot("ask", "--batch", str(write(path, ASKED)), "--out", str(out))
    assert code == 2 and err == f'{out} exists and is not a JSONL of answers with an "id" each.\n'


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("out", ["q.jsonl", "./q.jsonl", "link.jsonl"])
@pytest.mark.parametrize("id_", [{}, {"id": "a"}])
def test_the_questions_are_not_overwritten(vot, tmp_path, monkeypatch, loading, out, id_, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    questions = write(Path("q.jsonl"), ASKED | id_)
    before = questions.read_text()
    os.symlink("q.jsonl", "link.jsonl")
    code, _, err = vot("ask", "--batch", "q.jsonl", "--out", out, "--engine", engine)
    assert code == 2 and err.count("\n") == 1 and "The output must not be one of the inputs" in err
    assert questions.read_text() == before


def test_another_file_of_questions_is_no_file_of_answers(vot, tmp_path, loading):
    questions = write(tmp_path / "q.jsonl", ASKED | {"id": "a"})
    out = write(tmp_path / "more.jsonl", ASKED | {"id": "a"})
    with out.open("a") as lines:
        lines.write("without an end")
    before = out.read_text()
    code, _, err = vot("ask", "--batch", str(questions), "--out", str(out))
    assert code == 2 and "more.jsonl exists and is not a JSONL of answers" in err
    assert out.read_text() == before
