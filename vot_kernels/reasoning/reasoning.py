"""Video-of-Thought: from a question and a scene graph to an answer with evidence, in five steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vot_kernels.reasoning import prompts, steps
from vot_kernels.reasoning.llm import LanguageModel, as_language_model, without_video
from vot_kernels.reasoning.moments import answer_interval, asks_when, importance_of
from vot_kernels.reasoning.names import find_tracklets
from vot_kernels.reasoning.types import (
    Analysis,
    Answer,
    Evidence,
    EvidenceBox,
    EvidenceEvent,
    EvidenceRelation,
    Ranking,
    StepTrace,
    Switches,
    Task,
    Tracking,
    Verification,
)
from vot_kernels.reasoning.verification import confidence, perception_score
from vot_kernels.reasoning.what_if import World
from vot_kernels.scene_graph.graph import STSG
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.words import fold

NOTHING_SEEN = "nothing in it was recognised"


class VideoOfThought:
    """Answer questions about a video's scene graph by step-wise reasoning.

    1. task definition · 2. object tracking · 3. action analysis · 4. candidate ranking · 5. verification.

    Args:
        llm: a `LanguageModel`, or any `generate(prompt) -> str`.
        switches: which steps run.
        graph_style: how the model reads the graph: "sentences", "stsg" (the compact text form) or "both".
        world: simulates what the clip does not show, so that verification can check it; None leaves that unchecked.
        calibration: maps the raw confidence of an answer to how often such answers are right, of a choice among given
            candidates about a known clip that the graph supports; see `vot_kernels.reasoning.calibration`. None leaves
            it raw.

    Raises:
        TypeError: `llm` is neither.
        ValueError: an unknown graph_style.
    """

    def __init__(
        self,
        llm: LanguageModel | Callable[[str], str],
        switches: Switches | None = None,
        *,
        graph_style: prompts.GraphStyle = "sentences",
        world: World | None = None,
        calibration: Callable[[float], float] | None = None,
    ) -> None:
        if graph_style not in prompts.GRAPH_STYLES:
            raise ValueError(
                f"graph_style must be one of {', '.join(prompts.GRAPH_STYLES)}, got '{graph_style}'."
            )
        self.llm = as_language_model(llm)
        self.switches = switches or Switches()
        self.graph_style = graph_style
        self.world = world
        self.calibration = calibration

    def run(
        self,
        question: str,
        candidates: Sequence[str] | None,
        stsg: STSG,
        *,
        domain_warning: str | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer `question` about the video that `stsg` describes.

        Args:
            candidates: the answers to choose from; None for an open question, whose candidates are proposed.
            domain_warning: why the clip is outside the perception model's domain; the answer then says so
                and its confidence is at most 0.1. A graph without tracklets counts as such a clip, unless the
                language model sees the video itself; its prompts then leave the empty graph out.
            report: called with the name of each step when it begins.

        Raises:
            ValueError: the question is empty, or the candidates are empty, blank or repeated.
        """
        question, given = check_question(question), check_candidates(candidates)
        empty_but_seen = not stsg.tracklets and without_video(self.llm) is not None
        if not stsg.tracklets and not empty_but_seen and domain_warning is None:
            domain_warning = NOTHING_SEEN
        run = _Run(self.llm, report)
        on = self.switches
        everything = Task(question, targets=tuple(t.id for t in stsg.tracklets))
        task = run.step(
            "task_definition", on.task_definition, lambda m: steps.define_task(m, question, stsg), everything
        )
        whole = Tracking(stsg, prompts.graph_text(stsg, self.graph_style))
        tracking = run.step(
            "tracking", on.tracking, lambda m: steps.track_objects(task, stsg, self.graph_style), whole
        )
        if empty_but_seen:
            tracking = replace(tracking, text="")
        analysis = run.step(
            "action_analysis",
            on.action_analysis,
            lambda m: steps.analyse_actions(m, task, tracking),
            Analysis(),
        )
        ranking = run.step("ranking", True, lambda m: self._rank(m, task, tracking, analysis, given, stsg))
        best = ranking.best.text if ranking.best else None
        verification = run.step(
            "verification",
            on.verification,
            lambda m: steps.verify(m, task, tracking, analysis, ranking, stsg, self.world),
            Verification("off", best, best),
        )
        return self._answer(task, ranking, verification, stsg, run.trace, given, domain_warning)

    def _rank(
        self,
        model: steps.Recorder,
        task: Task,
        tracking: Tracking,
        analysis: Analysis,
        given: tuple[str, ...] | None,
        stsg: STSG,
    ) -> Ranking:
        candidates = given if given is not None else steps.propose_candidates(model, task, tracking, stsg)
        ranking = steps.rank_candidates(
            model, task, tracking, analysis, candidates, stsg, words=self.switches.ranking
        )
        return replace(ranking, candidates_from="given" if given is not None else "proposed")

    def _answer(
        self,
        task: Task,
        ranking: Ranking,
        verification: Verification,
        stsg: STSG,
        trace: list[StepTrace],
        given: tuple[str, ...] | None,
        warning: str | None,
    ) -> Answer:
        choice = verification.after
        chosen = next((c for c in ranking.candidates if c.text == choice), None)
        mentioned = find_tracklets(choice or "", stsg)
        ids = tuple(dict.fromkeys((*task.targets, *mentioned)))
        interval = None
        if choice is not None and asks_when(task.question):
            interval = answer_interval(task.question, choice, task.named, stsg)
        sure = 0.0
        if chosen is not None:
            check = next((c for c in verification.checks if c.candidate == choice), None)
            verdict = check.verdict if check else "uncheckable"
            seen = perception_score(stsg, ids) if stsg.tracklets or warning else 1.0
            # A single candidate has not won against another.
            share = chosen.score if len(ranking.candidates) > 1 else chosen.score / 2
            sure = confidence(share, verdict, verification.commonsense, seen, warning is None)
            # Such answers it was fitted to; of one that nothing bears out it knows nothing.
            fitting = warning is None and verdict == "supported" and given is not None and len(given) > 1
            if self.calibration is not None and fitting:
                sure = self.calibration(sure)
        return Answer(
            question=task.question,
            text=_wording(choice, verification, warning, only=given is not None and len(given) == 1),
            choice=choice,
            choice_before=verification.before,
            confidence=sure,
            decided_by=ranking.decided_by,
            verification=verification.outcome,
            evidence=collect_evidence(
                stsg if interval is None else _during(interval, stsg), ids, task.question
            ),
            trace=tuple(trace),
            candidates=given,
            warning=warning,
            model=self.llm.name,
            switches=self.switches,
            interval=interval,
        )


