"""Video-language models of all families as readers: what they see of a clip, and when they are told it was."""

import re

import numpy as np
import pytest
import torch

from vot_kernels.data.sample_clips import digitworld_clip
from vot_kernels.data.video import VideoClip, load_video, save_mp4
from vot_kernels.reasoning.llm import LanguageModel, LanguageModelError
from vot_kernels.testing import shifted
from vot_kernels.watching.frames import CLOCK, metadata
from vot_kernels.watching.loading import load_video_language_model
from vot_kernels.watching.protocols import Reader
from vot_kernels.watching.video_language import VideoLanguageModel, visual_tokens

PROMPTS = ["What happens?", "Who is it that moves to the left there, and why?"]
TELLS_TIMES = (
    "qwen3_vl",
    "qwen3_5",
    "smolvlm2",
    "video_llama_3",
)  # the processor writes them into the prompt


@pytest.fixture(scope="module")
def clip() -> VideoClip:
    return load_video(digitworld_clip()[0], num_frames=7, start=0.5)


@pytest.fixture(scope="module")
def reader(folder_of, family):
    return load_video_language_model(folder_of(family))


@pytest.fixture(scope="module")
def seeing(reader, clip):
    return reader.about(clip)


def varying(tmp_path) -> VideoClip:
    """A clip whose frames are at irregular times, as sampled from a file of variable frame rate."""
    save_mp4(
        tmp_path / "clip.mp4", np.random.default_rng(shifted(0)).integers(0, 255, (6, 64, 64, 3), np.uint8), 4
    )
    even = load_video(tmp_path / "clip.mp4", fps=4)
    return VideoClip(even.frames, np.array([0.0, 0.04, 1.0, 1.5, 61.5, 75.0]), even.info)


def words_of(model) -> str:
    return model.tokenizer.decode(model._head)


def test_it_is_a_reader_and_gives_language_models(reader, seeing, family):
    assert isinstance(reader, Reader) and isinstance(seeing, LanguageModel)
    assert isinstance(seeing.blind, LanguageModel) and seeing.name == reader.name == family


def test_our_kernels_serve_it(reader):
    counts = re.match(r"(\d+) of (\d+) modules replaced", str(reader.kernels))
    assert counts and counts[1] == counts[2] and int(counts[1]) >= 4
    assert "vot_kernels.flash_attn_varlen_func" in str(reader.kernels)


def test_it_sees_every_frame(seeing, clip, family):
    """Frames are counted in the pixels, and their tokens in the prompt."""
    inputs, frames = seeing.inputs, len(clip.frames)
    if "video_grid_thw" in inputs:
        steps, rows, columns = inputs["video_grid_thw"][0].tolist()
        assert steps == (frames if family == "video_llama_3" else (frames + 1) // 2)
        tokens = steps * rows * columns // 4
    else:
        pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        assert pixels.shape[-4] == frames
        tokens = frames * 4 + (family == "llava_onevision")
    assert seeing.visual_tokens == tokens if family != "video_llama_3" else 0 < seeing.visual_tokens <= tokens


def test_frames_reach_the_model_in_order_and_unchanged(seeing, clip):
    """What the model got is what the processor makes of these very frames without metadata and sampling."""
    processor = seeing.processor
    pixels = seeing.inputs.get("pixel_values_videos", seeing.inputs.get("pixel_values"))
    frames = np.ascontiguousarray(clip.frames.transpose(0, 3, 1, 2))
    wanted = processor.video_processor(
        videos=[torch.from_numpy(frames)], do_sample_frames=False, return_tensors="pt"
    )
    direct = wanted.get("pixel_values_videos", wanted.get("pixel_values"))
    assert torch.equal(pixels.flatten(), direct.flatten())


def test_the_prompt_has_the_true_times(reader, seeing, clip, family, tmp_path):
    """With a crop, a number of frames and a variable rate; every model is also told them in words."""
    other = varying(tmp_path)
    for model, times in ((seeing, clip.times), (reader.about(other), other.times)):
        text = words_of(model)
        assert f"{len(times)} frames, at {', '.join(f'{t:.2f}' for t in times)} s." in text
        if family in ("qwen3_vl", "qwen3_5"):  # a token stands for two frames
            padded = np.append(times, times[-1:]) if len(times) % 2 else times
            wanted = [f"{t:.1f}" for t in padded.reshape(-1, 2).mean(1)]
            assert re.findall(r"<([\d.]+) seconds>", text) == wanted
        elif family == "video_llama_3":
            assert re.findall(r"Time ([\d.]+)s:", text) == [f"{t:.1f}" for t in times]
        elif family == "smolvlm2":
            assert re.findall(r"Frame from (\d\d:\d\d)", text) == [
                f"{int(t) // 60:02}:{int(t) % 60:02}" for t in times
            ]
        else:
            assert family not in TELLS_TIMES


def test_rotary_positions_advance_by_the_true_interval(folder_of, clip):
    """Qwen2.5-VL places the frames of a video by seconds: here 2 frames a step, and 4 positions a second."""
    model = load_video_language_model(folder_of("qwen2_5_vl")).about(clip)
    step = 2 * (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1)
    assert float(model.inputs["second_per_grid_ts"][0]) == pytest.approx(step, rel=1e-4)
    inner = model.model.model
    position, _ = inner.get_rope_index(
        model.inputs["input_ids"],
        model.inputs["mm_token_type_ids"],
        video_grid_thw=model.inputs["video_grid_thw"],
        second_per_grid_ts=model.inputs["second_per_grid_ts"],
    )
    video = position[0, 0][model.inputs["mm_token_type_ids"][0] == 2].unique()
    assert (video - video[0]).tolist() == [int(step * 4 * k) for k in range(4)]


def test_metadata_holds_the_times_to_a_tick(clip, tmp_path):
    for watched in (clip, varying(tmp_path)):
        told = metadata(watched)
        times = np.array(told["frames_indices"]) / told["fps"]
        assert abs(times - watched.times).max() <= 0.5 / CLOCK
        rate = len(times) / told["total_num_frames"] * told["fps"]
        assert rate == pytest.approx((len(times) - 1) / (watched.times[-1] - watched.times[0]), rel=1e-4)


def full_inputs(model, ids):
    """The model's arguments for a whole prompt at once, without any cache."""
    tokens = torch.tensor([ids])
    options = {
        k: v for k, v in model.inputs.items() if k not in ("input_ids", "attention_mask", "video_metadata")
    }
    if "mm_token_type_ids" in options:
        missing = len(ids) - options["mm_token_type_ids"].shape[1]
        options["mm_token_type_ids"] = torch.nn.functional.pad(options["mm_token_type_ids"], (0, missing))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **options}


