"""Folders that are no video-language model or detector: one sentence each, and nothing of them is ever run."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.reasoning.test_llm import causal_lm, tokenizer
from tests.watching.detectors import save as save_detector
from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.reasoning.llm import LanguageModelError
from vot_kernels.watching.detector import load_detector
from vot_kernels.watching.loading import load_video_language_model

PROCESSOR = "processor_config.json"


@pytest.fixture
def folder(folder_of, tmp_path):
    """A folder of a model, to be broken."""
    return shutil.copytree(folder_of("qwen2_5_vl"), tmp_path / "broken")


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def text_only(folder, processor: bool = True):
    """A causal language model, with or without the processor of another model beside it."""
    kept = (folder / PROCESSOR).read_text()
    shutil.rmtree(folder)
    causal_lm().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if processor:
        (folder / PROCESSOR).write_text(kept)


def broken(folder, kind):
    match kind:
        case "missing":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "pickled":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "truncated":
            (folder / "model.safetensors").write_bytes(b"\x08")
        case "a weight is missing":
            weights = load_file(folder / "model.safetensors")
            weights.pop(next(name for name in weights if name.endswith("blocks.0.norm1.weight")))
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        case "no processor":
            (folder / PROCESSOR).unlink()
        case "bad processor":
            (folder / PROCESSOR).write_text("{")
        case "text alone":
            text_only(folder)
        case "text alone, no processor":
            text_only(folder, processor=False)
        case "a classifier":
            edit(folder / "config.json", model_type="vit")
        case "unknown type":
            edit(folder / "config.json", model_type="abacus")
        case "no template":
            (folder / "chat_template.jinja").unlink()
        case "code":
            code = {"AutoConfig": "mine.C", "AutoModelForImageTextToText": "mine.M"}
            edit(folder / "config.json", model_type="mine", auto_map=code)
            (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    return folder


BROKEN = {
    "missing": "does not exist",
    "no config": "has no config.json",
    "pickled": "only pickled weights",
    "truncated": "cannot be loaded",
    "a weight is missing": "norm1.weight is one of 1 that are missing",
    "no processor": "has no processor for videos or images",
    "bad processor": "cannot be read as JSON",
    "text alone": "for text alone .*llama.*--llm instead of --vlm",
    "text alone, no processor": "pass a model that reads text alone with --llm",
    "a classifier": "not a model that answers about images or videos",
    "unknown type": "cannot be loaded.*abacus",
    "no template": "no chat template",
    "code": "cannot be loaded",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_model_is_refused_in_one_line(folder, kind):
    with pytest.raises(LanguageModelError, match=BROKEN[kind]) as caught:
        load_video_language_model(broken(folder, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "pickled", "text alone", "no template", "code"])
def test_the_command_says_so_in_one_line_and_writes_nothing(folder, kind, monkeypatch, capfd, tmp_path):
    from vot_kernels import cli

    broken(folder, kind)
    capfd.readouterr()
    words = ["ask", digitworld_clip()[0], "What?", "--vlm", folder, "--json"]
    words += ["--trace", tmp_path / "trace.json", "--picture", tmp_path / "sheet.png"]
    monkeypatch.setattr(sys, "argv", ["vot", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and not out and len(err.splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "trace.json").exists() and not (tmp_path / "sheet.png").exists()


def test_code_in_the_folder_of_a_known_model_is_left_alone(folder):
    edit(folder / "config.json", auto_map={"AutoConfig": "mine.C", "AutoModelForImageTextToText": "mine.M"})
    edit(folder / PROCESSOR, auto_map={"AutoProcessor": "mine.P"})
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    assert load_video_language_model(folder).name == "broken"


def test_numbers_of_the_weights(folder):
    import torch

    assert load_video_language_model(folder).model.dtype == torch.float32
    assert load_video_language_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="auto, float32, bfloat16, float16, got 'int8'"):
        load_video_language_model(folder, dtype="int8")


def test_without_torchvision_it_says_what_to_install(folder, monkeypatch):
    """None in sys.modules makes a package look as if it were not installed."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"for videos needs torchvision: pip install 'vot-kernels\[vlm\]'"):
        load_video_language_model(folder)


def test_what_loading_itself_lacks_is_one_sentence(folder, monkeypatch):
    """Older folders do not say that their processor needs torchvision, and a model may be too large to load at all."""
    import transformers

    def raises(error):
        def load(*_, **__):
            raise error

        return load

    with monkeypatch.context() as small:
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        small.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", raises(error))
        with pytest.raises(LanguageModelError, match="too small for 'broken'; lower"):
            load_video_language_model(folder)
    edit(folder / PROCESSOR, video_processor=None)
    sentence = "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found.\nRead on"
    with monkeypatch.context() as missing:
        missing.setattr(transformers.AutoProcessor, "from_pretrained", raises(ImportError(sentence)))
        with pytest.raises(LanguageModelError, match="cannot be loaded: Qwen2VL.* not found.$"):
            load_video_language_model(folder)
        missing.setitem(sys.modules, "torchvision", None)
        with pytest.raises(ImportError, match=r"pip install 'vot-kernels\[vlm\]'"):
            load_video_language_model(folder)


def test_a_folder_that_is_no_detector(folder, tmp_path):
    with pytest.raises(LanguageModelError, match="not an object detector.*qwen2_5_vl"):
        load_detector(folder)
    detector = save_detector("detr", tmp_path / "detr")
    (detector / "preprocessor_config.json").unlink()
    with pytest.raises(LanguageModelError, match="no processor for images"):
        load_detector(detector)
    with pytest.raises(LanguageModelError, match="has no processor for videos or images"):
        load_video_language_model(detector)
    with pytest.raises(LanguageModelError, match="does not exist"):
        load_detector(tmp_path / "nowhere")
