"""Broken texts and files for every parser: a result, or the parser's own error in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz.calls import Draw
from tests.fuzz.checks import WrongResult, is_a_sentence
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.scene_graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

VOCABULARY = Vocabulary(
    labels=("digit 3", "digit 7"), attributes=("red", "blue"), predicates=("left of", "hits")
)


def graph() -> STSG:
    boxes = {0: (Box(0.1, 0.2, 0.3, 0.4), 0.9), 2: (Box(0.2, 0.2, 0.4, 0.4), 1.0)}
    tracklets = (Tracklet("o1", "digit 3", ("red",), boxes), Tracklet("o2", "digit 7", ("blue",), boxes))
    relations = (Relation("o1", "left of", "o2", 0, 2, 0.5),)
    return STSG((0.0, 0.1, 0.2), tracklets, relations, (Event("hits", 1, ("o1", "o2")),), VOCABULARY, "fuzz")


def broken_text(draw: Draw, text: str) -> str:
    """`text` with a few characters removed, doubled or replaced."""
    strange = [
        "",
        "\0",
        "\n",
        "[",
        "}",
        '"',
        "-1",
        "1e999",
        "NaN",
        "null",
        "é",
        "🎬",
        "9" * 40,
        "o1",
        ":",
        ",",
    ]
    characters = list(text)
    for _ in range(draw.whole(1, 6)):
        if not characters:
            break
        place = draw.whole(0, len(characters) - 1)
        characters[place : place + draw.whole(0, 8)] = draw.pick(
            [[], [draw.pick(strange)], characters[place : place + 5]]
        )
    return "".join(characters)


def broken_value(draw: Draw, value: Any) -> Any:
    """A document with one value somewhere replaced or removed."""
    if isinstance(value, dict) and value and draw.chance(0.85):
        key = draw.pick(sorted(value))
        if draw.chance(0.1):
            return {name: x for name, x in value.items() if name != key}
        return {**value, key: broken_value(draw, value[key])}
    if isinstance(value, list) and value and draw.chance(0.85):
        place = draw.whole(0, len(value) - 1)
        return [broken_value(draw, x) if i == place else x for i, x in enumerate(value)]
    return draw.pick([None, True, -1, 0, 2**70, 1e308, -0.5, "", "o1", "x" * 50, [], [1, 2], {}, {"a": 1}])


def graph_from_text(draw: Draw) -> None:
    """The text parser never raises."""
    text = broken_text(draw, graph().to_text())
    found, _ = STSG.from_text(text if draw.chance(0.8) else text.encode("utf-8", "ignore"))
    found.to_text()


def graph_from_json(draw: Draw) -> None:
    STSG.from_json(broken_text(draw, graph().to_json()))


def graph_from_dict(draw: Draw) -> None:
    found = STSG.from_dict(broken_value(draw, json.loads(graph().to_json())))
    assert STSG.from_dict(found.to_dict()) == found


def question_file(draw: Draw) -> None:
    from vot_kernels.pipelines.batch import read_questions

    lines = [
        json.dumps({"video": f"{i}.mp4", "question": "Who?", "candidates": ["a", "b"]}) for i in range(3)
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text(broken_text(draw, "\n".join(lines)), encoding="utf-8")
        read_questions(path)


def video_file(draw: Draw) -> None:
    from vot_kernels.data.video import load_video

    content = bytearray(Path(digitworld_clip()[0]).read_bytes())
    for _ in range(draw.whole(1, 20)):
        content[draw.whole(0, len(content) - 1)] = draw.whole(0, 255)
    if draw.chance(0.4):
        del content[draw.whole(0, len(content)) :]
    with TemporaryDirectory() as folder:
        path = Path(folder) / draw.pick(["a.mp4", "a.png", "a.gif", "a"])
        path.write_bytes(bytes(content))
        load_video(path, num_frames=4)


def reply_of_a_model(draw: Draw) -> None:
    """The functions that read a language model's words never raise."""
    from vot_kernels.reasoning import names, prompts

    text = broken_text(
        draw, "1. The red digit 3 hits the blue digit 7 at 0.2 s. Rating: 8/10. No, 12 times to the left."
    )
    scene = graph()
    prompts.parse_rating(text), prompts.parse_sentences(text), prompts.parse_proposals(text)
    names.find_tracklets(text, scene), names.absent_words(text, scene), names.find_number(text)
    names.find_yes_no(text), names.find_directions(text), names.match_candidate(text, ["the red digit", text])


PARSERS: dict[str, tuple[Callable[[Draw], None], bool]] = {
    "graph_from_text": (graph_from_text, False),
    "graph_from_json": (graph_from_json, True),
    "graph_from_dict": (graph_from_dict, True),
    "question_file": (question_file, True),
    "video_file": (video_file, True),
    "reply_of_a_model": (reply_of_a_model, False),
}
"""Each parser, and whether it may refuse what it reads by a ValueError."""


def check_parser(draw: Draw) -> None:
    """One broken text for one parser.

    Raises:
        WrongResult: the parser raised something else than a ValueError in a sentence, or raised where it never may.
    """
    name = draw.pick(sorted(PARSERS))
    parse, refuses = PARSERS[name]
    try:
        parse(draw)
    except ValueError as error:
        if not refuses or not is_a_sentence(str(error)):
            raise WrongResult(f"{name}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise WrongResult(f"{name}: {type(error).__name__}: {error}") from error
