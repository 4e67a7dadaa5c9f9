"""`python -m benchmarks.long_video OUT.json`: needle questions about DigitWorld clips of growing length.

Each clip is a file of real H.264; one hit somewhere in it decides the answer. Per length: the share of right answers,
by the rules on the graph of all frames, by the rules on 32 frames spread evenly over the clip, and by the language
model with Video-of-Thought for some of the questions; and the peak memory from the file to the graph, in a process of
its own. Rows are kept beside OUT.json as they are made: the same command goes on after an interruption, and one with
more lengths, or with questions to the language model, adds to them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vot_kernels.files import append_json_lines, atomic_write, check_output, read_json_lines

LENGTHS = (16, 64, 256, 1024, 4096)
CLIPS = {16: 48, 64: 12, 256: 6, 1024: 3, 4096: 2, 10000: 1}
SPREAD = 32  # frames of the comparison, which sees the clip at a low rate
SYSTEMS = {
    "vot": "language model + VoT",
    "rules": "rules on the seen STSG",
    "spread": f"the same, of {SPREAD} frames spread evenly",
}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 1 if a length failed, 2 for a bad option, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    settings = {name: getattr(options, name) for name in ("questions", "seed")}
    try:
        check_output(options.out, ".json")
        rows_file = options.out.with_suffix(".rows.jsonl")
        if options.only is not None:
            clips = options.only, options.questions, options.seed
            _append(rows_file, measure(*clips, _done(rows_file, "questions")))
            _append(rows_file, ask(*clips, options.asked, _done(rows_file, "asked")))
            return 0
        _begin(rows_file, settings)
        for length in options.lengths:
            print(f"{length} frames …", file=sys.stderr, flush=True)
            given = {**settings, "asked": options.asked, "only": length}
            own = [f"--{name}={value}" for name, value in given.items()]
            command = [sys.executable, "-m", "benchmarks.long_video", str(options.out), *own]
            if subprocess.run(command, check=False).returncode:
                print(f"{length} frames failed; the same command goes on there.", file=sys.stderr)
                return 1
        result = summarise(read_json_lines(rows_file)[1:], settings)
    except (ValueError, OSError) as error:
        print(f"benchmarks.long_video: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    with atomic_write(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        plot(result, options.plot)
    print(json.dumps(result["lengths"], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.long_video", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="JSON file for the result")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="frames of the clips")
    parser.add_argument("--questions", type=int, default=24, help="questions of each form and length")
    parser.add_argument(
        "--asked", type=int, default=0, help="of these, how many the language model is asked too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="SVG file for a picture of the result")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser


def _done(rows_file: Path, kind: str) -> set[tuple[int, int]]:
    """Return the clips, by length and number, of which there are rows with `kind`."""
    return {(row["frames"], row["clip"]) for row in read_json_lines(rows_file)[1:] if kind in row}


def _append(rows_file: Path, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        with append_json_lines(rows_file) as append:
            append(row)


def _begin(rows_file: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new file of rows; refuse one of other settings."""
    rows = read_json_lines(rows_file)
    if rows and rows[0] != {"settings": settings}:
        raise ValueError(f"{rows_file} belongs to a run with other settings ({rows[0]}); move it away.")
    with append_json_lines(rows_file) as append:
        if not rows:
            append({"settings": settings})


