"""Published annotation files as files of questions; what cannot be used is named."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vot_kernels.data.questions.formats import FORMATS
from vot_kernels.data.questions.formats.given import Given, LeftOut, read_json
from vot_kernels.data.questions.question import question_from_dict, question_to_dict
from vot_kernels.files import atomic_write, check_output

_PICKLES = (".pkl", ".pickle", ".p")


@dataclass(frozen=True)
class Conversion:
    """What became of a file.

    Attributes:
        records: its records.
        questions: questions that were written.
        left_out: records, or parts of them, that were not.
    """

    records: int
    questions: int
    left_out: int


def convert_questions(
    form: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    report: Callable[[str], None],
    *,
    videos: str | os.PathLike[str] | None = None,
    suffix: str = ".mp4",
    names: str | os.PathLike[str] | None = None,
    fps: float | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Write the questions of an annotation file to a JSONL file, which appears when it is complete.

    Args:
        form: a key of `FORMATS`.
        source: the annotation file, which is read as a whole.
        out: the JSONL file, in whose folder paths of videos begin.
        report: called with a sentence for each record, or part of one, that cannot be used.
        videos: folder of the videos, by default that of `out`. They need not be there, but where they are, they say how
            large they are and how many frames a second has.
        suffix: of the names of videos that have none.
        names: a JSON object that gives ids of videos other names.
        fps: frames per second of videos that are not there; frames of Action Genome and STAR have numbers alone.
        split: of all questions; by default as the file says.
        progress: called with the records done, and all of them.

    Raises:
        ValueError: the file is not of this format, or has no question that can be used.
        OSError: a file cannot be read or written.
    """
    if form not in FORMATS:
        raise ValueError(f"The format must be one of {', '.join(FORMATS)}, got {form!r}.")
    path, target = Path(source), Path(out)
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"'{path}' is a pickle, which can run code when it is opened: export it as JSON of the same structure, "
            "with lists for tuples and arrays, and give that."
        )
    check_output(target, ".jsonl", path, *([names] if names else []))
    given = Given(path, target.parent, Path(videos or target.parent), suffix, _names(names), fps)
    records = FORMATS[form].records(path)
    written = left_out = 0
    ids: dict[str, str] = {}
    with atomic_write(target) as draft, open(draft, "w", encoding="utf-8") as lines:
        for n, (name, record) in enumerate(records, 1):
            try:
                for fields in FORMATS[form].questions(record, given):
                    if isinstance(fields, LeftOut):
                        left_out += 1
                        report(f"{path}, {name}: {fields.reason}")
                        continue
                    if split is not None:
                        fields["split"] = split
                    fields["source"] = FORMATS[form].title
                    question = question_from_dict(fields, id=name)
                    if question.id in ids:
                        raise ValueError(f"Its id {question.id!r} is also that of {ids[question.id]}.")
                    ids[question.id] = name
                    lines.write(json.dumps(question_to_dict(question), ensure_ascii=False) + "\n")
                    written += 1
            except ValueError as error:
                left_out += 1
                report(f"{path}, {name}: {error}")
            progress(n, len(records))
        if not written:
            raise ValueError(
                f"{path} has {len(records):,} records, but no question of {FORMATS[form].title}."
            )
    return Conversion(len(records), written, left_out)


def _names(path: str | os.PathLike[str] | None) -> Mapping[str, str]:
    if path is None:
        return {}
    found = read_json(Path(path), dict)
    if wrong := [key for key, name in found.items() if not isinstance(name, str)]:
        raise ValueError(f"{path} must give each video a name, but that of {wrong[0]!r} is no string.")
    return found
