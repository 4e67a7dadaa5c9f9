"""`vot train sft` and GRPO on a video-language model of transformers: adapters, by TRL, on a user's own questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vot_kernels.data.questions.file import QuestionFile, split_questions
from vot_kernels.data.video import VideoClip
from vot_kernels.extras import imports_for
from vot_kernels.reasoning.llm import render_chat
from vot_kernels.train.checkpoint import fingerprint, publish_folder
from vot_kernels.train.config import identity
from vot_kernels.train.estimate import Work, estimate
from vot_kernels.train.loop import Measure, Report, no_report
from vot_kernels.train.optimization import in_precision
from vot_kernels.train.report import (
    check_eval_clips,
    command_line,
    finished,
    format_metrics,
    machine,
    reporting,
    write_record,
)
from vot_kernels.train.rl.grpo import Guest, grpo_metrics, grpo_work, own_questions, train_grpo
from vot_kernels.train.rl.own_questions import split_for_replies
from vot_kernels.train.rl.preferences import load_preference_reward
from vot_kernels.train.rl.settings import GrpoTraining
from vot_kernels.train.rl.trainer import EachStep, Resumable, Run, arguments, train
from vot_kernels.train.sft.questions import asked_of, data_identity, frames_of, scores, seconds_of, shuffled
from vot_kernels.train.sft.replies import reply_to
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.vlm.answers import MAX_NEW_TOKENS, first_prompt
from vot_kernels.watching.loading import load_video_language_model
from vot_kernels.watching.video_language import visual_tokens

FRAMES = 8
MAX_PIXELS = 448 * 448


@dataclass(frozen=True)
class Finetuning(SftTraining):
    """The settings of the stage sft for a model whose adapters alone are trained, and what its trainer must know."""

    item_name: ClassVar[str] = "questions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text != "lora":
            raise ValueError("Of a model of transformers adapters alone are trained: pass --text lora.")
        if self.learning_rate == SftTraining.learning_rate:
            raise ValueError(
                f"The default learning rate, {self.learning_rate:g}, is for small models of our own: "
                "pass another, such as --learning-rate 2e-4."
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained."""
        return ("lora",)


@dataclass(frozen=True)
class Rows:
    """Questions as rows for TRL by index; the frames of a row are read when it is taken.

    Attributes:
        questions: of a file, shuffled.
        count: number of rows.
        seed: of their order.
    """

    questions: QuestionFile
    count: int
    seed: int

    def row(self, index: int) -> dict[str, Any]:
        """Return `prompt` and `completion`, a message each, and the `images` in the prompt; `clip` and `question`."""
        question = shuffled(self.questions, self.seed, index)
        clip = frames_of(self.questions, question, FRAMES, MAX_PIXELS)
        graph = None if question.kind == "graph" else question.stsg
        text = {"type": "text", "text": first_prompt(graph, asked_of(question))}
        reply = {"type": "text", "text": reply_to(question)}
        return {
            "prompt": [{"role": "user", "content": [*_shown(clip), text]}],
            "completion": [{"role": "assistant", "content": [reply]}],
            "images": _pictures(clip),
            "question": question,
            "seconds": seconds_of(clip),
        }

    def dataset(self) -> Any:
        """Return a dataset of the package datasets that computes a row when it is taken."""
        from datasets import Dataset

        def take(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            taken = [self.row(index) for index in batch["index"]]
            return {name: [row[name] for row in taken] for name in ("prompt", "completion", "images")}

        return Dataset.from_dict({"index": list(range(self.count))}).with_transform(take)


def _shown(clip: VideoClip) -> list[dict[str, str]]:
    """Return parts of a message: frames as images, because TRL hands on images alone, each after its time."""
    return [part for at in clip.times for part in ({"type": "text", "text": f"{at:.1f}s"}, {"type": "image"})]


def _pictures(clip: VideoClip) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in clip.frames]


def add_adapters(model: Any, seed: int) -> Any:
    """Return the model with LoRA adapters in the linear layers of its language model."""
    from peft import LoraConfig, get_peft_model

    decoder = model.get_decoder()
    within = {id(module) for module in decoder.modules()}
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in within]
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=layers))


