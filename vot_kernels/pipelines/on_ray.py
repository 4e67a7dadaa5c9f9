"""Many videos on the workers of a Ray cluster, or on those of this machine."""

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vot_kernels.extras import imports_for
from vot_kernels.files import check_output
from vot_kernels.models.checkpoint import ENCODER, PERCEPTION
from vot_kernels.pipelines.batch import BatchCounts, Row, write_answers
from vot_kernels.pipelines.encode import save_encoded
from vot_kernels.pipelines.progress import track
from vot_kernels.pipelines.sampling import Sampling, checkpoint_folder
from vot_kernels.pipelines.workers import AnswerQuestions, EncodeVideos

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoQA

THREADS = 4  # of a worker without a GPU, where `workers` is not given
RETRIES = 2  # of a block of rows whose worker ended
Block = list[Row]


def answer_batch_on_ray(
    load: "Callable[[], VideoQA]",
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sampling: Sampling | None = None,
    *,
    workers: int | None = None,
    device: str = "cpu",
) -> BatchCounts:
    """Do what `answer_batch` does, on workers of Ray: the same lines in the same order, resumed in the same way.

    The workers read the videos, so all need the same paths. A video at which a worker ends, also on the third try,
    gets lines with "error".

    Args:
        load: returns what answers, in the worker; it is pickled.
        questions, out, sampling: as for `answer_batch`.
        workers: number of processes; by default one per GPU, or one per four CPU cores.
        device: where `load` puts the models; on "cuda" each worker has a GPU of its own.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as in `answer_batch`, or `workers` is below 1.
    """
    arguments = {"load": load, "folder": Path(questions).parent.absolute(), "sampling": sampling}

    def answers(todo: Sequence[Row]) -> Iterator[Row]:
        blocks = [
            [_question(item) for item in group] for _, group in groupby(todo, lambda item: item["video"])
        ]
        for row, answered in _mapped(AnswerQuestions, arguments, blocks, "id", workers, device):
            if answered is not None:
                yield json.loads(answered["answer"])
            else:
                known = {key: row[key] for key in ("id", "video", "part", "question") if row[key]}
                yield known | {"error": _ENDED}

    return write_answers(answers, questions, out, sampling)


def encode_videos_on_ray(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    sampling: Sampling | None = None,
    *,
    workers: int | None = None,
    device: str = "cpu",
) -> tuple[list[str], list[str]]:
    """Do what `encode_videos` does, on workers of Ray that share the file system.

    Each video is encoded into a file of its own in the folder `out` + ".parts", from which an interrupted run goes on;
    then all are joined in `out`. A video that fails is left out of it; the others keep their number, and the folder
    stays, so that the next run tries only that video again.

    Returns:
        The lines that describe the videos, and a sentence about each that failed.

    Raises:
        ImportError: Ray is not installed.
        ValueError: `out` is no safetensors file, or `workers` is below 1.
    """
    check_output(out, ".safetensors", *paths)
    folder = checkpoint_folder(checkpoint, ENCODER, PERCEPTION).absolute()
    parts = Path(f"{os.fspath(out)}.parts").absolute()
    names = [str(Path(path).absolute()) for path in paths]
    files = [parts / f"{_key(name, folder, sampling)}.safetensors" for name in names]
    todo = {file: name for name, file in zip(names, files, strict=True) if not file.exists()}
    blocks = [[{"video": name, "file": str(file)}] for file, name in todo.items()]
    arguments = {"checkpoint": folder, "sampling": sampling, "device": device}
    rows = _mapped(EncodeVideos, arguments, blocks, "video", workers, device) if todo else ()
    errors = []
    for row, encoded in track(rows, "Encoding", total=len(todo), shown=bool(todo)):
        error = _ENDED if encoded is None else encoded["error"]
        errors += [f"{row['video']}: {error}"] if error else []
    lines = _join({n: file for n, file in enumerate(files) if file.exists()}, paths, out)
    if not errors:
        shutil.rmtree(parts, ignore_errors=True)
    return lines, errors


_ENDED = f"The worker that had this video ended, {RETRIES + 1} times: out of memory?"


def _question(item: Row) -> Row:
    return {key: item[key] for key in ("id", "video", "question")} | {
        name: item.get(name) or [] for name in ("candidates", "part")
    }


