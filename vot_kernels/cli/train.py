"""`vot train`: one command per stage."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from vot_kernels.cli.manners import checkpoints_are_kept, when_interrupted
from vot_kernels.cli.options import CHECKPOINT, GROUP, PATH, Checkpoint, Device, examples
from vot_kernels.cli.settings import with_settings
from vot_kernels.extras import require
from vot_kernels.files import check_output_folder
from vot_kernels.train.encoder.settings import RANDOM_TEACHER, EncoderTraining
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.rl.settings import (
    GrpoPerception,
    GrpoPreference,
    GrpoReasoning,
    PreferenceTraining,
)
from vot_kernels.train.sft.settings import SftTraining

train_app = typer.Typer(help="Train a stage; interrupted runs are resumed.", **GROUP)
OVER_RANKS = ("perception", "linearize", "encoder", "projector", "sft")


@train_app.callback()
def check_ranks(context: typer.Context) -> None:
    """Refuse processes of torchrun that would all train the same."""
    if context.invoked_subcommand not in OVER_RANKS:
        _check_alone(f"vot train {context.invoked_subcommand}")


def _check_alone(what: str) -> None:
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ValueError(
            f"{what} runs in one process, but torchrun has started {count}; "
            f"over several run: {', '.join(OVER_RANKS)}."
        )


def _over_ranks(device: str, train: Callable[[str, Any], str]) -> None:
    """Train on this process's device as one of torchrun's ranks, or alone; the first prints what comes out."""
    from vot_kernels.train.ranks import torchrun

    with torchrun(device) as (ranks, own_device):
        table = train(own_device, ranks)
    if ranks.first:
        print(table)


Out = Annotated[
    Path, typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH)
]
EvalClips = Annotated[int, typer.Option(help="Held-out clips in the metrics.")]
VlmCheckpoint = Annotated[
    Path, typer.Argument(help="Folder of a video-language checkpoint, of the stage before.", **CHECKPOINT)
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="JSONL of questions about your own videos; vot data check looks through it.",
        show_default="DigitWorld",
        **PATH,
    ),
]
HeldOut = Annotated[
    float, typer.Option(help="Share of the videos of --data to measure with, where it has no splits.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print parameters, operations, memory and time, and train nothing.")
]


@train_app.command(
    "perception",
    epilog=examples(
        "vot train perception --out run",
        "vot train perception --out run --attention softmax --steps 2000 --device cuda",
    ),
)
@when_interrupted(checkpoints_are_kept)
@with_settings(PerceptionTraining)
def train_perception_command(
    out: Out,
    settings: Any,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips per split in the final metrics.")] = 200,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Train the nano encoder and the STSG head on DigitWorld."""
    require("vot train perception", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    check_output_folder(out)
    from vot_kernels.train.perception.run import run

    _over_ranks(device, lambda own, ranks: run(out, settings, eval_clips, own, dry_run, ranks))


@train_app.command("linearize", epilog=examples("vot train linearize runs/softmax/model --out runs/hybrid"))
@when_interrupted(checkpoints_are_kept)
@with_settings(Linearization)
def train_linearize_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a perception checkpoint with softmax attention.", **CHECKPOINT)
    ],
    out: Out,
    settings: Any,
    window: Annotated[int, typer.Option(help="Frames on each side that stay exact.")] = 1,
    eval_clips: EvalClips = 200,
    device: Device = "cpu",
) -> None:
    """Turn exact attention into hybrid attention by distillation, layer by layer and then end to end."""
    require("vot train linearize", "video", "llm", "train")
    from vot_kernels.models.checkpoint import PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    checkpoint_kind(checkpoint, PERCEPTION)
    _check_run(out, checkpoint)
    from vot_kernels.train.linearize.run import run

    _over_ranks(device, lambda own, ranks: run(out, checkpoint, settings, window, eval_clips, own, ranks))


