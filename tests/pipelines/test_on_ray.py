"""Many videos on Ray: the same files as in one process, whatever happens to a worker."""

import json
import logging
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pipelines.mortal import Mortal
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.pipelines.batch import answer_batch
from vot_kernels.pipelines.encode import encode_videos
from vot_kernels.pipelines.on_ray import answer_batch_on_ray, encode_videos_on_ray, resources
from vot_kernels.pipelines.workers import AnswerQuestions, EncodeVideos

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def questions(tmp_path):
    """Two questions about each clip: one ends its first worker, one ends all, and one is no file."""
    lines = []
    for name in ("one", "frail", "poison", "missing", "three"):
        if name != "missing":
            (tmp_path / f"{name}.mp4").touch()
        lines.append({"video": f"{name}.mp4", "question": "Where?", "id": f"{name} 1"})
        lines.append({"video": f"{name}.mp4", "question": "Who?", "candidates": ["a", "b"], "more": [1]})
    lines[1] |= {"part": [0, 0.5]}
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def all_cores_are_free(within_s):
    """Whether the next run has all cores of the cluster, soon."""
    end = time.monotonic() + within_s
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < end:
        time.sleep(0.1)
    return ray.available_resources().get("CPU") == 2


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_one_process_though_workers_end(cluster, questions, tmp_path):
    load = partial(Mortal, tmp_path)
    spread, alone = tmp_path / "spread.jsonl", tmp_path / "alone.jsonl"
    assert answer_batch_on_ray(load, questions, spread, workers=2) == (6, 0, 4)
    assert (tmp_path / "died").exists()
    assert all_cores_are_free(within_s=20)
    assert ray.data.DataContext.get_current().max_errored_blocks == 0  # as before
    rows = read(spread)
    assert [row.get("part") for row in rows[:2]] == [None, [0, 0.5]] and "0.0 to 0.5 s" in rows[1]["text"]
    assert all("ended, 3 times" in row["error"] and row["id"] in ("poison 1", "6") for row in rows[4:6])
    kept = [line for line in questions.read_text().splitlines() if "poison" not in line]
    questions.write_text("\n".join(kept))
    assert answer_batch(load(), questions, alone) == (6, 0, 2)
    assert [row | {"id": ""} for row in rows[:4] + rows[6:]] == [row | {"id": ""} for row in read(alone)]


def test_an_interrupted_batch_goes_on(cluster, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.mp4").touch()
    lines = [{"video": f"{name}.mp4", "question": "Who?"} for name in ("one", "two", "one")]
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    load = partial(Mortal, tmp_path)
    answer_batch(load(), questions, out)
    whole = out.read_text()
    out.write_text(whole[: whole.index("\n") + 30])  # killed while writing the second line
    assert answer_batch_on_ray(load, questions, out, workers=1) == (2, 1, 0)
    assert out.read_text() == whole
    assert answer_batch_on_ray(load, questions, out, workers=1) == (0, 3, 0)


def test_encoding_is_that_of_one_process(cluster, vot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copy(digitworld_clip()[0], f"{name}.mp4")
    Path("bad.mp4").write_text("no video")
    code, _, err = vot("encode", "a.mp4", "bad.mp4", "b.mp4", "--out", "e.safetensors", "--engine", "ray")
    assert code == 1 and "bad.mp4" in err and "1 failed" in err
    assert {name.split(".")[0] for name in load_file("e.safetensors")} == {"0", "2"}
    assert len(list(Path("e.safetensors.parts").iterdir())) == 2
    shutil.copy("a.mp4", "bad.mp4")
    lines, errors = encode_videos_on_ray(["a.mp4", "bad.mp4", "b.mp4"], "e.safetensors")
    assert not errors and not Path("e.safetensors.parts").exists()
    assert lines == encode_videos(["a.mp4", "bad.mp4", "b.mp4"], "alone.safetensors")
    spread, alone = load_file("e.safetensors"), load_file("alone.safetensors")
    assert spread.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(spread[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_workers_take_lists_arrays_and_data_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    clip, question, candidates = digitworld_clip()
    answer = AnswerQuestions(partial(Mortal, tmp_path))
    rows = {"id": ["x", "y"], "video": [str(clip)] * 2, "question": [question] * 2}
    lists = answer(rows | {"candidates": [candidates, None]})
    arrays = answer(
        {name: np.array(column) for name, column in rows.items()}
        | {"candidates": np.array([np.array(candidates), None], dtype=object)}
    )
    frame = answer(pandas.DataFrame(rows | {"candidates": [candidates, []]}))
    assert lists == arrays == frame
    assert [json.loads(text)["id"] for text in lists["answer"]] == lists["id"] == ["x", "y"]
    file = tmp_path / "part.safetensors"
    encoded = EncodeVideos()({"video": [str(clip), "missing.mp4"], "file": [str(file), str(tmp_path / "no")]})
    assert encoded["error"][0] == "" and "missing.mp4" in encoded["error"][1]
    assert set(load_file(file)) == {"pooled", "tokens", "grid_thw", "times_s"}
    assert not (tmp_path / "no").exists()


def test_an_unexpected_error_is_that_of_its_video_alone(tmp_path):
    (tmp_path / "fine.mp4").touch()
    rows = {
        "id": ["1", "2"],
        "video": ["odd.mp4", "fine.mp4"],
        "question": ["Who?"] * 2,
        "candidates": [[], []],
    }
    odd, fine = map(json.loads, AnswerQuestions(partial(Mortal, tmp_path), tmp_path)(rows)["answer"])
    assert odd["error"] == "ZeroDivisionError: nobody expects this" and "error" not in fine


BIG = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("nodes", "workers", "blocks", "device", "wanted"),
    [
        ([{"CPU": 2.0}], None, 9, "cpu", (1, 2)),
        ([{"CPU": 2.0}], 5, 9, "cpu", (2, 1)),  # no more workers than cores
        (BIG, None, 99, "cpu", (6, 4)),
        (BIG, 1, 99, "cpu", (1, 8)),  # no more cores than every machine has
        (BIG, None, 3, "cpu", (3, 8)),
        (BIG, None, 99, "cuda", (6, 4)),
        (BIG, 9, 99, "cuda:0", (6, 4)),  # no more workers than GPUs
        ([{"CPU": 4.0}, {}], None, 1, "cpu", (1, 4)),
    ],
)
def test_workers_ask_for_what_the_cluster_has(nodes, workers, blocks, device, wanted):
    assert resources(nodes, workers, blocks, device) == wanted


def test_no_gpu_and_no_worker_are_refused():
    with pytest.raises(ValueError, match="--device cuda needs a GPU, but the Ray cluster has none"):
        resources([{"CPU": 2.0}], None, 1, "cuda")
    with pytest.raises(ValueError, match="--workers must be at least 1, got 0"):
        resources(BIG, 0, 1, "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "a.mp4", "Who?", "--engine", "ray"], "is for a file of questions"),
        (["ask", "a.mp4", "Who?", "--engine", "spark"], "--engine must be one of local, ray"),
        (["ask", "--batch", "q", "--out", "a", "--workers", "2"], "give --engine ray, too"),
        (["encode", "a.mp4", "--out", "e.safetensors", "--engine", "ray", "--workers", "0"], "at least 1"),
    ],
)
def test_engines_that_cannot_be(vot, words, message):
    code, _, err = vot(*words)
    assert code == 2 and message in err and err.count("\n") == 1
