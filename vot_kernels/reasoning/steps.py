"""The five steps, each a function from typed inputs to a typed output.

A step asks the language model through a `Recorder`, which records every prompt and reply for the trace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from vot_kernels.reasoning import prompts
from vot_kernels.reasoning.claims import events_of, part_in_question, seconds
from vot_kernels.reasoning.llm import (
    LanguageModel,
    Reply,
    ScoreUnavailable,
    ThinkingModel,
    Thought,
    without_video,
)
from vot_kernels.reasoning.moments import WHEN, asks_when, importance_of, proposed_moments
from vot_kernels.reasoning.names import find_events, find_tracklets, find_yes_no, match_candidate
from vot_kernels.reasoning.types import (
    Analysis,
    DecidedBy,
    ModelCall,
    QuestionKind,
    Ranking,
    ScoredCandidate,
    Task,
    Tracking,
    Verification,
)
from vot_kernels.reasoning.verification import check
from vot_kernels.reasoning.what_if import World
from vot_kernels.scene_graph.graph import STSG, Tracklet
from vot_kernels.scene_graph.summary import summarised
from vot_kernels.scene_graph.words import fold

# New tokens per request; a small model on a CPU generates about 20 a second.
TASK_TOKENS, KIND_TOKENS, ANALYSIS_TOKENS, PROPOSE_TOKENS, RATING_TOKENS = 24, 6, 40, 24, 4
LIKELIHOOD_SHARE = 0.8  # the likelihood's weight; the rest goes to the 1-10 ratings
PRIOR_WEIGHT = 0.5  # share of the likelihood without the graph that is subtracted
TEMPERATURE = 0.25  # nats per token; this difference is a factor of e between candidates
MAX_PROPOSALS = 8
ACCOUNT_EVENTS = 4  # of what happens, in one answer
_HAPPENS = re.compile(
    r"\bwhat(?: else)? (?:happens?|happened|occurs?|occurred|goes on|takes place|is (?:happening|going on))\b"
    r"|\bwhat (?:do|does|did|is|are|was|were)\b.*\b(?:do|doing)\b|^describe (?:it|the (?:clip|video|scene))\W*$"
)
"""Questions of what happens, which the events of a graph answer."""
LONG = 64  # frames; of a longer video the model reads a summary, of a shorter one whatever fits

_KIND_CUES: tuple[tuple[QuestionKind, str], ...] = (
    ("counterfactual", r"\bwould\b.*\b(if|without|had)\b|\b(if|without|had)\b.*\bwould\b"),
    ("when", WHEN),
    ("prediction", r"\bnext\b|\bwill\b|\bgoing to\b|\bwould\b"),
    ("cause", r"\bwhy\b|\bcaus\w*|\bbecause\b|\bresponsible\b|\bwhat made\b|\breason\b"),
    ("count", r"\bhow many\b|\bhow often\b|\bnumber of\b"),
    (
        "direction",
        r"\bdirections?\b|\bwhich way\b|\bwhat way\b|\bwhere\b.*\b(go|goes|going|mov\w*|head\w*)\b",
    ),
    ("order", r"\b(which|who|what)\b.*\b(first|last|earli\w+|latest)\b|\bwhat order\b"),
    (
        "attribute",
        r"\b(what|which) colou?rs?\b|\bcolou?rs? of\b"
        r"|^(what|which) (number|digit) is the \w+( one| digit| object)?\W*$",
    ),
    (
        "which",
        r"^(which|who|whom)\b|^(in|on|with|by|into) (which|whom)\b|^what (object|thing|digit|colou?r)\b",
    ),
    ("yes/no", r"^(did|do|does|is|are|was|were|has|have|had|can|could)\b|\byes or no\b|\btrue or false\b"),
)

# To accept a kind that the model names, the question must contain at least one of these.
_KIND_HINTS: dict[QuestionKind, str] = {
    "counterfactual": r"\b(if|without|had|were|suppose|imagine)\b",
    "prediction": r"\b(future|after\w*|later|soon|then|expect\w*|predict\w*|end up)\b",
    "cause": r"\b(mak\w+|made|led|lead|due|explain|for what|how come)\b",
    "count": r"\b(count|number|amount|total|many|often|times|much)\b",
    "direction": r"\b(way|where|towards?|left|right|up|down|mov\w+|go\w*|head\w*)\b",
    "order": r"\b(first|last|before|after|order|sequence|earl\w+|lat\w+)\b",
    "attribute": r"\b(colou?r\w*|look\w*|kind|sort|number|digit)\b",
    "which": r"\b(which|who|whom|whose|what|name)\b",
    "when": r"\b(when|time|moment|seconds?)\b",
    "yes/no": r"\b(whether|true|false|correct|right|possible)\b",
}
_ECHO_SHARE = 0.5  # a proposal that repeats more than this share of a question's words in a row is no answer


class Recorder:
    """A language model that records what it was asked and what it replied."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.calls: list[ModelCall] = []

    def generate(self, purpose: str, prompt: str, max_new_tokens: int) -> str:
        """Return the reply; a `Reply` that the token limit cut off still says so. A `ThinkingModel` is not asked."""
        if isinstance(self.model, ThinkingModel):
            return ""
        reply = self.model.generate(prompt, max_new_tokens=max_new_tokens)
        reply = reply if isinstance(reply, Reply) else str(reply)
        self.calls.append(ModelCall(purpose, prompt, str(reply)))
        return reply

    def generate_batch(self, purpose: str, batch: Sequence[str], max_new_tokens: int) -> list[str]:
        replies = [str(reply) for reply in self.model.generate_batch(batch, max_new_tokens=max_new_tokens)]
        if len(replies) != len(batch):
            raise ValueError(
                f"The model '{self.model.name}' gave {len(replies)} replies to {len(batch)} prompts."
            )
        self.calls += [
            ModelCall(purpose, prompt, reply) for prompt, reply in zip(batch, replies, strict=True)
        ]
        return replies

    def think(self, purpose: str, question: str, candidates: Sequence[str], graph: STSG) -> Thought | None:
        """Return the thought of a `ThinkingModel`; None from any other model."""
        if not isinstance(self.model, ThinkingModel):
            return None
        thought = self.model.think(question, candidates, graph)
        self.calls.append(ModelCall(purpose, thought.prompt, thought.reply))
        return thought

    def score(
        self, purpose: str, prompt: str, continuations: Sequence[str], *, blind: bool = False
    ) -> list[float] | None:
        """Return mean log-likelihoods per token, or None from a model that cannot score or gives infinities.

        With `blind`, a model that sees the video does not.

        Raises:
            ValueError: the model gives NaN.
        """
        model = (without_video(self.model) if blind else None) or self.model
        try:
            scores = [float(score) for score in model.score(prompt, continuations)]
        except ScoreUnavailable:
            return None
        if len(scores) != len(continuations):
            raise ValueError(
                f"The model '{self.model.name}' gave {len(scores)} scores for {len(continuations)} texts."
            )
        if any(map(math.isnan, scores)):
            raise ValueError(
                f"The model '{self.model.name}' gives NaN in place of likelihoods: its weights are damaged, or too "
                "large for its dtype."
            )
        if not all(map(math.isfinite, scores)):
            return None
        self.calls.append(ModelCall(purpose, prompt, tuple(scores)))
        return scores


