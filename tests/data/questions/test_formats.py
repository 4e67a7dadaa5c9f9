"""Converters of published annotation files, on small ones written by hand in the form of each."""

import json
import sys
from typing import get_args

import numpy as np
import pytest

from vot_kernels import cli
from vot_kernels.cli.data import Format
from vot_kernels.data.questions import convert_questions, read_lines
from vot_kernels.data.questions.formats import FORMATS
from vot_kernels.data.questions.formats.action_genome import WRITE_GRAPH
from vot_kernels.data.video import save_mp4
from vot_kernels.train.projector.stage import GRAPH


def convert(form, source, out, **options):
    """Return the questions, what was reported, and the counts."""
    reported = []
    counts = convert_questions(form, source, out, reported.append, **options)
    lines = list(read_lines(out))
    assert all(line.problem is None and not line.unread for line in lines)
    assert counts.questions == len(lines) and counts.left_out == len(reported)
    questions = [line.question for line in lines]
    assert {q.source for q in questions} == {FORMATS[form].title}
    return questions, reported, counts


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- NExT-QA ------------------------------------------------------------------------------------------------

NEXTQA = """video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
41,350,640,480,why does the girl wave,2,0,CW,to swat a fly,to dance,"to say ""hello"", twice",to fall,to sit
41,350,640,480,what does the boy do next,7,1,TN,runs,sits,eats,sleeps,waves
42,350,640,480,how many cups are there,0,0,DC,one,two
42,350,640,480,how many cups are there,0,1,DC,one,two,three,four,five,six
43,350,640,480,where is this,4,0,DL,park,street,home,school,beach
41,350,640,480,why does the girl wave again,1,0,CW,a,b,c,d,e
"""


def test_nextqa_with_choices(tmp_path):
    names = write(tmp_path / "map.json", {"41": "0003/41"})
    questions, reported, counts = convert(
        "nextqa",
        write(tmp_path / "train.csv", NEXTQA),
        tmp_path / "out" / "q.jsonl",
        videos=tmp_path / "videos",
        names=names,
        split="train",
    )
    first, last = questions
    assert (first.video, first.id, first.split) == ("../videos/0003/41.mp4", "41_0", "train")
    assert first.answer == 'to say "hello", twice' and len(first.candidates) == 5 and first.kind == "choice"
    assert (last.video, last.answer) == ("../videos/43.mp4", "beach")
    assert counts.records == 6 and [text.split(": ", 1)[1] for text in reported] == [
        "\"answer\" must be the number of a choice, 0 to 4, got '7'.",
        '"a2" is missing.',
        "The row has more cells than the file has columns.",
        "Its id '41_0' is also that of line 2.",
    ]
    assert reported[0].startswith(f"{tmp_path / 'train.csv'}, line 3: ")


def test_nextqa_with_open_answers(tmp_path):
    columns = "video,frame_count,width,height,question,answer,qid,type,additional_ref_answer"
    rows = f"{columns}\n7,9,4,4,who ran,the dog,3,DO,dog\n"
    [question], _, _ = convert("nextqa", write(tmp_path / "val.csv", rows), tmp_path / "q.jsonl")
    assert (question.kind, question.answer, question.video, question.split) == (
        "open",
        "the dog",
        "7.mp4",
        None,
    )


# --- Charades-STA -------------------------------------------------------------------------------------------


def test_charades_sta(tmp_path):
    lines = "AAAAA 2.5 9.0##person opens the door.\n\nBBBBB 5 x##a\nCCCCC 9 2##person sits.\nDDDDD\nEEEEE 0 1## .\n"
    questions, reported, counts = convert(
        "charades-sta", write(tmp_path / "sta.txt", lines), tmp_path / "q.jsonl"
    )
    [question] = questions
    assert question.question == 'When does this happen: "person opens the door"?'
    assert question.kind == "when" and question.answer == "2.50 s to 9.00 s" and question.video == "AAAAA.mp4"
    assert counts.records == 5 and [text.split(", line ")[1] for text in reported] == [
        "3: A time must be a number of seconds, got 'x'.",
        '4: "start" must not be after "end", got 9 s to 2 s.',
        "5: It must read VIDEO START END##SENTENCE.",
        "6: It has no sentence after ##.",
    ]


# --- ActivityNet-QA -----------------------------------------------------------------------------------------


