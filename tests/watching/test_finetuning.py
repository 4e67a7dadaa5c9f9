"""Adapters of a model of transformers, trained on a user's own questions: a whole run, resuming, what is refused."""

import json
import sys

import pytest
import torch

from vot_kernels import cli
from vot_kernels.data.digitworld import generate_episode
from vot_kernels.data.video import save_mp4
from vot_kernels.reasoning import LanguageModelError
from vot_kernels.train.sft.replies import reply_to

pytest.importorskip("trl", reason="adapters are trained through TRL: pip install 'vot-kernels[rl]'")

from vot_kernels.data.questions import split_questions  # noqa: E402
from vot_kernels.pipelines import finetuning  # noqa: E402
from vot_kernels.pipelines.finetuning import Finetuning, Rows, add_adapters, finetune, run_finetuning  # noqa: E402
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
    assert "--dry-run measures models of our own alone." in run("--text", "lora", "--dry-run")
    assert not list(tmp_path.iterdir())