def define_task(model: Recorder, question: str, graph: STSG) -> Task:
    """Step 1. Find the kind of the question and the tracklets it is about.

    Where the words of the question itself match, they decide; where they do not, the model decides among the kinds
    that the words admit.
    """
    kind, kind_by = kind_of(question), "question"
    if kind is None:
        kind = _kind_in(
            model.generate("kind", prompts.kind_prompt(question, get_args(QuestionKind)), KIND_TOKENS),
            question,
        )
        kind_by = "model" if kind else "default"
    asked = find_tracklets(question, graph)
    names = [t.name for t in graph.tracklets]
    reply = model.generate("targets", prompts.task_prompt(names, question), TASK_TOKENS) if names else ""
    said = find_tracklets(reply, graph)
    if asked:
        targets, targets_by = asked, "both" if set(said) == set(asked) else "question"
    elif said:
        targets, targets_by = said, "model"
    else:
        targets, targets_by = tuple(t.id for t in graph.tracklets), "all"
    return Task(question, kind or "open", kind_by, targets, targets_by)  # type: ignore[arg-type]


def kind_of(question: str) -> QuestionKind | None:
    """Return the kind of question by its own words, or None if they do not tell."""
    folded = fold(question)
    return next((kind for kind, cue in _KIND_CUES if re.search(cue, folded)), None)


def _kind_in(reply: str, question: str) -> QuestionKind | None:
    """Return the kind that the model names, if the words of the question support it."""
    folded, asked = fold(reply), fold(question)
    named = (kind for kind in get_args(QuestionKind) if kind in folded)
    return next((kind for kind in named if re.search(_KIND_HINTS.get(kind, "$^"), asked)), None)


