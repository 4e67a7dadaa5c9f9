"""Balanced questions about a clip, whose answers the simulation knows exactly.

A kind is split into cells (form of the question and class of the answer). Sets have equally many questions of every
cell, so that neither the wording nor the most frequent answer helps. The assignment of colours to objects is
uniformly random, so kinds whose answer is a digit are balanced by symmetry.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vot_kernels.data.digitworld.scene import Scene
from vot_kernels.data.digitworld.truth import frame_of, true_stsg
from vot_kernels.data.digitworld.world import Hit, Motion
from vot_kernels.scene_graph.graph import STSG, Relation
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.relations import DIRECTIONS as PLACES
from vot_kernels.scene_graph.relations import INVERSES, MOTIONS

KINDS = ("motion", "did_hit", "count", "which_first", "causal", "counterfactual", "next")
TIMED_KINDS = ("when",)
"""Kinds whose answer is an interval of time instead of a candidate."""
MOMENT_FORMS = ("hit", "bounce", "place", "motion")
THIRDS = ("early", "middle", "late")
OPPOSITES = (("left", "right"), ("up", "down"))
DIRECTIONS = tuple(itertools.chain(*OPPOSITES))
YES_NO = ("yes", "no")
MAX_COUNT = {"all hits": 4, "hits": 3, "bounces": 3}
CELLS: dict[str, tuple[str, ...]] = {
    "motion": tuple(f"{part}: {d}" for d in DIRECTIONS for part in ("whole", "start", "end")),
    "did_hit": tuple(f"{part}: {a}" for part in ("whole", "first half", "second half") for a in YES_NO),
    "count": tuple(f"{form}: {n}" for form, most in MAX_COUNT.items() for n in range(most + 1)),
    "which_first": ("of one digit", "of two hits"),
    "causal": ("turn", "needed"),
    "counterfactual": ("yes: flip", "no: flip", "yes: same", "no: same"),
    "next": ("the nearer", "the farther"),
    "when": tuple(f"{form}: {third}" for form in MOMENT_FORMS for third in THIRDS),
}
"""Per kind, the cells that are filled equally. "flip": the counterfactual answer is not the fact."""

AVAILABILITY: dict[str, dict[str, float]] = {
    "did_hit: whole": {"whole: yes": 0.84, "whole: no": 0.24},
    "did_hit: first half": {"first half: yes": 0.51, "first half: no": 0.51},
    "did_hit: second half": {"second half: yes": 0.55, "second half: no": 0.47},
    "count: all hits": {f"all hits: {n}": p for n, p in enumerate((0.16, 0.29, 0.23, 0.18, 0.09))},
    "count: hits": {f"hits: {n}": p for n, p in enumerate((0.62, 0.75, 0.49, 0.18))},
    "count: bounces": {f"bounces: {n}": p for n, p in enumerate((0.62, 0.89, 0.65, 0.18))},
    "counterfactual": {"yes: flip": 0.29, "no: flip": 0.29, "yes: same": 0.49, "no: same": 0.75},
}
"""Share of train clips that admit a cell, where the cells of one form differ; measured on 300 clips."""

HORIZON = 4.0  # the next hit must come within this many seconds after the end
DOMINANCE = 1.5  # a direction of motion outweighs the other axis by this factor
MIN_MOVED = 0.5  # radii; a shorter path has no direction
MIN_APART = 2  # frames between two hits whose order is asked
MIN_LASTING = 3  # frames of a place or motion that is asked for
MAX_LASTING = 0.6  # of the clip
MIN_MISS = 0.1  # radii; discs that do not hit each other stay at least this far apart
NEAR_MISS = 0.4  # radii; in some frame, discs that could have hit each other are at least this close
CHANGED = 0.25  # radii by which removing an object must move another one to matter
WOBBLE = math.radians(1.5)  # answers of re-simulations must survive velocities turned by this much


@dataclass(frozen=True)
class Question:
    """A question with a closed set of answers.

    Attributes:
        kind: one of `KINDS` or `TIMED_KINDS`.
        text: the question.
        candidates: 2 to 5 answers in shuffled order, among them `answer`; none for a kind of `TIMED_KINDS`.
        answer: the right answer.
        flip: whether this is a counterfactual whose answer is the opposite of what happened.
        cell: one of `CELLS[kind]`.
        objects: track ids named in the text.
        interval: the right answer in seconds, for a kind of `TIMED_KINDS`.
    """

    kind: str
    text: str
    candidates: tuple[str, ...]
    answer: str
    flip: bool = False
    cell: str = ""
    objects: tuple[str, ...] = ()
    interval: Interval | None = None


class Facts:
    """What happened in a clip and what would have happened in others."""

    def __init__(self, scene: Scene, motion: Motion) -> None:
        self.scene, self.motion = scene, motion
        self.count = len(scene.digits)
        self._removed: dict[tuple[int, int], Motion] = {}

    @cached_property
    def centers(self) -> np.ndarray:
        """float64 [T, N, 2] px."""
        return self.motion.centers(np.arange(self.scene.num_frames) / self.scene.fps)

    @cached_property
    def busy(self) -> set[int]:
        """Objects that take part in a hit."""
        return {body for hit in self.motion.hits for body in hit.pair}

    @cached_property
    def stsg(self) -> STSG:
        return true_stsg(self.scene, self.motion)

    def around(self, time: float) -> Interval:
        """Return when an event at `time` seconds happens: from a frame's length before it to one after it."""
        frame = 1 / self.scene.fps
        return Interval(max(0.0, time - frame), min(self.scene.duration, time + frame))

    def third(self, interval: Interval) -> str:
        """Return the third of the clip in which the middle of an interval lies."""
        middle = (interval.start_s + interval.end_s) / 2
        return THIRDS[min(2, int(3 * middle / self.scene.duration))]

    def pairs(self) -> Iterator[tuple[int, int]]:
        return itertools.combinations(range(self.count), 2)

    def hits_of(self, *bodies: int) -> list[Hit]:
        """Return the hits in which all the given objects take part, by time."""
        return [hit for hit in self.motion.hits if set(bodies) <= set(hit.pair)]

    def space(self, a: int, b: int, motion: Motion | None = None) -> float:
        """Return the smallest clear space between two objects over the clip, in radii."""
        return (motion or self.motion).closest(a, b) / self.scene.radius - 2

    def removed(self, body: int, wobble: int = 0) -> Motion:
        """Simulate the clip without one object; `wobble` ±1 turns the velocities slightly."""
        key = body, wobble
        if key not in self._removed:
            scene = self.scene.without(body)
            self._removed[key] = replace(scene, velocities=_turned(scene.velocities, wobble)).simulate()
        return self._removed[key]

    def hit_without(self, a: int, b: int, body: int) -> bool | None:
        """Whether a and b would hit each other without `body`; None if too close to tell."""
        a, b = a - (a > body), b - (b > body)
        answers = set()
        for wobble in (0, 1, -1):
            motion = self.removed(body, wobble)
            hit = any(h.pair == (min(a, b), max(a, b)) for h in motion.hits)
            if not hit and self.space(a, b, motion) < MIN_MISS:
                return None
            answers.add(hit)
        return answers.pop() if len(answers) == 1 else None

    def changed_without(self, other: int, body: int) -> bool:
        """Whether removing `body` visibly changes the path of `other`."""
        times = np.arange(self.scene.num_frames) / self.scene.fps
        path = self.removed(body).centers(times)[:, other - (other > body)]
        moved = np.linalg.norm(path - self.centers[:, other], axis=1).max()
        return bool(moved > CHANGED * self.scene.radius)

    def next_partners(self) -> dict[int, int]:
        """Map each object to the one that it hits next after the clip, if that is certain within the horizon."""
        found = [self._partners_after_end(wobble) for wobble in (0, 1, -1)]
        return {a: b for a, b in found[0].items() if all(other.get(a) == b for other in found[1:])}

    def _partners_after_end(self, wobble: int) -> dict[int, int]:
        end = self.motion.centers(np.array([self.scene.duration]))[0]
        scene = replace(self.scene, positions=end, velocities=_turned(self.motion.velocities[-1], wobble))
        partners: dict[int, int] = {}
        for hit in scene.simulate(HORIZON).hits:
            partners.setdefault(hit.a, hit.b)
            partners.setdefault(hit.b, hit.a)
        return partners


