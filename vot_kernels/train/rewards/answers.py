"""Rewards of the answer: whether it is right, and whether that takes the frames in their order."""

from collections.abc import Sequence
from typing import Any

from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.reasoning.claims import stated_interval
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.words import fold
from vot_kernels.train.rewards.reading import Completion, Rewards, column, text_of


def accuracy(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    interval: Sequence[Sequence[float] | None] | None = None,
    frame_times_s: Sequence[Sequence[float]] | None = None,
    **_: Any,
) -> Rewards:
    """Reward the right answer with 1; an answer that is a time with its temporal IoU.

    Args:
        completions: the replies.
        answer: the right answers, which are compared without case and spacing.
        interval: for questions of when, begin and end of the right answer in seconds, which then counts alone.
        frame_times_s: times of the frames of the clip in seconds, needed where there is an interval.

    Returns:
        1 or 0, or for questions of when a number in [0, 1]; 0 for a reply that is not a thought and an answer; None
        where no right answer is known.
    """
    count = len(completions)
    rows = zip(completions, answer, column(interval, count), column(frame_times_s, count), strict=True)
    return [_accuracy(*row) for row in rows]


def order_bonus(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    shuffled_accuracy: Sequence[float | None],
    group: Sequence[Any] | None = None,
    *,
    margin: float = 0.1,
    **columns: Any,
) -> Rewards:
    """Reward right answers to a question that is answered better from frames in order than from shuffled ones.

    It follows the idea of T-GRPO (Feng et al. 2025, Video-R1), but a tie earns nothing.

    Args:
        completions: the replies about frames in order.
        answer: the right answers.
        shuffled_accuracy: mean accuracy of replies to the same question about shuffled frames.
        group: what tells the questions apart; None if all replies are to one question.
        margin: by how much the mean accuracy of a group must exceed `shuffled_accuracy`.
        columns: further columns, as `accuracy` takes them.

    Returns:
        The accuracy of replies to such questions, 0 for the others, None where nothing is known.
    """
    right = accuracy(completions, answer, **columns)
    groups = column(group, len(right))
    known: dict[Any, list[float]] = {}
    for key, value in zip(groups, right, strict=True):
        if value is not None:
            known.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in known.items()}
    return [
        None if value is None or shuffled is None else (value if means[key] - shuffled > margin else 0.0)
        for value, key, shuffled in zip(right, groups, shuffled_accuracy, strict=True)
    ]


def _accuracy(
    completion: Completion,
    answer: str | None,
    interval: Sequence[float] | None,
    frame_times_s: Sequence[float] | None,
) -> float | None:
    if answer is None and interval is None:
        return None
    parts = read_reply(text_of(completion))
    if parts is None:
        return 0.0
    if interval is None:
        return float(fold(parts[1]) == fold(answer or ""))
    said, true = stated_and_true(parts[1], interval, frame_times_s)
    return said.iou(true) if said else 0.0


def stated_and_true(
    answer: str, interval: Sequence[float], frame_times_s: Sequence[float] | None
) -> tuple[Interval | None, Interval]:
    """Return the interval that an answer names, and the true one as words would name it.

    Words round to hundredths of a second, for which nobody shall pay.
    """
    if frame_times_s is None:
        raise ValueError("Questions of when need the column frame_times_s, got None.")
    clip = STSG(frame_times_s=tuple(frame_times_s))
    true = Interval(*interval)
    return stated_interval(answer, clip), stated_interval(str(true), clip) or true