def test_activitynet_qa(tmp_path):
    def asked(id, **more):
        return {"video_name": "Ab-_1", "question": "is it day", "question_id": id} | more

    questions = [
        asked("a_1"),
        asked("a_2"),
        asked("a_3", question="who is it?"),
        asked("a_3"),
        {"question": "x"},
    ]
    answers = [
        {"answer": "yes", "type": 3, "question_id": "a_1"},
        {"answer": 2, "type": 4, "question_id": "a_3"},
        {"answer": "no", "type": 3, "question_id": "a_9"},
        {"answer": "no", "type": 3, "question_id": "a_1"},
        "no",
    ]
    write(tmp_path / "val_a.json", answers)
    source = write(tmp_path / "val_q.json", questions)
    found, reported, counts = convert("activitynet-qa", source, tmp_path / "q.jsonl", suffix=".mkv")
    assert [(q.id, q.question, q.answer, q.video) for q in found] == [
        ("a_1", "is it day?", "yes", "v_Ab-_1.mkv"),
        ("a_3", "who is it?", "2", "v_Ab-_1.mkv"),
    ]
    assert [text.split(", ", 1)[1] for text in reported] == [
        "question 2: No answer has the id 'a_2', or an earlier question has it.",
        "question 4: No answer has the id 'a_3', or an earlier question has it.",
        'question 5: "question_id" is missing.',
        "answer 4: No question, or another answer, has the id 'a_1'.",
        "answer 5: It must be an object, got a string.",
        "answer 'a_9': No question, or another answer, has the id 'a_9'.",
    ]
    with pytest.raises(ValueError, match=r"are in a file \*_q.json, got"):
        convert("activitynet-qa", tmp_path / "val_a.json", tmp_path / "q.jsonl")


# --- CLEVRER ------------------------------------------------------------------------------------------------


def test_clevrer(tmp_path):
    def choices(*answers):
        return [
            {"choice_id": n, "choice": f"the cube {n} falls", "program": ["x"], "answer": answer}
            for n, answer in enumerate(answers)
        ]

    def asked(id, kind, **more):
        return {"question_id": id, "question_type": kind, "question": "What?", "program": ["y"]} | more

    scene = {
        "scene_index": 17,
        "video_filename": "video_00017.mp4",
        "questions": [
            asked(0, "descriptive", answer="2", question_subtype="count"),
            asked(1, "predictive", choices=choices("wrong", "correct")),
            asked(2, "explanatory", choices=choices("correct", "wrong", "correct")),
            asked(3, "predictive", choices=choices("correct", "correct")),
            asked(4, "counterfactual", choices=choices("maybe")),
            asked(5, "poetic", choices=choices("correct")),
            asked(6, "descriptive"),
        ],
    }
    source = write(tmp_path / "train.json", [scene, {"scene_index": 18}, 3])
    found, reported, counts = convert("clevrer", source, tmp_path / "q.jsonl")
    assert [(q.id, q.answer, len(q.candidates)) for q in found] == [
        *(("17_0", "2", 0), ("17_1", "the cube 1 falls", 2)),
        *(("17_2_0", "yes", 2), ("17_2_1", "no", 2), ("17_2_2", "yes", 2)),
    ]
    assert (
        found[2].question == "What? Is this right: the cube 0 falls?" and found[0].video == "video_00017.mp4"
    )
    assert counts.records == 9 and [text.split(", ", 1)[1] for text in reported] == [
        "video 1, question 4: One choice of a predictive question must be correct, got 2.",
        "video 1, question 5: \"answer\" of a choice must be correct or wrong, got 'maybe'.",
        "video 1, question 6: \"question_type\" must be one of CLEVRER's four, got 'poetic'.",
        'video 1, question 7: "answer" is missing.',
        'video 2: "questions" is missing.',
        "video 3: It must be an object, got the number 3.",
    ]


# --- STAR ---------------------------------------------------------------------------------------------------


def star(id="Interaction_T1_3", **more):
    choices = [
        {"choice_id": n, "choice": f"The {thing}.", "choice_program": []}
        for n, thing in enumerate(("book", "door"))
    ]
    frame = {
        "actions": ["a007"],
        "bbox": [[10, 6, 40, 30], [0, 0, 32, 24]],
        "bbox_labels": ["o000", "o004"],
        "rel_pairs": [["o000", "o004"]],
        "rel_labels": ["r002"],
    }
    return {
        "question_id": id,
        "question": "What was opened?",
        "video_id": "AAAAA",
        "start": 0.5,
        "end": 2.0,
        "answer": "The book.",
        "question_program": [],
        "choices": choices,
        "situations": {
            "000011": frame,
            "000021": frame | {"actions": []},
            "000001": frame | {"rel_pairs": [], "rel_labels": []},
        },
    } | more


