"""One question about each of many DigitWorld clips, resumable: what the evaluations share."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.question_sets import AskedEpisode
from vot_kernels.files import append_json_lines, read_json_lines
from vot_kernels.models.encoder.processing import VotImageProcessor
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.models.perception.reading import Detection, detect
from vot_kernels.pipelines.progress import track
from vot_kernels.train.checkpoint import fingerprint
from vot_kernels.watching.perception import explained

LOOKED_AT = ("frames", "frame_size", "fps", "codec", "decoder")
Row = dict[str, Any]
_CRF = 23


def answer_rows(
    perception: VotPerceptionModel,
    processor: VotImageProcessor,
    asked: Sequence[AskedEpisode],
    settings: Row,
    rows_file: str | os.PathLike[str],
    answer: Callable[[AskedEpisode, np.ndarray, Detection], Row],
) -> list[Row]:
    """Return a row for each question: `answer` of its clip's frames, which pass through H.264, and of the graph seen.

    Each row is at once appended to `rows_file`, after a row with the settings.

    Raises:
        ValueError: `rows_file` belongs to a run with other settings, or has other rows than those of the questions.
    """
    file = Path(rows_file)
    rows = _read_rows(file, settings, asked)
    with append_json_lines(file) as append:
        if not file.stat().st_size:
            append({"settings": settings})
        for item in track(asked[len(rows) :], "Asking", done=len(rows)):
            frames = h264_roundtrip(item.episode.frames(), _CRF)
            found = detect(perception, processor, [frames], [item.episode.times], item.episode.name)
            (seen,) = explained(perception, found)
            rows.append(answer(item, frames, seen))
            append(rows[-1])
    return rows


def named(name: str, model: nn.Module) -> str:
    """Return the name of a model in the settings, which changes with its weights."""
    return f"{name} ({fingerprint(model)})"


def looked_note(settings: Row) -> list[str]:
    """Return the sentence about what the model looked at; none for results of an older version, which lack it."""
    names = [name for name in LOOKED_AT if name in settings]
    looked = "; ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in names)
    return [f"Looked at: {looked}."] if looked else []


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines of text in columns."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def looked_at(asked: Sequence[AskedEpisode]) -> dict[str, str]:
    """Describe what of the clips reaches the model. Other frames, or another decoder, give other scores."""
    import av

    scenes = [item.episode.scene for item in asked]
    return {
        "frames": _span(scene.num_frames for scene in scenes),
        "frame_size": _span(f"{scene.size[1]} × {scene.size[0]}" for scene in scenes),
        "fps": _span(f"{scene.fps:g}" for scene in scenes),
        "codec": f"H.264, crf {_CRF}, yuv420p",
        "decoder": f"PyAV {av.__version__}",
    }


def _span(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _read_rows(path: Path, settings: Row, asked: Sequence[AskedEpisode]) -> list[Row]:
    """Return the rows of an earlier, interrupted run on the same questions."""
    lines = read_json_lines(path)
    if not lines:
        return []
    found = lines[0].get("settings") if isinstance(lines[0], dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no file of rows: its first line has no settings; move it away.")
    if found != settings:
        names = [name for name in (settings | found) if found.get(name) != settings.get(name)]
        changes = ", ".join(f"{name} was {found.get(name)}, now {settings.get(name)}" for name in names)
        raise ValueError(f"{path} belongs to a run with other settings: {changes}; move it away.")
    rows = lines[1:]
    for number, row in enumerate(rows, 2):
        name = asked[number - 2].episode.name if number - 2 < len(asked) else None
        if not isinstance(row, dict) or row.get("episode") != name or "answers" not in row:
            raise ValueError(
                f"{path}, line {number}, is not the row of {name or 'a question'}; move the file away."
            )
    return rows
