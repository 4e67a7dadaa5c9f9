"""The typed inputs and outputs of the five reasoning steps, and the answer they end in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from vot_kernels.scene_graph.graph import STSG, Box

QuestionKind = Literal[
    "yes/no", "count", "direction", "which", "order", "cause", "counterfactual", "prediction", "open"
]
Verdict = Literal["supported", "contradicted", "uncheckable"]
Outcome = Literal["kept", "revised", "abstained", "off"]
DecidedBy = Literal["words", "likelihood", "both", "none"]


@dataclass(frozen=True)
class Switches:
    """Which steps run. A step that is off passes on what is stated here, so that the rest still works.

    task_definition: off = the kind is "open" and every tracklet is a target.
    tracking: off = the whole graph is read instead of the part about the targets.
    action_analysis: off = no analysis is written, none is read by the ranking.
    ranking: off = candidates are ordered by likelihood alone, without the model's 1–10 words.
    verification: off = the best candidate is the answer.
    """

    task_definition: bool = True
    tracking: bool = True
    action_analysis: bool = True
    ranking: bool = True
    verification: bool = True

    @classmethod
    def all_off(cls) -> Switches:
        """Every step off: the language model's likelihood given the whole graph decides."""
        return cls(False, False, False, False, False)


@dataclass(frozen=True)
class ModelCall:
    """One request to the language model: "generate" with its reply, or "score" with its numbers."""

    purpose: str
    prompt: str
    output: str | tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """Step 1. What is asked and about which tracklets (ids).

    kind_by, targets_by: "question" (its own words), "model" (the language model's words), "both" (they
    agree), "all" (nobody named any: every tracklet is a target) or "default".
    """

    question: str
    kind: QuestionKind = "open"
    kind_by: Literal["question", "model", "both", "default"] = "default"
    targets: tuple[str, ...] = ()
    targets_by: Literal["question", "model", "both", "all"] = "all"


@dataclass(frozen=True)
class Tracking:
    """Step 2. The part of the graph that concerns the targets, and the text the model reads it as."""

    graph: STSG
    text: str


@dataclass(frozen=True)
class Analysis:
    """Step 3. What happens and why, in the model's words; empty when off or when nothing usable came."""

    text: str = ""


@dataclass(frozen=True)
class ScoredCandidate:
    """Step 4, one candidate. `score` is its share in [0, 1] of the combined distribution.

    words: the model's rating 1–10, None when it gave none.
    likelihood: mean log-likelihood per token given graph and question (nats), None if the model cannot score.
    prior: the same without the graph.
    """

    text: str
    score: float
    words: int | None = None
    likelihood: float | None = None
    prior: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Step 4. Candidates, best first; which of the model's two voices decided; where candidates came from."""

    candidates: tuple[ScoredCandidate, ...]
    decided_by: DecidedBy
    candidates_from: Literal["given", "proposed"] = "given"

    @property
    def best(self) -> ScoredCandidate | None:
        return self.candidates[0] if self.candidates else None


@dataclass(frozen=True)
class GroundingCheck:
    """Step 5. Does the graph bear out one candidate, and why."""

    candidate: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Verification:
    """Step 5. What became of the best candidate.

    outcome: "kept", "revised" (another candidate took its place), "abstained" or "off".
    before, after: the candidate before and after; None where there is none.
    commonsense: does the model see the answer agree with step 3; "not asked" when there is no analysis.
    """

    outcome: Outcome
    before: str | None
    after: str | None
    checks: tuple[GroundingCheck, ...] = ()
    commonsense: Literal["agrees", "contradicts", "unclear", "not asked"] = "not asked"


@dataclass(frozen=True)
class StepTrace:
    """One step as it ran: its typed output, every call to the model, seconds taken."""

    name: str
    ran: bool
    output: Task | Tracking | Analysis | Ranking | Verification
    calls: tuple[ModelCall, ...]
    seconds: float


@dataclass(frozen=True)
class EvidenceBox:
    """Where a target is: box in fractions of the frame, time in seconds."""

    id: str
    name: str
    frame: int
    time_s: float
    box: Box
    score: float


@dataclass(frozen=True)
class EvidenceRelation:
    """`subject predicate object` (display names) from start_s to end_s, seconds."""

    subject: str
    predicate: str
    object: str
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True)
class EvidenceEvent:
    """Something that happened to the participants (display names) at time_s, seconds."""

    kind: str
    participants: tuple[str, ...]
    frame: int
    time_s: float
    score: float


@dataclass(frozen=True)
class Evidence:
    """What in the video the answer rests on. `times_s`: events, first and last sight."""

    times_s: tuple[float, ...] = ()
    boxes: tuple[EvidenceBox, ...] = ()
    relations: tuple[EvidenceRelation, ...] = ()
    events: tuple[EvidenceEvent, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    text: what to tell the user. choice: the candidate chosen, None after abstaining.
    choice_before: the candidate before verification; shows what verification fixed and what it broke.
    confidence: in [0, 1], not calibrated; `vot_kernels.reasoning.verification.confidence` defines it.
    warning: why the clip may be outside what the perception model knows, else None.
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

    @property
    def seconds(self) -> float:
        """Time the steps took together."""
        return sum(step.seconds for step in self.trace)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers; a graph is its text form."""
        return {**plain(self), "seconds": self.seconds}

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as JSON; other scripts than Latin stay readable."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def summary(self) -> str:
        """The five steps and the answer in a few lines of plain text."""
        lines = [f"Question: {self.question}"]
        lines += [f"{number}. {_in_short(step)}" for number, step in enumerate(self.trace, 1)]
        lines.append(f"Answer: {self.text} (confidence {self.confidence:.2f}, decided by {self.decided_by})")
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """`value` as what JSON can hold."""
    if isinstance(value, STSG):
        return value.to_text()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def _in_short(step: StepTrace) -> str:
    out, off = step.output, "" if step.ran else " (off)"
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
    return f"{step.name.replace('_', ' ').capitalize()}{off}: {said}"
