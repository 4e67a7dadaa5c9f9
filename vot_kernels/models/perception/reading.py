"""Conversion of the head's output to a spatial-temporal scene graph."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.configuration import VotPerceptionConfig
from vot_kernels.models.perception.head import HeadOutput
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.scene_graph.graph import STSG, Box, Event, Relation, Tracklet, Vocabulary

_SURE = 0.5
_CERTAIN = 0.8
_MIN_SHARE = 0.25  # an object seen in a smaller share of the frames is dropped
_DUPLICATE_IOU = 0.5
_MIN_RELATION_FRAMES = 2


@dataclass(frozen=True)
class Detection:
    """The scene graph of one clip, and how reliable it is.

    Attributes:
        stsg: the graph; track ids in order of first appearance.
        queries: for each tracklet the query that found it; empty for a graph that was joined from several windows.
        domain_distance, domain_threshold: distance of the clip from the training clips, and the limit.
    """

    stsg: STSG
    queries: tuple[int, ...]
    domain_distance: float
    domain_threshold: float

    @property
    def in_domain(self) -> bool:
        """Whether the clip resembles the training clips."""
        return self.domain_distance <= self.domain_threshold


@torch.no_grad()
def detect(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    clips: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    source: str = "",
    read: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> list[Detection]:
    """Detect the graphs of clips of any sizes: uint8 `[T, H, W, 3]` with frame times in seconds, float `[T]`.

    `read` computes the tokens instead of the encoder; see `TokenStream.reader`.
    """
    inputs = processor(list(clips), fps=[sampled_fps(t) for t in times]).to(model.device)
    tokens = None if read is None else read(inputs["pixel_values"], inputs["image_grid_thw"], inputs["fps"])
    output = model.eval()(**inputs, tokens=tokens)
    found: dict[int, Detection] = {}
    limit = float(model.domain_threshold)
    for head, index in zip(output.clips, output.clip_index, strict=True):
        for row, clip in enumerate(index.tolist()):
            stsg, queries = to_stsg(head, row, model.config, times[clip], source)
            found[clip] = Detection(stsg, queries, float(output.domain_distance[clip]), limit)
    return [found[i] for i in range(len(clips))]


def sampled_fps(times: np.ndarray) -> float:
    """Return the mean frames per second of frame times in seconds; 0 for a single frame."""
    return float((len(times) - 1) / (times[-1] - times[0])) if len(times) > 1 else 0.0


def vocabulary(config: VotPerceptionConfig) -> Vocabulary:
    """Return the closed vocabulary of a checkpoint."""
    return Vocabulary(
        tuple(config.labels), tuple(config.attributes), tuple(config.predicates), tuple(config.events)
    )


def to_stsg(
    output: HeadOutput,
    row: int,
    config: VotPerceptionConfig,
    times: Sequence[float] | np.ndarray,
    source: str = "",
) -> tuple[STSG, tuple[int, ...]]:
    """Return the graph of clip `row` of a bucket, and the query behind each tracklet."""
    presence = output.presence[row].sigmoid()
    queries = _distinct(output, row, presence)
    tracklets = tuple(
        _tracklet(f"o{n + 1}", output, row, q, presence[q], config) for n, q in enumerate(queries)
    )
    names = {q: tracklet.id for q, tracklet in zip(queries, tracklets, strict=True)}
    stsg = STSG(
        frame_times_s=tuple(float(t) for t in times),
        tracklets=tracklets,
        relations=tuple(_relations(output, row, names, config)),
        events=tuple(_events(output, row, names, config)),
        vocabulary=vocabulary(config),
        source=source,
    )
    return stsg, tuple(queries)


def _distinct(output: HeadOutput, row: int, presence: Tensor) -> list[int]:
    """Return the queries that see an object, without duplicates, in order of first appearance."""
    seen = presence > _SURE
    order = [
        q for q in presence.mean(1).argsort(descending=True).tolist() if seen[q].float().mean() >= _MIN_SHARE
    ]
    kept: list[int] = []
    for q in order:
        size = output.sizes[row, q].mean()
        apart = [(output.centers[row, q] - output.centers[row, o]).norm(dim=-1).median() / size for o in kept]
        if all(float(a) > 1 - _DUPLICATE_IOU for a in apart):
            kept.append(q)
    first = {q: int(seen[q].float().argmax()) for q in kept}
    return sorted(kept, key=lambda q: (first[q], q))


def _tracklet(
    name: str, output: HeadOutput, row: int, query: int, presence: Tensor, config: VotPerceptionConfig
) -> Tracklet:
    centers, sizes = output.centers[row, query], output.sizes[row, query]
    corners = torch.cat([centers - sizes / 2, centers + sizes / 2], -1).clamp(0, 1).tolist()
    boxes = {
        t: (Box(*corner), float(score))
        for t, (corner, score) in enumerate(zip(corners, presence.tolist(), strict=True))
        if score > _SURE
    }
    attributes = config.attributes and (config.attributes[int(output.attributes[row, query].argmax())],)
    return Tracklet(name, config.labels[int(output.labels[row, query].argmax())], tuple(attributes), boxes)


def _relations(
    output: HeadOutput, row: int, names: dict[int, str], config: VotPerceptionConfig
) -> Iterator[Relation]:
    binary = [p for p in config.predicates if p not in config.unary_predicates]
    pair, single = output.pair_relations[row].sigmoid(), output.unary_relations[row].sigmoid()
    for a, subject in names.items():
        for kind, predicate in enumerate(config.unary_predicates):
            for t0, t1, score in _intervals(single[a, :, kind]):
                yield Relation(subject, predicate, subject, t0, t1, score)
        for b, other in names.items():
            if a == b:
                continue
            for kind, predicate in enumerate(binary):
                for t0, t1, score in _intervals(pair[a, b, :, kind]):
                    yield Relation(subject, predicate, other, t0, t1, score)


def _events(
    output: HeadOutput, row: int, names: dict[int, str], config: VotPerceptionConfig
) -> Iterator[Event]:
    binary = [e for e in config.events if e not in config.unary_events]
    pair, single = output.pair_events[row].sigmoid(), output.unary_events[row].sigmoid()
    found: list[Event] = []
    for a, actor in names.items():
        for kind, event in enumerate(config.unary_events):
            found += [Event(event, t, (actor,), score) for t, score in _peaks(single[a, :, kind])]
        for b, other in names.items():
            if a < b:
                for kind, event in enumerate(binary):
                    # Two objects must separate before they can meet again, so neighbouring frames are one event.
                    moments = _peaks(pair[a, b, :, kind], certain=math.inf)
                    found += [Event(event, t, (actor, other), score) for t, score in moments]
    yield from sorted(found, key=lambda event: (event.t, event.kind, event.participants))


def _intervals(probability: Tensor) -> Iterator[tuple[int, int, float]]:
    """Yield (first, last, mean probability) of each run of frames above one half."""
    values = probability.tolist()
    start = None
    for t, value in enumerate([*values, 0.0]):
        if value > _SURE and start is None:
            start = t
        elif value <= _SURE and start is not None:
            if t - start >= _MIN_RELATION_FRAMES:
                yield start, t - 1, sum(values[start:t]) / (t - start)
            start = None


def _peaks(probability: Tensor, certain: float = _CERTAIN) -> Iterator[tuple[int, float]]:
    """Yield (frame, probability) of moments.

    An event between two frames may be split over both, so neighbours share one moment's probability, unless
    each of them is `certain` by itself.
    """
    values = probability.tolist()
    taken = [False] * len(values)
    for t in sorted(range(len(values)), key=lambda t: -values[t]):
        near = [u for u in (t - 1, t, t + 1) if 0 <= u < len(values) and not taken[u]]
        window = [u for u in near if u == t or values[u] < certain]
        if t in window and sum(values[u] for u in window) > _SURE and values[t] > _SURE / 2:
            yield t, min(1.0, sum(values[u] for u in window))
            for u in window:
                taken[u] = True
