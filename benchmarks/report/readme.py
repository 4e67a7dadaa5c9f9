"""Tables of the README and the docs from committed results.

A table is between `<!-- table: NAME -->` and `<!-- end -->`; a test checks that every table follows from the
committed JSON, so no figure there can be edited by hand.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report.figures import best_of_ours, in_order, is_timed
from benchmarks.report.markdown import escape, table
from benchmarks.report.runs import DIRECTION_NAMES, Row, Section, read_sections
from benchmarks.report.tables import ceilings, device_name, is_partial, number, of_the_floor, ratio_text
from vot_kernels.models.checkpoint import BUNDLED_ADAPTERS, BUNDLED_CHECKPOINT, BUNDLED_READER

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in ("frames.md", "cpu.md", "vot-model.md", "training.md", "long-video.md", "towers.md")
    ),
)
"""The pages with tables."""
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


OURS = "vot-kernels"
SPEED_COLUMNS = ("workload", "ours", "of torch's rate", "the others take", "context: another function takes")


def cpu_table() -> str:
    """Return ours against each peer in the same run."""
    return _speed_table("cpu") or "No figures have been measured on a CPU yet.\n"


def one_thread_table() -> str:
    """Return the same with a single thread."""
    return _speed_table("one-thread")


def amx_table() -> str:
    """Return the same on a processor with AMX."""
    return _speed_table("amx")


def avx2_table() -> str:
    """Return the same on a processor without AVX-512."""
    return _speed_table("avx2")


def gpu_table() -> str:
    """Return ours against each peer on GPUs."""
    return _speed_table("gpu") or "No figures have been measured on a GPU yet.\n"


def towers_table() -> str:
    """Return vision towers that are patched against the same ones as they come."""
    return _speed_table("towers", every=True)


def _speed_table(kind: str, every: bool = False) -> str:
    """Return a table for each device, of all results named after a kind; empty if there are none.

    It has the largest workloads, or `every` one.
    """
    tables = []
    for section in read_sections(sorted(RESULTS.glob(f"{kind}-*.json"))):
        races = section.races.values()
        rows = list(filter(None, map(_speed_row, races if every else _largest(races))))
        body = table(SPEED_COLUMNS, rows)
        tables.append(f"{body}\n{escape(_speed_note(section))}\n")
    return "\n".join(tables)


def _largest(races: Iterable[Sequence[Row]]) -> list[Sequence[Row]]:
    """Return the largest workload of each op and direction, and those of half its size or more; the report has all."""
    found: dict[tuple[str, str, str], list[Sequence[Row]]] = {}
    for rows in races:
        found.setdefault((rows[0].suite, rows[0].op, rows[0].direction), []).append(rows)
    return [
        rows
        for same in found.values()
        for largest in [max(rows[0].size for rows in same)]
        for rows in sorted(same, key=lambda rows: rows[0].size)
        if 2 * rows[0].size >= largest
    ]


def _speed_row(rows: Sequence[Row]) -> list[str] | None:
    """Return our best backend and its time on one workload, its share of the machine's peak, how many times as long
    the others take, our other backends first, and those that compute another function; None if ours was not timed.
    """
    ours = best_of_ours(rows)
    if ours is None:
        return None
    direction = DIRECTION_NAMES.get(ours.direction, ours.direction)
    others = [row for row in in_order(rows) if is_timed(row) and row is not ours]
    backend = ours.provider.removeprefix(OURS).strip()
    return [
        f"`{ours.op}` {direction}: {escape(ours.describe)}, {ours.dtype}",
        f"{number(1e3 * median(ours.whole_s))} ms{', ' if backend else ''}{escape(backend)}",
        of_the_floor(ours),
        "<br>".join(f"**{_times(row, ours)}** {escape(row.provider)}" for row in others if not row.instead),
        "<br>".join(f"{_times(row, ours)} {escape(row.provider)}" for row in others if row.instead),
    ]


def _times(row: Row, ours: Row) -> str:
    return ratio_text(row, ours).partition(" (")[0]


def _speed_note(section: Section) -> str:
    torch = " and ".join(dict.fromkeys(str(run.versions.get("torch")) for run in section.runs))
    partial = "Partial run. " if is_partial(section) else ""
    peak = " and ".join(dict.fromkeys(filter(None, map(ceilings, section.runs))))
    context = _context(section)
    return " ".join(
        [
            f"{partial}{device_name(section)}, torch {torch}.",
            f"Ours is the fastest backend of {OURS}. Medians of the whole op, layouts and masks built inside; ratios "
            "of rounds taken in turns.",
            *(
                [
                    f"The rate of torch, measured first, which a kernel may exceed: {peak}; "
                    "of decoding a video the pixels alone count."
                ]
                if peak
                else []
            ),
            *([f"What computes another function is for context alone: {context}."] if context else []),
        ]
    )


def _context(section: Section) -> str:
    """Say who computed another function, and which one; empty if nobody did."""
    providers: dict[str, dict[str, None]] = {}
    for row in (row for rows in section.races.values() for row in rows if is_timed(row) and row.instead):
        providers.setdefault(row.instead, {})[row.provider] = None
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in providers.items())


def perception_table() -> str:
    """Return the accuracy of the bundled checkpoint on held-out splits."""
    record = _read(ROOT / "vot_kernels" / "checkpoints" / "digitworld-nano" / "training.json")
    columns = {
        "presence": ("objects present or not", _percent),
        "exact_count": ("clips with the right number", _percent),
        "center_error_px": ("median centre error", lambda v: f"{v:.2f} px"),
        "attribute_accuracy": ("colour", _percent),
        "label_accuracy": ("digit", _percent),
        "hits_f1": ("hits F1", lambda v: f"{v:.2f}"),
        "bounces_f1": ("bounces F1", lambda v: f"{v:.2f}"),
        "relations_f1": ("relations F1", lambda v: f"{v:.2f}"),
    }
    rows = [
        [split.replace("_", " "), *(show(metrics[name]) for name, (_, show) in columns.items())]
        for split, metrics in record["metrics"].items()
    ]
    parameters = sum(record["parameters"].values()) / 1e6
    domain = _read(RESULTS / "digitworld-domain.json")
    clips = sum(split["clips"] for split in domain["splits"].values())
    foreign = sum(split["clips"] * split["foreign"] for split in domain["splits"].values())
    least = min(split["auroc"] for split in domain["splits"].values())
    natural = domain["natural"]
    known = (
        f" Of {clips:,} clips of these splits {foreign:.0f} are called foreign, of {natural['clips']} natural ones "
        f"{natural['clips'] * natural['called_foreign']:.0f}; the area under the curve that tells these from any split "
        f"is at least {least:.3f} (`{domain['command']}`)."
    )
    note = (
        f"{parameters:.2f} M parameters, trained in {record['training_seconds'] / 60:.1f} minutes on "
        f"{record['threads']} CPU threads by `{record['command']}`; {record['eval_clips_per_split']} clips a split, "
        f"all through H.264. {record.get('note', '')}".rstrip()
    )
    return table(["split", *(title for title, _ in columns.values())], rows) + f"\n{note}{known}\n"


def question_table() -> str:
    """Return the accuracy on held-out questions, from `vot eval digitworld`: of three runs.

    Our VLM was asked in a run of its own; those who do not watch, in one of more questions.
    """
    result = _read(RESULTS / "digitworld-questions.json")
    reader = _read(RESULTS / "digitworld-splits.json")["test"]
    same = ("videos", "seed", "checkpoint", "frames", "codec")
    if any(result["settings"][name] != reader["settings"][name] for name in same):
        raise ValueError("digitworld-questions.json and digitworld-splits.json are of other questions.")
    systems = reader["accuracy"] | result["accuracy"]
    blind = _read(RESULTS / "digitworld-blind.json")
    result["accuracy"] = {name: systems[name] for name in _SEEING} | {
        name: found for name, found in blind["accuracy"].items() if name not in _SEEING
    }
    settings, fixed, broke = result["settings"], *(result["verification"][key] for key in ("fixed", "broke"))
    seconds = result["seconds_per_question"]
    note = (
        f"`vot eval digitworld --videos {settings['videos']} --out results.json`: as many held-out videos, one "
        f"question each, {settings['llm']}, per cent right. Verification fixed {fixed} answers and broke {broke}. "
        f"{_calibration_note(result)}Our VLM is digitworld-reader (`--vlm digitworld-reader --only vlm`). The "
        f"blind rows are of {blind['settings']['videos']:,} questions (`--only blind --only rules`). Seconds a "
        f"question on two cores that had other work too: {seconds['vot']:.1f} "
        f"with VoT, {seconds['direct']:.1f} direct."
    )
    return _accuracy_table(result) + f"\n{note}\n"


_SEEING = ("vot", "vot_unverified", "direct", "vlm_verified", "vlm", "vlm_truth", "rules", "rules_truth")


def splits_table() -> str:
    """Return how the bundled models do on every held-out split: answers, graphs, and the form of replies."""
    found = _read(RESULTS / "digitworld-splits.json")
    rows = []
    for split, result in found.items():
        accuracy, graph = result["accuracy"], result["scene_graph"]
        rows.append(
            [
                split.replace("_", " "),
                *(_percent(accuracy[name]["all"]) for name in ("rules", "vlm_verified", "vlm")),
                *(_percent(result[name]) for name in ("vlm_format", "vlm_parse_valid")),
                _percent(graph["triplet_recall"]),
                *(f"{graph[name]:.2f}" for name in ("track_iou", "event_iou")),
            ]
        )
    columns = [
        "split",
        "rules",
        "our VLM, verified",
        "our VLM",
        "replies whole",
        "replies whose graph parses",
    ]
    columns += ["triplet recall", "track IoU", "event IoU"]
    videos = found["test"]["settings"]["videos"]
    note = (
        f"`vot eval digitworld --videos {videos} --split … --vlm digitworld-reader --only vlm --only rules`: right "
        "answers to one question a video; then of the replies; then of the seen scene graphs beside the true ones."
    )
    return table(columns, rows) + f"\n{note}\n"


def _calibration_note(result: Any) -> str:
    if "calibration" not in result:
        return ""
    raw, calibrated = (100 * result["calibration"][name] for name in ("raw", "calibrated"))
    return (
        f"Expected calibration error of the confidence, of answers that it was not fitted to: {calibrated:.1f} per "
        f"cent, {raw:.1f} before. "
    )


def vlm_table() -> str:
    """Return the accuracy of SmolLM2 with the bundled adapters on held-out questions, and how they were trained."""
    result = _read(RESULTS / "digitworld-vlm.json")
    settings, seconds = result["settings"], result["seconds_per_question"]["vlm"]
    records = {
        "projector": _read(RESULTS / "digitworld-vlm-projector.json"),
        "sft": _read(BUNDLED_ADAPTERS / "training.json"),
    }
    stages = [
        f"{name} for {record['settings']['steps']} steps of {record['settings']['batch_size']} "
        f"clip{'s' if record['settings']['batch_size'] > 1 else ''}"
        for name, record in records.items()
    ]
    note = (
        f"`vot eval digitworld --videos {settings['videos']} --vlm digitworld-smollm2 --only vlm --only rules`: per "
        f"cent right; {100 * result['vlm_format']:.0f} per cent of the replies are a thought and an answer as a whole. "
        f"Trained with {', then '.join(stages)}. Seconds a question on two cores: {seconds:.1f}."
    )
    return _accuracy_table(result) + f"\n{note}\n"


def reader_table() -> str:
    """Return the accuracy of the bundled video-language model on held-out questions, and how it was trained."""
    result = _read(RESULTS / "digitworld-reader.json")
    settings, seconds = result["settings"], result["seconds_per_question"]["vlm"]
    earlier = [_read(RESULTS / f"digitworld-reader-{name}.json") for name in ("projector", "short", "whole")]
    last = _read(BUNDLED_READER / "training.json")
    minutes = sum(stage["training_seconds"] for stage in (*earlier, last)) / 60
    # Other questions than those after short thoughts alone, of which there were half as many.
    short, whole = (
        100 * stage["metrics"][when]["accuracy"] for stage, when in ((earlier[-1], "before"), (last, "after"))
    )
    note = (
        f"`vot eval digitworld --videos {settings['videos']} --vlm digitworld-reader --only vlm --only rules`: per "
        f"cent right; {100 * result['vlm_format']:.0f} per cent of the replies are a thought and an answer as a whole. "
        f"Seconds a question on one core: {seconds:.1f}. The four stages took {minutes:.0f} minutes on one or two CPU "
        f"threads. Of {last['eval_clips']} questions about other held-out clips, each with frames and true graph, the "
        f"model answers {short:.0f} per cent with short thoughts and {whole:.0f} with whole ones."
    )
    return _accuracy_table(result) + f"\n{note}\n"


def reader_grpo_table() -> str:
    """Return what reinforcement learning made of the bundled video-language model, and of an earlier one."""
    runs = _read(RESULTS / "digitworld-reader-grpo.json")["runs"]

    def cells(run: dict[str, Any], when: str) -> list[str]:
        settings, metrics = run["settings"], run["metrics"][when]
        how = [
            str(settings["steps"]),
            f"{settings['batch_size']} × {settings['generations']}",
            str(settings["learning_rate"]),
            f"{settings['grounding_weight']}, {settings['temporal_weight']}",
        ]
        return [
            f"{run['checkpoint']} ({run['checkpoint_fingerprint']})",
            *(how if when == "after" else ["0", "", "", ""]),
            _percent(metrics["accuracy"]),
            *(f"{metrics[name]:.2f}" for name in ("grounding", "temporal")),
        ]

    columns = ["began with", "steps", "questions × replies", "learning rate", "weights of grounding, time"]
    columns += ["right answers", "grounding", "times"]
    rows = []
    for run in runs:
        before = cells(run, "before")
        rows += [*([] if before in rows else [before]), cells(run, "after")]
    return table(columns, rows) + f"\nGreedy replies to {runs[0]['eval_clips']} held-out questions.\n"


def _accuracy_table(result: Any) -> str:
    from vot_kernels.pipelines.evaluation import SYSTEMS

    columns = ["motion", "did_hit", "count", "which_first", "causal", "counterfactual", "next", "flip", "all"]
    rows = [
        [
            SYSTEMS.get(name, f"blind: {name.replace('_', ' ')}"),
            *(f"{100 * accuracy[c]:.0f}" for c in columns),
        ]
        for name, accuracy in result["accuracy"].items()
    ]
    return table(["answered by", *(c.replace("_", " ") for c in columns)], rows)


def stage_times_table() -> str:
    """Return how long runs of the stages took on CPUs, from their records; what a run was resumed from is left out."""
    grpo = _read(RESULTS / "digitworld-reader-grpo.json")["runs"][-1]
    records = [
        ("encoder", _read(RESULTS / "encoder-nano.json")),
        ("perception", _read(BUNDLED_CHECKPOINT / "training.json")),
        ("linearize", _read(RESULTS / "linearize.json")),
        ("projector, nano", _read(RESULTS / "digitworld-reader-projector.json")),
        ("sft, nano, graphs alone", _read(RESULTS / "digitworld-reader-short.json")),
        ("projector, SmolLM2", _read(RESULTS / "digitworld-vlm-projector.json")),
        ("sft, LoRA of SmolLM2, bfloat16", _read(BUNDLED_ADAPTERS / "training.json")),
        ("grpo-reasoning, nano, graphs alone", grpo),
    ]
    rows = []
    for stage, record in records:
        settings = record["settings"]
        steps = f"{settings['steps'] - record.get('resumed_at_step', 0):,}"
        if "layer_steps" in settings:
            steps = f"{settings['layer_steps']} a layer, then {steps}"
        items = str(settings.get("batch_size", ""))
        items += f" × {settings['generations']} replies" if "generations" in settings else ""
        rows.append([stage, steps, items, str(record["threads"]), f"{record['training_seconds'] / 60:.1f}"])
    columns = ["stage", "steps", "clips or questions a step", "CPU threads", "minutes"]
    note = "From the records of runs, most of which made what ships with the package; of resumed ones the last part."
    return table(columns, rows) + f"\n{note}\n"


def encoder_table() -> str:
    """Return what the encoder of `vot train encoder` has learnt, on held-out clips."""
    record = _read(RESULTS / "encoder-nano.json")
    columns = {
        "distil_tokens": ("distance from the teacher, tokens", ".2f"),
        "distil_pooled": ("pooled", ".2f"),
        "video_to_caption_r1": ("caption of a clip found first", ".0%"),
        "caption_to_video_r1": ("clip of a caption", ".0%"),
        "probe_count": ("probe: count", ".1%"),
        "probe_colour": ("probe: colours", ".1%"),
    }
    rows = [
        [name, *(format(metrics[key], spec) for key, (_, spec) in columns.items())]
        for name, metrics in record["metrics"].items()
    ]
    guess = record["metrics"]["trained"]
    note = (
        f"{record['parameters']['encoder'] / 1e6:.2f} M parameters, {record['training_seconds'] / 60:.0f} minutes on "
        f"{record['threads']} CPU thread, {record['eval_clips']} held-out clips; the teacher is the "
        f"{record['teacher']}. A guess finds {guess['r1_chance']:.0%}; the most frequent count is that of "
        f"{guess['probe_count_majority']:.0%} of the clips, and colours are guessed so at "
        f"{guess['probe_colour_majority']:.1%}. `{record['command']}`"
    )
    return table(["encoder", *(title for title, _ in columns.values())], rows) + f"\n{note}\n"


def temporal_context_table() -> str:
    """Return the gain of a frozen tower from the other frames, seed by seed."""
    result = _read(RESULTS / "temporal-context.json")
    ways = result["results"]
    seeds = [f"seed {seed}" for seed in range(len(next(iter(ways.values()))))]
    rows = [
        [way, *(f"{x:.1f}" for x in found), f"{sum(found) / len(found):.1f}"] for way, found in ways.items()
    ]
    note = f"`{result['command']}`: {result['task']}. {result['machine']}."
    return table(["the covered frame sees", *seeds, "mean"], rows) + f"\n{note}\n"


def linearize_table() -> str:
    """Return the metrics of a perception model before and after linearization, and the errors of its layers."""
    record = _read(RESULTS / "linearize.json")
    columns = {
        "presence": "objects present or not",
        "center_error_px": "median centre error, px",
        "label_accuracy": "digit",
        "hits_f1": "hits F1",
        "bounces_f1": "bounces F1",
        "relations_f1": "relations F1",
    }
    metrics = [[name, *(f"{found[c]:.3f}" for c in columns)] for name, found in record["metrics"].items()]
    layers = list(record["layer_errors"]["converted"])
    titles = [name.removeprefix("encoder.").removesuffix(".attention") for name in layers]
    errors = [
        [when, *(f"{found[name]:.3f}" for name in layers)] for when, found in record["layer_errors"].items()
    ]
    flops = record["attention_flops"]
    saved = 1 - flops["hybrid"] / flops["softmax"]
    note = (
        f"`{record['command']}`; {record['eval_clips']} held-out clips. Errors are root mean squares relative to the "
        f"exact model's, on clips that were not trained on. Attention takes {saved:.0%} fewer operations on a clip of "
        f"{' × '.join(map(str, flops['grid_thw']))} patches."
    )
    tables = table(["attention", *columns.values()], metrics), table(["error of", *titles], errors)
    return "\n".join(tables) + f"\n{note}\n"


def when_table() -> str:
    """Return how well intervals of time fit, from `vot eval digitworld --when`."""
    from vot_kernels.pipelines.localisation import localiser_title

    result = _read(RESULTS / "digitworld-when.json")["localisation"]
    columns = ("hit", "bounce", "place", "motion", "all")
    rows = [
        [
            localiser_title(name),
            *(f"{100 * scores[c]['miou']:.0f} / {100 * scores[c]['r50']:.0f}" for c in columns),
        ]
        for name, scores in result["scores"].items()
    ]
    settings = result["settings"]
    note = f"`vot eval digitworld --videos 0 --when {settings['videos']} --out results.json`: "
    note += f"one question about each held-out video, {settings['llm']}."
    return table(["answered by", *columns], rows) + f"\n{note}\n"


def long_video_table() -> str:
    """Return accuracy and memory over the length of the clip, from `python -m benchmarks.long_video`."""
    from benchmarks.long_video import SYSTEMS

    result = _read(RESULTS / "long-video.json")
    lengths = result["lengths"]
    systems = [s for s in SYSTEMS if any(s in found["right"] for found in lengths.values())]
    rows = [
        [
            f"{int(frames):,}",
            *(_percent(found["right"][s]["all"]) if s in found["right"] else "–" for s in systems),
            f"{found['peak_mb']:.0f} MB",
            f"{found['seconds_per_clip']:.1f} s",
        ]
        for frames, found in lengths.items()
    ]
    counts = ", ".join(str(found["questions"]) for found in lengths.values())
    asked = ", ".join(str(found["questions_to_the_model"]) for found in lengths.values())
    note = f"`{result['command']}`: {counts} questions"
    if result["llm"]:
        note += f"; with `--asked`, {asked} of them to {result['llm']}, too,"
        note += " which read what of the graph fits into its prompt"
    loaded = max(found["loaded_mb"] for found in lengths.values())
    note += f". With the checkpoint loaded and no video read the process has {loaded:.0f} MB. Two cores that had other"
    note += " work."
    columns = ["frames", *(SYSTEMS[s] for s in systems), "peak memory", "a clip takes"]
    return table(columns, rows) + f"\n{note}\n"


def long_encoding_table() -> str:
    """Return memory and time of encoding all frames of a video, from `python -m benchmarks.long_encoding`."""
    result = _read(RESULTS / "long-encoding.json")
    names = {"windows": "a window in every layer", "bundled": "the bundled one, with an exact layer"}
    rows = [
        [
            names[row["encoder"]],
            f"{row['frames']:,}",
            f"{row['tokens']:,}",
            f"{row['peak_mb']:.0f} MB",
            f"{row['seconds']:.0f} s",
            f"{row['out_mb']:.0f} MB",
        ]
        for row in result["rows"]
    ]
    threads = sorted({row["threads"] for row in result["rows"]})
    more = max(row["peak_mb"] - row["loaded_mb"] for row in result["rows"])
    note = f"`{result['command']}`: the largest resident set of the process, of which loading the encoder takes all"
    note += f" but {more:.0f} MB" if more >= 1 else ""
    note += f"; CPU threads: {', '.join(map(str, threads))}, on a machine that had other work."
    columns = ["encoder", "frames", "tokens", "peak memory", "time", "file of embeddings"]
    return table(columns, rows) + f"\n{note}\n"


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "one-thread": one_thread_table,
    "amx": amx_table,
    "avx2": avx2_table,
    "towers": towers_table,
    "gpu": gpu_table,
    "perception": perception_table,
    "questions": question_table,
    "splits": splits_table,
    "encoder": encoder_table,
    "stage-times": stage_times_table,
    "vlm": vlm_table,
    "reader": reader_table,
    "reader-grpo": reader_grpo_table,
    "temporal-context": temporal_context_table,
    "linearize": linearize_table,
    "when": when_table,
    "long-video": long_video_table,
    "long-encoding": long_encoding_table,
}


def render(text: str) -> str:
    """Return `text` with every marked table made anew; ValueError for a marker of an unknown table."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"There is no table {match[2]!r}; the tables are {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return _MARKED.sub(made, text)


def changed_tables(text: str) -> list[str]:
    """Return the names of the tables in `text` that differ from the results."""
    return [match[2] for match in _MARKED.finditer(text) if render(match[0]) != match[0]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