def track_objects(task: Task, graph: STSG, style: prompts.GraphStyle) -> Tracking:
    """Step 2. Find the tracklets in question, everything that touches them, and those they meet in an event."""
    targets = set(task.targets)
    events = tuple(e for e in graph.events if targets & set(e.participants))
    relations = tuple(r for r in graph.relations if targets & {r.subject, r.object})
    involved = targets.union(*(e.participants for e in events))
    relations = tuple(r for r in relations if {r.subject, r.object} <= involved)
    tracklets = tuple(t for t in graph.tracklets if t.id in involved)
    part = replace(graph, tracklets=tracklets, relations=relations, events=events)
    return Tracking(part, prompts.graph_text(_fitted(_told(part, task), task), style))


def _told(part: STSG, task: Task) -> STSG:
    """Return the part of `part` that the model reads: shorter, and without relations that the question does not need.

    For a question about events or a direction, that is the targets' own motion and the relations that the question
    names; for any other question, it is everything.
    """
    about_events = task.kind in ("yes/no", "count", "which", "order", "when") and find_events(
        task.question, part.vocabulary.events
    )
    if not about_events and task.kind != "direction":
        return part
    asked, targets = fold(task.question), set(task.targets)
    told = (
        r
        for r in part.relations
        if (r.subject == r.object and r.subject in targets)
        or re.search(rf"\b{re.escape(fold(r.predicate))}\b", asked)
    )
    return replace(part, relations=tuple(told))


def _fitted(part: STSG, task: Task) -> STSG:
    """Return `part` of a long video without what the prompt has no room for: what matters to the question stays."""
    room = prompts.MAX_LINES - len(part.tracklets) - 3
    if part.num_frames <= LONG or len(part.events) + len(part.relations) <= room:
        return part
    return summarised(part, max(room, 0), importance_of(task.question, task.named, part))


def analyse_actions(model: Recorder, task: Task, tracking: Tracking) -> Analysis:
    """Step 3. Say what the targets do and why, as the model reads it from the graph with its common sense."""
    context = prompts.context(tracking.text, task.question)
    return Analysis(
        prompts.parse_sentences(model.generate("analysis", prompts.analysis_prompt(context), ANALYSIS_TOKENS))
    )


