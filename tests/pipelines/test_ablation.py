"""Ablations: padding computes what packing does, runs are kept and gone on with, outcomes follow from the spread."""

import json
import sys
from functools import partial

import pytest
import torch

from tests.models.vot.tiny import tiny_config, tiny_tokenizer
from vot_kernels import cli
from vot_kernels.data.digitworld.episode import generate_episode
from vot_kernels.files import read_json_lines
from vot_kernels.models.encoder import VotEncoder, VotEncoderConfig
from vot_kernels.models.vot import VotForConditionalGeneration, VotProcessor
from vot_kernels.pipelines.ablation import run as runner
from vot_kernels.pipelines.ablation.padding import PaddedEncoder
from vot_kernels.pipelines.ablation.parts import MEASURES, PARTS, Part, Variant
from vot_kernels.pipelines.ablation.summary import format_summary, summarise
from vot_kernels.pipelines.ablation.tasks import TASKS, encoders, language
from vot_kernels.pipelines.ablation.tasks.base import Sources, seconds_of
from vot_kernels.testing import shifted
from vot_kernels.train.sft.stage import reason
from vot_kernels.train.vlm.model import save_half

REWARDS = ("accuracy", "grounding", "temporal", "preference")
DENSE = VotEncoderConfig.preset("nano", attention="softmax", aoe_every=0)


