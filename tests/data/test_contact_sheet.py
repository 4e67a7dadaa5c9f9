"""Contact sheets: what is drawn, where, and that a sheet is written whole or not at all."""

from types import SimpleNamespace

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from vot_kernels.data import contact_sheet  # noqa: E402
from vot_kernels.data.contact_sheet import MAX_CELL_PX, save_contact_sheet  # noqa: E402
from vot_kernels.scene_graph.graph import STSG, Box, Event, Tracklet, Vocabulary  # noqa: E402

VOCABULARY = Vocabulary(("digit 3", "digit 4"), ("red", "blue"), ("near",), ("hits", "bounces"))


def clip_of(count, size=(64, 64)):
    frames = np.zeros((count, size[1], size[0], 3), np.uint8)
    return SimpleNamespace(frames=frames, times=np.arange(count) / 8, info=None)


def graph_of(count, tracklets=(), events=()):
    times = tuple(k / 8 for k in range(count))
    return STSG(times, tuple(tracklets), (), tuple(events), VOCABULARY, "test")


def moving(count, id="o1", label="digit 3", attributes=("red",), y=0.5):
    boxes = {
        k: (Box(0.1 + 0.6 * k / count, y - 0.1, 0.3 + 0.6 * k / count, y + 0.1), 0.9) for k in range(count)
    }
    return Tracklet(id, label, attributes, boxes)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def share_of(image, colour):
    """How many pixels have exactly this "#rrggbb"."""
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


RED, BLUE = (contact_sheet._NAMED_COLOURS[name] for name in ("red", "blue"))


def test_boxes_are_drawn_in_the_colour_of_the_track(tmp_path):
    plain = pixels(save_contact_sheet(tmp_path / "a.png", clip_of(4), None))
    assert share_of(plain, RED) == share_of(plain, BLUE) == 0
    two = [moving(4, y=0.25), moving(4, "o2", "digit 4", ("blue",), y=0.7)]
    drawn = pixels(save_contact_sheet(tmp_path / "b.png", clip_of(4), graph_of(4, two)))
    assert share_of(drawn, RED) > 4 * 200 and share_of(drawn, BLUE) > 4 * 200


