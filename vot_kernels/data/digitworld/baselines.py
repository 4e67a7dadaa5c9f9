"""Answers without seeing the clip, or without its order: the baselines that any method must beat."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vot_kernels.data.digitworld.questions import Question
from vot_kernels.data.digitworld.rules import answer_by_rules
from vot_kernels.extras import imports_for
from vot_kernels.scene_graph.graph import STSG

BASELINES = ("chance", "majority", "question_only", "single_frame", "shuffled_frames")


class Majority:
    """The candidate that was most often the answer to training questions of the same kind."""

    def __init__(self, train: Sequence[Question]) -> None:
        self._counts = Counter((question.kind, question.answer) for question in train)

    def answer(self, question: Question) -> str:
        """Return the first of the candidates with the largest count."""
        return max(question.candidates, key=lambda candidate: self._counts[question.kind, candidate])


class QuestionOnly:
    """Logistic regression on words, which predicts which candidate of a question is its answer.

    It sees the question's words, the candidate's words and position in the list, and every combination of them.
    """

    def __init__(self, train: Sequence[Question], seed: int = 0) -> None:
        with imports_for("The question-only baseline", "train"):
            from sklearn.feature_extraction import FeatureHasher
            from sklearn.linear_model import LogisticRegression
        if not train:
            raise ValueError("train must hold at least one question, got none.")
        self._hasher: Any = FeatureHasher(2**15, input_type="string")
        self._model: Any = LogisticRegression(C=0.1, solver="liblinear", random_state=seed)
        rows = [features for question in train for features in _features(question)]
        right = [candidate == question.answer for question in train for candidate in question.candidates]
        self._model.fit(self._hasher.transform(rows), right)

    def answer(self, question: Question) -> str:
        """Return the candidate with the highest score."""
        scores = self._model.decision_function(self._hasher.transform(_features(question)))
        return question.candidates[int(np.argmax(scores))]


def _features(question: Question) -> list[list[str]]:
    """Return per candidate its words and position, alone and combined with each word of the question."""
    asked = [f"kind={question.kind}", f"choices={len(question.candidates)}", *question.text.lower().split()]
    rows = []
    for place, candidate in enumerate(question.candidates):
        words = candidate.lower().split()
        own = [f"place={place}", f"answer={candidate}", *(f"{n}:{w}" for n, w in enumerate(words))]
        own += [f"asked {w}" for w in words if w in asked]
        rows.append([*own, *(f"{a}|{o}" for a in asked for o in own)])
    return rows


def last_frame_only(stsg: STSG) -> STSG:
    """Return what one frame shows: the last frame's boxes as a clip of one frame, without events and relations."""
    return _with_frames(stsg, [stsg.num_frames - 1] if stsg.num_frames else [])


def shuffled_frames(stsg: STSG, rng: np.random.Generator) -> STSG:
    """Return the same boxes with the frames in random order; events and relations are dropped with it."""
    return _with_frames(stsg, rng.permutation(stsg.num_frames).tolist())


def _with_frames(stsg: STSG, frames: Sequence[int]) -> STSG:
    """Return a graph of tracklets only, whose frame k shows frame frames[k] of `stsg`."""
    tracklets = tuple(
        replace(t, boxes={k: t.boxes[f] for k, f in enumerate(frames) if f in t.boxes})
        for t in stsg.tracklets
    )
    times = stsg.frame_times_s[: len(frames)]
    return replace(stsg, frame_times_s=times, tracklets=tracklets, relations=(), events=())


def baseline_answers(
    train: Sequence[Question], questions: Sequence[Question], stsgs: Sequence[STSG], *, seed: int = 0
) -> dict[str, list[str]]:
    """Return the answers of every baseline of `BASELINES` to `questions`, each with the graph of its clip.

    train: questions of the split "train", for the two fitted baselines. The graphs may be true or predicted.
    """
    if len(questions) != len(stsgs):
        raise ValueError(f"stsgs must be one per question, got {len(stsgs)} for {len(questions)} questions.")
    rng = np.random.default_rng(seed)
    majority, question_only = Majority(train), QuestionOnly(train, seed)
    pairs = list(zip(questions, stsgs, strict=True))
    return {
        "chance": [q.candidates[rng.integers(len(q.candidates))] for q in questions],
        "majority": [majority.answer(q) for q in questions],
        "question_only": [question_only.answer(q) for q in questions],
        "single_frame": [answer_by_rules(q, last_frame_only(stsg)) for q, stsg in pairs],
        "shuffled_frames": [answer_by_rules(q, shuffled_frames(stsg, rng)) for q, stsg in pairs],
    }


def accuracy_by_kind(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy per kind, over all ("all") and on the flip subset of counterfactuals ("flip")."""
    right: dict[str, list[bool]] = {}
    for question, answer in zip(questions, answers, strict=True):
        groups = [question.kind, "all", *(["flip"] if question.flip else [])]
        for group in groups:
            right.setdefault(group, []).append(answer == question.answer)
    return {group: float(np.mean(values)) for group, values in right.items()}
