"""The whole curriculum by its commands: two steps of every stage, each from what the stage before has published."""

import sys
from pathlib import Path

import pytest

from vot_kernels import cli
from vot_kernels.train.recipes import STAGES
from vot_kernels.train.vlm import answers
from vot_kernels.train.vlm import model as vlm

for package in ("trl", "datasets", "peft"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'vot-kernels[rl]'")

GRPO = "steps: 2\nbatch_size: 1\ngenerations: 2\nmax_reply_tokens: 4\nframes: 2\nwarmup: 1\n"
FILES = {
    "perception": "steps: 1\ndynamics_steps: 1\nname_steps: 1\nbatch_size: 2\nwarmup: 1\nattention: softmax\n",
    "linearize": "layer_steps: 1\nsteps: 1\nwarmup: 1\n",
    "encoder": "steps: 1\nbatch_size: 2\nwarmup: 1\nnum_frames: 4\n",
    "projector": "steps: 2\nbatch_size: 1\nwarmup: 1\n",
    "sft": "steps: 2\nbatch_size: 1\nwarmup: 1\n",
    "grpo-perception": GRPO,
    "grpo-reasoning": f"{GRPO}text: lora\n",
    "preference": "steps: 2\nbatch_size: 1\nwarmup: 1\n",
    "grpo-preference": GRPO,
}
"""A recipe of a few steps for each stage."""
BEGINS = {
    "linearize": ["perception"],
    "projector": ["--checkpoint", "linearize"],
    "sft": ["projector"],
    "grpo-perception": ["sft"],
    "grpo-reasoning": ["grpo-perception"],
    "preference": ["sft"],
    "grpo-preference": ["grpo-reasoning", "--reward-model", "preference"],
}
"""What each stage begins with."""


@pytest.mark.slow
def test_every_stage_trains_from_the_one_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "_TOKENIZER_EPISODES", 6)
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_STEPS", 3)
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_HELD_OUT", 1)
    monkeypatch.setattr("vot_kernels.train.linearize.run._BATCH", 1)
    monkeypatch.chdir(tmp_path)
    for stage in STAGES:
        Path(f"{stage}.yaml").write_text(FILES[stage])
        begins = [word if word.startswith("-") else f"{word}/model" for word in BEGINS.get(stage, [])]
        words = ["train", stage, *begins, "--out", stage, "--config", f"{stage}.yaml", "--eval-clips", "1"]
        monkeypatch.setattr(sys, "argv", ["vot", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        assert (tmp_path / stage / "model" / "training.json").is_file() and len(out.splitlines()) > 2