@pytest.fixture
def star_folder(tmp_path):
    write(tmp_path / "object_classes.txt", "o000 person\no004 Book\n")
    write(tmp_path / "relationship_classes.txt", "r002 in_front_of\n")
    write(tmp_path / "action_classes.txt", "a007 Opening a book\n")
    save_mp4(tmp_path / "AAAAA.mp4", np.zeros((30, 48, 64, 3), np.uint8), fps=10)
    return tmp_path


def test_star(star_folder):
    bad = [
        star("b", answer="The cat."),
        star("c", start=None),
        star("d", situations={"000001": {"bbox_labels": ["o999"]}}),
        star("e", video_id="BBBBB"),
        star("f", choices=[]),
    ]
    source = write(star_folder / "STAR_train.json", [star(), *bad])
    found, reported, _ = convert("star", source, star_folder / "q.jsonl")
    assert [q.id for q in found] == ["Interaction_T1_3", "d", "e"]
    first = found[0]
    assert (first.part.start_s, first.part.end_s, first.candidates) == (0.5, 2.0, ("The book.", "The door."))
    stsg = first.stsg
    assert stsg.frame_times_s == (0.0, 1.0, 2.0)  # ffmpeg counts frames from 1
    assert [(t.id, t.label) for t in stsg.tracklets] == [("o1", "person"), ("o2", "book")]
    assert stsg.tracklet("o2").boxes[1][0] == (0, 0, 0.5, 0.5)
    assert [(r.subject, r.predicate, r.object, r.t0, r.t1) for r in stsg.relations] == [
        ("o1", "opening a book", "o1", 0, 1),
        ("o1", "in front of", "o2", 1, 2),
    ]
    assert [text.split(", ")[1].split(": ")[0] for text in reported] == [f"question {n}" for n in range(2, 7)]
    assert "The classes do not say what 'o999' means" in reported[2] and found[1].stsg is None
    assert "neither the video nor --fps says how many" in reported[3]
    given, _, _ = convert("star", write(source, [star(video_id="BBBBB")]), star_folder / "q.jsonl", fps=5)
    assert given[0].stsg.frame_times_s == (0.0, 2.0, 4.0) and not given[0].stsg.tracklet("o1").boxes


def test_classes_that_are_not_utf8_are_named(star_folder):
    file, reported = star_folder / "object_classes.txt", []
    file.write_bytes(b"o000 person\no004 caf\xe9\n")
    source = write(star_folder / "STAR_val.json", [star()])
    with pytest.raises(ValueError, match="no question of STAR"):
        convert_questions("star", source, star_folder / "q.jsonl", reported.append)
    assert reported == [
        f"{source}, question 1: {file}, line 2: The line is not UTF-8: byte 9 cannot be read."
    ]


def test_star_without_its_classes_has_no_graphs(tmp_path):
    [question], _, _ = convert("star", write(tmp_path / "STAR_val.json", [star()]), tmp_path / "q.jsonl")
    assert question.stsg is None and question.kind == "choice"


# --- Action Genome ------------------------------------------------------------------------------------------


def thing(label, box, **more):
    return {
        "class": label,
        "bbox": box,
        "visible": box is not None,
        "attention_relationship": ["not_looking_at"],
        "spatial_relationship": ["in_front_of"],
        "contacting_relationship": ["holding"],
        "metadata": {"tag": "x", "set": "train"},
    } | more


