"""What answers in the workers of test_on_ray.py: it loads no model, so that workers start fast."""

import os
from pathlib import Path


class Answer:
    """An answer about a video."""

    def __init__(self, video, question, candidates, sampling):
        self.row = {
            "question": question,
            "text": f"{Path(video).stem}, {sampling.start} to {sampling.end} s: {candidates or 'anything'}",
            "size": 0.1,
        }

    def to_dict(self):
        return self.row


class Result:
    """What `VideoQA.ask` returns, as far as a batch reads it."""

    read = None

    def __init__(self, *asked):
        self.answer = self.sight = Answer(*asked)


class Mortal:
    """Stands for a VideoQA. Its process ends at a video named poison, and the first time at one named frail.

    A video named odd is an error that is nobody's fault.
    """

    def __init__(self, folder):
        self.died = Path(folder, "died")

    def ask(self, video, question, candidates, sampling):
        name = Path(video).stem
        if name == "poison" or (name == "frail" and not self.died.exists()):
            self.died.touch()
            os._exit(1)
        if name == "odd":
            raise ZeroDivisionError("nobody expects this")
        with open(video, "rb"):
            return Result(video, question, candidates, sampling)