def _during(interval: Interval, stsg: STSG) -> STSG:
    """Return the part of the graph in an interval of time."""
    inside = [k for k, time in enumerate(stsg.frame_times_s) if time in interval]
    return stsg.subgraph(None, inside[0], inside[-1]) if inside else stsg


def collect_evidence(stsg: STSG, ids: Sequence[str], question: str = "") -> Evidence:
    """Collect the events, relations and boxes that concern the tracklets `ids`.

    Events are those in which any of them takes part; relations, those with both ends among them, or with one end for a
    single tracklet; boxes, theirs where they are first and last seen, and at the events. Events and relations that
    matter more to the question come first, then the earlier ones.
    """
    wanted = set(ids)
    matters = importance_of(question, find_tracklets(question, stsg), stsg)
    names = {t.id: t.name for t in stsg.tracklets}
    times = stsg.frame_times_s
    events = sorted((e for e in stsg.events if wanted & set(e.participants)), key=lambda e: e.t)
    events.sort(key=matters, reverse=True)
    needed = 1 if len(wanted) == 1 else 2
    relations = [
        r
        for r in stsg.relations
        if len(wanted & {r.subject, r.object}) >= min(needed, len({r.subject, r.object}))
    ]
    relations.sort(key=matters, reverse=True)
    boxes = []
    for tracklet in stsg.tracklets:
        if tracklet.id not in wanted or not tracklet.boxes:
            continue
        shown = {tracklet.frames[0], tracklet.frames[-1], *(e.t for e in events)} & set(tracklet.frames)
        for frame in sorted(shown):
            box, score = tracklet.boxes[frame]
            boxes.append(EvidenceBox(tracklet.id, tracklet.name, frame, times[frame], box, score))
    return Evidence(
        times_s=tuple(sorted({b.time_s for b in boxes} | {times[e.t] for e in events})),
        boxes=tuple(boxes),
        relations=tuple(
            EvidenceRelation(
                names.get(r.subject, r.subject),
                r.predicate,
                names.get(r.object, r.object),
                times[r.t0],
                times[r.t1],
                r.score,
            )
            for r in relations
        ),
        events=tuple(
            EvidenceEvent(e.kind, tuple(names.get(id, id) for id in e.participants), e.t, times[e.t], e.score)
            for e in events
        ),
    )


class _Run:
    """One run of the steps, which records what each asked, returned and took in time."""

    def __init__(self, llm: LanguageModel, report: Callable[[str], None] | None) -> None:
        self.llm, self.report = llm, report
        self.trace: list[StepTrace] = []

    def step(self, name: str, on: bool, work: Callable[[steps.Recorder], Any], otherwise: Any = None) -> Any:
        recorder = steps.Recorder(self.llm)
        if on and self.report is not None:
            self.report(name)
        start = time.perf_counter()
        output = work(recorder) if on else otherwise
        seconds = time.perf_counter() - start
        self.trace.append(StepTrace(name, on, output, tuple(recorder.calls), seconds))
        return output


def check_question(question: str) -> str:
    """Return the question on one line; ValueError if it is empty."""
    if not question.strip():
        raise ValueError("The question is empty.")
    return " ".join(question.split())


def check_candidates(candidates: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the candidates on one line each; ValueError if there are none, one is blank or two are equal."""
    if candidates is None:
        return None
    if isinstance(candidates, str):
        raise ValueError(f"candidates must be a sequence of answers, got the string {candidates!r}.")
    texts = tuple(" ".join(candidate.split()) for candidate in candidates)
    if not texts:
        raise ValueError("The list of candidates is empty; pass None for an open question.")
    if not all(texts):
        raise ValueError("A candidate is blank; every candidate needs text.")
    if len(set(map(fold, texts))) < len(texts):
        raise ValueError(f"Two candidates are the same: {', '.join(texts)}.")
    return texts


def split_candidates(text: str | None) -> tuple[str, ...] | None:
    """Return the candidates that a user wrote in one line, separated by "|", checked; None if there is no line."""
    return check_candidates(None if text is None else text.split("|"))


def outside(warning: str, answer: str = "; no answer.") -> str:
    """Return the sentence about a clip outside the checkpoint's domain."""
    return f"This clip is outside what the checkpoint knows ({warning}){answer}"


def _wording(choice: str | None, verification: Verification, warning: str | None, only: bool) -> str:
    if warning is not None:
        return outside(warning) if choice is None else f"{outside(warning, '')}; a guess: {choice}"
    if choice is not None:
        return f"{choice} (the only candidate given)" if only else choice
    if verification.before is None:
        return "I cannot tell: the model proposed no answer."
    return "I cannot tell: the scene graph contradicts every candidate."
