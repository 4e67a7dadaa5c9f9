"""Reinforcement learning: what it trains, resuming to the same bits after any end, rewards, preferences, logs."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.models.vot.tiny import tiny_config, tiny_tokenizer
from tests.processes import default_signals
from vot_kernels.data.digitworld import VOCABULARY
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.data.video import save_mp4
from vot_kernels.models.checkpoint import check_reward_model
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.train.report import Log, format_metrics, write_record
from vot_kernels.train.rewards import accuracy, form, grounding, temporal
from vot_kernels.train.rewards.reading import text_of
from vot_kernels.train.rl.graphs import GraphMemory
from vot_kernels.train.rl.own_questions import split_for_replies
from vot_kernels.train.rl.questions import Rows, asked_about
from vot_kernels.train.rl.settings import GrpoPerception, GrpoPreference, GrpoReasoning, PreferenceTraining
from vot_kernels.train.vlm.answers import prompt_inputs
from vot_kernels.train.vlm.model import add_lora, load_vlm, part_of, save_half

for package in ("trl", "datasets", "peft"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'vot-kernels[rl]'")

from vot_kernels.train.rl import grpo, preferences  # noqa: E402
from vot_kernels.train.rl.run import run_grpo, run_preference  # noqa: E402
from vot_kernels.train.rl.trainer import Run, mean_rewards  # noqa: E402

ROOT = Path(__file__).parents[3]
SHORT = {"batch_size": 1, "generations": 2, "max_reply_tokens": 4, "frames": 2, "warmup": 1}
PAIRS = PreferenceTraining(steps=3, batch_size=4, accumulation=2, warmup=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny video-language model with random weights."""
    torch.manual_seed(0)
    config = tiny_config(vision={"patch_size": 8})
    folder = tmp_path_factory.mktemp("vlm") / "model"
    save_half(VotForConditionalGeneration(config), VotProcessor.for_model(config, tiny_tokenizer()), folder)
    return folder


def varied(completions, **_):
    """Rewards that differ between random replies."""
    return [len(set(text_of(c))) / 4 for c in completions]


@pytest.fixture
def lively(monkeypatch):
    """A reward that random replies earn, so that weights move."""
    monkeypatch.setattr(grpo, "rewards_of", lambda *_: {"accuracy": varied})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what is trained ----------------------------------------------------------------------------------------