def propose_candidates(model: Recorder, task: Task, tracking: Tracking, graph: STSG) -> tuple[str, ...]:
    """Return candidates where none are given: those that the kind of the question admits, and the model's own.

    To a question of what happens, or of what somebody does, the events of the graph are one.
    """
    own: tuple[str, ...] = ()
    if asks_when(task.question) and (moments := proposed_moments(task.question, task.named, tracking.graph)):
        return moments[:MAX_PROPOSALS]
    asks_yes_no = task.kind in ("prediction", "counterfactual") and begins_with_verb(task.question)
    if task.kind == "yes/no" or asks_yes_no:
        return ("yes", "no")
    if task.kind == "direction":
        return ("left", "right", "up", "down")
    if task.kind == "attribute" and not find_events(task.question, graph.vocabulary.events):
        if re.search(r"\bcolou?r", fold(task.question)) and graph.vocabulary.attributes:
            return graph.vocabulary.attributes
        return tuple(dict.fromkeys(t.label for t in graph.tracklets))
    if task.kind == "count":
        most = max(len(graph.tracklets), len(graph.events), 1)
        if most < MAX_PROPOSALS:
            return tuple(str(n) for n in range(most + 1))
        kinds = find_events(task.question, graph.vocabulary.events)
        part = part_in_question(task.question, graph)
        counted = len(events_of(part, kinds[0], task.named)) if kinds else 0
        lowest = max(0, counted - MAX_PROPOSALS // 2)
        return tuple(str(n) for n in range(lowest, lowest + MAX_PROPOSALS))
    if task.kind in ("which", "order", "cause", "prediction", "attribute"):
        named = task.targets if task.targets_by != "all" else ()
        others = [t for t in graph.tracklets if t.id not in named] or graph.tracklets
        brief = isinstance(model.model, ThinkingModel)
        own = tuple(brief_name(t, graph) if brief else t.name for t in others)
    if task.kind == "open" and _HAPPENS.search(fold(task.question)):
        own = tuple(filter(None, [account_of(task.question, task.named, graph)]))
    if not own and (thought := model.think("proposals", task.question, (), graph)) is not None:
        return (thought.answer,) if thought.answer else ()
    context = prompts.context(tracking.text, task.question)
    reply = model.generate("proposals", prompts.propose_prompt(context), PROPOSE_TOKENS)
    said = (text for text in prompts.parse_proposals(reply) if not is_echo(text, task.question))
    proposed = (*said, *own)
    distinct: dict[str, str] = {}
    for text in proposed:
        distinct.setdefault(fold(text), text)
    return tuple(distinct.values())[:MAX_PROPOSALS]


def brief_name(tracklet: Tracklet, graph: STSG) -> str:
    """Return "the red digit" for "red digit 3", as people say it, if no other tracklet of the graph is called so."""

    def brief(t: Tracklet) -> str:
        return " ".join((*t.attributes, t.label.split()[0]))

    alone = [brief(t) for t in graph.tracklets].count(brief(tracklet)) == 1
    return f"the {brief(tracklet)}" if alone else tracklet.name


def account_of(question: str, named: Sequence[str], graph: STSG) -> str:
    """Return in words, by time, the events that matter most to `question`; "" if those that it names do nothing.

    named: ids of the tracklets that it names; none stand for all.
    """
    part = part_in_question(question, graph)
    events = [e for e in part.events if not named or set(named) & set(e.participants)]
    importance = importance_of(question, named, graph)
    told = sorted(events, key=importance, reverse=True)[:ACCOUNT_EVENTS]
    told.sort(key=lambda event: event.t)
    return ", then ".join(f"{prompts.event_words(event, part)} at {seconds(part, event.t)}" for event in told)


def is_echo(text: str, question: str) -> bool:
    """Whether `text` repeats the question, or more than half of it in one run."""
    said, asked = (re.findall(r"\w+", fold(part)) for part in (text, question))
    if not said or not asked:
        return False
    inside = f" {' '.join(asked)} " in f" {' '.join(said)} "
    return inside or (
        len(said) > _ECHO_SHARE * len(asked) and f" {' '.join(said)} " in f" {' '.join(asked)} "
    )


def begins_with_verb(question: str) -> bool:
    """Whether the question, or its clause after a comma, begins with a verb and so asks for yes or no."""
    verbs = "did|do|does|is|are|was|were|has|have|can|could|will|would"
    return re.search(rf"(?:^|, ?)(?:{verbs})\b", fold(question)) is not None


def rank_candidates(
    model: Recorder,
    task: Task,
    tracking: Tracking,
    analysis: Analysis,
    candidates: Sequence[str],
    graph: STSG,
    *,
    words: bool,
) -> Ranking:
    """Step 4. Score every candidate by the model's 1–10 rating and by its likelihood, and order them.

    The likelihood is the mean per token, minus half of that without the graph (how plausible the words are anyway); a
    softmax turns it into a distribution. The ratings are divided by their sum; if all are equal, they are ignored. The
    combined score is 0.8 likelihood + 0.2 rating, or the only one there is. Ties go to the likelihood, then to the
    earlier candidate. One of the two decided if it alone prefers the winner; both did if both or neither do.

    A `ThinkingModel` reads the whole `graph` instead and answers in words. Its answer comes first, with its likelihood
    as the score; the other candidates share the rest and keep their order.
    """
    if not candidates:
        return Ranking((), "none")
    thought = model.think("thought", task.question, candidates, graph)
    if thought is not None:
        return _rank_by_thought(thought, candidates)
    context = prompts.context(tracking.text, task.question)
    ratings: list[int | None] = [None] * len(candidates)
    if words:
        batch = [prompts.rating_prompt(context, analysis.text, candidate) for candidate in candidates]
        replies = model.generate_batch("rating", batch, RATING_TOKENS)
        ratings = [prompts.parse_rating(reply) for reply in replies]
    likelihoods = model.score("likelihood", prompts.answer_prompt(context), candidates)
    blind = prompts.blind_prompt(task.question)
    priors = model.score("prior", blind, candidates, blind=True) if likelihoods else None
    by_words = _shares_of_ratings(ratings)
    by_likelihood = _shares_of_likelihoods(likelihoods, priors)
    if not by_words and not by_likelihood:
        reply = model.generate("answer", prompts.answer_prompt(context), PROPOSE_TOKENS)
        by_words = _shares_of_reply(reply, candidates)
    combined = _combine(by_words, by_likelihood, len(candidates))
    order = sorted(range(len(candidates)), key=lambda i: (-combined[i], -(by_likelihood or combined)[i], i))
    scored = tuple(
        ScoredCandidate(
            candidates[i],
            combined[i],
            ratings[i],
            likelihoods[i] if likelihoods else None,
            priors[i] if priors else None,
        )
        for i in order
    )
    return Ranking(scored, _decider(order, by_words, by_likelihood))


def _rank_by_thought(thought: Thought, candidates: Sequence[str]) -> Ranking:
    chosen = match_candidate(thought.answer, candidates)
    others = [text for i, text in enumerate(candidates) if i != chosen]
    if chosen is None:
        return Ranking(tuple(ScoredCandidate(text, 1 / len(others)) for text in others), "none")
    rest = (1 - thought.likelihood) / max(1, len(others))
    answered = ScoredCandidate(candidates[chosen], thought.likelihood)
    return Ranking((answered, *(ScoredCandidate(text, rest) for text in others)), "words")


def _shares_of_ratings(ratings: Sequence[int | None]) -> list[float]:
    """Divide ratings by their sum; empty if they do not distinguish candidates. A missing rating counts as 1."""
    if len(ratings) > 1 and len(set(ratings)) == 1 or not any(ratings):
        return []
    values = [rating or 1 for rating in ratings]
    return [value / sum(values) for value in values]


def _shares_of_likelihoods(
    likelihoods: Sequence[float] | None, priors: Sequence[float] | None
) -> list[float]:
    if not likelihoods:
        return []
    gains = [
        a - PRIOR_WEIGHT * b for a, b in zip(likelihoods, priors or [0.0] * len(likelihoods), strict=True)
    ]
    powers = [math.exp((gain - max(gains)) / TEMPERATURE) for gain in gains]
    return [power / sum(powers) for power in powers]


def _shares_of_reply(reply: str, candidates: Sequence[str]) -> list[float]:
    """Without ratings and likelihoods, choose the candidate that the model answers; empty if it names none."""
    match = match_candidate(reply, candidates)
    if match is None:
        return []
    return [float(i == match) for i in range(len(candidates))]


def _combine(by_words: Sequence[float], by_likelihood: Sequence[float], count: int) -> list[float]:
    if by_words and by_likelihood:
        pairs = zip(by_words, by_likelihood, strict=True)
        return [(1 - LIKELIHOOD_SHARE) * w + LIKELIHOOD_SHARE * p for w, p in pairs]
    return list(by_words or by_likelihood) or [1 / count] * count


def _decider(order: Sequence[int], by_words: Sequence[float], by_likelihood: Sequence[float]) -> DecidedBy:
    if not (by_words or by_likelihood):
        return "none"
    words = bool(by_words) and by_words[order[0]] == max(by_words)
    likelihood = bool(by_likelihood) and by_likelihood[order[0]] == max(by_likelihood)
    if words == likelihood:
        return "both"
    return "words" if words else "likelihood"


def verify(
    model: Recorder,
    task: Task,
    tracking: Tracking,
    analysis: Analysis,
    ranking: Ranking,
    graph: STSG,
    world: World | None = None,
) -> Verification:
    """Step 5. Keep the best candidate, take the next one that the graph does not contradict, or abstain.

    Grounding: a contradicted candidate is replaced, once, by the best one that is not; if the graph contradicts all,
    there is no answer, nor if it shows nothing to a model that does not see the video. What the clip does not show is
    simulated by `world`, if there is one. Common sense: the model is asked
    whether the answer contradicts its analysis; if so, the confidence of what the graph cannot check is lowered, and
    nothing else changes.
    """
    best = ranking.best
    if best is None or (not graph.tracklets and without_video(model.model) is None):
        return Verification("abstained", best.text if best else None, None)
    texts = [candidate.text for candidate in ranking.candidates]
    checks = []
    for text in texts:
        checks.append(check(task, text, texts, graph, world))
        if checks[-1].verdict != "contradicted":
            break
    else:
        return Verification("abstained", best.text, None, tuple(checks))
    after = checks[-1].candidate
    outcome = "kept" if len(checks) == 1 else "revised"
    commonsense = "not asked"
    if analysis.text:
        context = prompts.context(tracking.text, task.question)
        prompt = prompts.contradiction_prompt(context, analysis.text, after)
        said = find_yes_no(model.generate("contradiction", prompt, RATING_TOKENS))
        commonsense = "unclear" if said is None else "contradicts" if said else "agrees"
    return Verification(outcome, best.text, after, tuple(checks), commonsense)  # type: ignore[arg-type]
