"""What every reward reads from a completion: its text, thought and answer, and the graph that it states."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, update_wrapper
from typing import Any, NamedTuple

from vot_kernels.data.digitworld.traces import read_reply
from vot_kernels.scene_graph.graph import STSG, Vocabulary
from vot_kernels.scene_graph.text import ParseIssue, from_text

Completion = str | Sequence[Mapping[str, Any]]
"""A text, or messages, whose last one is the reply."""
Rewards = list[float | None]


class Stated(NamedTuple):
    """A reply that is a thought and an answer.

    Attributes:
        thought: the text between the tags, the graph included.
        answer: the text between the tags.
        graph: what is stated in the thought.
        issues: of the graph's text.
    """

    thought: str
    answer: str
    graph: STSG
    issues: Sequence[ParseIssue]


def text_of(completion: Completion) -> str:
    """Return the text of a completion."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def read(
    completion: Completion, vocabulary: Vocabulary | None = None, frame_times_s: Sequence[float] | None = None
) -> Stated | None:
    """Return what a completion states; None if it is not a thought and an answer as a whole."""
    parts = read_reply(text_of(completion))
    if parts is None:
        return None
    thought, answer = parts
    return Stated(thought, answer, *from_text(thought, vocabulary, frame_times_s))


def column(values: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """Return a column of the dataset; one that it does not have is None everywhere."""
    return [None] * count if values is None else values


def with_options(reward: Callable[..., Rewards], **options: Any) -> Callable[..., Rewards]:
    """Return the reward with some of its options set, under its own name, which TRL shows in its logs."""
    return update_wrapper(partial(reward, **options), reward)
