"""A language model that replies what a test specifies."""

from collections.abc import Callable, Sequence

from vot_kernels.reasoning.llm import ScoreUnavailable

PURPOSES = {
    "Which kind of question": "kind",
    "Which of these objects": "targets",
    "Before answering": "analysis",
    "Answer in a few words": "proposals",
    "Rate it from 1 to 10": "rating",
    "contradict the thought": "contradiction",
    "shortest possible answer": "answer",
}


def purpose_of(prompt: str) -> str:
    """Return the purpose of a prompt."""
    found = [purpose for words, purpose in PURPOSES.items() if words in prompt]
    assert len(found) == 1, f"the prompt fits {found}: {prompt}"
    return found[0]


class ScriptedLanguageModel:
    """Replies by purpose; a reply may be a function of the prompt. Scores come from `likelihood` and `prior`,
    tables of candidate -> mean log-likelihood; without `likelihood` the model cannot score."""

    name = "scripted"

    def __init__(
        self,
        replies: dict[str, str | Callable[[str], str]] | None = None,
        likelihood: dict[str, float] | None = None,
        prior: dict[str, float] | None = None,
    ) -> None:
        self.replies = replies or {}
        self.likelihood = likelihood
        self.prior = prior or {}
        self.asked: list[str] = []

    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        purpose = purpose_of(prompt)
        self.asked.append(purpose)
        reply = self.replies.get(purpose, "")
        return reply(prompt) if callable(reply) else reply

    def generate_batch(self, prompts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        return [self.generate(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]

    def score(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        self.asked.append("score")
        if self.likelihood is None:
            raise ScoreUnavailable("no likelihoods")
        table = self.likelihood if "What happens in the video" in prompt else self.prior
        return [table.get(text, -3.0 if table is self.likelihood else -1.0) for text in continuations]


def rate(ratings: dict[str, str]) -> Callable[[str], str]:
    """A rating reply that depends on the proposed answer."""

    def reply(prompt: str) -> str:
        proposed = prompt.split("Proposed answer: ")[1].split("\n")[0]
        return ratings.get(proposed, "")

    return reply
