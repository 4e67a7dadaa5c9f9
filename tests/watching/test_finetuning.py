"""Adapters of a model of transformers, trained on a user's own questions: a whole run, resuming, what is refused."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from vot_kernels import cli
from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.video import save_mp4
from vot_kernels.models.checkpoint import BUNDLED_READER
from vot_kernels.reasoning import LanguageModelError
from vot_kernels.train.sft.replies import reply_to

pytest.importorskip("trl", reason="adapters are trained through TRL: pip install 'vot-kernels[rl]'")

from vot_kernels.data.questions import split_questions  # noqa: E402
from vot_kernels.pipelines import finetuning  # noqa: E402
from vot_kernels.pipelines.finetuning import (  # noqa: E402
    Finetuning,
    Rows,
    add_adapters,
    finetune,
    run_finetuning,
    run_reinforcement,
)
from vot_kernels.train.rewards.reading import text_of  # noqa: E402
from vot_kernels.train.rl import grpo  # noqa: E402
from vot_kernels.train.rl.grpo import own_questions, train_grpo  # noqa: E402
from vot_kernels.train.rl.run import run_preference  # noqa: E402
from vot_kernels.train.rl.settings import GrpoPreference, GrpoReasoning, PreferenceTraining  # noqa: E402
from vot_kernels.watching.loading import load_video_language_model  # noqa: E402

SHORT = Finetuning(text="lora", steps=2, batch_size=2, warmup=1, learning_rate=1e-3)


@pytest.fixture(scope="module", autouse=True)
def small():
    patch = pytest.MonkeyPatch()
    patch.setattr(finetuning, "MAX_NEW_TOKENS", 3)
    patch.setattr(finetuning, "FRAMES", 2)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for n, split in enumerate(("train", "val")):
        episode = generate_episode("test", n)
        save_mp4(folder / f"{n}.mp4", episode.frames(), fps=8)
        common = {"video": f"{n}.mp4", "split": split}
        lines += [
            common | {"question": "What is it?", "answer": "a game"},
            common | {"question": "Is it a game?", "answer": "yes", "stsg": episode.stsg.to_dict()},
        ]
    path = folder / "q.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm2"])
def test_a_run_trains_adapters_and_its_result_is_a_model_like_the_first(folder_of, file, tmp_path, family):
    table = run_finetuning(tmp_path, folder_of(family), file, SHORT, eval_clips=2)
    assert table.startswith("2 questions to train on, 2 held out.\nweights") and "accuracy" in table
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["metrics"]["after"]["nats"] != record["metrics"]["before"]["nats"]
    assert run_finetuning(tmp_path, folder_of(family), file, SHORT, eval_clips=2) == table
    first, trained = (
        load_video_language_model(f).model.state_dict() for f in (folder_of(family), tmp_path / "model")
    )
    assert first.keys() == trained.keys()
    changed = {name for name in first if not torch.equal(first[name], trained[name])}
    assert changed and all("visual" not in name and "vision" not in name for name in changed)


def test_exactly_the_reply_is_learnt(folder_of, file):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = load_video_language_model(folder_of("qwen2_5_vl")).processor
    rows = Rows(split_questions(file)[0], 2, 0)
    for index in range(2):
        row = rows.row(index)
        question = row["question"]
        batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([row])
        learnt = processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
        assert (
            learnt.startswith(reply_to(question))
            and learnt[len(reply_to(question)) :].strip() == "<|im_end|>"
        )
        assert len(batch["image_grid_thw"]) == 2
        assert ("<stsg>" in processor.tokenizer.decode(batch["input_ids"][0])) == (question.stsg is not None)


def test_a_resumed_run_ends_with_the_same_bits(folder_of, file, tmp_path):
    questions, results = split_questions(file)[0], []
    for name, stops in (("whole", (None,)), ("parts", (1, None))):
        for stop in stops:
            whole = load_video_language_model(folder_of("qwen2_5_vl"))
            model = add_adapters(whole.model, 0)
            finetune(tmp_path / name, model, whole.processor, SHORT, questions, known={}, stop_at=stop)
        results.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    assert results[0] and all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_chat_template_that_fails_is_one_sentence(folder_of, file):
    whole = load_video_language_model(folder_of("qwen2_5_vl"))
    whole.processor.chat_template = "{{ raise_exception('no users here') }}"
    row = Rows(split_questions(file)[0], 2, 0).row(0)
    with pytest.raises(LanguageModelError, match="The chat template of '.*' fails: no users here."):
        finetuning._greedy(whole.model, whole.processor, row)


def test_what_is_refused(folder_of, file, tmp_path, monkeypatch, capsys):
    def run(*words):
        folder = str(folder_of("qwen2_5_vl"))
        command = ["vot", "train", "sft", folder, "--data", str(file), "--out", str(tmp_path / "out"), *words]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "adapters alone are trained: pass --text lora." in run()
    assert "such as --learning-rate 2e-4." in run("--text", "lora")
    assert "--learning-rate 2e-4." in run("--text", "lora", "--dry-run")
    command = ["vot", "train", "sft", str(folder_of("qwen2_5_vl")), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    assert "pass --data questions.jsonl." in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


# Reinforcement


REINFORCED = GrpoReasoning(
    text="lora",
    steps=2,
    batch_size=1,
    generations=2,
    warmup=1,
    learning_rate=1e-3,
    frames=2,
    max_reply_tokens=3,
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm2"])
def test_adapters_are_reinforced_on_own_questions(folder_of, file, tmp_path, family, monkeypatch):
    told = []

    def watched(out, model, *args, **options):
        report = options.pop("report")
        return train_grpo(out, model, *args, report=lambda *row: (told.append(row), report(*row)), **options)

    monkeypatch.setattr(finetuning, "train_grpo", watched)
    monkeypatch.setattr(grpo, "rewards_of", lambda *_: {"accuracy": varied})
    run = (file, REINFORCED)
    table = run_reinforcement("grpo-reasoning", tmp_path, folder_of(family), *run, eval_clips=2)
    assert table.startswith("2 questions to train on, 2 held out.\nweights")
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["command"].startswith("vot train grpo-reasoning ") and "--text lora" in record["command"]
    assert [step for step, _ in told] == [1, 2] and all("loss" in values for _, values in told)
    assert run_reinforcement("grpo-reasoning", tmp_path, folder_of(family), *run, eval_clips=2) == table
    first, trained = (
        load_video_language_model(f).model.state_dict() for f in (folder_of(family), tmp_path / "model")
    )
    changed = {name for name in first if not torch.equal(first[name], trained[name])}
    assert changed and all("visual" not in name and "vision" not in name for name in changed)


def test_a_reward_model_serves_a_guest(folder_of, file, tmp_path):
    """It is made of our own model, and the adapters that its score trains are those of another."""
    run_preference(
        tmp_path / "liked", BUNDLED_READER, PreferenceTraining(steps=1, batch_size=1), 1, data=file
    )
    liked = tmp_path / "liked" / "model"
    only = {"accuracy_weight": 0.0, "grounding_weight": 0.0, "temporal_weight": 0.0, "preference_weight": 1.0}
    settings = GrpoPreference(text="lora", steps=1, batch_size=1, generations=2, max_reply_tokens=3, **only)
    out, model = tmp_path / "run", folder_of("qwen2_5_vl")
    table = run_reinforcement("grpo-preference", out, model, file, settings, eval_clips=2, reward_model=liked)
    assert re.search(r"^weights .*preference", table, re.MULTILINE), table
    record = json.loads((out / "model" / "training.json").read_text())
    assert f"--reward-model {liked}" in record["command"] and 0 < record["metrics"]["after"]["preference"] < 1
    assert record["reward_model_fingerprint"]
    first, trained = (load_video_language_model(f).model.state_dict() for f in (model, out / "model"))
    assert any(not torch.equal(first[name], trained[name]) for name in first)


def varied(completions, **_):
    """Rewards that differ between random replies."""
    return [len(set(text_of(c))) / 4 for c in completions]


def test_right_answers_of_a_guest_are_counted(folder_of, file, monkeypatch):
    good = "<think>so</think><answer>yes</answer>"  # of the two answers "yes" is one
    whole = load_video_language_model(folder_of("qwen2_5_vl"))
    guest = grpo.Guest(lambda model, processor, prompts, tokens: [good for _ in prompts], ())
    asked = own_questions(file, 0.1, REINFORCED, 64 * 64)
    options = {"settings": REINFORCED, "data": asked, "guest": guest}
    assert grpo.grpo_metrics(whole.model, whole.processor, 2, **options)["accuracy"] == 0.5


def test_the_images_of_a_prompt_reach_the_model(folder_of, file):
    whole = load_video_language_model(folder_of("qwen2_5_vl"))
    row = own_questions(file, 0.1, REINFORCED, 64 * 64).rows("train", 2, 0).row(0)
    assert len(finetuning.images_in(row["prompt"])) == REINFORCED.frames
    [reply] = finetuning._greedy_replies(whole.model, whole.processor, [row["prompt"]], 3)
    assert isinstance(reply, str)


def test_only_adapters_of_a_guest_are_reinforced(folder_of, file, tmp_path):
    with pytest.raises(ValueError, match="pass --text lora"):
        run_reinforcement("grpo-reasoning", tmp_path, folder_of("qwen2_5_vl"), file, GrpoReasoning())


def test_the_command_reinforces_a_guest(folder_of, file, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(finetuning, "run_reinforcement", lambda *args: seen.append(args) or "table")
    words = ["train", "grpo-perception", str(folder_of("qwen2_5_vl")), "--data", str(file), "--text", "lora"]
    words += ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["vot", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "table" in capsys.readouterr().out
    assert seen[0][:2] == ("grpo-perception", tmp_path / "run") and seen[0][4].text == "lora"


@pytest.mark.parametrize("stage", ["sft", "grpo-reasoning"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm2"])
def test_a_dry_run_tells_what_a_run_takes(folder_of, file, tmp_path, family, stage):
    out, folder = tmp_path / "run", folder_of(family)
    if stage == "sft":
        told = run_finetuning(out, folder, file, replace(SHORT, accumulation=2), dry_run=True)
    else:
        told = run_reinforcement(stage, out, folder, file, REINFORCED, dry_run=True)
    adapted = add_adapters(load_video_language_model(folder).model, 0)
    learnt = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in adapted.parameters())
    assert f"parameters  {learnt:,} trained (lora) of {whole:,}" in told
    assert re.search(r"^operations  0\.\d*[1-9]\d* GFLOP", told, re.MULTILINE) and "s a step" in told
    assert ("up to 3 tokens of each reply" in told) == (stage != "sft")
    assert not out.exists()


def test_a_reward_model_is_made_of_our_own_models_alone(folder_of, file, tmp_path, capsys, monkeypatch):
    words = ["train", "preference", str(folder_of("qwen2_5_vl")), "--data", str(file)]
    monkeypatch.setattr(sys, "argv", ["vot", *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "takes a folder of vot train sft alone" in capsys.readouterr().err.replace("\n", " ")
