"""DigitWorld and the models behind lmms-eval's interface; what runs lmms-eval itself is skipped without it."""

import json
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tests.reasoning.scripted import ScriptedLanguageModel
from vot_kernels.data.digitworld.codec import h264_roundtrip
from vot_kernels.data.digitworld.question_sets import generate_questions
from vot_kernels.data.video import load_video
from vot_kernels.integrations import patching
from vot_kernels.pipelines import evaluation, sampling, video_qa
from vot_kernels.pipelines import lmms_eval as adapter

ROOT = Path(__file__).parents[2]
VIDEOS = 7
INSTALLED = find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(
    not INSTALLED, reason="lmms_eval is not installed: it wants av < 16, so it has an environment of its own"
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return adapter.write_task(tmp_path_factory.mktemp("lmms") / "task", VIDEOS, seed=0)


def documents(task):
    return [json.loads(line) for line in (task / "questions.jsonl").read_text().splitlines()]


def test_the_task_has_the_questions_and_clips_of_the_evaluation(task):
    asked = generate_questions("test", VIDEOS, seed=0)
    found = documents(task)
    assert len(found) == VIDEOS
    for document, item in zip(found, asked, strict=True):
        assert document["question"] == item.question.text and document["answer"] == item.question.answer
        assert document["candidates"] == list(item.question.candidates)
        (path,) = adapter.doc_to_visual(document)
        seen = sampling.sample_video(path, sampling.Sampling(), 8.0)
        decoded = h264_roundtrip(item.episode.frames(), 23)
        assert (seen.frames == decoded).all() and abs(seen.times - item.episode.times).max() < 1e-9


def test_texts_and_scores():
    document = {"question": "Which?", "candidates": ["red", "blue"], "answer": "red"}
    assert adapter.doc_to_text(document) == "Which?\nAnswer with one of: red, blue."
    scores = {
        text: adapter.process_results(document, [text]) for text in ("red", " Red.", "blue", "", "red blue")
    }
    assert [score["accuracy"] for score in scores.values()] == [1, 1, 0, 0, 0]


def test_a_folder_with_something_in_it_is_refused(task, monkeypatch, capsys):
    before = sorted(task.iterdir())
    monkeypatch.setattr(sys, "argv", ["lmms_eval", str(task), "--videos", "1"])
    assert adapter.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is not empty" in error and sorted(task.iterdir()) == before


def test_the_entry_point_is_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["vot_kernels"].partition(":")
    assert getattr(import_module(module), function) is adapter.manifests


@pytest.mark.skipif(INSTALLED, reason="lmms_eval is installed")
@pytest.mark.parametrize(
    "asked", [adapter.manifests, lambda: adapter.VideoQAModel, lambda: adapter.PatchedModel]
)
def test_without_lmms_eval_one_sentence_says_what_to_install(asked):
    with pytest.raises(ImportError, match=r"lmms-eval needs lmms_eval: pip install 'vot-kernels\[lmms\]'"):
        asked()


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = adapter.Nothing


@needs_lmms_eval
def test_the_registry_of_lmms_eval_takes_the_models():
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    for manifest in adapter.manifests():
        registry.register_manifest(manifest)
    for name in ("vot_kernels_qa", "vot_kernels_vlm"):
        assert issubclass(registry.get_model_class(name), lmms)


@needs_lmms_eval
def test_lmms_eval_gives_the_accuracy_of_the_evaluation(task, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for manifest in adapter.manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    scripted = lambda path=None, device="cpu": ScriptedLanguageModel()  # noqa: E731
    monkeypatch.setattr(evaluation, "_TRAIN_QUESTIONS", 70)
    for module in (video_qa, evaluation):
        monkeypatch.setattr(module, "load_language_model", scripted)
    expected = evaluation.evaluate_digitworld(tmp_path / "result.json", videos=VIDEOS)
    rows = [json.loads(line) for line in (tmp_path / "result.rows.jsonl").read_text().splitlines()][1:]
    found = simple_evaluate(
        model="vot_kernels_qa",
        tasks=["digitworld"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        device="cpu",
        batch_size=1,
        log_samples=True,
    )
    answers = {s["doc"]["video"]: s["filtered_resps"][0] for s in found["samples"]["digitworld"]}
    assert [answers[d["video"]] for d in documents(task)] == [row["answers"]["vot"] for row in rows]
    scores = found["results"]["digitworld"]
    assert 0 < scores["accuracy,none"] < 1
    assert scores["accuracy,none"] == pytest.approx(expected["accuracy"]["vot"]["all"])


@pytest.fixture(scope="module")
def vision_language_folder(tmp_path_factory):
    """A tiny random Qwen2.5-VL with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    from tests.integrations.tiny import qwen2_5_vl

    special = {"<|image_pad|>": 90, "<|video_pad|>": 91, "<|vision_start|>": 92, "<|vision_end|>": 93}
    words = {"[UNK]": 0} | {chr(97 + i): 1 + i for i in range(26)} | special
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", additional_special_tokens=[*special]
    )
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
        "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
    )
    small = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
    image, video = Qwen2VLImageProcessor(**small), Qwen2VLVideoProcessor(**small)
    folder = tmp_path_factory.mktemp("vlm")
    Qwen2_5_VLProcessor(image, fast, video, chat_template=template).save_pretrained(folder)
    qwen2_5_vl().save_pretrained(folder)
    return folder


@needs_lmms_eval
def test_lmms_eval_runs_a_patched_model(task, vision_language_folder, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for manifest in adapter.manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)

    def answers():
        found = simple_evaluate(
            model="vot_kernels_vlm",
            model_args=f"pretrained={vision_language_folder},dtype=float32,num_frames=4",
            tasks=["digitworld"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            limit=3,
            batch_size=1,
            device="cpu",
            log_samples=True,
        )
        return [sample["filtered_resps"][0] for sample in found["samples"]["digitworld"]]

    patched = []
    patch = patching.patch
    monkeypatch.setattr(patching, "patch", lambda model: patched.append(patch(model)) or patched[-1])
    adapter._patched_model.cache_clear()
    found = answers()
    assert len(patched) == 1 and len(patched[0].replaced) == 4
    monkeypatch.setattr(patching, "patch", lambda model: None)
    adapter._patched_model.cache_clear()
    assert len(found) == 3 and all(found) and found == answers()
    adapter._patched_model.cache_clear()


def test_a_patched_model_is_told_when_the_frames_are(task, vision_language_folder, monkeypatch):
    """With a stand-in for the base class of lmms-eval, of which only the documents are used."""
    api = ModuleType("lmms_eval.api.model")
    api.lmms = type("lmms", (), {"__init__": lambda self: None})
    for name, module in (
        ("lmms_eval", ModuleType("lmms_eval")),
        ("lmms_eval.api", ModuleType("api")),
        (api.__name__, api),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    adapter._patched_model.cache_clear()
    try:
        model = adapter._patched_model()(str(vision_language_folder), dtype="float32", num_frames=4)
    finally:
        adapter._patched_model.cache_clear()
    model.task_dict = {"digitworld": {"test": documents(task)}}
    told, processor = [], type(model.processor)
    call = processor.__call__
    monkeypatch.setattr(
        processor, "__call__", lambda self, **given: told.append(given) or call(self, **given)
    )
    options = {"max_new_tokens": 2}
    request = ("What?", options, adapter.doc_to_visual, 0, "digitworld", "test")
    assert isinstance(model._answer(*request), str)
    (metadata,) = told[0]["video_metadata"]
    times = [index / metadata["fps"] for index in metadata["frames_indices"]]
    clip = load_video(documents(task)[0]["video"], num_frames=4)
    assert len(times) == 4 and max(abs(times - clip.times)) < 1e-4