def finetune(
    out: Path,
    model: Any,
    processor: Any,
    settings: Finetuning,
    questions: QuestionFile,
    *,
    known: dict[str, Any],
    save_every: int = 20,
    stop_at: int | None = None,
    report: Report = no_report,
    validate: Measure | None = None,
) -> int:
    """Train the adapters of a model in place, or resume; return the number of steps done.

    Args:
        out: folder of the checkpoints, which hold the adapters alone.
        model: with adapters, on its device.
        processor: of the model.
        settings: of the run.
        questions: to train on.
        known: what tells the data from others, for resuming.
        save_every: steps between two checkpoints.
        stop_at: end early after this step, with a checkpoint.
        report: called after every step with what TRL logs of it.
        validate: measures the model during training.

    Raises:
        ValueError: a checkpoint in `out` is of another run, or a video cannot be read.
        KeyboardInterrupt: Ctrl-C ended the run after a step.
    """
    from trl import SFTConfig, SFTTrainer

    class Trainer(Resumable, SFTTrainer):
        """Rows come shuffled."""

    run = Run(out, model, settings, **known)
    common = arguments(settings, next(model.parameters()).device.type)
    del common["disable_dropout"]  # which this trainer does not know; the adapters have none
    trainer = Trainer(
        model,
        args=SFTConfig(
            output_dir=str(out),
            per_device_train_batch_size=settings.part_size,
            max_length=None,
            completion_only_loss=True,
            remove_unused_columns=False,  # a row is made of its index
            save_steps=save_every,
            **common,
        ),
        train_dataset=Rows(questions, settings.steps * settings.batch_size, settings.seed).dataset(),
        processing_class=processor,
        optimizers=(run.optimizer, run.schedule),
    )
    each = EachStep(run, report, validate, stop_at)
    trainer.add_callback(each)
    return train(trainer, run, each)


def sft_work(model: Any, processor: Any, settings: Finetuning, questions: QuestionFile) -> Work:
    """Return what a step of `finetune` computes."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = Rows(questions, settings.part_size, settings.seed).dataset()
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collate([rows[index] for index in range(settings.part_size)]).to(model.device)

    def loss() -> Tensor:
        with in_precision(model, settings.precision):
            return model(**batch, use_cache=False).loss

    return Work(loss, settings.accumulation)


@torch.no_grad()
def held_out_metrics(model: Any, processor: Any, questions: QuestionFile, clips: int) -> dict[str, float]:
    """Return the nats per token of true replies, and how good greedy ones are, as `question_metrics` does."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    model.eval()
    rows = Rows(questions, min(clips, len(questions)), 0)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    total, tokens, asked, said = 0.0, 0, [], []
    for index in range(rows.count):
        row = rows.row(index)
        reply = _greedy(model, processor, row) if row["question"].kind != "graph" else None
        batch = collate([{name: row[name] for name in ("prompt", "completion", "images")}]).to(model.device)
        learnt = int((batch["labels"][:, 1:] >= 0).sum())
        total += learnt * model(**batch).loss.item()
        tokens += learnt
        if reply is not None:
            asked.append(row)
            said.append(reply)
    found = {"nats": total / tokens}
    if asked:
        found |= scores([row["question"] for row in asked], [row["seconds"] for row in asked], said)
    return found


def _greedy(model: Any, processor: Any, row: dict[str, Any], tokens: int | None = None) -> str:
    inputs = _read(model, processor, [row["prompt"]], [row["images"]])
    new = model.generate(**inputs, max_new_tokens=tokens or MAX_NEW_TOKENS, do_sample=False)
    return processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _read(model: Any, processor: Any, prompts: Sequence[Any], images: Sequence[Sequence[Any]]) -> Any:
    """Return the inputs of prompts, padded on the left, on the device of the model."""
    name = model.config.name_or_path
    texts = [render_chat(processor, prompt, name, add_generation_prompt=True) for prompt in prompts]
    options: dict[str, Any] = {"images": [list(some) for some in images]} if any(images) else {}
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": "left"}
    inputs = processor(text=texts, return_tensors="pt", add_special_tokens=False, **options)
    return inputs.to(model.device, model.dtype)


def _inputs_of(model: Any, processor: Any, prompts: Sequence[Any]) -> Any:
    """Return the inputs of prompts whose images are in the message."""
    return _read(model, processor, prompts, [images_in(prompt) for prompt in prompts])


@torch.no_grad()
def _greedy_replies(model: Any, processor: Any, prompts: Sequence[Any], tokens: int) -> list[str]:
    """Return the replies to prompts whose images are in the message."""
    return [
        _greedy(model, processor, {"prompt": prompt, "images": images_in(prompt)}, tokens)
        for prompt in prompts
    ]


