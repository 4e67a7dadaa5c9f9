"""A small hand-written scene graph that the tests share."""

from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

COLOURS = ("red", "green", "blue", "yellow")
VOCABULARY = Vocabulary(
    labels=tuple(f"digit {n}" for n in range(10)),
    attributes=COLOURS,
    predicates=("left of", "near", "moves left", "moves right", "moves up", "moves down"),
    events=("hits", "bounces"),
)


def track(id: str, colour: str, digit: int, start: tuple, end: tuple, frames: int = 8, score: float = 1.0):
    """Return a tracklet whose centre moves in a straight line from `start` to `end`."""
    boxes = {}
    for k in range(frames):
        x, y = (a + (b - a) * k / (frames - 1) for a, b in zip(start, end, strict=True))
        boxes[k] = (Box(x - 0.1, y - 0.1, x + 0.1, y + 0.1), score)
    return Tracklet(id, f"digit {digit}", (colour,), boxes)


def make_world() -> STSG:
    """Eight frames, 0.25 s apart: red goes right, hits blue at 0.5 s and green at 1.25 s; blue bounces."""
    return STSG(
        frame_times_s=tuple(0.25 * k for k in range(8)),
        tracklets=(
            track("o1", "red", 3, (0.2, 0.5), (0.8, 0.5), score=0.9),
            track("o2", "blue", 7, (0.5, 0.5), (0.5, 0.9)),
            track("o3", "green", 3, (0.85, 0.5), (0.85, 0.1)),
        ),
        relations=(
            Relation("o1", "moves right", "o1", 0, 7),
            Relation("o1", "left of", "o3", 0, 7),
            Relation("o1", "left of", "o2", 0, 3),
            Relation("o2", "near", "o3", 0, 1),
        ),
        events=(Event("hits", 2, ("o1", "o2")), Event("hits", 5, ("o1", "o3")), Event("bounces", 6, ("o2",))),
        vocabulary=VOCABULARY,
        source="test",
    )
