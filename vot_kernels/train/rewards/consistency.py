"""The reward of consistency: what a reply says follows from the graph that it states itself."""

import re
from collections.abc import Sequence
from typing import Any

from vot_kernels.reasoning.claims import judge_claim
from vot_kernels.reasoning.names import find_tracklets
from vot_kernels.reasoning.steps import kind_of
from vot_kernels.reasoning.types import Task
from vot_kernels.reasoning.verification import check
from vot_kernels.scene_graph.graph import Vocabulary
from vot_kernels.scene_graph.text import outside_blocks
from vot_kernels.train.rewards.reading import Completion, Rewards, Stated, column, read


def consistency(
    completions: Sequence[Completion],
    question: Sequence[str],
    candidates: Sequence[Sequence[str] | None] | None = None,
    frame_times_s: Sequence[Sequence[float]] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    **_: Any,
) -> Rewards:
    """Reward an answer and a thought that the stated graph supports, right or wrong.

    The answer is judged as in step 5 of Video-of-Thought, and the words of the thought claim by claim.

    Args:
        completions: the replies.
        question: the questions.
        candidates: the answers to choose from; None where there are none.
        frame_times_s: times of the frames of the clip in seconds.
        vocabulary: the words of the graph; None allows every word.

    Returns:
        1 if the graph supports what it can judge, 0 if it contradicts the answer or the thought, or if the reply is
        not a thought and an answer; None where the graph cannot judge either, as in questions of what would happen.
    """
    count = len(completions)
    rows = zip(completions, question, column(candidates, count), column(frame_times_s, count), strict=True)
    return [_consistency(asked, chosen, read(c, vocabulary, times)) for c, asked, chosen, times in rows]


def _consistency(question: str, candidates: Sequence[str] | None, stated: Stated | None) -> float | None:
    if stated is None:
        return 0.0
    graph, asked = stated.graph, find_tracklets(question, stated.graph)
    task = Task(question, kind_of(question) or "open", "question", asked, "question")
    answer = check(task, stated.answer, candidates or (stated.answer,), graph).verdict
    claims = re.split("[;\n]+", outside_blocks(stated.thought))
    thoughts = [judge_claim(claim, graph)[0] for claim in claims]
    verdicts = [{"supported": True, "contradicted": False, "uncheckable": None}[answer], *thoughts]
    if False in verdicts:
        return 0.0
    return 1.0 if True in verdicts else None
