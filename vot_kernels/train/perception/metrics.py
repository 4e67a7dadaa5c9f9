"""Metrics of a perception checkpoint, measured on held-out DigitWorld clips."""

from collections.abc import Sequence

import numpy as np
import torch

from vot_kernels.data.digitworld.batches import episode_batch
from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.loss import match
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import to_stsg
from vot_kernels.scene_graph.graph import STSG, Event
from vot_kernels.train.perception.batches import dense_targets

_BATCH = 16
_EVENT_TOLERANCE = 1  # frames
Metrics = dict[str, float]


@torch.no_grad()
def perception_metrics(
    model: VotPerceptionModel,
    processor: VotImageProcessor,
    split: str,
    clips: int,
    seed: int = 0,
    num_frames: int | None = None,
) -> Metrics:
    """Measure on the first `clips` episodes of a split, each passed through H.264; `num_frames` overrides the split's.

    Returns:
        presence: share of correct query × frame decisions; exact_count: share of clips with the right
        number of tracklets; center_error_px: median, in pixels of the clip; label_accuracy and
        attribute_accuracy: share of true tracks with the right name; hits_f1, bounces_f1: events with the right
        participants within one frame; relations_f1: over frames; in_domain: share of clips recognised.
    """
    episodes = [generate_episode(split, index, seed, num_frames=num_frames) for index in range(clips)]
    groups: dict[tuple[int, int], list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.scene.size, []).append(episode)
    counts = _Counts()
    for members in groups.values():
        for first in range(0, len(members), _BATCH):
            _measure(model, processor, members[first : first + _BATCH], counts)
    return counts.metrics()


class _Counts:
    """Sums over clips, from which the metrics follow."""

    def __init__(self) -> None:
        self.shares: dict[str, list[float]] = {}
        self.center_errors: list[float] = []
        self.hits: dict[str, list[int]] = {}  # true positives, predicted, true

    def add(self, name: str, values: torch.Tensor | Sequence[bool]) -> None:
        self.shares.setdefault(name, []).extend(torch.as_tensor(values).float().flatten().tolist())

    def add_detections(self, name: str, right: int, predicted: int, true: int) -> None:
        sums = self.hits.setdefault(name, [0, 0, 0])
        for i, n in enumerate((right, predicted, true)):
            sums[i] += n

    def metrics(self) -> Metrics:
        shares = {name: float(np.mean(values)) for name, values in self.shares.items()}
        f1 = {name: 2 * right / max(1, found + true) for name, (right, found, true) in self.hits.items()}
        return shares | {"center_error_px": float(np.median(self.center_errors))} | f1


def _measure(
    model: VotPerceptionModel, processor: VotImageProcessor, episodes: list[Episode], counts: _Counts
) -> None:
    batch = episode_batch(episodes, codec_fraction=1.0)
    inputs = processor(list(batch.frames), fps=episodes[0].scene.fps)
    output = model(**inputs.to(model.device))
    (head,) = output.clips
    truth = dense_targets(batch, episodes).to(model.device)
    pixels = head.centers.new_tensor([batch.frames.shape[3], batch.frames.shape[2]])
    wanted = torch.zeros_like(head.presence, dtype=torch.bool)
    for row, (queries, objects) in enumerate(match(head, truth)):
        wanted[row, queries] = truth.present[row, objects]
        present = truth.present[row, objects]
        error = ((head.centers[row, queries] - truth.centers[row, objects]) * pixels).norm(dim=-1)
        counts.center_errors.extend(error[present].tolist())
        counts.add("label_accuracy", head.labels[row, queries].argmax(-1) == truth.labels[row, objects])
        counts.add(
            "attribute_accuracy", head.attributes[row, queries].argmax(-1) == truth.attributes[row, objects]
        )
        stsg, found = to_stsg(head, row, model.config, episodes[row].times)
        counts.add("exact_count", [len(stsg.tracklets) == len(objects)])
        names = dict(zip(queries.tolist(), (f"o{n + 1}" for n in objects.tolist()), strict=True))
        renamed = {t.id: names.get(q, f"extra {q}") for t, q in zip(stsg.tracklets, found, strict=True)}
        _count_events(stsg, episodes[row].stsg, renamed, counts)
        _count_relations(stsg, episodes[row].stsg, renamed, counts)
    counts.add("presence", (head.presence > 0) == wanted)
    counts.add("in_domain", output.domain_distance <= model.domain_threshold)


def _count_events(found: STSG, truth: STSG, renamed: dict[str, str], counts: _Counts) -> None:
    """Match events greedily one to one by participants and time."""
    for kind in ("hits", "bounces"):
        true = [event for event in truth.events if event.kind == kind]
        predicted = [event for event in found.events if event.kind == kind]
        left, right = list(true), 0
        for event in predicted:
            who = {renamed[p] for p in event.participants}
            same = [e for e in left if set(e.participants) == who and abs(e.t - event.t) <= _EVENT_TOLERANCE]
            if same:
                left.remove(min(same, key=lambda e: _distance(e, event)))
                right += 1
        counts.add_detections(f"{kind}_f1", right, len(predicted), len(true))


def _distance(a: Event, b: Event) -> int:
    return abs(a.t - b.t)


def _count_relations(found: STSG, truth: STSG, renamed: dict[str, str], counts: _Counts) -> None:
    """Count over (subject, predicate, object, frame)."""
    true = {(r.subject, r.predicate, r.object, t) for r in truth.relations for t in range(r.t0, r.t1 + 1)}
    predicted = {
        (renamed[r.subject], r.predicate, renamed[r.object], t)
        for r in found.relations
        for t in range(r.t0, r.t1 + 1)
    }
    # The truth has each inverse pair once ("left of" or "right of"), so what is compared to it must too.
    order = {tracklet.id: n for n, tracklet in enumerate(truth.tracklets)}
    predicted = {p for p in predicted if p[1] == "approaches" or order.get(p[0], -1) <= order.get(p[2], -1)}
    counts.add_detections("relations_f1", len(true & predicted), len(predicted), len(true))