def test_box_lies_where_the_graph_says(tmp_path):
    track = Tracklet("o1", "digit 3", ("red",), {0: (Box(0.25, 0.5, 0.75, 0.75), 1.0)})
    image = pixels(save_contact_sheet(tmp_path / "a.png", clip_of(1), graph_of(1, [track])))
    left, top, side = contact_sheet._MARGIN, contact_sheet._MARGIN, 256  # 64 px enlarged four times
    red = (image == [int(RED[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)[
        top : top + side, left : left + side
    ]
    row = red[int(0.7 * side)]  # below the label, through both sides of the box
    columns = np.flatnonzero(row)
    assert columns.min() == pytest.approx(0.25 * side, abs=2)
    assert columns.max() == pytest.approx(0.75 * side, abs=2)
    assert red[int(0.5 * side), 70:180].all()
    assert np.flatnonzero(red[:, 128]).max() == pytest.approx(0.75 * side, abs=2)


def test_frame_pixels_are_enlarged_exactly(tmp_path):
    clip = clip_of(1)
    clip.frames[0] = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    image = pixels(save_contact_sheet(tmp_path / "a.png", clip, None))
    at = contact_sheet._MARGIN
    np.testing.assert_array_equal(image[at : at + 256 : 4, at : at + 256 : 4], clip.frames[0])


def test_events_are_marked(tmp_path):
    two = [moving(6, y=0.2), moving(6, "o2", "digit 4", ("blue",), y=0.8)]
    without = pixels(save_contact_sheet(tmp_path / "a.png", clip_of(6), graph_of(6, two)))
    events = [Event("hits", 2, ("o1", "o2")), Event("bounces", 4, ("o1",))]
    marked = pixels(save_contact_sheet(tmp_path / "b.png", clip_of(6), graph_of(6, two, events)))
    assert share_of(without, contact_sheet._EVENT) == 0
    assert share_of(marked, contact_sheet._EVENT) > 2 * 4 * 250 * 3 * 0.8  # two frames' borders, three wide
    assert contact_sheet._says(events[0]) == "o1 hits o2" and contact_sheet._says(events[1]) == "o1 bounces"


def test_trail_shows_where_the_track_has_been(tmp_path):
    long, short = moving(8), Tracklet("o1", "digit 3", ("red",), {7: moving(8).boxes[7]})
    reddish = []
    for name, track in (("long", long), ("short", short)):
        image = pixels(
            save_contact_sheet(tmp_path / f"{name}.png", clip_of(8), graph_of(8, [track]), columns=8)
        )
        last = image[contact_sheet._MARGIN :][:256, -contact_sheet._MARGIN - 256 : -contact_sheet._MARGIN]
        reddish.append(int((last[..., 0] > 1.5 * last[..., 1] + 20).sum()))
    assert reddish[0] > reddish[1] + 100


@pytest.mark.parametrize(
    ("size", "cell"), [((64, 64), 256), ((32, 48), 256), ((8, 8), 240), ((640, 272), 136)]
)
def test_small_frames_are_enlarged_and_large_ones_reduced(tmp_path, size, cell):
    width, height = contact_sheet._cell_size(*size)
    assert min(width, height) == cell and width * size[1] == pytest.approx(height * size[0], rel=0.01)
    assert max(width, height) <= 2 * MAX_CELL_PX


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (10, 2000), (1920, 1080)])
def test_any_shape_of_frame_fits(tmp_path, size):
    image = pixels(save_contact_sheet(tmp_path / "a.png", clip_of(3, size), graph_of(3, [moving(3)])))
    assert image.shape[0] < 2000 and image.shape[1] < 2000


def test_frames_with_events_are_among_those_shown():
    events = [Event("hits", 3, ("o1", "o2")), Event("hits", 57, ("o1", "o2"))]
    shown = contact_sheet._choose(100, events, 8)
    assert len(shown) == len(set(shown)) == 8 and {3, 57} <= set(shown) and shown == sorted(shown)
    assert contact_sheet._choose(5, events, 8) == [0, 1, 2, 3, 4]
    many = [Event("hits", t, ("o1", "o2")) for t in range(40)]
    assert len(set(contact_sheet._choose(100, many, 8))) == 8
    assert contact_sheet._choose(100, [], 1) == [0]


def test_columns_and_default_layout(tmp_path):
    wide = pixels(save_contact_sheet(tmp_path / "a.png", clip_of(4), None, columns=4))
    tall = pixels(save_contact_sheet(tmp_path / "b.png", clip_of(4), None, columns=1))
    assert wide.shape[1] > 3 * wide.shape[0] and tall.shape[0] > 3 * tall.shape[1]
    sixteen = contact_sheet._Sheet.plan(clip_of(16), None, list(range(16)), None, None)
    assert sixteen.columns == 4 and sixteen.rows == 4


def test_title_and_odd_text_do_not_break_the_sheet(tmp_path):
    track = Tracklet(
        "o1", "a very long label " * 20, ("größer", "красный"), {0: (Box(0.9, 0.9, 1.0, 1.0), 1.0)}
    )
    image = pixels(
        save_contact_sheet(tmp_path / "a.png", clip_of(2), graph_of(2, [track]), title="long " * 200)
    )
    assert image.shape[1] < 700
    assert contact_sheet._fit("word " * 50, contact_sheet._font(12), 100).endswith("...")


def test_colours_follow_the_attributes_and_never_clash():
    tracks = [moving(1, f"o{i}", attributes=a) for i, a in enumerate([("red",), ("red",), (), ("blue",)], 1)]
    colours = contact_sheet.track_colours(tracks)
    assert colours[0] == RED and colours[3] == BLUE and len(set(colours)) == 4
    assert len(contact_sheet.track_colours([moving(1)] * 60)) == 60


def test_labels_do_not_cover_one_another(monkeypatch, tmp_path):
    placed = []
    real = contact_sheet._Sheet._label

    def label(self, pen, corners, texts, colour, labels, others):
        real(self, pen, corners, texts, colour, labels, others)
        placed.append(list(labels))

    monkeypatch.setattr(contact_sheet._Sheet, "_label", label)
    tracks = [moving(1, f"o{i}", y=0.4 + 0.03 * i) for i in range(1, 6)]
    save_contact_sheet(tmp_path / "a.png", clip_of(1), graph_of(1, tracks))
    final = placed[-1]
    assert len(final) >= 4
    assert not any(contact_sheet._overlap(a, b) for i, a in enumerate(final) for b in final[:i])
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 256 and y2 <= 256 for x1, y1, x2, y2 in final)


@pytest.mark.parametrize(
    ("name", "count", "graph", "options", "words"),
    [
        ("a.jpg", 2, None, {}, r"must end in '\.png'"),
        ("a.png", 0, None, {}, "at least one frame"),
        ("a.png", 2, 3, {}, "2 frames, but it has 3"),
        ("a.png", 2, None, {"columns": 0}, "columns must be"),
        ("a.png", 2, None, {"max_frames": 1.5}, "max_frames must be"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, name, count, graph, options, words):
    with pytest.raises(ValueError, match=words):
        save_contact_sheet(tmp_path / name, clip_of(count), graph and graph_of(graph), **options)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_sheet(tmp_path, monkeypatch):
    path = save_contact_sheet(tmp_path / "a.png", clip_of(2), None)
    before = path.read_bytes()
    monkeypatch.setattr(
        contact_sheet._Sheet, "draw", lambda self: (_ for _ in ()).throw(RuntimeError("full"))
    )
    with pytest.raises(RuntimeError, match="full"):
        save_contact_sheet(path, clip_of(3), None)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