@pytest.mark.fixed_seed  # two steps of training
@pytest.mark.parametrize(
    "text, frames, parts",
    [("all", 2, {"projector", "text"}), ("lora", 2, {"projector", "lora"}), ("all", 0, {"text"})],
)
def test_exactly_its_parts_are_trained(folder, tmp_path, lively, text, frames, parts):
    model, processor = load_vlm(folder)
    settings = GrpoReasoning(steps=2, text=text, learning_rate=1e-2, **(SHORT | {"frames": frames}))
    trained = add_lora(model, 0) if text == "lora" else model
    before = parameters(trained)
    assert grpo.train_grpo(tmp_path, trained, processor, settings) == 2
    changed = {part_of(n) for n, p in trained.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(settings.parts) == parts


def test_other_parameters_are_found(folder, tmp_path):
    model, _ = load_vlm(folder)
    run = Run(tmp_path, model, GrpoReasoning(**SHORT))
    with pytest.raises(RuntimeError, match="has no gradient, but the stage trains projector, text"):
        run.check()
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        outside = name if not parameter.requires_grad else ""
    run.check()
    model.get_parameter(outside or "model.encoder.blocks.0.norm1.weight").requires_grad_(True)
    with pytest.raises(RuntimeError, match="is trained, but the stage trains exactly"):
        run.check()


# --- resuming -----------------------------------------------------------------------------------------------


def test_a_resumed_run_of_grpo_ends_with_the_same_bits(folder, tmp_path, lively):
    settings = GrpoReasoning(steps=3, accumulation=2, learning_rate=1e-2, **SHORT)
    results = []
    for name, stops in (("whole", (None,)), ("parts", (2, None))):
        for stop in stops:
            torch.manual_seed(len(results) + 5)  # it does not depend on what was drawn before
            model, processor = load_vlm(folder)
            done = grpo.train_grpo(tmp_path / name, model, processor, settings, stop_at=stop)
            assert done == (stop or 3)
        results.append(parameters(model))
    again, _ = load_vlm(folder)
    assert same(*results) and not same(results[0], parameters(again))
    assert grpo.train_grpo(tmp_path / "whole", again, processor, settings) == 3  # only loads
    assert same(parameters(again), results[0])
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        grpo.train_grpo(tmp_path / "whole", again, processor, GrpoReasoning(**vars(settings) | {"seed": 1}))


def test_a_resumed_reward_model_ends_with_the_same_bits(folder, tmp_path):
    results = []
    for name, stops in (("whole", (None,)), ("parts", (2, None))):
        for stop in stops:
            model, tokenizer = preferences.build_reward_model(*load_vlm(folder), seed=0)
            preferences.train_preference(tmp_path / name, model, tokenizer, PAIRS, stop_at=stop)
        results.append(parameters(model))
    assert same(*results)


RUN = """
    import sys
    from pathlib import Path

    import torch

    from tests.train.rl.test_rl import varied
    from vot_kernels.train.rl import grpo
    from vot_kernels.train.rl.settings import GrpoReasoning
    from vot_kernels.train.vlm.model import load_vlm

    torch.set_num_threads(int(sys.argv[3]))
    grpo.rewards_of = lambda *_: {"accuracy": varied}
    model, processor = load_vlm(Path(sys.argv[1]))
    settings = GrpoReasoning(steps=400, learning_rate=1e-2, batch_size=1, generations=2, max_reply_tokens=4,
                             frames=2, warmup=1)
    print("ready", flush=True)
    grpo.train_grpo(Path(sys.argv[2]), model, processor, settings, save_every=1)
"""


def started(folder, out):
    """Start a long run in a process of its own; return it when there is a checkpoint."""
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(RUN),
        str(folder),
        str(out),
        str(torch.get_num_threads()),
    ]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-[1-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(folder, tmp_path, lively):
    """kill -9 leaves the checkpoint before, and perhaps half of another one."""
    out = tmp_path / "run"
    with started(folder, out) as process:
        time.sleep(0.5)
        process.kill()
        process.communicate()
    settings = GrpoReasoning(steps=400, learning_rate=1e-2, **SHORT)
    done = max(int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*"))
    results = []
    for where in (out, tmp_path / "whole"):
        model, processor = load_vlm(folder)
        assert grpo.train_grpo(where, model, processor, settings, stop_at=done + 1) == done + 1
        results.append(parameters(model))
    assert same(*results) and not same(results[0], parameters(load_vlm(folder)[0]))


def test_the_first_interrupt_ends_the_step(folder, tmp_path, lively):
    model, processor = load_vlm(folder)
    settings = GrpoReasoning(steps=3, **SHORT)

    def report(step, terms):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        grpo.train_grpo(tmp_path, model, processor, settings, report=report)
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == "checkpoint-2"
    assert {p.suffix for p in kept.iterdir()} == {".safetensors", ".json"}
    assert grpo.train_grpo(tmp_path, *load_vlm(folder), settings) == 3


@pytest.mark.fixed_seed  # thirty steps of training
def test_training_raises_the_reward(folder, tmp_path, lively):
    model, processor = load_vlm(folder)
    settings = GrpoReasoning(steps=30, learning_rate=1e-2, **SHORT | {"generations": 8})
    found = []
    grpo.train_grpo(
        tmp_path, model, processor, settings, report=lambda _, terms: found.append(terms["reward"])
    )
    assert sum(found[-5:]) > sum(found[:5]) + 0.2


# --- what the model reads -----------------------------------------------------------------------------------


def test_rows_are_what_a_video_looks_like(folder):
    """The same text as with a video in its place, but for the name of the placeholder."""
    _, processor = load_vlm(folder)
    processor.num_frames = 2
    rows = Rows("val", 3, 0, frames=2, summary=True)
    for index in range(3):
        row, episode = rows.row(index), asked_about("val", index, 0).episode
        (message,) = row["prompt"]
        images = [part["image"] for part in message["content"] if part["type"] == "image"]
        assert len(images) == 2 and row["asked"] == message["content"][-1]["text"]
        text = processor.apply_chat_template(row["prompt"], tokenize=False)
        as_images = processor(text=[text], images=images)["input_ids"][0]
        clip = [{"type": "video", "video": None}, message["content"][-1]]
        text = processor.apply_chat_template([{"role": "user", "content": clip}], tokenize=False)
        as_video = processor(text=[text], videos=[Shown(episode)])["input_ids"][0]
        known = {processor.video_token_id: processor.image_token_id}
        assert as_images == [known.get(token, token) for token in as_video]


class Shown:
    def __init__(self, episode):
        self.frames, self.times = episode.frames(), episode.times


def test_perception_reads_no_events():
    seen, read = (Rows("val", 1, 0, 2, summary).row(0)["asked"] for summary in (False, True))
    assert "<stsg>" in read and "<stsg>" not in seen and read.endswith(seen)


@pytest.mark.tested_on("trl#4144")
def test_frames_and_graphs_are_read_for_replies_and_in_the_update(folder, tmp_path, lively):
    """TRL hands on ids and pixels alone; both passes see the graphs of all rows, and whatever is patched is undone."""
    model, processor = load_vlm(folder)
    read, patches = {True: [], False: []}, {True: 0, False: 0}

    def count(_, given):
        patches[torch.is_grad_enabled()] += len(given[0])

    model.model.projector.register_forward_pre_hook(count)
    hooks = len(model.model._forward_pre_hooks)
    model.model.graph.register_forward_pre_hook(
        lambda _, given: read[torch.is_grad_enabled()].extend(given[0]["graph_sizes"].tolist())
    )
    settings = GrpoReasoning(steps=1, accumulation=2, **SHORT | {"batch_size": 2})
    assert grpo.train_grpo(tmp_path, model, processor, settings) == 1
    graphs = [asked_about("train", index, 0).episode.stsg for index in range(2)]
    tracks = sorted(len(graph.tracklets) for graph in graphs for _ in range(2))
    assert sorted(sizes[3] for sizes in read[True]) == tracks == sorted(sizes[3] for sizes in read[False])
    assert sorted(read[True]) == sorted(read[False]) and len(model.model._forward_pre_hooks) == hooks
    assert patches[True] == patches[False] > 0


def test_an_update_computes_what_the_graphs_themselves_give(folder):
    """The ids alone, padded on the left and with a reply, have the logits of the ids with their graphs."""
    model, processor = load_vlm(folder)
    memory = GraphMemory.of(processor)
    rows = Rows("val", 2, 0, 2, True, tokens=True).rows(0, 2)
    inputs = prompt_inputs(memory, [row["prompt"] for row in rows])
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        expected = model(**inputs).logits
        bare = {name: value for name, value in inputs.items() if not name.startswith("graph_")}
        with pytest.raises(ValueError, match="graph"):
            model(**bare)
        handle = memory.attach(model)
        assert torch.equal(model(**bare).logits, expected)
        handle.remove()
    texts = [
        memory.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    images = [[p["image"] for p in row["prompt"][0]["content"] if p["type"] == "image"] for row in rows]
    again = memory(images=images, text=texts)
    assert not any(name.startswith("graph_") for name in again) and len(again["input_ids"]) == 2
    with pytest.raises(ValueError, match="but 0 graphs are given"):
        memory(text=["What of <|graph|>?"])


def test_replies_have_no_placeholders(folder, tmp_path, monkeypatch):
    """They would stand for frames that are not there."""
    model, processor = load_vlm(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.video_token_id] *= 50  # the head is tied to it
    said = []
    monkeypatch.setattr(
        grpo,
        "rewards_of",
        lambda *_: {
            "accuracy": lambda completions, **c: said.extend(c["completion_ids"]) or varied(completions)
        },
    )
    assert grpo.train_grpo(tmp_path, model, processor, GrpoReasoning(steps=1, **SHORT)) == 1
    assert said and processor.video_token_id not in sum(said, [])


# --- metrics, logs and records ------------------------------------------------------------------------------


def test_metrics_are_the_mean_rewards_of_held_out_replies(folder, monkeypatch):
    model, processor = load_vlm(folder)
    items = [asked_about("val", index, 0) for index in range(8)]
    from vot_kernels.data.digitworld.traces import write_trace

    perfect = iter([write_trace(i.question, i.episode.stsg) for i in items] + ["no"])
    monkeypatch.setattr(grpo, "_greedy", lambda m, p, prompts, tokens: [next(perfect) for _ in prompts])
    found = grpo.grpo_metrics(model, processor, 9, settings=GrpoReasoning(**SHORT))
    assert found["accuracy"] == found["grounding"] == pytest.approx(8 / 9)
    assert list(found) == ["reward", "accuracy", "grounding", "temporal"]


def test_what_was_not_measured_is_no_zero(tmp_path):
    found = mean_rewards({"accuracy": [1.0, None, 0.0], "temporal": [None, None]})
    assert found["accuracy"] == 0.5 and math.isnan(found["temporal"])
    assert format_metrics({"before": found}, "weights").splitlines()[1].split() == ["before", "0.500", "–"]
    write_record(tmp_path, {"metrics": {"before": found}, "list": [1]})
    record = json.loads((tmp_path / "training.json").read_text())
    assert record == {"metrics": {"before": {"accuracy": 0.5, "temporal": None}}, "list": [1]}
    assert format_metrics(record["metrics"], "weights").split()[-1] == "–"


def test_weights_of_rewards():
    assert GrpoPerception().weights == {"form": 0.5, "grounding": 1.0}
    assert set(grpo.rewards_of(GrpoReasoning())) == {"accuracy", "grounding", "temporal"}
    assert GrpoPreference().weights["preference"] < min(w for w in GrpoReasoning().weights.values() if w)
    with pytest.raises(ValueError, match="At least one reward"):
        GrpoPerception(form_weight=0, grounding_weight=0)
    with pytest.raises(ValueError, match="accumulation must divide the 16 replies of a step, got 3"):
        GrpoReasoning(accumulation=3)
    with pytest.raises(ValueError, match="generations must be at least 2, got 1"):
        GrpoReasoning(generations=1)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        GrpoPerception(frames=0)
    with pytest.raises(ValueError, match="frames must be at least 0, got -1"):
        GrpoReasoning(frames=-1)


def test_a_run_publishes_logs_and_validates(folder, tmp_path, lively):
    settings = GrpoReasoning(steps=2, validate_every=2, validation_clips=1, **SHORT)
    grpo_folder = tmp_path / "out"
    before = parameters(load_vlm(folder)[0])
    assert "time  " in run_grpo("grpo-reasoning", grpo_folder, folder, settings, 1, dry_run=True)
    assert not grpo_folder.exists()
    table = run_grpo("grpo-reasoning", grpo_folder, folder, settings, 1)
    record = json.loads((grpo_folder / "model" / "training.json").read_text())
    assert record["trained"] == ["projector", "text"] and "accuracy" in table
    assert record["command"].startswith(f"vot train grpo-reasoning {folder} --eval-clips 1 --steps 2 ")
    with (grpo_folder / "log.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert rows[0]["held_out/accuracy"] == "" and float(rows[1]["held_out/accuracy"]) >= 0
    assert list((grpo_folder / "tensorboard").glob("events.*"))
    after = parameters(load_vlm(grpo_folder / "model")[0])
    assert all(torch.equal(after[n], before[n]) for n in after if part_of(n) in ("encoder", "graph"))
    assert run_grpo("grpo-reasoning", grpo_folder, folder, settings, 1) == table  # it is not trained again


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path):
    for steps in ((1, 2, 3), (3, 4)):
        with Log(tmp_path) as log:
            for step in steps:
                log.write(step, {"loss": step / 2, **({"more": 1.0} if step == 4 else {})})
    text = (tmp_path / "log.csv").read_text()
    assert text.splitlines() == ["step,loss,more", "1,0.5,", "2,1.0,", "3,1.5,", "4,2.0,1.0"]
    (tmp_path / "log.csv").write_text(text[:-6])  # a killed process wrote half a line
    with Log(tmp_path) as log:
        log.write(5, {"loss": math.nan})
    assert (tmp_path / "log.csv").read_text().splitlines()[3:] == ["3,1.5,", "5,nan,"]


# --- preferences --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    return list(preferences.all_pairs("val", 28, 0))


def test_every_rule_spoils_what_it_says(pairs):
    items = {
        preferences.first_prompt(i.episode.stsg, preferences.ask(i.question.text, i.question.candidates)): i
        for i in (asked_about("val", index, 0) for index in range(28))
    }
    assert {pair.rule for pair in pairs} == set(preferences.RULES) and {p.source for p in pairs} == {
        "synthetic"
    }
    for pair in pairs:
        question, stsg = items[pair.prompt].question, items[pair.prompt].episode.stsg
        columns = {
            "answer": [question.answer],
            "truth": [preferences.evidence_text(preferences.evidence(question, stsg), question)],
            "frame_times_s": [stsg.frame_times_s],
            "vocabulary": VOCABULARY,
        }

        def of(reward, text, columns=columns):
            return reward([text], **columns)[0]

        loses = {
            "wrong_answer": accuracy,
            "wrong_objects": grounding,
            "wrong_times": temporal,
            "no_graph": form,
            "unclosed": form,
        }.get(pair.rule)
        assert of(form, pair.chosen) == of(accuracy, pair.chosen) == 1
        if loses is None:  # it repeats itself, and no reward says so: that is for the reward model to learn
            assert pair.rule == "repeated" and len(pair.rejected) > len(pair.chosen)
        else:
            assert of(loses, pair.rejected) < of(loses, pair.chosen), pair


def test_training_pairs_are_not_held_out(pairs):
    drawn = preferences.draw_pairs(12, 0)
    assert len(drawn) == 12 and drawn == preferences.draw_pairs(12, 0) != preferences.draw_pairs(12, 1)
    assert not {(p.prompt, p.chosen) for p in drawn} & {(p.prompt, p.chosen) for p in pairs}


@pytest.fixture(scope="module")
def reward_model(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("preference")
    settings = PreferenceTraining(steps=16, batch_size=4, learning_rate=2e-3, warmup=2)
    run_preference(out, folder, settings, eval_clips=2)
    return out / "model"


@pytest.mark.fixed_seed  # sixteen steps of training
def test_a_reward_model_learns_the_rules(reward_model):
    record = json.loads((reward_model / "training.json").read_text())
    assert record["metrics"]["after"]["accuracy"] > record["metrics"]["before"]["accuracy"]
    assert record["preferences"] == "synthetic" and record["rules"] == list(preferences.RULES)
    assert record["trained"] == ["text"]


def test_a_reward_model_scores_replies(reward_model, pairs):
    reward = preferences.PreferenceReward(*preferences.load_reward_model(reward_model))
    texts = [[{"role": "assistant", "content": pair.rejected}] for pair in pairs[:5]]
    asked = [pair.prompt for pair in pairs[:5]]
    scores = reward(texts, asked=asked, answer=["x"] * 5)
    assert all(0 <= score <= 1 for score in scores) and len(set(scores)) > 1
    singly = [reward([text], asked=[prompt])[0] for text, prompt in zip(texts, asked, strict=True)]
    assert scores == pytest.approx(singly, abs=1e-5)  # padding does not count


def test_grpo_with_a_reward_model(folder, reward_model, tmp_path):
    settings = GrpoPreference(steps=1, **SHORT)
    table = run_grpo("grpo-preference", tmp_path, folder, settings, 1, reward_model=reward_model)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert "preference" in table and record["reward_model_fingerprint"]
    assert f"--reward-model {reward_model}" in record["command"]


def test_a_reward_model_is_one(folder, reward_model, tmp_path):
    check_reward_model(reward_model)
    with pytest.raises(ValueError, match="must be a reward model, of the stage preference, but"):
        check_reward_model(folder)
    with pytest.raises(FileNotFoundError, match="is not a reward model, of the stage preference: it has no"):
        check_reward_model(tmp_path)


# --- a user's own questions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Questions about four clips: a choice with a graph, a time with one, and one that asks for a graph."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for n, item in enumerate(generate_questions("test", 4, kinds=("did_hit",))):
        save_mp4(folder / f"{n}.mp4", item.episode.frames(), fps=8)
        common = {"video": f"{n}.mp4", "split": "train" if n < 2 else "val"}
        graph, question = item.episode.stsg.to_dict(), item.question
        chosen = {
            "question": question.text,
            "candidates": list(question.candidates),
            "answer": question.answer,
        }
        lines.append(common | chosen | {"stsg": graph})
        lines.append(common | {"question": "When does it begin?", "start": 0.25, "end": 1.0})
        lines.append(common | {"question": "What is there?", "stsg": graph})
    file = folder / "q.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_rows_of_a_file_are_what_rewards_take(own):
    train, held = split_for_replies(own, 0.1)
    assert (len(train), len(held)) == (4, 4)
    data = grpo.own_questions(own, 0.1, GrpoReasoning(frames=2), 64 * 64)
    rows = [data.rows("val", 100, 0).row(n) for n in range(4)]
    assert len(data.rows("val", 100, 0)) == 4 and len(data.rows("train", 100, 0)) == 100
    chosen = [row for row in rows if row["candidates"]]
    timed = [row for row in rows if row["interval"]]
    assert len(chosen) == len(timed) == 2
    for row in rows:
        [message] = row["prompt"]
        *shown, text = message["content"]
        assert [part["type"] for part in shown] == ["text", "image"] * 2 and row["asked"] == text["text"]
    for row in chosen:
        assert row["asked"].startswith("<stsg>") and row["truth"].startswith("<stsg>")
        said = f"<think>{row['truth']}</think><answer>{row['answer']}</answer>"
        columns = {name: [value] for name, value in row.items()}
        found = {name: reward([said], **columns) for name, reward in grpo.rewards_of(GrpoReasoning()).items()}
        assert found["accuracy"] == found["grounding"] == [1.0]
    for row in timed:
        columns = {name: [value] for name, value in row.items()}
        right, late = (f"<think></think><answer>{t}</answer>" for t in ("0.25 s to 1 s", "1.5 s to 1.9 s"))
        accuracy = grpo.rewards_of(GrpoReasoning())["accuracy"]
        assert accuracy([right], **columns)[0] > 0.7 and accuracy([late], **columns) == [0.0]
        assert row["truth"] is None and grpo.rewards_of(GrpoReasoning())["grounding"]([right], **columns) == [
            None
        ]


def test_perception_of_own_videos_reads_no_graph(own):
    row = (
        grpo.own_questions(own, 0.1, GrpoPerception(frames=1), 64 * 64, tokens=True)
        .rows("train", 1, 0)
        .row(0)
    )
    assert "<stsg>" not in row["asked"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["text", "image", "text"]


@pytest.mark.fixed_seed  # two steps of training
def test_a_run_on_own_questions(own, folder, tmp_path, lively):
    settings = GrpoReasoning(**SHORT | {"steps": 2})
    run = partial(run_grpo, "grpo-reasoning", tmp_path, folder, settings, 4, data=own)
    table = run()
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["data"] == "q.jsonl" and "--data" in record["command"]
    before, after = (load_vlm(f)[0].state_dict() for f in (folder, tmp_path / "model"))
    assert not same(before, after)
    assert run() == table  # a finished run is neither trained nor measured again
    assert "floating-point operations" in run(dry_run=True) or "parameters" in run(dry_run=True)


def test_a_file_of_scene_graphs_alone_is_refused(own, folder, tmp_path):
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    graphs = [line for line in lines if line["question"] == "What is there?"]
    file = own.parent / "graphs.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in graphs))
    with pytest.raises(ValueError, match="no question to train on but those for scene graphs"):
        run_grpo("grpo-reasoning", tmp_path, folder, GrpoReasoning(**SHORT), data=file)


def test_preferences_among_own_replies(own):
    train, held = split_for_replies(own, 0.1)
    found = list(preferences.own_pairs(held, 4, 0))
    assert found == list(preferences.own_pairs(held, 4, 0)) and {pair.source for pair in found} == {
        "synthetic"
    }
    by_reply = {}
    for pair in found:
        assert pair.rejected != pair.chosen
        by_reply.setdefault(pair.chosen, set()).add(pair.rule)
    [timed, *chosen] = sorted(by_reply.items(), key=lambda item: len(item[1]))
    assert timed[1] == {"unclosed"}  # no graph, no candidates
    everything = {"wrong_answer", "no_graph", "unclosed", "repeated", "wrong_objects"}
    assert len(chosen) == 2 and all(rules >= everything for _, rules in chosen)
    drawn = preferences.draw_pairs(5, 1, train)
    assert len(drawn) == 5 and not {p.prompt for p in drawn} & {p.prompt for p in found if "stsg" in p.prompt}


def test_a_reward_model_of_own_questions(own, folder, tmp_path):
    run_preference(tmp_path, folder, PAIRS, 4, data=own)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["data"] == "q.jsonl" and "--data" in record["command"]
    assert {"accuracy", "unclosed"} <= record["metrics"]["after"].keys()
    scorer, _ = preferences.load_reward_model(tmp_path / "model")
    assert scorer.num_labels == 1
