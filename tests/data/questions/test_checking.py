"""Files of questions: what a line may say, a sentence for each that is wrong, the summary, memory, held-out videos."""

import dataclasses
import json
import sys
import tracemalloc

import pytest

from vot_kernels import cli
from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.questions import (
    check_questions,
    question_from_dict,
    question_to_dict,
    read_lines,
    split_questions,
)
from vot_kernels.data.questions import lines as lines_module
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.scene_graph import STSG, Interval

PLAIN = {"video": "a.mp4", "question": "Who comes in?", "answer": "the dog"}
GRAPH = "<stsg>\no1=red digit 3: 0:10,10,20,20 8:30,10,40,20\no2=blue digit 7\no1 hits o2 @8\n</stsg>"


def write(path, *items):
    """Write lines; what is no string is written as JSON."""
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def problems(path, **options):
    found = []
    summary = check_questions(path, lambda number, problem: found.append((number, problem)), **options)
    return found, summary


@pytest.fixture
def vot(monkeypatch, capsys):
    """Run `vot ...`; return (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


# --- one line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "kind", "answer"),
    [
        ({}, "open", "the dog"),
        ({"candidates": ["the cat", " the dog "]}, "choice", "the dog"),
        ({"answer": None, "start": 1, "end": 2.5}, "when", "1.00 s to 2.50 s"),
        ({"start": 1, "end": 2.5}, "open", "the dog"),
        ({"stsg": GRAPH}, "open", "the dog"),
    ],
)
def test_what_the_answer_is(more, kind, answer):
    question = question_from_dict(PLAIN | more, "7")
    assert (question.kind, question.answer, question.id) == (kind, answer, "7")


def test_a_graph_is_the_answer_where_nothing_else_is():
    stsg = generate_episode("test", 0).stsg
    question = question_from_dict({"video": "a.mp4", "question": "?", "stsg": stsg.to_dict()}, "1")
    assert question.kind == "graph" and question.answer == stsg.to_text() and question.stsg == stsg


def test_frames_of_the_text_form_are_counted_in_seconds_or_by_fps():
    times = [
        question_from_dict(PLAIN | {"stsg": GRAPH} | more, "1").stsg.frame_times_s
        for more in ({}, {"fps": 4})
    ]
    assert times[0][8] == 8 and times[1][8] == 2


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"candidates": ["the dog", "x"], "split": "val", "source": "me", "id": 12, "part": [0, 5.5]},
        {"answer": None, "start": 0.25, "end": 3},
        {"answer": None, "stsg": generate_episode("test", 1).stsg.to_dict()},
        {"stsg": GRAPH, "fps": 3, "start": 1, "end": 2},
    ],
)
def test_the_plain_form_is_read_back(more):
    question = question_from_dict(PLAIN | more, "7")
    plain = json.loads(json.dumps(question_to_dict(question)))
    assert question_from_dict(plain, "other") == question


BAD = [
    ("{", "not JSON: Expecting property name"),
    ("[1, 2]", 'must be an object with "video" and "question", got a list of 2'),
    ("1" * 5000, "not JSON that can be read"),
    ("[" * 100_000, "not JSON that can be read"),
    ({"question": "?", "answer": "a"}, '"video" is missing'),
    ({"video": "a.mp4", "answer": "a"}, '"question" is missing'),
    (
        {"video": "a.mp4", "question": "?"},
        '"answer" is missing; it must be a string, or there must be "start"',
    ),
    (PLAIN | {"video": 3}, '"video" must be a string, got the number 3'),
    (PLAIN | {"video": "https://x/a.mp4"}, "must be a local path, got the URL"),
    (PLAIN | {"question": "  "}, '"question" must say something'),
    (PLAIN | {"answer": True}, '"answer" must be a string, got true or false'),
    (PLAIN | {"answer": "\ud800"}, '"answer" must be text that UTF-8 can write'),
    (PLAIN | {"candidates": "a|b"}, '"candidates" must be a list of at least two strings, got a string'),
    (PLAIN | {"candidates": ["the dog"]}, "at least two strings, got a list of 1"),
    (PLAIN | {"candidates": ["the dog", 2]}, r'"candidates\[1\]" must be a string, got the number 2'),
    (
        PLAIN | {"candidates": ["the dog", "a cat", "A  cat"]},
        "must differ, but 'a cat' and 'A  cat' are the same",
    ),
    (PLAIN | {"candidates": ["a", "b"]}, "must be one of the candidates 'a' | 'b', got 'the dog'"),
    (
        PLAIN | {"answer": None, "candidates": ["a", "b"]},
        "must be one of the candidates 'a' | 'b', got no answer",
    ),
    (PLAIN | {"start": 1}, '"start" must come with "end"'),
    (PLAIN | {"end": 1}, '"end" must come with "start"'),
    (PLAIN | {"start": 3, "end": 1}, '"start" must not be after "end", got 3 s to 1 s'),
    (PLAIN | {"start": -1, "end": 1}, '"start" must be a number from 0 to 1e9, got the number -1'),
    (PLAIN | {"start": float("nan"), "end": 1}, "must be a number from 0 to 1e9, got the number nan"),
    (PLAIN | {"start": "0:01", "end": 2}, '"start" must be a number from 0 to 1e9, got a string'),
    (PLAIN | {"part": [1]}, r'"part" must be \[start, end\] in seconds, got a list of 1'),
    (PLAIN | {"part": [2, 2]}, '"part" must begin before it ends'),
    (PLAIN | {"part": [2, 3], "start": 1, "end": 2.5}, "must lie in the part 2.00 s to 3.00 s"),
    (PLAIN | {"stsg": 4}, '"stsg" must be a scene graph as text or as an object, got the number 4'),
    (PLAIN | {"stsg": "o1 flies"}, '"stsg" does not parse: in its line 1, There is no <stsg> block'),
    (PLAIN | {"stsg": GRAPH.replace("@8", "")}, '"stsg" does not parse: in its line 4'),
    (PLAIN | {"stsg": {"format": "other"}}, '"stsg" does not parse: A scene graph must be an object'),
    (PLAIN | {"stsg": GRAPH, "fps": 0}, '"fps" must be above 0'),
    (PLAIN | {"id": 1.5}, '"id" must be a string, got the number 1.5'),
]


@pytest.mark.parametrize(("line", "sentence"), BAD)
def test_a_bad_line_has_one_sentence(tmp_path, line, sentence):
    found, summary = problems(write(tmp_path / "q.jsonl", PLAIN, "", line, PLAIN))
    [(number, problem)] = found
    assert number == 3 and "\n" not in problem and problem.endswith(".")
    with pytest.raises(ValueError, match=sentence.replace("|", r"\|")):
        raise ValueError(problem)
    assert (summary.lines, summary.bad, summary.kinds["open"]) == (3, 1, 2)


def test_an_invalid_graph_is_found(tmp_path):
    stsg = generate_episode("test", 0).stsg
    broken = dataclasses.replace(
        stsg, relations=stsg.relations[:1] + stsg.relations[:1], frame_times_s=(1.0,)
    )
    words = stsg.to_dict()
    words["tracklets"][0]["label"] = words["vocabulary"]["labels"][0] = "a=b"
    found, _ = problems(
        write(tmp_path / "q.jsonl", PLAIN | {"stsg": broken.to_dict()}, PLAIN | {"stsg": words})
    )
    assert len(found) == 2 and all('"stsg" is not a valid graph' in problem for _, problem in found)


# --- a file -------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_and_a_mark_at_the_beginning(tmp_path):
    path = tmp_path / "q.jsonl"
    line = json.dumps(PLAIN | {"question": "Wer kommt herein – zuerst?"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + b'{"video": "\xff"}\n' + line)
    found, summary = problems(path)
    assert found == [(2, "The line is not UTF-8: byte 12 cannot be read.")] and summary.lines == 3


def test_a_repeated_id_names_the_other_line(tmp_path):
    """The id of a line without one is its number."""
    found, _ = problems(
        write(tmp_path / "q.jsonl", PLAIN | {"id": "a"}, PLAIN | {"id": "a"}, PLAIN | {"id": 4}, PLAIN)
    )
    assert found == [
        (2, "\"id\" must be unique, but 'a' is also that of line 1."),
        (4, "\"id\" must be unique, but '4' is also that of line 3."),
    ]


def test_the_summary(tmp_path, vot):
    path = write(
        tmp_path / "q.jsonl",
        PLAIN | {"candidates": ["the dog", "x"], "frames": 3},
        PLAIN | {"stsg": GRAPH, "frames": 3},
        {"video": "b.mp4", "question": "When?", "start": 1, "end": 2},
    )
    code, out, _ = vot("data", "check", path)
    assert code == 0 and out == (
        "3 lines, 0 of them bad; 3 questions about 2 videos: 1 choice, 1 open, 1 when; 1 with a scene graph, "
        '1 with times.\nNot read, with the number of lines: "frames" (2).\n'
    )
    code, out, _ = vot("data", "check", write(path, PLAIN, "{}"))
    assert code == 1 and out.startswith(
        f'{path}, line 2: "video" is missing; it must be a string.\n2 lines, 1'
    )
    code, _, err = vot("data", "check", write(path))
    assert code == 2 and "has no line" in err
    code, _, err = vot("data", "check", tmp_path / "no.jsonl")
    assert code == 2 and "No such file" in err


def test_videos_are_decoded_once_and_bound_the_intervals(tmp_path, monkeypatch):
    clip, *_ = digitworld_clip()  # 2 s
    (tmp_path / "good.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:3000])
    (tmp_path / "text.mp4").write_text("no video")
    asked = {"question": "When?", "start": 1}
    path = write(
        tmp_path / "q.jsonl",
        asked | {"video": "good.mp4", "end": 2.05},
        asked | {"video": "good.mp4", "end": 2.5},
        asked | {"video": "good.mp4", "end": 2, "part": [0.5, 9]},
        *(asked | {"video": name, "end": 2} for name in ("none.mp4", "text.mp4", "cut.mp4", "cut.mp4")),
    )
    assert problems(path)[0] == []
    graph = STSG((0.0, 1.9))
    for late, wrong in ((graph, []), (dataclasses.replace(graph, frame_times_s=(0.0, 9.0)), [1])):
        line = {"video": "good.mp4", "question": "What?", "stsg": late.to_dict()}
        found, _ = problems(write(tmp_path / "graph.jsonl", line), videos=True)
        assert [number for number, _ in found] == wrong
    assert found[0][1].startswith("The frames of the scene graph 0.00 s to 9.00 s must lie in the video")
    import vot_kernels.data.video as video

    opened = []
    load = video.load_video
    monkeypatch.setattr(video, "load_video", lambda file, **o: opened.append(file.name) or load(file, **o))
    found, summary = problems(path, videos=True)
    assert [number for number, _ in found] == [2, 3, 4, 5, 6, 7] and summary.videos == 1
    assert found[0][1] == "The interval 1.00 s to 2.50 s must lie in the video, which ends at 2.00 s."
    assert found[1][1].startswith("The part 0.50 s to 9.00 s must lie in the video")
    assert all("none.mp4" in found[2][1] and "cannot be read" in problem for _, problem in found[2:])
    assert opened == ["good.mp4", "none.mp4", "text.mp4", "cut.mp4"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            for n in range(count):
                file.write(json.dumps(PLAIN | {"id": f"{'x' * 40}{n}", "video": f"{'y' * 40}{n}.mp4"}) + "\n")
        positions = []
        tracemalloc.start()
        _, summary = problems(path, progress=positions.append)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert summary.lines == summary.videos == count and positions[-1] == path.stat().st_size
        return most

    few, many = peak(500), peak(4000)
    assert many < few + 100_000 + 64 * 3500  # the positions that the test itself keeps


def test_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE", 200)
    path = write(tmp_path / "q.jsonl", PLAIN, "x" * 5000, PLAIN, "x" * 199)
    found = list(read_lines(path))
    assert [line.number for line in found] == [1, 2, 3, 4]
    assert found[1].problem == "The line has 5,001 bytes; at most 200 are allowed."
    assert found[2].question is not None and "not JSON" in found[3].problem


# --- training and held-out questions ------------------------------------------------------------------------


def test_a_video_is_held_out_as_a_whole(tmp_path):
    items = [PLAIN | {"video": f"{n % 40}.mp4", "question": f"{n}?"} for n in range(120)]
    train, held = split_questions(write(tmp_path / "q.jsonl", *items), 0.3)
    seen, kept = ({q.video for q in part} for part in (train, held))
    assert not seen & kept and len(train) + len(held) == 120 and 4 <= len(kept) <= 20
    again, _ = split_questions(write(tmp_path / "more.jsonl", "", *items[::-1], PLAIN), 0.3)
    assert {q.video for q in again} - {"a.mp4"} == seen
    assert train.video(train[0]) == tmp_path / train[0].video


def test_a_split_that_is_given_decides(tmp_path):
    items = [PLAIN | {"question": f"{split}?", "split": split} for split in ("train", "val", "test", "train")]
    train, held = split_questions(write(tmp_path / "q.jsonl", *items), 0.0)
    assert [q.question for q in train] == ["train?"] * 2 and [q.question for q in held] == ["val?"]


def test_what_cannot_be_trained_on(tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(
        ValueError, match='line 2: "video" is missing; it must be a string. All bad lines: vot data'
    ):
        split_questions(write(path, PLAIN, {}))
    with pytest.raises(ValueError, match="has 1 questions, but none held out to measure with"):
        split_questions(write(path, PLAIN), 0.0)
    with pytest.raises(ValueError, match="but none to train on"):
        split_questions(write(path, PLAIN), 1.0)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        split_questions(path, 2.0)
    train, _ = split_questions(write(path, PLAIN, PLAIN | {"split": "val"}), 0.0)
    write(path, "{", "{")
    with pytest.raises(ValueError, match="has changed: line 1"):
        train[0]


def test_an_interval_is_of_the_video():
    question = question_from_dict(PLAIN | {"part": [1, 4], "start": 2, "end": 3}, "1")
    assert (question.part, question.interval) == (Interval(1, 4), Interval(2, 3))
