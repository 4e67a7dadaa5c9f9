"""The typed inputs and outputs of the five reasoning steps, and the resulting answer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from vot_kernels.scene_graph.graph import STSG, Box
from vot_kernels.scene_graph.interval import Interval

QuestionKind = Literal[
    "yes/no",
    "count",
    "direction",
    "attribute",
    "which",
    "order",
    "cause",
    "counterfactual",
    "prediction",
    "when",
    "open",
]
Verdict = Literal["supported", "contradicted", "uncheckable"]
Outcome = Literal["kept", "revised", "abstained", "off"]
DecidedBy = Literal["words", "likelihood", "both", "none"]


@dataclass(frozen=True)
class Switches:
    """The steps that run. A step that is off still has an output, which the later steps need.

    Attributes:
        task_definition: if off, the kind is "open" and every tracklet is a target.
        tracking: if off, the model reads the whole graph instead of the part about the targets.
        action_analysis: if off, no analysis is written, and the ranking reads none.
        ranking: if off, candidates are ordered by likelihood alone, without the model's 1–10 ratings.
        verification: if off, the best candidate is the answer.
    """

    task_definition: bool = True
    tracking: bool = True
    action_analysis: bool = True
    ranking: bool = True
    verification: bool = True

    @classmethod
    def all_off(cls) -> Switches:
        """Turn every step off: the language model's likelihood given the whole graph decides."""
        return cls(False, False, False, False, False)


@dataclass(frozen=True)
class ModelCall:
    """One request to the language model.

    Attributes:
        purpose: the purpose of the request.
        prompt: the text that the model reads.
        output: its reply, or the scores of the continuations.
    """

    purpose: str
    prompt: str
    output: str | tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """Step 1: what the question asks, and about which tracklets.

    Attributes:
        question: its text.
        kind: the kind of question.
        targets: ids of the tracklets it is about.
        kind_by, targets_by: who decided: "question" (its wording), "model" (the language model), "both" (they
            agree), "all" (neither named any, so every tracklet is a target) or "default".
    """

    question: str
    kind: QuestionKind = "open"
    kind_by: Literal["question", "model", "both", "default"] = "default"
    targets: tuple[str, ...] = ()
    targets_by: Literal["question", "model", "both", "all"] = "all"

    @property
    def named(self) -> tuple[str, ...]:
        """The targets, if the question itself names them."""
        return self.targets if self.targets_by in ("question", "both") else ()


@dataclass(frozen=True)
class Tracking:
    """Step 2: the part of the graph that concerns the targets.

    Attributes:
        graph: that part.
        text: the form in which the model reads it.
    """

    graph: STSG
    text: str


@dataclass(frozen=True)
class Analysis:
    """Step 3: what happens and why.

    Attributes:
        text: the model's words; empty if the step is off or the reply was unusable.
    """

    text: str = ""