def test_action_genome(tmp_path):
    cup = "cup/glass/bottle"
    objects = {
        "AAAAA.mp4/000011.png": [thing(cup, [30, 20, 40, 20])],
        "AAAAA.mp4/000031.png": [
            thing(cup, [30, 20, 40, 20], contacting_relationship=[]),
            thing("bed", None),
        ],
        "AAAAA.mp4/000021.png": [thing(cup, [60, 80, 70, 90])],
        "AAAAA.mp4/000041.png": [thing(cup, [60, 80, -1, 9])],
        "AAAAA.mp4/oh.png": [],
        "BBBBB.mp4/000001.png": 3,
        "CCCCC.mp4/000001.png": [thing("bed", [1, 1, 2, 2])],
    }
    person = {"bbox": [[0, 0, 50, 100]], "bbox_size": [100, 200], "bbox_mode": "xyxy"}
    write(tmp_path / "person_bbox.json", {"AAAAA.mp4/000011.png": person})
    source = write(tmp_path / "object_bbox_and_relationship.json", objects)
    found, reported, counts = convert("action-genome", source, tmp_path / "q.jsonl", fps=10)
    first, other = found
    assert (first.question, first.kind, first.video, first.split) == (
        WRITE_GRAPH,
        "graph",
        "AAAAA.mp4",
        "train",
    )
    assert first.answer.startswith("<stsg>\no1=person: 0:0,0,50,50\no2=cup/glass/bottle: 0:30,10,69,20")
    stsg = first.stsg
    assert stsg.frame_times_s == (1.0, 2.0, 3.0) and stsg.tracklet("o1").frames == (0,)
    assert stsg.tracklet("o2").boxes[1][0] == pytest.approx((0.6, 0.4, 1.0, 0.85))  # cut off at the edge
    assert [(r.subject, r.predicate, r.object, r.t0, r.t1) for r in stsg.relations] == [
        ("o1", "not looking at", "o2", 0, 2),
        ("o1", "holding", "o2", 0, 1),
        ("o2", "in front of", "o1", 0, 2),
    ]
    assert other.stsg.tracklets[1].boxes == {}  # its size is not known
    assert counts.records == 3 and [text.split("json, ")[1] for text in reported] == [
        "AAAAA.mp4: Its frame AAAAA.mp4/000041.png was left out: A box must be [x, y, width, height], got a negative "
        "side.",
        "AAAAA.mp4: Its frame AAAAA.mp4/oh.png was left out: A frame must be called VIDEO/NUMBER.png.",
        "BBBBB.mp4: Its frame BBBBB.mp4/000001.png was left out: Its objects must be a list.",
        "BBBBB.mp4: No frame of it can be read.",
    ]


def test_the_graph_is_asked_for_as_in_training():
    assert WRITE_GRAPH == GRAPH


def test_a_pickle_is_never_opened(tmp_path):
    source = tmp_path / "object_bbox_and_relationship.pkl"  # it is not there, which nobody finds out
    with pytest.raises(
        ValueError, match="is a pickle, which can run code when it is opened: export it as JSON"
    ):
        convert("action-genome", source, tmp_path / "q.jsonl")


# --- all of them --------------------------------------------------------------------------------------------


def test_what_is_no_annotation_file(tmp_path):
    out = tmp_path / "q.jsonl"
    for form in ("star", "clevrer", "action-genome"):
        with pytest.raises(ValueError, match="is not JSON that can be read"):
            convert(form, write(tmp_path / "x.json", "{"), out)
    with pytest.raises(ValueError, match="must hold a list, got an object"):
        convert("star", write(tmp_path / "x.json", {}), out)
    with pytest.raises(ValueError, match="must be a CSV of NExT-QA, but it has no column 'video'"):
        convert("nextqa", write(tmp_path / "x.csv", "a,b\n1,2\n"), out)
    with pytest.raises(ValueError, match="has 1 records, but no question of STAR"):
        convert("star", write(tmp_path / "x.json", [3]), out)
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        convert("star", tmp_path / "x.json", tmp_path / "q.json")
    with pytest.raises(ValueError, match="must be one of nextqa, star"):
        convert_questions("coco", tmp_path / "x.json", out, print)
    with pytest.raises(ValueError, match="that of '1' is no string"):
        convert("star", tmp_path / "x.json", out, names=write(tmp_path / "names.json", {"1": 2}))
    assert not out.exists() and not list(tmp_path.glob(".q*"))


def test_an_older_result_stays_where_the_conversion_fails(tmp_path):
    out = write(tmp_path / "q.jsonl", "old")
    with pytest.raises(ValueError, match="no question of STAR"):
        convert("star", write(tmp_path / "x.json", [3]), out)
    assert out.read_text() == "old"


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", "data", "convert", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    assert get_args(Format) == tuple(FORMATS)
    source, out = write(tmp_path / "sta.txt", "A 1 2##a b.\nB\n"), tmp_path / "q.jsonl"
    code, told, err = run("charades-sta", source, out)
    assert code == 1 and told == f"{out}: 1 questions of 2 records; 1 left out.\n"
    assert err == f"{source}, line 2: It must read VIDEO START END##SENTENCE.\n"
    code, told, _ = run("charades-sta", write(source, "A 1 2##a b.\n"), out, "--split", "val")
    assert code == 0 and json.loads(out.read_text())["split"] == "val"
    code, _, err = run("action-genome", tmp_path / "x.pkl", out)
    assert code == 2 and "is a pickle" in err
