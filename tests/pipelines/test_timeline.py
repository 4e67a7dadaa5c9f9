"""The timeline: what lies where, and that names cannot become markup."""

from xml.etree import ElementTree

import pytest

from vot_kernels.pipelines.long_video.reading import spacing
from vot_kernels.pipelines.timeline import timeline
from vot_kernels.reasoning.types import Evidence, EvidenceBox, EvidenceEvent
from vot_kernels.scene_graph.graph import STSG, Box, Event, Tracklet

BOX = Box(0, 0, 0.5, 0.5)


def tracklet(id: str, label: str, *frames: int) -> Tracklet:
    return Tracklet(id, label, (), {k: (BOX, 1.0) for k in frames})


def world(*events: Event, names: tuple[str, str] = ("cat", "dog")) -> STSG:
    tracks = (tracklet("o1", names[0], 0, 1, 4, 5), tracklet("o2", names[1], *range(8)))
    return STSG(tuple(k / 4 for k in range(8)), tracks, (), events)


def told(id: str, *events: EvidenceEvent) -> Evidence:
    return Evidence((), (EvidenceBox(id, "cat", 0, 0.0, BOX, 1.0),), (), events)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def test_bars_lie_where_the_tracklets_are_seen():
    bars = parsed(timeline(world(), told("o1"))).findall(".//rect")
    left, width = ([float(bar.get(name)) for bar in bars] for name in ("x", "width"))
    start, whole = left[2], width[2]  # the dog is there all the time
    assert left[:2] == pytest.approx([start, start + whole / 2], abs=0.1)
    assert width[:2] == pytest.approx([whole / 4, whole / 4], abs=0.1)
    assert [bar.get("opacity") for bar in bars] == ["1", "1", "0.3"]
    assert len({bar.get("y") for bar in bars}) == 2 and len({bar.get("fill") for bar in bars}) == 2


def test_a_summary_of_a_long_video_has_whole_bars():
    """Boxes of every 4th frame are one bar, and what is away for longer has two."""
    always, away = tracklet("o1", "cat", *range(0, 64, 4)), tracklet("o2", "dog", *range(0, 24, 4), 40, 44)
    graph = STSG(tuple(k / 8 for k in range(64)), (always, away))
    bars = parsed(timeline(graph, told("o1"), spacing(graph, 32))).findall(".//rect")
    assert len(bars) == 3 and len(parsed(timeline(graph, told("o1"))).findall(".//rect")) == 24
    width = [float(bar.get("width")) for bar in bars]
    assert width == pytest.approx([61 * width[2] / 5, 21 * width[2] / 5, width[2]], abs=0.5)


def test_events_of_the_evidence_have_numbers_in_the_order_of_time():
    events = (Event("hits", 5, ("o1", "o2")), Event("hits", 1, ("o2", "o1")), Event("bounces", 0, ("o2",)))
    evidence = told(
        "o1",
        EvidenceEvent("hits", ("cat", "dog"), 5, 1.25, 1.0),
        EvidenceEvent("hits", ("dog", "cat"), 1, 0.25, 1.0),
    )
    page = parsed(timeline(world(*events), evidence))
    assert [item.text for item in page.findall(".//li")] == ["0.25 s: dog hits cat", "1.25 s: cat hits dog"]
    marks = {mark.find("title").text: mark for mark in page.findall(".//g")}
    assert {name: mark.get("opacity") for name, mark in marks.items()} == {
        "cat hits dog": "1",
        "dog hits cat": "1",
        "dog bounces": "0.3",
    }
    assert [text.text for text in marks["cat hits dog"].findall("text")] == ["2", "2"]
    assert marks["dog bounces"].findall("text") == []
    x = {name: float(mark.find("circle").get("cx")) for name, mark in marks.items()}
    bar = page.findall(".//rect")[2]
    start, step = float(bar.get("x")), float(bar.get("width")) / 8
    assert x["dog bounces"] == pytest.approx(start, abs=0.1)
    assert x["cat hits dog"] == pytest.approx(start + 5 * step, abs=0.1)


def test_names_are_text():
    evil = '<script>alert(1)</script> & "it"'
    html = timeline(world(Event("hits", 1, ("o1", "o2")), names=(evil, "dog")), told("o1"))
    assert "<script>" not in html and evil + " hits dog" in {t.text for t in parsed(html).findall(".//title")}


def test_one_frame_is_a_timeline_and_none_is_not():
    one = STSG((0.0,), (tracklet("o1", "cat", 0),))
    assert float(parsed(timeline(one, told("o1"))).find(".//rect").get("width")) > 100
    with pytest.raises(ValueError, match="at least one frame"):
        timeline(STSG(()), Evidence())