@dataclass(frozen=True)
class ScoredCandidate:
    """Step 4: one candidate.

    Attributes:
        text: the candidate answer.
        score: its share, in [0, 1], of the combined distribution.
        words: the model's rating from 1 to 10, None if it gave none.
        likelihood: mean log-likelihood per token given graph and question, in nats; None if the model cannot
            score.
        prior: the same without the graph.
    """

    text: str
    score: float
    words: int | None = None
    likelihood: float | None = None
    prior: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Step 4: the candidates in order.

    Attributes:
        candidates: best first.
        decided_by: which of the model's two ratings decided.
        candidates_from: "given" by the caller or "proposed" by the model.
    """

    candidates: tuple[ScoredCandidate, ...]
    decided_by: DecidedBy
    candidates_from: Literal["given", "proposed"] = "given"

    @property
    def best(self) -> ScoredCandidate | None:
        return self.candidates[0] if self.candidates else None


@dataclass(frozen=True)
class GroundingCheck:
    """Step 5: whether the graph supports one candidate.

    Attributes:
        candidate: the candidate answer.
        verdict: the result.
        reason: why.
    """

    candidate: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Verification:
    """Step 5: whether the best candidate is kept.

    Attributes:
        outcome: "kept", "revised" (another candidate replaced it), "abstained" or "off".
        before, after: the candidate before and after; None if there is none.
        checks: the checks of the candidates against the graph.
        commonsense: whether the model thinks that the answer agrees with step 3; "not asked" if there is no
            analysis.
    """

    outcome: Outcome
    before: str | None
    after: str | None
    checks: tuple[GroundingCheck, ...] = ()
    commonsense: Literal["agrees", "contradicts", "unclear", "not asked"] = "not asked"


@dataclass(frozen=True)
class StepTrace:
    """The record of one step.

    Attributes:
        name: name of the step.
        ran: False if it was off.
        output: its typed output.
        calls: every call to the model.
        seconds: how long it took.
    """

    name: str
    ran: bool
    output: Task | Tracking | Analysis | Ranking | Verification
    calls: tuple[ModelCall, ...]
    seconds: float

    def in_short(self) -> str:
        """Return the step and its output in one line."""
        off = "" if self.ran else " (off)"
        return f"{self.name.replace('_', ' ').capitalize()}{off}: {_in_short(self.output)}"


@dataclass(frozen=True)
class EvidenceBox:
    """Where a target is in one frame.

    Attributes:
        id, name: id and display name of the tracklet.
        frame, time_s: number of the frame, and its time in seconds.
        box: the box in fractions of the frame.
        score: confidence in [0, 1].
    """

    id: str
    name: str
    frame: int
    time_s: float
    box: Box
    score: float


@dataclass(frozen=True)
class EvidenceRelation:
    """`subject predicate object` over an interval of time.

    Attributes:
        subject, predicate, object: display names; object equals subject in a unary relation.
        start_s, end_s: seconds.
        score: confidence in [0, 1].
    """

    subject: str
    predicate: str
    object: str
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True)
class EvidenceEvent:
    """Something that happened.

    Attributes:
        kind: such as "hits".
        participants: display names, the actor first.
        frame, time_s: number of the frame, and its time in seconds.
        score: confidence in [0, 1].
    """

    kind: str
    participants: tuple[str, ...]
    frame: int
    time_s: float
    score: float


@dataclass(frozen=True)
class Evidence:
    """The parts of the video that the answer rests on.

    Attributes:
        times_s: seconds of the events, and of where the targets are first and last seen.
        boxes, relations, events: boxes, relations and events of the targets.
    """

    times_s: tuple[float, ...] = ()
    boxes: tuple[EvidenceBox, ...] = ()
    relations: tuple[EvidenceRelation, ...] = ()
    events: tuple[EvidenceEvent, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: its text.
        text: the answer for the user.
        choice: the candidate that was chosen, None after abstaining.
        choice_before: the candidate before verification, which shows what verification fixed or broke.
        confidence: a number in [0, 1]; `vot_kernels.reasoning.verification.confidence` defines it. Where there is a
            calibration, and the graph supports the answer, it is the share of such answers that were right on held-out
            questions.
        decided_by: which of the model's two ratings decided.
        verification: outcome of step 5.
        evidence: the parts of the video that the answer rests on.
        trace: the steps as they ran.
        candidates: the answers that were given to choose from, if any.
        warning: why the clip may be outside what the perception model knows, else None.
        model: name of the language model.
        switches: which steps ran.
        interval: when, in seconds, if the question asks that and there is an answer.
    """

    question: str
    text: str
    choice: str | None
    choice_before: str | None
    confidence: float
    decided_by: DecidedBy
    verification: Outcome
    evidence: Evidence
    trace: tuple[StepTrace, ...]
    candidates: tuple[str, ...] | None = None
    warning: str | None = None
    model: str = ""
    switches: Switches = field(default_factory=Switches)
    interval: Interval | None = None

    @property
    def seconds(self) -> float:
        """The total time of the steps, in seconds."""
        return sum(step.seconds for step in self.trace)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers; a graph is its text form."""
        return {**plain(self), "seconds": self.seconds}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON; scripts other than Latin stay readable."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def headline(self) -> str:
        """Return the answer in one line."""
        when = f", {self.interval}" if self.interval and str(self.interval) not in self.text else ""
        return f"Answer: {self.text}{when} (confidence {self.confidence:.2f}, decided by {self.decided_by})"

    def summary(self) -> str:
        """Return the five steps and the answer in a few lines of plain text."""
        lines = [f"Question: {self.question}"]
        lines += [f"{number}. {step.in_short()}" for number, step in enumerate(self.trace, 1)]
        return "\n".join([*lines, self.headline()])


def plain(value: Any) -> Any:
    """Convert `value` to what JSON can hold."""
    if isinstance(value, STSG):
        return value.to_text()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _in_short(out: Task | Tracking | Analysis | Ranking | Verification) -> str:
    if isinstance(out, Task):
        targets = ", ".join(out.targets) or "none"
        said = f"kind {out.kind} (by {out.kind_by}), targets {targets} (by {out.targets_by})"
    elif isinstance(out, Tracking):
        graph = out.graph
        said = (
            f"{len(graph.tracklets)} tracklets, {len(graph.relations)} relations, {len(graph.events)} events"
        )
    elif isinstance(out, Analysis):
        said = out.text or "nothing said"
    elif isinstance(out, Ranking):
        said = "; ".join(f"{c.text} {c.score:.2f}" for c in out.candidates) or "no candidate"
        said += f" (decided by {out.decided_by})"
    else:
        said = f"{out.outcome}; commonsense {out.commonsense}"
        said += "".join(f"; {check.candidate}: {check.verdict} ({check.reason})" for check in out.checks)
    return said
