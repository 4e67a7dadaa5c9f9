"""Balanced sets of questions, each about a clip of its own."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vot_kernels.data.digitworld.episode import Episode, generate_episode
from vot_kernels.data.digitworld.questions import CELLS, KINDS, Asker, Facts, Question, kept

_MAX_CLIPS_PER_QUESTION = 500


@dataclass(frozen=True)
class AskedEpisode:
    """An episode and one question about it."""

    episode: Episode
    question: Question


def generate_questions(
    split: str, count: int, *, kinds: Sequence[str] = KINDS, seed: int = 0, start: int = 0
) -> list[AskedEpisode]:
    """Return `count` questions about as many clips of `split`, with every kind, and every cell within it, equally
    often.

    The answer is also equally often at each position in the list of candidates. `kinds` are some of `KINDS`, or of
    `TIMED_KINDS`, whose questions have no candidates but an interval.

    The function goes through the episodes from index `start` on and takes from each the question still needed that the
    fewest clips have admitted so far; clips that admit none are skipped. Kinds alternate in the result, so that any
    beginning of it is balanced too. The result is deterministic in all arguments.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    unknown = [kind for kind in kinds if kind not in CELLS]
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(CELLS)}, got {list(kinds)}.")
    plan = _plan(count, kinds)
    wanted = Counter(plan)
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, str], list[AskedEpisode]] = {place: [] for place in wanted}
    for index in range(start, start + count * _MAX_CLIPS_PER_QUESTION):
        episode = generate_episode(split, index, seed)
        asker = Asker(Facts(episode.scene, episode.motion), episode.rng("question set"))
        offers = {place: q for place in wanted if (q := asker.ask(*place)) is not None}
        seen.update(offers.keys())
        if offers:
            place = min(offers, key=lambda place: (seen[place], plan.index(place)))
            found[place].append(AskedEpisode(episode, offers[place]))
            wanted[place] -= 1
            wanted += Counter()  # drops cells that are filled
        if not wanted:
            break
    else:
        missing = ", ".join(f"{kind} ({cell})" for kind, cell in wanted)
        raise ValueError(f"The clips of '{split}' do not admit enough questions of: {missing}.")
    taken = {place: iter(_with_even_places(items, _number(place))) for place, items in found.items()}
    return [next(taken[place]) for place in plan]


def draw_question(split: str, index: int, seed: int = 0) -> AskedEpisode:
    """Return question `index` of an endless set about clips of `split`, which takes no time for those before it.

    Kinds, and the cells of each kind, take turns. Every question is about a clip of its own: the first that admits it
    among those set apart for it.
    """
    kind = KINDS[index % len(KINDS)]
    cell = CELLS[kind][index // len(KINDS) % len(CELLS[kind])]
    for attempt in range(_MAX_CLIPS_PER_QUESTION):
        episode = generate_episode(split, index * _MAX_CLIPS_PER_QUESTION + attempt, seed)
        asker = Asker(Facts(episode.scene, episode.motion), episode.rng("question set"))
        question = asker.ask(kind, cell)
        if question is not None:
            return AskedEpisode(episode, question)
    raise ValueError(
        f"No clip of '{split}' from {index * _MAX_CLIPS_PER_QUESTION} on admits {kind} ({cell})."
    )


def draw_questions(
    episode: Episode, count: int, rng: np.random.Generator, of_a_kind: int = 1
) -> list[Question]:
    """Return up to `count` questions about one clip, at most `of_a_kind` of each kind, for training.

    Kinds come in random order, and of each random ones of the cells that the clip admits, without those that most clips
    admit more often than others, so that no answer is rare. A set for testing has all of them equally often: see
    `generate_questions`.
    """
    asker = Asker(Facts(episode.scene, episode.motion), rng)
    found: list[Question] = []
    for kind in rng.permutation(KINDS):
        cells = (str(cell) for cell in rng.permutation(CELLS[kind]))
        asked = (asker.ask(kind, cell) for cell in cells if rng.random() < kept(kind, cell))
        found += itertools.islice((question for question in asked if question is not None), of_a_kind)
    return [found[n] for n in rng.permutation(len(found))[:count]]


def _number(place: tuple[str, str]) -> int:
    """Return the number of a cell among those of its kind."""
    return CELLS[place[0]].index(place[1])


def _with_even_places(items: list[AskedEpisode], first: int) -> list[AskedEpisode]:
    """Move the answer of the questions of one cell to each position in the list of candidates in turn.

    The turns begin at the position `first`, another one for each cell; with few questions of a cell, all would else
    have their answers near the beginning.
    """
    turns: Counter[int] = Counter()
    moved = []
    for item in items:
        question = item.question
        if not question.candidates:
            moved.append(item)
            continue
        others = [candidate for candidate in question.candidates if candidate != question.answer]
        others.insert((first + turns[len(others)]) % (len(others) + 1), question.answer)
        turns[len(question.candidates) - 1] += 1
        moved.append(replace(item, question=replace(question, candidates=tuple(others))))
    return moved


def _plan(count: int, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Return (kind, cell) of each question: kinds in turn, and each kind's cells in turn."""
    turns: Counter[str] = Counter()
    plan = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        plan.append((kind, CELLS[kind][turns[kind] % len(CELLS[kind])]))
        turns[kind] += 1
    return plan
