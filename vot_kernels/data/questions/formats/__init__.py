"""The annotation files of published data sets, a file each: its records, and the questions that a record becomes.

Every format has a function `records(path)`, which returns the records of a file with what to call them, and a function
`questions(record, given)`, which yields the plain forms of questions, and a `LeftOut` for a part of the record that
cannot be used, or raises ValueError for a record that cannot be used at all.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vot_kernels.data.questions.formats import (
    action_genome,
    activitynet_qa,
    charades_sta,
    clevrer,
    nextqa,
    star,
)
from vot_kernels.data.questions.formats.given import Given, LeftOut


class Format(NamedTuple):
    """A format of annotation files.

    Attributes:
        title: how its authors call the data set.
        records: reads a file.
        questions: what becomes of a record.
    """

    title: str
    records: Callable[[Path], Sequence[tuple[str, Any]]]
    questions: Callable[[Any, Given], Iterator[dict[str, Any] | LeftOut]]


FORMATS = {
    "nextqa": Format("NExT-QA", nextqa.records, nextqa.questions),
    "star": Format("STAR", star.records, star.questions),
    "clevrer": Format("CLEVRER", clevrer.records, clevrer.questions),
    "charades-sta": Format("Charades-STA", charades_sta.records, charades_sta.questions),
    "activitynet-qa": Format("ActivityNet-QA", activitynet_qa.records, activitynet_qa.questions),
    "action-genome": Format("Action Genome", action_genome.records, action_genome.questions),
}