@train_app.command(
    "encoder",
    epilog=examples(
        "vot train encoder --out run",
        f"vot train encoder --out run --teacher {RANDOM_TEACHER} --contrastive 0",
    ),
)
@when_interrupted(checkpoints_are_kept)
@with_settings(EncoderTraining)
def train_encoder_command(
    out: Out,
    settings: Any,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of a checkpoint to distil from, or '{RANDOM_TEACHER}' for an untrained encoder.",
            show_default="the bundled perception checkpoint",
            **CHECKPOINT,
        ),
    ] = None,
    eval_clips: EvalClips = 200,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Pretrain the nano encoder on DigitWorld by distillation and by contrast with captions."""
    require("vot train encoder", "video", "llm", "train")
    from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT, ENCODER, PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    folder = None if teacher == Path(RANDOM_TEACHER) else teacher or BUNDLED_CHECKPOINT
    if folder is not None and settings.distillation:
        checkpoint_kind(folder, PERCEPTION, ENCODER)
    _check_run(out, folder)
    from vot_kernels.train.encoder.run import run

    _over_ranks(device, lambda own, ranks: run(out, settings, folder, eval_clips, own, dry_run, ranks))


@train_app.command("projector", epilog=examples("vot train projector --out runs/projector"))
@when_interrupted(checkpoints_are_kept)
@with_settings(ProjectorTraining)
def train_projector_command(
    out: Out,
    settings: Any,
    checkpoint: Checkpoint = None,
    eval_clips: EvalClips = 64,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Align clips and scene graphs with a language model: it learns to write captions and graphs."""
    require("vot train projector", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import check_device, checkpoint_folder

    check_device(device)
    perception = checkpoint_folder(checkpoint)
    _check_run(out, perception)
    from vot_kernels.reasoning.smollm2 import ensure_smollm2
    from vot_kernels.train.projector.run import run

    text = ensure_smollm2() if settings.language_model == "smollm2" else None
    _over_ranks(
        device, lambda own, ranks: run(out, settings, perception, text, eval_clips, own, dry_run, ranks)
    )


@train_app.command(
    "sft",
    epilog=examples(
        "vot train sft runs/projector/model --out runs/sft",
        "vot train sft runs/projector/model --out runs/own --data questions.jsonl",
    ),
)
@when_interrupted(checkpoints_are_kept)
@with_settings(SftTraining)
def train_sft_command(
    checkpoint: VlmCheckpoint,
    out: Out,
    settings: Any,
    data: Data = None,
    held_out: HeldOut = 0.1,
    eval_clips: EvalClips = 56,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Teach a video-language model to answer with Video-of-Thought traces: of DigitWorld, or your own questions."""
    require("vot train sft", "video", "llm", "train", *(("rl",) if settings.text == "lora" else ()))
    if data is not None and _is_foreign(checkpoint):
        _finetune(checkpoint, out, data, settings, held_out, eval_clips, device, dry_run)
        return
    _check(checkpoint, out, device)
    from vot_kernels.train.sft.run import run, run_on_questions

    def train(own: str, ranks: Any) -> str:
        if data is None:
            return run(out, checkpoint, settings, eval_clips, own, dry_run, ranks)
        return run_on_questions(out, checkpoint, data, settings, held_out, eval_clips, own, dry_run, ranks)

    _over_ranks(device, train)


def _add_grpo(stage: str, settings_of: type, meaning: str, before: str) -> None:
    """Add the command of a stage of GRPO that needs the checkpoint of the stage before."""

    @train_app.command(
        stage,
        help=meaning,
        epilog=examples(
            f"vot train {stage} runs/{before}/model --out runs/{stage}",
            f"vot train {stage} path/to/Qwen2.5-VL --data questions.jsonl --text lora --out runs/own",
        ),
    )
    @when_interrupted(checkpoints_are_kept)
    @with_settings(settings_of)
    def command(
        checkpoint: VlmCheckpoint,
        out: Out,
        settings: Any,
        data: Data = None,
        held_out: HeldOut = 0.1,
        eval_clips: EvalClips = 56,
        device: Device = "cpu",
        dry_run: DryRun = False,
    ) -> None:
        run = Common(checkpoint, out, settings, eval_clips, device, dry_run)
        _reinforce(stage, run, data=data, held_out=held_out)


_add_grpo(
    "grpo-perception",
    GrpoPerception,
    "Reinforce well-formed replies whose scene graph is that of the frames, by GRPO.",
    before="sft",
)
_add_grpo(
    "grpo-reasoning",
    GrpoReasoning,
    "Reinforce right answers that rest on the right objects, events and times, by GRPO.",
    before="grpo-perception",
)


@train_app.command("preference", epilog=examples("vot train preference runs/sft/model --out runs/preference"))
@when_interrupted(checkpoints_are_kept)
@with_settings(PreferenceTraining)
def train_preference_command(
    checkpoint: VlmCheckpoint,
    out: Out,
    settings: Any,
    data: Data = None,
    held_out: HeldOut = 0.1,
    eval_clips: EvalClips = 56,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Train a reward model on synthetic preferences: true traces against traces that rules have spoilt."""
    run = Common(checkpoint, out, settings, eval_clips, device, dry_run)
    _reinforce("preference", run, data=data, held_out=held_out)


@train_app.command(
    "grpo-preference",
    epilog=examples(
        "vot train grpo-preference runs/reason/model --reward-model runs/preference/model --out runs/prefer"
    ),
)
@when_interrupted(checkpoints_are_kept)
@with_settings(GrpoPreference)
def train_grpo_preference_command(
    checkpoint: VlmCheckpoint,
    reward_model: Annotated[
        Path, typer.Option(help="Folder of a reward model, of the stage preference.", **CHECKPOINT)
    ],
    out: Out,
    settings: Any,
    data: Data = None,
    held_out: HeldOut = 0.1,
    eval_clips: EvalClips = 56,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Reinforce as in grpo-reasoning, and a little of what a reward model of preferences likes."""
    from vot_kernels.models.checkpoint import check_reward_model

    check_reward_model(reward_model)
    _check_run(out, reward_model)
    run = Common(checkpoint, out, settings, eval_clips, device, dry_run)
    _reinforce("grpo-preference", run, reward_model=reward_model, data=data, held_out=held_out)


@train_app.command("recipe", epilog=examples("vot train recipe sft"))
def recipe_command(
    stage: Annotated[str, typer.Argument(help="A stage, such as sft.")],
) -> None:
    """Print the YAML file of a stage: all of its settings, their defaults, and what they mean."""
    from vot_kernels.train.recipes import recipe

    print(recipe(stage), end="")


@train_app.command("export", epilog=examples("vot train export runs/sft --out my-adapters"))
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of sft with adapters.", **PATH)],
    out: Annotated[Path, typer.Option(help="Folder to write.", **PATH)],
) -> None:
    """Keep the adapters of a run without the language model: 12 MB, which every --vlm takes."""
    require("vot train export", "llm", "train")
    check_output_folder(out, run, run / "model")
    from vot_kernels.train.vlm.adapters import export_adapters

    export_adapters(run, out)
    print(f"{out}: adapters, configuration and training.json")


class Common(NamedTuple):
    """What the commands of reinforcement learning have in common."""

    checkpoint: Path
    out: Path
    settings: Any
    eval_clips: int
    device: str
    dry_run: bool


def _reinforce(
    stage: str,
    run: Common,
    *,
    reward_model: Path | None = None,
    data: Path | None = None,
    held_out: float = 0.1,
) -> None:
    require(f"vot train {stage}", "video", "llm", "train", "rl")
    if data is not None and _is_foreign(run.checkpoint):
        if stage == "preference":
            raise ValueError(
                "vot train preference takes a folder of vot train sft alone; the reward model that it makes reads "
                "text, and grpo-preference takes it beside any model."
            )
        _check_foreign(f"vot train {stage}", run.checkpoint, run.out, run.device)
        from vot_kernels.pipelines.finetuning import run_reinforcement

        options = held_out, run.eval_clips, run.device, reward_model, run.dry_run
        print(run_reinforcement(stage, run.out, run.checkpoint, data, run.settings, *options))
        return
    _check(run.checkpoint, run.out, run.device)
    from vot_kernels.train.rl.run import run_grpo, run_preference

    arguments = run.out, run.checkpoint, run.settings, run.eval_clips, run.device, run.dry_run
    if stage == "preference":
        print(run_preference(*arguments, data, held_out))
    else:
        print(run_grpo(stage, *arguments, reward_model, data, held_out))


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model that is none of ours."""
    from vot_kernels.models.checkpoint import read_config

    try:
        return not str(read_config(folder).get("model_type")).startswith("vot")
    except (ValueError, AttributeError, OSError):
        return False  # which the check of our own says in a sentence


def _finetune(
    folder: Path,
    out: Path,
    data: Path,
    settings: Any,
    held_out: float,
    eval_clips: int,
    device: str,
    dry_run: bool,
) -> None:
    _check_foreign("vot train sft", folder, out, device)
    from vot_kernels.pipelines.finetuning import Finetuning, run_finetuning

    own = Finetuning(**asdict(settings))
    print(run_finetuning(out, folder, data, own, held_out, eval_clips, device, dry_run))


def _check_foreign(command: str, folder: Path, out: Path, device: str) -> None:
    """Check what a run on a model of transformers needs before anything is loaded."""
    from vot_kernels.pipelines.sampling import check_device

    _check_alone(f"{command} on a model that is not our own")
    check_device(device)
    _check_run(out, folder)


def _check(checkpoint: Path, out: Path, device: str) -> None:
    """Check what a run needs before anything is loaded."""
    from vot_kernels.models.checkpoint import VLM, checkpoint_kind, read_config
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    if _is_foreign(checkpoint) and "vision_config" in read_config(checkpoint):
        raise ValueError(
            "Of a model of transformers, adapters are trained on your own questions: pass --data questions.jsonl."
        )
    checkpoint_kind(checkpoint, VLM)
    _check_run(out, checkpoint)


def _check_run(out: Path, *inputs: Path | None) -> None:
    """Refuse a folder of a run that cannot be written, or whose result would be in the place of an input."""
    given = [folder for folder in inputs if folder is not None]
    check_output_folder(out, *given)
    check_output_folder(out / "model", *given)