def _key(video: str, checkpoint: Path, sampling: Sampling | None) -> str:
    """Return a name that changes with the video, the checkpoint and the frames that are looked at."""
    facts = []
    for path in (video, checkpoint / "model.safetensors"):
        there = os.stat(path) if os.path.exists(path) else None
        facts.append((str(path), there and (there.st_size, there.st_mtime_ns)))
    return hashlib.sha256(repr((facts, sampling or Sampling())).encode()).hexdigest()[:24]


def _join(
    files: dict[int, Path], paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> list[str]:
    """Write the parts into one file; return their descriptions."""
    from safetensors import safe_open

    encoded, lines = {}, []
    for n, file in files.items():
        with safe_open(file, "pt") as part:
            encoded[n] = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 (it is no dict)
            lines.append(part.metadata()["description"])
    save_encoded(encoded, paths, out)
    return lines


def _mapped(
    worker: type,
    arguments: dict[str, Any],
    blocks: Sequence[Block],
    key: str,
    workers: int | None,
    device: str,
) -> Iterator[tuple[Row, Row | None]]:
    """Yield each row of `blocks` with what a worker made of it, in order; None where the worker ended again and again.

    Args:
        worker: a class that is made in the worker from `arguments` and called with blocks.
        key: a column that rows and results have, equal for a row and its result, unique among the rows.
    """
    with _ray() as ray:
        import pyarrow

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        number, cores = resources(nodes, workers, len(blocks), device)
        tables = [pyarrow.Table.from_pylist(block) for block in blocks]
        results = ray.data.from_arrow(tables).map_batches(
            worker,
            batch_size=None,
            # A video that waits at a worker would be tried again, too, when another one ends it.
            compute=ray.data.ActorPoolStrategy(size=number, max_tasks_in_flight_per_actor=1),
            fn_constructor_kwargs=arguments,
            num_cpus=cores,  # Ray gives a worker as many threads
            num_gpus=1 if device.startswith("cuda") else None,
            ray_remote_args_fn=_patience,
        )
        rows = iter(results.iter_rows())
        try:
            result = next(rows, None)
            for row in (row for block in blocks for row in block):
                if result is not None and result[key] == row[key]:
                    yield row, result
                    result = next(rows, None)
                else:
                    yield row, None
        finally:
            # Where a worker ended, its handle is in a cycle with the error, and its cores are taken till both are gone.
            del results, rows
            gc.collect()


def resources(
    nodes: Sequence[Mapping[str, float]], workers: int | None, blocks: int, device: str
) -> tuple[int, int]:
    """Return how many workers there are, and the CPU cores of each: no more than the cluster can give, or Ray waits.

    Args:
        nodes: for each machine of the cluster its "CPU" and "GPU".
        workers: as many as were asked for; None is one per GPU, or one per four cores.
        blocks: pieces of work.
        device: where the models are; on "cuda" each worker has a GPU.

    Raises:
        ValueError: `workers` is below 1, or there are no GPUs for "cuda".
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}.")
    on_gpu = device.startswith("cuda")
    cores, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
    if on_gpu and not gpus:
        raise ValueError(f"--device {device} needs a GPU, but the Ray cluster has none.")
    usual, most = (gpus, gpus) if on_gpu else (max(1, cores // THREADS), max(1, cores))
    number = min(workers or usual, most, blocks)
    on_one = min((int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1), default=1)
    return number, max(1, min(cores // number, on_one))


def _patience() -> dict[str, int]:
    """A worker that ends is made again, and its block is tried again, but not for ever."""
    return {"max_restarts": -1, "max_task_retries": RETRIES}


@contextmanager
def _ray() -> Iterator[Any]:
    """Yield Ray: the cluster that the environment names, or workers on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    with imports_for("--engine ray", "ray"):
        import ray
        import ray.data
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = (
        context.execution_options.preserve_order,
        context.max_errored_blocks,
        context.enable_progress_bars,
    )
    # In order; a block that fails is missing, and its rows get an error; the progress is shown elsewhere.
    _set(context, True, -1, False)
    try:
        yield ray
    finally:
        _set(context, *before)
        if started:
            ray.shutdown()


def _set(context: Any, preserve_order: bool, max_errored_blocks: int, progress_bars: bool) -> None:
    context.execution_options.preserve_order = preserve_order
    context.max_errored_blocks = max_errored_blocks
    context.enable_progress_bars = progress_bars
