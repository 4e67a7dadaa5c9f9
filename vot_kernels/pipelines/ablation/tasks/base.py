"""What a task is, and what it begins with."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vot_kernels.train.loop import Report

Changes = Mapping[str, Any]
Step = Callable[[], None]


@dataclass(frozen=True)
class Sources:
    """What some parts begin with; a part whose source is missing is left out.

    Attributes:
        vlm: folder of a video-language model, as `vot train sft` makes it.
        answers: files of rows that `vot eval digitworld` wrote.
    """

    vlm: Path | None = None
    answers: Sequence[Path] = ()


class Task(ABC):
    """What a variant does in a run.

    Attributes:
        steps: optimiser steps of a run, by default.
        clips: held-out clips in the metrics.
        seeds: so many at most.
    """

    steps = 0
    clips = 0
    seeds = sys.maxsize

    @abstractmethod
    def run(
        self, changes: Changes, seed: int, steps: int, folder: Path, report: Report, sources: Sources
    ) -> dict[str, float]:
        """Train in `folder`, or go on there, and return the metrics."""

    def lacks(self, changes: Changes, sources: Sources) -> str | None:
        """Return which option a variant needs that is not given."""
        return None

    def cost(self, changes: Changes) -> dict[str, int]:
        """Return the parameters of the encoder, and its operations in a training step; empty without training."""
        return {}

    def step(self, changes: Changes) -> Step | None:
        """Return a function that computes a training step, to be timed; None without training."""
        return None


def seconds_of(step: Step) -> float:
    """Return the seconds that a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
