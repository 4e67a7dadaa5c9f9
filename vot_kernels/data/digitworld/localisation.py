"""Questions of when: answers by rules, the blind baselines beside them, and the measures of moment retrieval."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from vot_kernels.data.digitworld.baselines import shuffled_frames
from vot_kernels.data.digitworld.questions import MOMENT_FORMS, Question
from vot_kernels.data.digitworld.tracks import Tracks
from vot_kernels.scene_graph.graph import STSG, Event
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.relations import DIRECTIONS, INVERSES, MOTIONS, geometric_relations

INTERVAL_BASELINES = ("whole_clip", "middle_third", "mean_interval", "shuffled_frames")
RIGHT_IOU = 0.5  # of R@0.5: the share of answers with at least this temporal IoU
_NAME = r"(the \w+ digit)"


def form_of(question: Question) -> str:
    """Return which of `MOMENT_FORMS` a question of when has."""
    return question.cell.split(": ")[0]


def interval_by_rules(text: str, stsg: STSG) -> Interval:
    """Return when the graph shows what `text` asks for, the first time if often; the whole clip if it shows nothing.

    Events that the graph lacks are found from the tracks, and relations from the boxes.

    Raises:
        ValueError: a wording that DigitWorld does not use, or a graph without frames.
    """
    if not stsg.num_frames:
        raise ValueError("The graph must have at least one frame, got none.")
    tracks = Tracks(stsg)
    for pattern, rule in _RULES:
        if match := re.fullmatch(pattern, text.strip(), flags=re.IGNORECASE):
            parts = [part for part in match.groups() if part is not None]
            named = [tracks.named(part) if re.fullmatch(_NAME, part) else part for part in parts]
            found = rule(tracks, stsg, *named) if None not in named else None
            return found or Interval(stsg.frame_times_s[0], stsg.frame_times_s[-1])
    raise ValueError(f"The rules know only DigitWorld's wordings, not {text!r}.")


_Rule = Callable[..., Interval | None]


def _hit(tracks: Tracks, stsg: STSG, a: int, b: int, begin: str = "0", end: str = "inf") -> Interval | None:
    frames = [t for t in tracks.hits_of(a, b) if float(begin) <= tracks.times[t] <= float(end)]
    return stsg.interval(Event("hits", frames[0], ())) if frames else None


def _bounce(tracks: Tracks, stsg: STSG, body: int) -> Interval | None:
    frames = [frame for frame, track in tracks.bounces if track == body]
    return stsg.interval(Event("bounces", frames[0], ())) if frames else None


def _place(tracks: Tracks, stsg: STSG, a: int, place: str, b: int) -> Interval | None:
    return _relation(stsg, tracks.tracklets[a].id, place, tracks.tracklets[b].id)


def _motion(tracks: Tracks, stsg: STSG, body: int, direction: str) -> Interval | None:
    id = tracks.tracklets[body].id
    return _relation(stsg, id, f"moves {direction}", id)


def _relation(stsg: STSG, subject: str, predicate: str, object: str) -> Interval | None:
    asked = [(subject, predicate, object), (object, INVERSES.get(predicate), subject)]
    relations = stsg.relations or geometric_relations(stsg)
    for wanted in asked:
        found = [r for r in relations if (r.subject, r.predicate, r.object) == wanted]
        if found:
            return stsg.interval(min(found, key=lambda relation: relation.t0))
    return None


_RULES: tuple[tuple[str, _Rule], ...] = (
    (rf"When does {_NAME} hit {_NAME}(?: between ([\d.]+) and ([\d.]+) s)?\?", _hit),
    (rf"When does {_NAME} bounce off a wall\?", _bounce),
    (rf"When is {_NAME} ({'|'.join(DIRECTIONS)}) {_NAME}\?", _place),
    (rf"When does {_NAME} move ({'|'.join(m.removeprefix('moves ') for m in MOTIONS)})\?", _motion),
)


def baseline_intervals(
    train: Sequence[Question], questions: Sequence[Question], stsgs: Sequence[STSG], *, seed: int = 0
) -> dict[str, list[Interval]]:
    """Return the answers of every baseline of `INTERVAL_BASELINES` to `questions`, each with the graph of its clip.

    "mean_interval" is the mean start and end of the questions `train` of the same form; "shuffled_frames" are the
    rules on a graph whose frames are in random order.
    """
    if len(questions) != len(stsgs):
        raise ValueError(f"stsgs must be one per question, got {len(stsgs)} for {len(questions)} questions.")
    rng = np.random.default_rng(seed)
    means = {form: _mean([q.interval for q in train if form_of(q) == form]) for form in MOMENT_FORMS}
    clips = [Interval(stsg.frame_times_s[0], stsg.frame_times_s[-1]) for stsg in stsgs]
    thirds = [(clip, clip.length_s / 3) for clip in clips]
    return {
        "whole_clip": clips,
        "middle_third": [Interval(clip.start_s + third, clip.end_s - third) for clip, third in thirds],
        "mean_interval": [means[form_of(q)] or clip for q, clip in zip(questions, clips, strict=True)],
        "shuffled_frames": [
            interval_by_rules(q.text, shuffled_frames(stsg, rng))
            for q, stsg in zip(questions, stsgs, strict=True)
        ],
    }


def _mean(intervals: Sequence[Interval | None]) -> Interval | None:
    ends = [(i.start_s, i.end_s) for i in intervals if i is not None]
    return Interval(*np.mean(ends, axis=0).tolist()) if ends else None


def localisation_scores(
    questions: Sequence[Question], answers: Sequence[Interval | None]
) -> dict[str, dict[str, float]]:
    """Return "miou" (mean temporal IoU) and "r50" (R@0.5) per form of question and over "all"; no answer has IoU 0."""
    found: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.interval is None:
            raise ValueError(f"A question of when must have an interval, {question.text!r} has none.")
        iou = 0.0 if answer is None else answer.iou(question.interval)
        for group in (form_of(question), "all"):
            found.setdefault(group, []).append(iou)
    return {
        group: {"miou": float(np.mean(ious)), "r50": float(np.mean([iou >= RIGHT_IOU for iou in ious]))}
        for group, ious in found.items()
    }