@pytest.fixture
def vot(monkeypatch, capsys):
    """Run `vot ablate ...`; return (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vot", "ablate", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def quick(monkeypatch):
    """Runs that measure little."""
    for task in TASKS.values():
        monkeypatch.setattr(task, "clips", 2)
    monkeypatch.setattr(encoders, "step_time", lambda changes: 1.0)


# --- padding ------------------------------------------------------------------------------------------------


def test_a_padded_encoder_computes_what_the_packed_one_does():
    torch.manual_seed(shifted(0))
    packed = VotEncoder(DENSE).train()
    padded = PaddedEncoder(DENSE).train()
    padded.load_state_dict(packed.state_dict())
    grid = torch.tensor([[2, 2, 3], [5, 3, 4], [1, 1, 1]])
    pixels = torch.randn(int(grid.prod(1).sum()), DENSE.patch_numbers)
    seen = [model(pixels, grid, fps=torch.tensor([8.0, 4.0, 0.0])) for model in (packed, padded)]
    for one in seen:
        (one.last_hidden_state.square().sum() + one.pooler_output.sum()).backward()
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(seen[1][name], seen[0][name], rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in packed.named_parameters()}
    for name, parameter in padded.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-3)


def test_padding_needs_exact_attention_and_no_experts():
    with pytest.raises(ValueError, match="got 'hybrid' and 2"):
        PaddedEncoder(VotEncoderConfig.preset("nano"))


# --- runs ---------------------------------------------------------------------------------------------------


def test_runs_are_kept_and_not_repeated(vot, quick, tmp_path):
    out, plot = tmp_path / "a.json", tmp_path / "a.svg"
    words = ("--only", "dense residual", "--only", "size embedding", "--seeds", 1, "--steps", 2, "--out", out)
    code, table, err = vot(*words, "--plot", plot)
    assert code == 0, err
    rows = read_json_lines(tmp_path / "a.rows.jsonl")
    assert len(rows) == 3  # the default encoder is run once for both parts
    assert "dense residual" in table and "3 of 3" in err and plot.read_text().count("<circle") == 4
    result = json.loads(out.read_text())
    assert [part["name"] for part in result["parts"]] == ["dense residual", "size embedding"]
    on, off = result["parts"][0]["variants"]
    assert on["parameters"] > off["parameters"] and len(off["measures"]["test_loss"]["values"]) == 1
    (tmp_path / "a.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    code, again, err = vot(*words)
    assert code == 0 and err.count(" of 3") == 1 and len(read_json_lines(tmp_path / "a.rows.jsonl")) == 3
    assert json.loads(out.read_text()) == result and not (tmp_path / "a.runs").exists()


def test_an_interrupted_run_goes_on_from_its_checkpoint(quick, tmp_path):
    plan = runner.Plan(runner.choose_parts(["contrast"], Sources()), seeds=1, steps=3)
    (run, *_), seen = plan.runs(), []

    def stop(step, terms):
        seen.append(step)
        if step == 2 and len(seen) == 2:
            raise KeyboardInterrupt

    task, folder = TASKS["encoder"], tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        task.run(run, 0, 3, folder, stop, Sources())
    found = task.run(run, 0, 3, folder, stop, Sources())
    assert seen == [1, 2, 3]
    assert found == task.run(run, 0, 3, tmp_path / "whole", lambda *_: None, Sources())


@pytest.mark.parametrize("name", ["packing", "attention", "normaliser", "experts"])
def test_every_variant_takes_a_step_and_has_a_cost(name):
    (part,) = [part for part in PARTS if part.name == name]
    for variant in part.variants:
        task = TASKS[part.task]
        step, cost = task.step(variant.changes), task.cost(variant.changes)
        assert seconds_of(step) > 0 and cost["parameters"] > 0 and cost["operations"] > 1e8


def test_experts_are_compared_at_equal_parameters_or_operations():
    (part,) = [part for part in PARTS if part.name == "experts"]
    ours, *others = [TASKS[part.task].cost(variant.changes) for variant in part.variants]
    off = {
        variant.name: {name: abs(cost[name] / ours[name] - 1) for name in cost}
        for variant, cost in zip(part.variants[1:], others, strict=True)
    }
    assert off.pop("dense, as many operations")["operations"] < 0.1
    assert all(differs["parameters"] < 0.05 for differs in off.values())


def test_a_dry_run_writes_nothing(vot, tmp_path):
    code, table, _ = vot("--only", "contrast", "--seeds", 2, "--out", tmp_path / "a.json", "--dry-run")
    assert code == 0 and "4 runs" in table and not list(tmp_path.iterdir())
    assert table.count("contrastive=0.0") == 2 and "GFLOP" in table


def test_a_steps_time_is_relative_to_the_default_encoders():
    assert 0.5 < encoders.step_time({}, rounds=3) < 2


# --- parts without training ---------------------------------------------------------------------------------


def test_answers_are_read_from_an_evaluation(vot, tmp_path):
    right = {"vot": "a", "vot_unverified": "b", "direct": "b"}
    rows = [{"question": {"answer": "a"}, "answers": right} for _ in range(6)]
    rows[0]["answers"] = right | {"vot_unverified": "a"}
    file = tmp_path / "digits.rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"settings": {}}, *rows]))
    out = tmp_path / "a.json"
    code, table, err = vot(
        "--only", "verification", "--only", "thought", "--answers", file, "--out", out, "--seeds", 3
    )
    assert code == 0, err
    thought, verification = json.loads(out.read_text())["parts"]
    values = [v["measures"]["accuracy"]["values"] for v in verification["variants"]]
    assert values == [[1.0, 1.0, 1.0], [0.5, 0.0, 0.0]]
    assert verification["variants"][1]["measures"]["accuracy"]["outcome"] == "worse"
    assert thought["variants"][1]["measures"]["accuracy"]["outcome"] == "none"


def test_a_graph_is_read_as_tokens_or_text():
    import numpy as np

    whole = reason(generate_episode("val", 0), np.random.default_rng(0))
    assert language.as_read(whole, ("tokens", "text")) == whole
    text = language.as_read(whole, ("text",))
    assert text.graph is None and text.turns == whole.turns
    tokens = language.as_read(whole, ("tokens",))
    assert tokens.graph is whole.graph and "<stsg>" not in tokens.turns[0].prompt
    assert whole.turns[0].prompt.endswith(tokens.turns[0].prompt) and tokens.turns[1:] == whole.turns[1:]


@pytest.fixture
def vlm(tmp_path):
    """The folder of a tiny video-language model with new weights."""
    torch.manual_seed(0)
    config = tiny_config(vision={"patch_size": 8})
    folder = tmp_path / "model"
    save_half(VotForConditionalGeneration(config), VotProcessor.for_model(config, tiny_tokenizer()), folder)
    return folder


def test_a_video_language_model_is_measured(quick, vlm, tmp_path, monkeypatch):
    monkeypatch.setattr("vot_kernels.train.vlm.answers.MAX_NEW_TOKENS", 4)
    for reads in (["tokens"], []):
        run = {"reads": reads}
        found = TASKS["reading"].run(run, 0, 0, tmp_path, lambda *_: None, Sources(vlm=vlm))
        assert found["nats"] > 0 and found["accuracy"] == 0


def test_a_dry_run_says_what_it_cannot_know(vot, vlm, tmp_path):
    options = ("--vlm", vlm, "--seeds", 1, "--out", tmp_path / "a.json", "--dry-run")
    code, table, err = vot("--only", "reinforcement", *options)
    assert code == 0, err
    rows = [line for line in table.splitlines() if line.endswith(" steps")]
    trained = [line for line in rows if not line.endswith(" 0 steps")]
    assert trained and f"Not in it: {len(trained)} of them" in table


def test_reinforcement_goes_on_from_a_finished_stage(quick, vlm, tmp_path, monkeypatch):
    short = {
        name: partial(stage, batch_size=1, generations=2, max_reply_tokens=4, learning_rate=1e-2)
        for name, stage in language._STAGES.items()
    }
    monkeypatch.setattr(language, "_STAGES", short)
    monkeypatch.setattr(language, "_JUDGE_STEPS", 1)
    trained = []

    def run(stages, folder):
        changes, sources = {"stages": stages}, Sources(vlm=vlm)
        return TASKS["reinforcement"].run(changes, 0, 1, folder, lambda *n: trained.append(n), sources)

    before = run([], tmp_path / "none")
    assert 0 < before["preference"] < 1 and not trained
    stages = ["perception", "reasoning", "preference"]
    run(stages[:1], tmp_path / "one")
    after = run(stages, tmp_path / "all")
    assert len(trained) == 3 and after.keys() == before.keys() == {"reward", "seen_grounding", *REWARDS}
    monkeypatch.setattr(TASKS["reinforcement"], "_done", ())  # as after an interruption
    assert run(stages, tmp_path / "all") == run(stages, tmp_path / "whole") == after


def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="A part must be one of attention, normaliser.*got 'colour'"):
        runner.choose_parts(["colour"], Sources())
    with pytest.raises(ValueError, match="The part 'graph tokens' needs --vlm"):
        runner.choose_parts(["graph tokens"], Sources())
    names = {part.name for part in runner.choose_parts(None, Sources())}
    assert "experts" in names and not names & {"graph tokens", "thought", "verification"}


# --- the summary --------------------------------------------------------------------------------------------


def test_an_outcome_needs_a_difference_beyond_the_spread():
    part = Part("p", "?", "perception", tuple(map(Variant, "abcd")), ("test_loss", "test_presence"))
    found = {
        "a": {"test_loss": [1.0, 1.2], "test_presence": [0.5, 0.6]},
        "b": {"test_loss": [1.3, 1.35], "test_presence": [0.8, 0.9]},
        "c": {"test_loss": [1.1, 1.3], "test_presence": [0.4, 0.62]},
        "d": {"test_loss": [0.7, 0.75]},
    }

    def rows(part, variant):
        values = found[variant.name]
        run = {"steps": 1, "clips": 1}
        return [{"run": run, "metrics": {name: v[n] for name, v in values.items()}} for n in range(2)]

    result = summarise([part], rows)
    outcomes = [
        {name: m["outcome"] for name, m in v["measures"].items()} for v in result["parts"][0]["variants"]
    ]
    assert outcomes == [
        {"test_loss": None, "test_presence": None},
        {"test_loss": "worse", "test_presence": "better"},
        {"test_loss": "none", "test_presence": "none"},
        {"test_loss": "better"},
    ]
    text = format_summary(result)
    assert "1.100 ± 0.100  " in text and "1.325 ± 0.025 −" in text and "–" in text


def test_every_part_has_known_measures_and_variants_of_its_own():
    for part in PARTS:
        assert set(part.measures) <= MEASURES.keys() and part.task in TASKS and len(part.variants) > 1
        changes = [json.dumps(variant.changes, sort_keys=True) for variant in part.variants]
        assert len(set(changes)) == len(changes)