def _turned(velocities: np.ndarray, wobble: int) -> np.ndarray:
    """Turn velocities [N, 2] by ±WOBBLE, neighbouring objects in opposite directions."""
    if wobble == 0:
        return velocities
    angle = wobble * WOBBLE * (-1.0) ** np.arange(len(velocities))
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = velocities[:, 0], velocities[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


class Asker:
    """Writes the questions that a clip admits; the random generator chooses order and wording."""

    def __init__(self, facts: Facts, rng: np.random.Generator) -> None:
        self.facts, self.rng = facts, rng
        self.names = [f"the {colour} digit" for colour in facts.scene.colours]

    def ask(self, kind: str, cell: str) -> Question | None:
        """Return one question of this kind and cell, or None if the clip admits none."""
        found = list(getattr(self, f"_{kind}")(cell))
        if not found:
            return None
        question = found[self.rng.integers(len(found))]
        order = self.rng.permutation(len(question.candidates))
        return replace(question, candidates=tuple(question.candidates[i] for i in order), cell=cell)

    def _question(
        self,
        kind: str,
        text: str,
        candidates: tuple[str, ...],
        answer: str,
        *objects: int,
        flip: bool = False,
    ) -> Question:
        ids = tuple(f"o{body + 1}" for body in objects)
        return Question(kind, text, candidates, answer, flip, objects=ids)

    def _swap(self, a: int, b: int) -> tuple[int, int]:
        return (a, b) if self.rng.random() < 0.5 else (b, a)

    def _motion(self, cell: str) -> Iterator[Question]:
        part, wanted = cell.split(": ")
        quarter = -(-self.facts.scene.num_frames // 4)
        first, last = {"whole": (0, -1), "start": (0, quarter - 1), "end": (-quarter, -1)}[part]
        text = {
            "whole": "Which way does {} move over the whole clip?",
            "start": "Which way does {} move at the start of the clip?",
            "end": "Which way does {} move at the end of the clip?",
        }[part]
        moved = (self.facts.centers[last] - self.facts.centers[first]) / self.facts.scene.radius
        for body, (x, y) in enumerate(moved.tolist()):
            if direction(x, y) == wanted:
                # Frames in any order show along which axis it moves, so only the way along it is asked.
                ways = next(pair for pair in OPPOSITES if wanted in pair)
                yield self._question("motion", text.format(self.names[body]), ways, wanted, body)

    def _did_hit(self, cell: str) -> Iterator[Question]:
        part, wanted = cell.split(": ")
        middle, frame = self.facts.scene.duration / 2, 1 / self.facts.scene.fps
        begin, end = {
            "whole": (0.0, math.inf),
            "first half": (0.0, middle),
            "second half": (middle, math.inf),
        }[part]
        for a, b in self.facts.pairs():
            times = [hit.time for hit in self.facts.hits_of(a, b)]
            if part != "whole" and any(abs(time - middle) < frame for time in times):
                continue
            inside = any(begin <= time < end for time in times)
            possible = self._could_have_hit(a, b) if part == "whole" else False
            if inside != (wanted == "yes") or not (times or possible):
                continue  # a pair that never hits is asked about only if it seems to, and not about a half
            first, second = self._swap(a, b)
            when = "" if part == "whole" else f" in the {part} of the clip"
            text = f"Does {self.names[first]} hit {self.names[second]}{when}?"
            yield self._question("did_hit", text, YES_NO, wanted, first, second)

    def _could_have_hit(self, a: int, b: int) -> bool:
        """Whether a pair that does not hit each other seems to in some frame."""
        gap = np.linalg.norm(self.facts.centers[:, a] - self.facts.centers[:, b], axis=1).min()
        return self.facts.space(a, b) > MIN_MISS and gap / self.facts.scene.radius - 2 < NEAR_MISS

    def _count(self, cell: str) -> Iterator[Question]:
        form, wanted = cell.split(": ")
        candidates = tuple(str(n) for n in range(MAX_COUNT[form] + 1))
        if form == "all hits":
            if str(len(self.facts.motion.hits)) == wanted:
                yield self._question(
                    "count", "How many times do two digits hit each other?", candidates, wanted
                )
            return
        for body, name in enumerate(self.names):
            if form == "hits":
                count = len(self.facts.hits_of(body))
                text = f"How many times does {name} hit another digit?"
            else:
                count = sum(bounce.body == body for bounce in self.facts.motion.bounces)
                text = f"How many times does {name} bounce off a wall?"
            if str(count) == wanted:
                yield self._question("count", text, candidates, wanted, body)

    def _which_first(self, cell: str) -> Iterator[Question]:
        if cell == "of one digit":
            yield from self._first_partner()
        else:
            yield from self._first_of_two()

    def _first_partner(self) -> Iterator[Question]:
        fps = self.facts.scene.fps
        for body, name in enumerate(self.names):
            moments: dict[int, int] = {}
            for hit in self.facts.hits_of(body):
                moments.setdefault(hit.b if hit.a == body else hit.a, frame_of(hit.time, fps))
            times = list(moments.values())
            if len(times) >= 2 and times[1] - times[0] >= MIN_APART:
                partners = list(moments)
                yield self._question(
                    "which_first",
                    f"Which digit does {name} hit first?",
                    tuple(self.names[p] for p in partners),
                    self.names[partners[0]],
                    body,
                )

    def _first_of_two(self) -> Iterator[Question]:
        once = [hit for hit in self.facts.motion.hits if len(self.facts.hits_of(*hit.pair)) == 1]
        for early, late in itertools.combinations(once, 2):
            if (
                frame_of(late.time, self.facts.scene.fps) - frame_of(early.time, self.facts.scene.fps)
                < MIN_APART
            ):
                continue
            claims = []
            for hit in (early, late):
                first, second = self._swap(*hit.pair)
                claims.append(f"{self.names[first]} hits {self.names[second]}")
            yield self._question("which_first", "Which of these happens first?", tuple(claims), claims[0])

    def _causal(self, cell: str) -> Iterator[Question]:
        yield from self._cause_of_turn() if cell == "turn" else self._needed_for_hit()

    def _cause_of_turn(self) -> Iterator[Question]:
        """Ask whose hit turned an object, among those that hit it at some time."""
        apart = MIN_APART / self.facts.scene.fps
        for body, name in enumerate(self.names):
            hits = self.facts.hits_of(body)
            partners = dict.fromkeys(hit.b if hit.a == body else hit.a for hit in hits)
            for hit in hits:
                if len(partners) < 2 or any(
                    other is not hit and abs(other.time - hit.time) < apart for other in hits
                ):
                    continue
                cause = hit.b if hit.a == body else hit.a
                yield self._question(
                    "causal",
                    f"Which digit causes {name} to change direction at {hit.time:.1f} s?",
                    tuple(self.names[partner] for partner in partners),
                    self.names[cause],
                    body,
                )

    def _needed_for_hit(self) -> Iterator[Question]:
        """Ask for the one object without which a hit would not have happened, found by removing each in turn."""
        for hit in self.facts.motion.hits:
            others = [
                body
                for body in range(self.facts.count)
                if body not in hit.pair and any(self.facts.hits_of(body, one) for one in hit.pair)
            ]
            if len(others) < 2 or len(self.facts.hits_of(*hit.pair)) != 1:
                continue
            still = {body: self.facts.hit_without(*hit.pair, body) for body in others}
            needed = [body for body in others if still[body] is False]
            if None in still.values() or len(needed) != 1:
                continue
            a, b = self._swap(*hit.pair)
            yield self._question(
                "causal",
                f"Which other digit causes {self.names[a]} to hit {self.names[b]} at {hit.time:.1f} s?",
                tuple(self.names[body] for body in others),
                self.names[needed[0]],
                a,
                b,
            )

    def _counterfactual(self, cell: str) -> Iterator[Question]:
        wanted, change = cell.split(": ")
        flip = change == "flip"
        fact = (wanted == "yes") != flip
        for a, b in self.facts.pairs():
            if bool(self.facts.hits_of(a, b)) != fact:
                continue
            for body in range(self.facts.count):
                if body in (a, b) or self.facts.hit_without(a, b, body) != (wanted == "yes"):
                    continue
                # An object whose removal changes nothing would reveal the answer, "as it was".
                if not (self.facts.changed_without(a, body) or self.facts.changed_without(b, body)):
                    continue
                first, second = self._swap(a, b)
                text = (
                    f"If {self.names[body]} were not there,"
                    f" would {self.names[first]} hit {self.names[second]}?"
                )
                yield self._question("counterfactual", text, YES_NO, wanted, body, first, second, flip=flip)

    def _next(self, cell: str) -> Iterator[Question]:
        last = self.facts.motion.times[-1]
        if self.facts.scene.duration - last < 1.5 / self.facts.scene.fps:
            return  # the last velocities cannot be seen
        last = self.facts.centers[-1]
        for body, partner in self.facts.next_partners().items():
            distances = np.linalg.norm(last - last[body], axis=1)
            for other in {*range(self.facts.count)} - {body, partner}:
                # How near each is in the last frame must not give the answer away.
                if (distances[partner] < distances[other]) != (cell == "the nearer"):
                    continue
                yield self._question(
                    "next",
                    f"After the clip ends, which digit will {self.names[body]} hit next?",
                    (self.names[partner], self.names[other]),
                    self.names[partner],
                    body,
                )

    def _when(self, cell: str) -> Iterator[Question]:
        """Ask when the only event or relation of its kind happens; the cell says in which third of the clip."""
        form, third = cell.split(": ")
        for text, interval, objects in getattr(self, f"_when_{form}")():
            if self.facts.third(interval) == third:
                question = self._question("when", text, (), str(interval), *objects)
                yield replace(question, interval=interval)

    def _when_hit(self) -> Iterator[_Moment]:
        for a, b in self.facts.pairs():
            hits = self.facts.hits_of(a, b)
            if len(hits) == 1:
                first, second = self._swap(a, b)
                text = f"When does {self.names[first]} hit {self.names[second]}?"
                yield text, self.facts.around(hits[0].time), (first, second)

    def _when_bounce(self) -> Iterator[_Moment]:
        for body, name in enumerate(self.names):
            times = [bounce.time for bounce in self.facts.motion.bounces if bounce.body == body]
            if len(times) == 1:
                yield f"When does {name} bounce off a wall?", self.facts.around(times[0]), (body,)

    def _when_place(self) -> Iterator[_Moment]:
        for relation in self._lasting(PLACES):
            ends, place = (int(relation.subject[1:]) - 1, int(relation.object[1:]) - 1), relation.predicate
            if self.rng.random() < 0.5:
                ends, place = ends[::-1], INVERSES[place]
            text = f"When is {self.names[ends[0]]} {place} {self.names[ends[1]]}?"
            yield text, self.facts.stsg.interval(relation), ends

    def _when_motion(self) -> Iterator[_Moment]:
        for relation in self._lasting(MOTIONS):
            body, motion = int(relation.subject[1:]) - 1, relation.predicate.removeprefix("moves ")
            text = f"When does {self.names[body]} move {motion}?"
            yield text, self.facts.stsg.interval(relation), (body,)

    def _lasting(self, predicates: tuple[str, ...]) -> Iterator[Relation]:
        """Yield the relations that hold once, for some frames but not for most of the clip."""
        relations = [r for r in self.facts.stsg.relations if r.predicate in predicates]
        often = Counter((r.subject, r.predicate, r.object) for r in relations)
        longest = MAX_LASTING * self.facts.scene.num_frames
        for relation in relations:
            once = often[relation.subject, relation.predicate, relation.object] == 1
            if once and MIN_LASTING <= relation.t1 - relation.t0 + 1 <= longest:
                yield relation


_Moment = tuple[str, Interval, tuple[int, ...]]
"""The text of a question, its answer, and the objects in it."""


def ask_all(scene: Scene, motion: Motion, rng: np.random.Generator) -> tuple[Question, ...]:
    """Return at most one question of each kind about a clip.

    The cell is drawn first, and cells that most clips admit are skipped more often, so that over many
    clips the answers are close to balanced; `generate_questions` balances them exactly.
    """
    asker = Asker(Facts(scene, motion), rng)
    questions = []
    for kind in KINDS:
        cell = CELLS[kind][rng.integers(len(CELLS[kind]))]
        if rng.random() < kept(kind, cell) and (question := asker.ask(kind, cell)):
            questions.append(question)
    return tuple(questions)


def kept(kind: str, cell: str) -> float:
    """Return the share of possible questions of a cell to keep: that of the rarest cell of its form over its own."""
    for form, shares in AVAILABILITY.items():
        if form.startswith(kind) and cell in shares:
            return min(shares.values()) / shares[cell]
    return 1.0


def direction(x: float, y: float) -> str | None:
    """Return the direction of a displacement in radii (y grows downwards), or None if small or between two."""
    if max(abs(x), abs(y)) < MIN_MOVED:
        return None
    if abs(x) > DOMINANCE * abs(y):
        return "right" if x > 0 else "left"
    if abs(y) > DOMINANCE * abs(x):
        return "down" if y > 0 else "up"
    return None
