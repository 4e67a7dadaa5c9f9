"""The text form: exact printing, tolerant reading, properties over broken texts."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vot_kernels.scene_graph import (
    ISSUE_KINDS,
    STSG,
    Box,
    Event,
    Relation,
    Tracklet,
    Vocabulary,
    from_text,
    to_text,
)
from vot_kernels.scene_graph.text import MAX_FRAMES

VOCABULARY = Vocabulary(
    labels=tuple(f"digit {d}" for d in range(10)) + ("red panda",),
    attributes=("red", "blue", "dark green"),
    predicates=("left of", "near", "approaches", "moves left"),
    events=("hits", "bounces"),
)
NUM_FRAMES = 16
TIMES = tuple(k / 8 for k in range(NUM_FRAMES))
EXAMPLE = """<stsg>
o1=red digit 3: 0:68,22,80,34 4:75,37,87,49
o2=dark green digit 7: 2:10,20,30,40
o1 left of o2 @0-7
o1 moves left @0-5
o1 hits o2 @6
o2 bounces @4
</stsg>"""


def grid_box(*cells: int) -> Box:
    return Box(*(c / 99 for c in cells))


def example() -> STSG:
    return STSG(
        TIMES,
        (
            Tracklet(
                "o1",
                "digit 3",
                ("red",),
                {0: (grid_box(68, 22, 80, 34), 1), 4: (grid_box(75, 37, 87, 49), 1)},
            ),
            Tracklet("o2", "digit 7", ("dark green",), {2: (grid_box(10, 20, 30, 40), 1)}),
        ),
        (Relation("o1", "left of", "o2", 0, 7), Relation("o1", "moves left", "o1", 0, 5)),
        (Event("hits", 6, ("o1", "o2")), Event("bounces", 4, ("o2",))),
        VOCABULARY,
        "text",
    )


def read(body: str, **options):
    """Parse lines inside a closed block: (graph, issue kinds)."""
    options = {"vocabulary": VOCABULARY, "frame_times_s": TIMES} | options
    graph, issues = from_text(f"<stsg>\n{body}\n</stsg>", **options)
    assert {i.kind for i in issues} <= ISSUE_KINDS.keys()
    return graph, [i.kind for i in issues]


# --- printing -----------------------------------------------------------------------------------------------


def test_prints_and_reads_the_documented_form():
    assert example().to_text() == EXAMPLE
    assert STSG.from_text(EXAMPLE, VOCABULARY, TIMES) == (example(), [])
    assert STSG.from_text(EXAMPLE.encode(), VOCABULARY, TIMES) == (example(), [])


def test_parts_can_be_left_out():
    text = to_text(example(), boxes=False, relations=False)
    assert text == "<stsg>\no1=red digit 3\no2=dark green digit 7\no1 hits o2 @6\no2 bounces @4\n</stsg>"
    assert "@6" not in to_text(example(), events=False)
    graph, issues = from_text(text, VOCABULARY, TIMES)
    assert issues == [] and [t.name for t in graph.tracklets] == ["red digit 3", "dark green digit 7"]


def test_every_keeps_first_and_last_frame():
    boxes = {k: (grid_box(k, 0, k + 1, 1), 1) for k in range(3, 15)}
    graph = STSG(TIMES, (Tracklet("o1", "digit 0", (), boxes),), vocabulary=VOCABULARY)
    for every, frames in ((4, [3, 4, 8, 12, 14]), (1, list(range(3, 15))), (100, [3, 14])):
        assert list(from_text(graph.to_text(every=every), VOCABULARY, TIMES)[0].tracklets[0].frames) == frames


def test_what_cannot_be_printed_is_refused():
    for word in ("a:b", "a=b", "a@b", "<a>", "a\nb", " a", ""):
        with pytest.raises(ValueError, match="single-spaced and contain none of"):
            STSG((), (Tracklet("o1", word),)).to_text()
    with pytest.raises(ValueError, match="every must be at least 1 .* got 0"):
        example().to_text(every=0)
    with pytest.raises(ValueError, match="NaN"):
        STSG((0.0,), (Tracklet("o1", "x", (), {0: ((0, 0, float("nan"), 1), 1)}),)).to_text()
    with pytest.raises(TypeError, match="got int"):
        from_text(3)


def test_coordinates_move_by_at_most_half_a_cell():
    boxes = {0: (Box(-0.2, 0.0149, 0.5051, 1.7), 1)}
    text = STSG((0.0,), (Tracklet("o1", "x", (), boxes),)).to_text()
    assert "0:0,1,50,99" in text


def test_costs_an_eighth_of_per_frame_json():
    names = ["red digit 3", "blue digit 7", "green digit 1", "white digit 0"]
    tracklets = []
    for i, name in enumerate(names):
        colour, _, label = name.partition(" ")
        boxes = {
            k: (Box(0.1 * i + 0.012 * k, 0.3, 0.1 * i + 0.012 * k + 0.19, 0.49), 0.97)
            for k in range(NUM_FRAMES)
        }
        tracklets.append(Tracklet(f"o{i + 1}", label, (colour,), boxes))
    graph = STSG(TIMES, tuple(tracklets), (), (Event("hits", 6, ("o1", "o2")),), VOCABULARY)
    # The plainest thing to hand a language model: a list of the objects of each frame, rounded to 3 digits.
    per_frame = [
        {
            "frame": k,
            "objects": [
                {"id": n.id, "label": n.label, "color": n.attributes[0], "box": [round(v, 3) for v in n.box]}
                for n in graph.frame(k).nodes
            ],
        }
        for k in range(NUM_FRAMES)
    ]
    assert len(graph.to_text()) <= len(json.dumps(per_frame)) / 8


# --- tolerance ----------------------------------------------------------------------------------------------

O1 = "o1=red digit 3: 0:68,22,80,34"
O2 = "o2=blue digit 7: 0:10,20,30,40"


@pytest.mark.parametrize(
    ("line", "boxes", "kinds"),
    [
        ("0: 68, 22 , 80,34   4:75,37,87,49", {0: (68, 22, 80, 34), 4: (75, 37, 87, 49)}, []),
        ("0:[68, 22, 80, 34]; 4:(75 37 87 49)", {0: (68, 22, 80, 34), 4: (75, 37, 87, 49)}, []),
        ("٤:٦٨,22,80,34", {4: (68, 22, 80, 34)}, []),  # Arabic digits
        ("4：68，22，80，34", {4: (68, 22, 80, 34)}, []),  # full-width colon and commas
        ("0:80,22,68,34", {0: (68, 22, 80, 34)}, ["swapped corners"]),
        ("0:-5,22,180,34", {0: (0, 22, 99, 34)}, ["out of range"]),
        ("0:1,2,3," + "9" * 5000, {0: (1, 2, 3, 99)}, ["out of range"]),
        ("0:0.5,0.25,1,1.0", {0: (50, 25, 99, 99)}, ["not an integer"]),
        ("0:67.5,22.4,80,34", {0: (68, 22, 80, 34)}, ["not an integer"] * 2),
        ("0:1,2,3 4:75,37,87,49", {4: (75, 37, 87, 49)}, ["malformed box"]),
        ("0:1,2,3,4,5 4:75,37,87,49", {4: (75, 37, 87, 49)}, ["malformed box"]),
        ("0:1,2,3,4 0:5,6,7,8", {0: (1, 2, 3, 4)}, ["duplicate frame"]),
        ("16:1,2,3,4 0:5,6,7,8", {0: (5, 6, 7, 8)}, ["frame out of range"]),
        ("-1:1,2,3,4 0:5,6,7,8", {0: (5, 6, 7, 8)}, ["frame out of range"]),
        ("frame 0:1,2,3,4", {0: (1, 2, 3, 4)}, ["stray text"]),
        ("12 0:1,2,3,4", {0: (1, 2, 3, 4)}, ["stray text"]),
        ("nowhere", {}, ["stray text", "no boxes"]),
        ("", {}, ["no boxes"]),
    ],
)
def test_boxes(line, boxes, kinds):
    graph, found = read(f"o1=red digit 3: {line}")
    assert dict(graph.tracklets[0].boxes) == {k: (grid_box(*b), 1.0) for k, b in boxes.items()}
    assert found == kinds


@pytest.mark.parametrize(
    ("name", "attributes", "label", "kinds"),
    [
        ("red digit 3", ("red",), "digit 3", []),
        ("Dark_Green  DIGIT 3", ("dark green",), "digit 3", []),
        ("red panda", (), "red panda", []),  # a whole name that is a label wins
        ("blue red panda", ("blue",), "red panda", []),
        ("digit 3", (), "digit 3", []),
        ("red cat", ("red",), "cat", ["unknown label"]),
        ("red", (), "red", ["unknown label"]),
    ],
)
def test_names(name, attributes, label, kinds):
    graph, found = read(f"o1={name}: 0:1,2,3,4")
    assert [(t.attributes, t.label) for t in graph.tracklets] == [(attributes, label)]
    assert found == kinds


@pytest.mark.parametrize(
    ("line", "relations", "kinds"),
    [
        ("o1 left of o2 @0-7", [Relation("o1", "left of", "o2", 0, 7)], []),
        ("O1  LEFT_OF  o2,  @ 0 – 7", [Relation("o1", "left of", "o2", 0, 7)], []),
        ("o1 moves left @3-3", [Relation("o1", "moves left", "o1", 3, 3)], []),
        ("o1 moves left @3", [Relation("o1", "moves left", "o1", 3, 3)], ["time form"]),
        ("o1 moves left @5-3", [Relation("o1", "moves left", "o1", 3, 5)], ["swapped interval"]),
        ("o1 moves left @3-99", [Relation("o1", "moves left", "o1", 3, 15)], ["out of range"]),
        ("o1 moves left @16-99", [], ["frame out of range"]),
        ("o1 eats o2 @0-7", [], ["unknown predicate"]),
        ("o1 near o9 @0-7", [], ["unknown participant"]),
        ("o9 moves left @0-7", [], ["unknown participant"]),
        ("near @0-7", [], ["unreadable"]),
        ("o1 near o2 o1 @0-7", [], ["unreadable"]),
        ("o1 o2 @0-7", [], ["unreadable"]),
        ("o1 near o2 @", [], ["malformed time"]),
        ("o1 near o2 @0-", [], ["malformed time"]),
        ("o1 near o2 @1-2-3", [], ["malformed time"]),
        ("o1 near o2", [], ["unreadable"]),
    ],
)
def test_relations(line, relations, kinds):
    graph, found = read(f"{line}\n{O1}\n{O2}")  # facts may come before the tracks they name
    assert list(graph.relations) == relations and graph.events == ()
    assert found == kinds


@pytest.mark.parametrize(
    ("line", "events", "kinds"),
    [
        ("o1 hits o2 @6", [Event("hits", 6, ("o1", "o2"))], []),
        ("o1 bounces @t=6", [Event("bounces", 6, ("o1",))], []),
        ("bounces @6", [Event("bounces", 6, ())], []),
        ("o1 hits o2 @6-8", [Event("hits", 6, ("o1", "o2"))], ["time form"]),
        ("o1 hits o2 @6.6", [Event("hits", 7, ("o1", "o2"))], ["not an integer"]),
        ("o1 hits o2 @16", [], ["frame out of range"]),
        ("o1 hits o3 @6", [], ["unknown participant"]),
        ("o1 sings @6", [], ["unknown predicate"]),
    ],
)
def test_events(line, events, kinds):
    graph, found = read(f"{O1}\n{O2}\n{line}")
    assert list(graph.events) == events and graph.relations == ()
    assert found == kinds


def test_tracks():
    graph, kinds = read(f"{O1}\no1=blue digit 4: 0:1,2,3,4\n=x: 0:1,2,3,4\no 2=x:\no3=\nHello there.\n\n")
    assert [t.name for t in graph.tracklets] == ["red digit 3"]
    assert kinds == ["duplicate id", "unreadable", "unreadable", "unreadable", "unreadable"]


def test_markdown_and_prose_around_the_block():
    plain = from_text(EXAMPLE, VOCABULARY, TIMES)[0]
    chatty = f"Of course! o1=blue: 0:1,2,3,4\n```xml\n{EXAMPLE}\n```\nI hope this helps @3."
    assert from_text(chatty, VOCABULARY, TIMES) == (plain, [])
    decorated = EXAMPLE.replace("\no", "\n- **o").replace("@6", "@6**").replace("<stsg>", "< STSG >\n```")
    graph, issues = from_text(decorated, VOCABULARY, TIMES)
    assert graph == plain and {i.kind for i in issues} == {"markup"} and len(issues) == 7
    numbered = EXAMPLE.replace("\no", "\n1. o")
    assert from_text(numbered, VOCABULARY, TIMES)[0] == plain
    one_line = EXAMPLE.replace("<stsg>\n", "<stsg>").replace("\n</stsg>", "</stsg>").replace("\n", "\r\n")
    assert from_text(one_line, VOCABULARY, TIMES) == (plain, [])


def test_issue_lines_count_from_the_start_of_the_text():
    _, issues = from_text(f"Hello\n\n<stsg>\n{O1}\nnonsense\n</stsg>", VOCABULARY, TIMES)
    assert [(i.line, i.kind) for i in issues] == [(5, "unreadable")]


def test_without_tags_the_whole_text_is_read():
    graph, issues = from_text(f"The graph:\n{O1}\n{O2}\no1 hits o2 @6\nThat is all.", VOCABULARY, TIMES)
    assert [t.id for t in graph.tracklets] == ["o1", "o2"] and len(graph.events) == 1
    assert [i.kind for i in issues] == ["no block"]
    assert [i.kind for i in from_text("", VOCABULARY)[1]] == ["no block"]


def test_of_several_blocks_the_last_closed_one_is_read():
    first, second = f"<stsg>\n{O1}\n</stsg>", f"<stsg>\n{O2}\n</stsg>"
    for text in (first + second, first + second + "<stsg>…</stsg>", first + second + f"<stsg>\n{O1}"):
        graph, issues = from_text(text, VOCABULARY, TIMES)
        assert [t.id for t in graph.tracklets] == ["o2"]
        assert [i.kind for i in issues] == ["several blocks"]
    graph, issues = from_text(f"<stsg>\n<stsg>\n{O1}", VOCABULARY, TIMES)
    assert [t.id for t in graph.tracklets] == ["o1"]
    assert {i.kind for i in issues} == {"several blocks", "unclosed"}


@pytest.mark.parametrize(
    ("end", "kinds"),
    [
        ("\no1 hits o2 @6\n", ["unclosed"]),
        ("\no1 hits o2 @6", ["unclosed"]),
        ("\no1 hits o2 @6\n</sts", ["unclosed", "truncated"]),
        ("\no1 hits o2 @6\no1 moves le", ["unclosed", "truncated"]),
        ("\no1 hits o2 @6\no1 moves left @", ["unclosed", "truncated"]),
        ("\no1 hits o2 @6\no1 moves left @1", ["unclosed", "truncated"]),
        ("\no1 hits o2 @6\no1 moves left @1-", ["unclosed", "truncated"]),
        ("\no1 hits o2 @6\no2=red digit 3: 0:10,20,30,4", ["unclosed", "truncated", "no boxes"]),
        ("\no1 hits o2 @6\no2=red digit 3: 0:10,20,30,40 4:10,2", ["unclosed", "truncated"]),
    ],
)
def test_a_cut_end_drops_only_the_incomplete_item(end, kinds):
    graph, issues = from_text(
        f"<stsg>\n{O1}\n{O2}".replace(O2, O2 if "o2=" not in end else "") + end, VOCABULARY, TIMES
    )
    assert graph.events == (Event("hits", 6, ("o1", "o2")),) and graph.relations == ()
    assert [i.kind for i in issues] == kinds


def test_an_open_vocabulary_takes_every_word():
    text = (
        "<stsg>\nx=small red car: 3:1,2,3,4\no2=tree: 0:5,6,7,8\nx parks behind o2 @0-3\nx honks @2\n</stsg>"
    )
    graph, issues = from_text(text)
    assert issues == [] and graph.frame_times_s == (0.0, 1.0, 2.0, 3.0)
    assert graph.vocabulary == Vocabulary(("small red car", "tree"), (), ("parks behind",), ("honks",))
    assert graph.relations == (Relation("x", "parks behind", "o2", 0, 3),)
    assert graph.events == (Event("honks", 2, ("x",)),)
    assert graph.to_text() == text
    far, kinds = read(f"{O1} {MAX_FRAMES}:1,2,3,4 99999999999999:1,2,3,4", frame_times_s=None)
    assert far.num_frames == 1 and kinds == ["frame out of range"] * 2


# --- properties ---------------------------------------------------------------------------------------------


@st.composite
def boxes(draw) -> Box:
    x1, x2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    y1, y2 = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return Box(x1, y1, x2, y2)


@st.composite
def graphs(draw) -> STSG:
    ids = [f"o{i}" for i in range(1, draw(st.integers(1, 4)) + 1)]
    frame, track = st.integers(0, NUM_FRAMES - 1), st.sampled_from(ids)
    tracklets = [
        Tracklet(
            id,
            draw(st.sampled_from(VOCABULARY.labels[:10])),
            draw(st.lists(st.sampled_from(VOCABULARY.attributes), unique=True)),
            draw(st.dictionaries(frame, st.tuples(boxes(), st.just(1.0)), max_size=6)),
        )
        for id in ids
    ]
    interval = st.tuples(frame, frame).map(sorted)
    relation = st.builds(
        lambda a, p, b, t: Relation(a, p, b, *t),
        track,
        st.sampled_from(VOCABULARY.predicates),
        track,
        interval,
    )
    event = st.builds(Event, st.sampled_from(VOCABULARY.events), frame, st.lists(track, max_size=3))
    facts = draw(st.lists(relation, max_size=4)), draw(st.lists(event, max_size=4))
    return STSG(TIMES, tracklets, *facts, VOCABULARY, "text")


@settings(max_examples=60, deadline=None)
@given(graphs(), st.booleans())
def test_round_trip_up_to_the_grid(graph, with_vocabulary):
    again, issues = from_text(graph.to_text(every=1), VOCABULARY, TIMES)
    assert issues == [] and again.validate() == []
    assert (again.relations, again.events) == (graph.relations, graph.events)
    for a, b in zip(graph.tracklets, again.tracklets, strict=True):
        assert (a.id, a.label, a.attributes, a.frames) == (b.id, b.label, b.attributes, b.frames)
        for k in a.frames:
            assert max(abs(p - q) for p, q in zip(a.box(k), b.box(k), strict=True)) <= 0.5 / 99 + 1e-9


def check_reading(text) -> STSG:
    """What holds for any text: well-formed issues, a valid graph, and reading the printed text changes nothing."""
    for vocabulary, times in ((VOCABULARY, TIMES), (None, None)):
        graph, issues = from_text(text, vocabulary, times)
        for issue in issues:
            assert (
                issue.kind in ISSUE_KINDS and issue.line >= 1 and issue.message and "\n" not in issue.message
            )
        assert [
            p for p in graph.validate() if "not in the vocabulary" not in p and "of the form" not in p
        ] == []
        printed = graph.to_text(every=1)
        again, issues = from_text(printed, vocabulary, graph.frame_times_s)
        assert {i.kind for i in issues} <= {"unknown label"}
        assert again == graph
        assert again.to_text(every=1) == printed
    return from_text(text, VOCABULARY, TIMES)[0]


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_truncation_never_invents(graph, data):
    text = graph.to_text(every=1)
    whole = from_text(text, VOCABULARY, TIMES)[0]
    cut = text[: data.draw(st.integers(0, len(text)))]
    part = check_reading(cut)
    complete = part
    if not cut.endswith("\n") and "</stsg>" not in cut:  # all but the line that was cut is exactly as it was
        complete = from_text(cut.rpartition("\n")[0] + "\n", VOCABULARY, TIMES)[0]
    for t in complete.tracklets:
        assert t in whole.tracklets
    assert set(complete.relations) <= set(whole.relations) and set(complete.events) <= set(whole.events)
    assert len(part.tracklets) - len(complete.tracklets) in (0, 1)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_deletions_and_garbage_inside(graph, data):
    text = graph.to_text()
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 12))
        text = (
            text[:at] + data.draw(st.text(alphabet="o12=:@,-. <>/*`\nst٣é", max_size=4)) + text[at + length :]
        )
    check_reading(text)


@settings(max_examples=100, deadline=None)
@given(st.text() | st.binary() | st.text(alphabet="o1=:@,-. <>stg/*`#\n\r\t٣²½：＝", max_size=80))
def test_arbitrary_text_and_bytes(text):
    check_reading(text)
    prefix, suffix = ("<stsg>", "</stsg>") if isinstance(text, str) else (b"<stsg>", b"</stsg>")
    check_reading(prefix + text + suffix)


UNITS = ("<", "< ", "<stsg>", "<stsg></stsg>", "o1=", "o1=x: 0:1,2,3,4 ", "0:", "1.", "1. ", "- ", "-", "@")
UNITS += ("o1 ", "red ", "\n", "o1=x\n", "o1 near o1 @1-2\n", "9", " ", "`", "```\n", "@1-", ".5")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("prefix", ["", "<stsg>\no1=", "<stsg>\no1=digit 3: 0:", "<stsg>\n"])
def test_reading_takes_linear_time(unit, prefix):
    """100,000 characters of anything take well under a second; a quadratic step would take minutes."""
    started = time.process_time()
    from_text(prefix + unit * (100_000 // len(unit)), VOCABULARY, TIMES)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("words", ["red car", " a:b=c ", "traffic\tlight<1>", "：＝", "", "@", "x\ny"])
def test_any_words_can_be_made_printable(words):
    from vot_kernels.scene_graph.text import printable

    graph = STSG((0.0,), (Tracklet("o1", printable(words), (), {0: (Box(0, 0, 1, 1), 1.0)}),))
    again, issues = STSG.from_text(graph.to_text())
    assert not issues and again.tracklets[0].label == graph.tracklets[0].label
    assert printable("red car") == "red car" and printable("") == "object"
