"""The reward of form: a thought and an answer as a whole, and a scene graph that can be read."""

from collections.abc import Sequence
from typing import Any

from vot_kernels.scene_graph.graph import Vocabulary
from vot_kernels.train.rewards.reading import Completion, Rewards, column, read

PER_ISSUE = 0.1
"""What each issue of the graph's text costs."""


def form(
    completions: Sequence[Completion],
    frame_times_s: Sequence[Sequence[float]] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    **_: Any,
) -> Rewards:
    """Reward `<think>…</think><answer>…</answer>` whose thought holds a scene graph in its text form.

    Args:
        completions: the replies.
        frame_times_s: times of the frames of the clip in seconds; without them every frame number is allowed.
        vocabulary: the words of the graph; None allows every word.

    Returns:
        1, less 0.1 for each issue of the graph's text, at least 0; 0 if the reply as a whole has another form or its
        thought has no graph.
    """
    times = column(frame_times_s, len(completions))
    return [_form(c, t, vocabulary) for c, t in zip(completions, times, strict=True)]


def _form(
    completion: Completion, frame_times_s: Sequence[float] | None, vocabulary: Vocabulary | None
) -> float:
    stated = read(completion, vocabulary, frame_times_s)
    if stated is None or any(issue.kind == "no block" for issue in stated.issues):
        return 0.0
    return max(0.0, 1 - PER_ISSUE * len(stated.issues))