def images_in(prompt: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the images in the parts of messages."""
    return [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]


def run_finetuning(
    out: Path,
    folder: Path,
    data: Path,
    settings: Finetuning,
    held_out: float = 0.1,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
) -> str:
    """Train adapters of the model in `folder`, or resume, and write `out/model`; return held-out metrics as a table.

    `out/model` is a folder as `folder`, with the adapters merged, which `vot ask --vlm` takes.

    Args:
        data: JSONL of questions about a user's own videos.
        held_out: share of the videos to measure with, where the file has no splits.
        eval_clips: held-out questions in the metrics.
        device: where the model is trained.
        dry_run: write nothing, and return what a run would take.

    Raises:
        ValueError: the model takes no images, the data cannot be used, or a checkpoint in `out` is of another run.
        ImportError: peft or trl is not installed.
    """
    known = data_identity(data, held_out)
    train_on, measure_on = split_questions(data, held_out)

    def prepare(model: Any, processor: Any) -> _Steps:
        return _Steps(
            lambda adapted, **options: finetune(
                out, adapted, processor, settings, train_on, known=known, **options
            ),
            lambda model, clips: held_out_metrics(model, processor, measure_on, clips),
            lambda adapted: sft_work(adapted, processor, settings, train_on),
        )

    words = (str(folder), "--data", str(data), "--held-out", str(held_out), "--eval-clips", str(eval_clips))
    command = command_line("vot train sft", settings, *words)
    table = _run_adapters(out, folder, settings, known, command, prepare, eval_clips, device, dry_run)
    return f"{len(train_on):,} questions to train on, {len(measure_on):,} held out.\n{table}"


def run_reinforcement(
    name: str,
    out: Path,
    folder: Path,
    data: Path,
    settings: GrpoTraining,
    held_out: float = 0.1,
    eval_clips: int = 56,
    device: str = "cpu",
    reward_model: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Train adapters of the model in `folder` by a stage of GRPO; see `run_finetuning`.

    `reward_model` is the folder of a reward model, for the stage that has one: it reads text, so it serves any model.

    Raises:
        ValueError: the settings are not those of adapters, or as in `run_finetuning`.
        ImportError: peft or trl is not installed.
    """
    if settings.text != "lora":
        raise ValueError("Of a model of transformers adapters alone are trained: pass --text lora.")
    known = data_identity(data, held_out)
    train_on, measure_on = split_for_replies(data, held_out)
    words, preference = [str(folder)], None
    if reward_model is not None:
        preference = load_preference_reward(reward_model, device)
        known["reward_model_fingerprint"] = preference.fingerprint
        words += ["--reward-model", str(reward_model)]

    def prepare(model: Any, processor: Any) -> _Steps:
        guest = Guest(_greedy_replies, sorted(visual_tokens(model, processor)))
        asked = own_questions(data, held_out, settings, MAX_PIXELS)
        same: dict[str, Any] = {"preference": preference, "data": asked, "guest": guest}
        return _Steps(
            lambda adapted, **options: train_grpo(out, adapted, processor, settings, **same, **options),
            lambda model, clips: grpo_metrics(model, processor, clips, settings=settings, **same),
            lambda adapted: grpo_work(adapted, processor, settings, data=asked, inputs_of=_inputs_of),
        )

    words += ["--data", str(data), "--held-out", str(held_out), "--eval-clips", str(eval_clips)]
    command = command_line(f"vot train {name}", settings, *words)
    table = _run_adapters(out, folder, settings, known, command, prepare, eval_clips, device, dry_run)
    return f"{len(train_on):,} questions to train on, {len(measure_on):,} held out.\n{table}"


class _Steps(NamedTuple):
    """How a run trains the model with adapters, how it measures one, and what a step computes.

    See `finetune`, `held_out_metrics` and `sft_work`.
    """

    train: Callable[..., Any]
    measure: Callable[[Any, int], dict[str, float]]
    work: Callable[[Any], Work]


def _run_adapters(
    out: Path,
    folder: Path,
    settings: Any,
    known: Mapping[str, Any],
    command: str,
    prepare: Callable[[Any, Any], _Steps],
    eval_clips: int,
    device: str,
    dry_run: bool,
) -> str:
    """Train, or resume, write `out/model` with the adapters merged, and return held-out metrics as a table.

    With dry_run write nothing, and return what a run would take.
    """
    check_eval_clips(eval_clips)
    with imports_for("Training a model of transformers", "rl"):
        import peft  # noqa: F401
        import trl  # noqa: F401
    whole = load_video_language_model(folder, device)
    model, processor = whole.model, whole.processor
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"The frames are shown as images, but the processor of '{folder}' takes none.")
    same = {"settings": identity(settings), **known, "checkpoint_fingerprint": fingerprint(model)}
    same["eval_clips"] = eval_clips
    steps = prepare(model, processor)
    if dry_run:
        adapted = add_adapters(model, settings.seed)
        learnt = [p for p in adapted.parameters() if p.requires_grad]
        return estimate(adapted, learnt, "lora", settings.steps, steps.work(adapted))
    if record := finished(out / "model", same):
        return format_metrics(record["metrics"], "weights")
    metrics = {"before": steps.measure(model, eval_clips)}
    adapted = add_adapters(model, settings.seed)
    with reporting(out, settings.steps) as report:
        steps.train(adapted, report=report, validate=steps.measure)
    merged = adapted.merge_and_unload()
    metrics["after"] = steps.measure(merged, eval_clips)
    record = {"command": command, **same, **machine(), "metrics": metrics}
    with publish_folder(out / "model") as draft:
        merged.save_pretrained(draft)
        processor.save_pretrained(draft)
        write_record(draft, record)
    return format_metrics(metrics, "weights")