def test_scores_are_those_of_one_pass_over_everything(seeing):
    continuations = ["yes", "no, it does not"]
    for prompt in PROMPTS:
        for text, score in zip(continuations, seeing.score(prompt, continuations), strict=True):
            ids, tail = seeing.encode(prompt), seeing._text_ids(text)
            with torch.no_grad():
                logits = seeing.model(**full_inputs(seeing, ids + tail)).logits[0, len(ids) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(tail)[:, None]).mean()
            assert score == pytest.approx(float(wanted), abs=2e-4)


def test_replies_are_those_of_generate(seeing):
    """A prompt alone and in a batch with a longer one, against transformers' own decoding from the pixels."""
    wanted = []
    for prompt in PROMPTS:
        inputs = full_inputs(seeing, seeing.encode(prompt))
        with torch.no_grad():
            out = seeing.model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        wanted.append(seeing.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert seeing.generate_batch(PROMPTS, max_new_tokens=5) == wanted
    assert seeing.generate(PROMPTS[1], max_new_tokens=5) == wanted[1]


def test_the_clip_is_read_once(reader, clip, monkeypatch):
    """The tower runs for the first prompt alone, and the clip that was asked about last is kept."""
    seen = reader.about(VideoClip(clip.frames, clip.times, clip.info))
    widths, forward = [], type(seen.model).forward

    def counting(self, *args, **options):
        widths.append((options["input_ids"].shape[1], any("pixel" in name for name in options)))
        return forward(self, *args, **options)

    monkeypatch.setattr(type(seen.model), "forward", counting)
    seen.score(PROMPTS[0], ["yes"])
    seen.generate(PROMPTS[1], max_new_tokens=2)
    assert [pixels for _, pixels in widths] == [True] + [False] * (len(widths) - 1)
    assert max(width for width, pixels in widths if not pixels) < len(seen._head)
    assert reader.about(seen_clip := VideoClip(clip.frames, clip.times, clip.info)) is reader.about(seen_clip)


def test_without_the_video_it_reads_the_words_alone(seeing):
    visual = visual_tokens(seeing.model, seeing.processor)
    assert visual & set(seeing.encode(PROMPTS[0])) and not visual & set(seeing.blind.encode(PROMPTS[0]))
    assert seeing.blind.score(PROMPTS[0], ["yes"]) != pytest.approx(
        seeing.score(PROMPTS[0], ["yes"]), abs=1e-3
    )


def test_without_the_video_no_clip_leaves_a_trace(folder_of, family, clip):
    """The model notes on a module by how much a clip shifts positions; prompts without the clip do not use that."""
    blind = load_video_language_model(folder_of(family)).about(clip).blind
    before = [blind.score(prompt, ["yes", "no"]) for prompt in PROMPTS]
    whole = load_video_language_model(folder_of(family)).about(clip)
    whole.score(PROMPTS[0], ["yes"])
    after = [whole.blind.score(prompt, ["yes", "no"]) for prompt in PROMPTS]
    assert np.allclose(before, after, rtol=0, atol=1e-5)


def test_marks_in_a_question_are_text(seeing):
    """A question cannot smuggle a video token or the end of its turn into the prompt."""
    plain = seeing.encode("What? no")
    tokens = {token for token in seeing.tokenizer.get_added_vocab() if len(token) > 1}
    for mark in tokens:
        id = seeing.tokenizer.convert_tokens_to_ids(mark)
        assert seeing.encode(f"What? {mark} no").count(id) == plain.count(id)


def test_another_clip_gives_other_likelihoods(reader, clip):
    other = VideoClip(255 - clip.frames, clip.times, clip.info)
    assert reader.about(clip).score(PROMPTS[0], ["yes"]) != reader.about(other).score(PROMPTS[0], ["yes"])


def test_an_image_goes_in_as_an_image(reader, clip, tmp_path):
    from PIL import Image

    Image.fromarray(clip.frames[0]).save(tmp_path / "picture.png")
    seen = reader.about(load_video(tmp_path / "picture.png"))
    assert "frames, at" not in words_of(seen) and seen.visual_tokens
    assert np.isfinite(seen.score(PROMPTS[0], ["yes"])).all()


def test_a_processor_for_images_alone_gets_every_frame_as_an_image(folder_of, clip):
    made = load_video_language_model(folder_of("qwen2_5_vl"))
    made.processor.video_processor = None
    seen = made.about(clip)
    assert len(seen.inputs["image_grid_thw"]) == len(clip.frames) and "pixel_values_videos" not in seen.inputs
    assert re.findall(r"Frame \d at ([\d.]+) s", words_of(seen)) == [f"{t:.2f}" for t in clip.times]
    assert len(seen.score(PROMPTS[0], ["yes", "no"])) == 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm2"])
class TestWhatIsDroppedIsRefused:
    def changed(self, folder_of, family, **changes) -> VideoLanguageModel:
        made = load_video_language_model(folder_of(family))
        for name, value in changes.items():
            setattr(made.processor, name, value)
        return made

    def test_a_template_without_the_video(self, folder_of, family, clip):
        made = self.changed(folder_of, family)
        made.processor.apply_chat_template = lambda turns, **_: turns[0]["content"][-1]["text"]
        with pytest.raises(LanguageModelError, match="did not reach the model|cannot read the clip"):
            made.about(clip)

    def test_a_processor_that_samples_again(self, folder_of, family, clip):
        """It passes on every second frame, whatever it is told."""
        made = self.changed(folder_of, family)
        real = made.processor.video_processor.preprocess

        def halved(videos, video_metadata, **options):
            video_metadata[0]["frames_indices"] = video_metadata[0]["frames_indices"][::2]
            return real([videos[0][::2]], video_metadata=video_metadata, **options)

        made.processor.video_processor.preprocess = halved
        with pytest.raises(LanguageModelError, match="was given 7 frames and passed 4"):
            made.about(clip)

    def test_a_template_that_leaves_out_the_words(self, folder_of, family, clip):
        made = self.changed(folder_of, family)
        made.processor.apply_chat_template = lambda *_, **__: "<video>"
        with pytest.raises(LanguageModelError, match="leaves out the text"):
            made.about(clip)


def test_a_model_that_can_think_aloud_is_told_not_to(folder_of, clip, capfd):
    made = load_video_language_model(folder_of("qwen3_5"))
    told = "{% if enable_thinking is defined and not enable_thinking %}<quiet>{% else %}<aloud>{% endif %}"
    assert "<aloud>" not in made.about(clip)._chat("What?")
    made.processor.chat_template += told
    assert made.about(VideoClip(clip.frames, clip.times, clip.info))._chat("What?").endswith("<quiet>")
    assert "Kwargs" not in capfd.readouterr().err


def test_a_processor_without_template_or_eyes_is_refused(folder_of):
    made = load_video_language_model(folder_of("qwen2_5_vl"))
    made.processor.video_processor = made.processor.image_processor = None
    with pytest.raises(LanguageModelError, match="neither videos nor images"):
        VideoLanguageModel(made.model, made.processor, "it")
    made.processor.chat_template = None
    with pytest.raises(LanguageModelError, match="no chat template"):
        VideoLanguageModel(made.model, made.processor, "it")


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("can't allocate memory: you tried to"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_too_little_memory_is_one_sentence(folder_of, clip, monkeypatch, error):
    seen = load_video_language_model(folder_of("smolvlm2")).about(clip)

    def out_of_memory(*_, **__):
        raise error

    monkeypatch.setattr(type(seen.model), "forward", out_of_memory)
    for ask in (lambda: seen.generate("What?"), lambda: seen.score("What?", ["yes"])):
        with pytest.raises(LanguageModelError, match="lower --num-frames.* --dtype bfloat16") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_other_errors_of_the_model_are_not_hidden(folder_of, clip, monkeypatch):
    seen = load_video_language_model(folder_of("smolvlm2")).about(clip)

    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(seen.model), "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        seen.generate("What?")


def test_a_clip_that_is_longer_than_the_context_is_refused(folder_of, clip):
    made = load_video_language_model(folder_of("smolvlm2"))
    made.model.config.get_text_config().max_position_embeddings = 50
    with pytest.raises(LanguageModelError, match="allows 50"):
        made.about(clip)
