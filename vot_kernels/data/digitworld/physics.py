"""What would have happened and what will: the motion that a scene graph shows, continued by DigitWorld's mechanics."""

from vot_kernels.data.digitworld.questions import HORIZON
from vot_kernels.data.digitworld.tracks import Tracks
from vot_kernels.scene_graph.graph import STSG


class Physics:
    """The world of elastic discs, for a verification that simulates: a `vot_kernels.reasoning.what_if.World`."""

    event = "hits"

    def meets_without(self, one: str, other: str, removed: str, graph: STSG) -> bool | None:
        """Return whether two tracklets would hit each other without a third; None if one of them has no boxes."""
        tracks = Tracks(graph)
        a, b, gone = (tracks.index(id) for id in (one, other, removed))
        return None if a is None or b is None or gone is None else hit_without(tracks, a, b, gone)

    def next_met(self, id: str, graph: STSG) -> str | None:
        """Return the tracklet that `id` hits next, or passes closest; None if it or all others have no boxes."""
        tracks = Tracks(graph)
        body = tracks.index(id)
        others = [n for n in range(len(tracks.tracklets)) if n != body]
        if body is None or not others:
            return None
        return tracks.tracklets[next_partner(tracks, body, others)].id


def hit_without(tracks: Tracks, a: int, b: int, removed: int) -> bool:
    """Whether a and b hit each other without `removed`.

    Until the first hit of `removed` the clip is used as it was seen; only from there on is it simulated.
    """
    facts = tracks.hits_of(a, b)
    influence = [t for t, _ in tracks.partners(removed)]
    if not influence:
        return bool(facts)
    if facts and facts[0] <= influence[0]:
        return True
    start = max(influence[0] - 1, 0)
    keep = [n for n in range(len(tracks.tracklets)) if n != removed]
    motion = tracks.simulate(start, float(tracks.times[-1] - tracks.times[start]), keep)
    pair = tuple(sorted((keep.index(a), keep.index(b))))
    return any(hit.pair == pair for hit in motion.hits)


def next_partner(tracks: Tracks, body: int, others: list[int]) -> int:
    """Return which of `others` body hits first if the motion continues; if none in time, which it passes closest."""
    motion = tracks.simulate(tracks.num_frames - 1, HORIZON, range(len(tracks.tracklets)))
    for hit in motion.hits:
        other = hit.b if hit.a == body else hit.a
        if body in hit.pair and other in others:
            return other
    return min(others, key=lambda n: motion.closest(body, n))