def measure(frames: int, questions: int, seed: int, done: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each clip of this length: its questions with the answers given, seconds, and peak memory in MB.

    The memory is that of the process, in which no language model is loaded yet.
    """
    from vot_kernels.pipelines.sampling import Sampling
    from vot_kernels.pipelines.video_qa import VideoQA, load_eyes

    clips = CLIPS.get(frames, 4)
    todo = [clip for clip in range(clips) if (frames, clip) not in done]
    if not todo:
        return
    video_qa = VideoQA(load_eyes(), lambda prompt: "")
    loaded = _peak_mb()
    for clip in todo:
        with tempfile.TemporaryDirectory() as folder:
            items, path = _clip(frames, clip, -(-questions // clips), seed, Path(folder))
            start = time.perf_counter()
            _, seen = video_qa.see(path)
            seconds, peak = time.perf_counter() - start, _peak_mb()
            _, spread = video_qa.see(path, Sampling(num_frames=min(SPREAD, frames)))
        rows = [
            _row(item)
            | {
                "right": {
                    "rules": _right(item.question, by_rules(item.question, seen.stsg)),
                    "spread": _right(item.question, by_rules(item.question, spread.stsg)),
                }
            }
            for item in items
        ]
        yield {
            "frames": frames,
            "clip": clip,
            "questions": rows,
            "seconds": seconds,
            "peak_mb": peak,
            "loaded_mb": loaded,
        }  # fmt: skip


def ask(
    frames: int, questions: int, seed: int, asked: int, done: set[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each clip of this length of which the language model is asked some of the same questions.

    It reads the graph as `vot ask` has it read: what of a long video's graph fits into the prompt.
    """
    from vot_kernels.data.digitworld import NEEDLE_FORMS
    from vot_kernels.pipelines.video_qa import VideoQA, load_eyes, load_language_model

    clips = CLIPS.get(frames, 4)
    share = -(-asked // clips)  # of each form; more clips than `asked` are not all asked about
    todo = [clip for clip in range(clips) if clip * share < asked and (frames, clip) not in done]
    if not todo:
        return
    video_qa, model = VideoQA(load_eyes(), lambda prompt: ""), load_language_model()
    for clip in todo:
        with tempfile.TemporaryDirectory() as folder:
            items, path = _clip(frames, clip, -(-questions // clips), seed, Path(folder))
            _, seen = video_qa.see(path)
        chosen = [
            item for form in NEEDLE_FORMS for item in [i for i in items if i.question.kind == form][:share]
        ]
        start = time.perf_counter()
        rows = [
            _row(item) | {"right": {"vot": _right(item.question, _by_model(model, item.question, seen.stsg))}}
            for item in chosen
        ]
        seconds = time.perf_counter() - start
        yield {"frames": frames, "clip": clip, "asked": rows, "seconds": seconds, "model": model.name}


def _row(item: Any) -> dict[str, Any]:
    return {"form": item.question.kind, "question": item.question.text, "time_s": item.time_s}


def _clip(frames: int, clip: int, count: int, seed: int, folder: Path) -> tuple[list[Any], Path]:
    """Return questions about a clip, and its file. Of the short clips, those without a hit that is seen are passed."""
    from vot_kernels.data.digitworld import NEEDLE_FORMS, long_clip, needles
    from vot_kernels.data.video import save_mp4

    rng = np.random.default_rng([seed, frames, clip])
    for index in range(100 * clip, 100 * clip + 100):
        episode = long_clip("test", index, frames, seed)
        items = needles(episode, NEEDLE_FORMS, count, rng)
        if items:
            return items, save_mp4(folder / "clip.mp4", episode.frames(), episode.scene.fps, crf=23)
    raise ValueError(f"No clip of {frames} frames has a hit that is seen.")


def by_rules(question: Any, stsg: Any) -> Any:
    """Return a candidate or an interval."""
    from vot_kernels.data.digitworld import answer_by_rules, interval_by_rules

    return answer_by_rules(question, stsg) if question.candidates else interval_by_rules(question.text, stsg)


def _by_model(model: Any, question: Any, stsg: Any) -> Any:
    from vot_kernels.reasoning.reasoning import VideoOfThought

    answer = VideoOfThought(model).run(question.text, question.candidates or None, stsg)
    return answer.choice if question.candidates else answer.interval


def _right(question: Any, answer: Any) -> bool:
    if question.interval is None:
        return bool(answer == question.answer)
    return answer is not None and answer.iou(question.interval) >= 0.5


def _peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def summarise(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return per length the share of right answers by system, the number of questions, and the memory."""
    lengths = {}
    for frames in sorted({row["frames"] for row in rows}):
        own = [row for row in rows if row["frames"] == frames and "questions" in row]
        told = [row for row in rows if row["frames"] == frames and "asked" in row]
        questions = [question for row in own for question in row["questions"]]
        asked = [question for row in told for question in row["asked"]]
        right: dict[str, dict[str, float]] = {}
        for system in SYSTEMS:
            of_system = [q for q in questions + asked if system in q["right"]]
            for form in ("which", "did", "when", "all"):
                found = [q["right"][system] for q in of_system if form in (q["form"], "all")]
                if found:
                    right.setdefault(system, {})[form] = sum(found) / len(found)
        lengths[str(frames)] = {
            "clips": len(own),
            "questions": len(questions),
            "questions_to_the_model": len(asked),
            "seconds_to_the_model": sum(row["seconds"] for row in told) / max(1, len(asked)),
            "right": right,
            "peak_mb": max(row["peak_mb"] for row in own),
            "loaded_mb": max(row["loaded_mb"] for row in own),
            "seconds_per_clip": sum(row["seconds"] for row in own) / len(own),
        }
    models = sorted({row["model"] for row in rows if "asked" in row})
    given = " ".join(f"--{name} {value}" for name, value in settings.items())
    return {
        "command": f"python -m benchmarks.long_video OUT.json {given}",
        "llm": ", ".join(models),
        "lengths": lengths,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy and peak memory over the number of frames."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "long-video"
    frames = [int(length) for length in result["lengths"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for system, title in SYSTEMS.items():
        right_of = {int(n): found["right"].get(system) for n, found in result["lengths"].items()}
        points = [(n, share["all"]) for n, share in right_of.items() if share is not None]
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=title)
    left.set(ylim=(0, 1.05), ylabel="share of right answers", title="One hit decides")
    left.legend(fontsize=8, loc="lower left")
    right.plot(frames, [found["peak_mb"] for found in result["lengths"].values()], marker="o", label="peak")
    right.plot(
        frames, [found["loaded_mb"] for found in result["lengths"].values()], "--", label="models loaded"
    )
    right.set(ylabel="resident memory, MB", title="From the file to the graph")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(frames, [f"{n:,}" for n in frames])
        axes.set_xlabel("frames of the clip")
        axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
