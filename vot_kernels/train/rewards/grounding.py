"""Rewards of the graph that a reply states: its tracks and events, and the times of its events."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from vot_kernels.scene_graph.graph import STSG, Vocabulary
from vot_kernels.scene_graph.text import from_text
from vot_kernels.train.rewards.agreement import event_iou, mean_of_matches, told, track_iou
from vot_kernels.train.rewards.answers import stated_and_true
from vot_kernels.train.rewards.reading import Completion, Rewards, column, read

SIGMA_S = 0.5
"""Seconds by which an event may be off and still earn 0.6 of the temporal reward."""


def grounding(
    completions: Sequence[Completion],
    truth: Sequence[str | None],
    frame_times_s: Sequence[Sequence[float]],
    *,
    vocabulary: Vocabulary | None = None,
    **_: Any,
) -> Rewards:
    """Reward a stated graph that agrees with the truth: track IoU × temporal IoU.

    Tracks of the same name, and events of the same kind with participants of the same names, are matched one to one,
    as well as possible. The track IoU is the mean over tracks of vIoU (Zhang et al. 2020, VidSTG): the IoU of the
    boxes, averaged over the frames that either has. The temporal IoU is the mean over events of the IoU of when they
    happen. What is missing or too much has an IoU of 0.

    Args:
        completions: the replies.
        truth: what should be stated, in the text form of scene graphs; None where nobody knows.
        frame_times_s: times of the frames of the clip in seconds.
        vocabulary: the words of the graphs; None allows every word.

    Returns:
        Numbers in [0, 1]; 0 for a reply that is not a thought and an answer; None without ground truth.
    """

    def agree(said: STSG, true: STSG) -> float:
        return track_iou(said, true) * event_iou(said, true)

    rows = zip(completions, truth, frame_times_s, strict=True)
    return [_compare(*row, vocabulary, agree) for row in rows]


def temporal(
    completions: Sequence[Completion],
    truth: Sequence[str | None],
    frame_times_s: Sequence[Sequence[float]],
    interval: Sequence[Sequence[float] | None] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    sigma_s: float = SIGMA_S,
    **_: Any,
) -> Rewards:
    """Reward times that are close to the true ones: exp(-Δt² / 2σ²), averaged over events.

    Events are matched as for `grounding`; one that is missing or too much counts 0. Of an answer that is a time, Δt² is
    the mean over its two ends.

    Args:
        completions: the replies.
        truth, frame_times_s, vocabulary: as for `grounding`.
        interval: for questions of when, begin and end of the right answer in seconds, which then counts alone.
        sigma_s: σ in seconds.

    Returns:
        Numbers in [0, 1]; 0 for a reply that is not a thought and an answer; None where no event or time is known.
    """
    if sigma_s <= 0:
        raise ValueError(f"sigma_s must be positive, got {sigma_s}.")

    def near(said: STSG, true: STSG) -> float | None:
        if not true.events:
            return None
        return mean_of_matches(
            said.events,
            true.events,
            lambda a, b: (
                _proximity(said.frame_times_s[a.t] - true.frame_times_s[b.t], sigma_s)
                if told(a, said) == told(b, true)
                else 0.0
            ),
        )

    rows = zip(completions, truth, frame_times_s, column(interval, len(completions)), strict=True)
    return [
        _compare(completion, graph, times, vocabulary, near)
        if ends is None
        else _near_ends(completion, ends, times, sigma_s)
        for completion, graph, times, ends in rows
    ]


def _compare(
    completion: Completion,
    truth: str | None,
    frame_times_s: Sequence[float],
    vocabulary: Vocabulary | None,
    measure: Callable[[STSG, STSG], float | None],
) -> float | None:
    """Return the measure of the stated and the true graph; both have been text, so both are on its grid."""
    if truth is None:
        return None
    true, _ = from_text(truth, vocabulary, frame_times_s)
    stated = read(completion, vocabulary, frame_times_s)
    nothing = STSG(frame_times_s=tuple(frame_times_s))
    best = measure(nothing if stated is None else stated.graph, true)
    return best if best is None or stated is not None else 0.0


def _near_ends(
    completion: Completion, interval: Sequence[float], frame_times_s: Sequence[float], sigma_s: float
) -> float:
    stated = read(completion)
    if stated is None:
        return 0.0
    said, true = stated_and_true(stated.answer, interval, frame_times_s)
    if said is None:
        return 0.0
    ends = (said.start_s - true.start_s, said.end_s - true.end_s)
    return _proximity(math.hypot(*ends) / math.sqrt(2), sigma_s)


def _proximity(seconds: float, sigma_s: float) -> float:
    return math.exp(-(seconds**2) / (2 * sigma_s**2))
