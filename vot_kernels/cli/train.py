"""`vot train`: one command per stage."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vot_kernels.cli.manners import checkpoints_are_kept, when_interrupted
from vot_kernels.cli.options import GROUP, PATH, Checkpoint, Device, examples
from vot_kernels.extras import require
from vot_kernels.files import check_output_folder
from vot_kernels.train.encoder.settings import RANDOM_TEACHER, EncoderTraining
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.sft.settings import SftTraining

train_app = typer.Typer(help="Train a stage; interrupted runs are resumed.", **GROUP)


@train_app.command(
    "perception",
    epilog=examples(
        "vot train perception --out run",
        "vot train perception --out run --attention softmax --steps 2000 --device cuda",
    ),
)
@when_interrupted(checkpoints_are_kept)
def train_perception_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH),
    ],
    steps: Annotated[
        int, typer.Option(help="Optimiser steps of the whole model.")
    ] = PerceptionTraining.steps,
    dynamics_steps: Annotated[
        int, typer.Option(help="Further steps that train relations and events alone.")
    ] = PerceptionTraining.dynamics_steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = PerceptionTraining.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = PerceptionTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = PerceptionTraining.seed,
    attention: Annotated[
        Literal["hybrid", "softmax"],
        typer.Option(help="Attention of the encoder; softmax reaches all frames."),
    ] = PerceptionTraining.attention,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips per split in the final metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Train the nano encoder and the STSG head on DigitWorld."""
    require("vot train perception", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import check_device

    settings = PerceptionTraining(
        steps=steps,
        dynamics_steps=dynamics_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        attention=attention,
    )
    check_device(device)
    check_output_folder(out)
    from vot_kernels.train.perception.run import run

    print(run(out, settings, eval_clips, device))


@train_app.command("linearize", epilog=examples("vot train linearize runs/softmax/model --out runs/hybrid"))
@when_interrupted(checkpoints_are_kept)
def train_linearize_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a perception checkpoint with softmax attention.", **PATH)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH),
    ],
    window: Annotated[int, typer.Option(help="Frames on each side that stay exact.")] = 1,
    layer_steps: Annotated[
        int, typer.Option(help="Optimiser steps in which each layer learns alone.")
    ] = Linearization.layer_steps,
    steps: Annotated[
        int, typer.Option(help="Further steps in which all layers learn together.")
    ] = Linearization.steps,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Turn exact attention into hybrid attention by distillation, layer by layer and then end to end."""
    require("vot train linearize", "video", "llm", "train")
    from vot_kernels.models.checkpoint import PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    check_device(device)
    checkpoint_kind(checkpoint, PERCEPTION)
    check_output_folder(out)
    from vot_kernels.train.linearize.run import run

    settings = Linearization(layer_steps=layer_steps, steps=steps)
    print(run(out, checkpoint, settings, window, eval_clips, device))


@train_app.command(
    "encoder",
    epilog=examples(
        "vot train encoder --out run",
        f"vot train encoder --out run --teacher {RANDOM_TEACHER} --contrastive 0",
    ),
)
@when_interrupted(checkpoints_are_kept)
def train_encoder_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of a checkpoint to distil from, or '{RANDOM_TEACHER}' for an untrained encoder.",
            show_default="the bundled perception checkpoint",
            **PATH,
        ),
    ] = None,
    distillation: Annotated[
        float, typer.Option(help="Weight of distillation; 0 is off.")
    ] = EncoderTraining.distillation,
    contrastive: Annotated[
        float, typer.Option(help="Weight of contrast; 0 is off.")
    ] = EncoderTraining.contrastive,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = EncoderTraining.steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = EncoderTraining.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = EncoderTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = EncoderTraining.seed,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 200,
    device: Device = "cpu",
) -> None:
    """Pretrain the nano encoder on DigitWorld by distillation and by contrast with captions."""
    require("vot train encoder", "video", "llm", "train")
    from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT, ENCODER, PERCEPTION, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    settings = EncoderTraining(
        distillation=distillation,
        contrastive=contrastive,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_device(device)
    folder = None if teacher == Path(RANDOM_TEACHER) else teacher or BUNDLED_CHECKPOINT
    if folder is not None and settings.distillation:
        checkpoint_kind(folder, PERCEPTION, ENCODER)
    check_output_folder(out)
    from vot_kernels.train.encoder.run import run

    print(run(out, settings, folder, eval_clips, device))


@train_app.command("projector", epilog=examples("vot train projector --out runs/projector"))
@when_interrupted(checkpoints_are_kept)
def train_projector_command(
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH),
    ],
    language_model: Annotated[
        Literal["nano", "smollm2"],
        typer.Option(help="nano is new and is trained too; SmolLM2-135M-Instruct stays as it is."),
    ] = ProjectorTraining.language_model,
    checkpoint: Checkpoint = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = ProjectorTraining.steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = ProjectorTraining.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = ProjectorTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = ProjectorTraining.seed,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 64,
    device: Device = "cpu",
) -> None:
    """Align clips and scene graphs with a language model: it learns to write captions and graphs."""
    require("vot train projector", "video", "llm", "train")
    from vot_kernels.pipelines.sampling import check_device, checkpoint_folder

    settings = ProjectorTraining(
        language_model=language_model,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_device(device)
    perception = checkpoint_folder(checkpoint)
    check_output_folder(out)
    from vot_kernels.reasoning.smollm2 import ensure_smollm2
    from vot_kernels.train.projector.run import run

    text = ensure_smollm2() if language_model == "smollm2" else None
    print(run(out, settings, perception, text, eval_clips, device))


@train_app.command("sft", epilog=examples("vot train sft runs/projector/model --out runs/sft"))
@when_interrupted(checkpoints_are_kept)
def train_sft_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a video-language checkpoint, of the stage projector.", **PATH)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for checkpoints and the result; an unfinished run is resumed.", **PATH),
    ],
    text: Annotated[
        Literal["all", "lora"],
        typer.Option(help="What of the language model is trained: all of it, or adapters."),
    ] = SftTraining.text,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = SftTraining.steps,
    batch_size: Annotated[int, typer.Option(help="Clips per step.")] = SftTraining.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = SftTraining.learning_rate,
    seed: Annotated[int, typer.Option(help="Seed of adapters and data.")] = SftTraining.seed,
    eval_clips: Annotated[int, typer.Option(help="Held-out clips in the metrics.")] = 56,
    device: Device = "cpu",
) -> None:
    """Teach a video-language model to answer with Video-of-Thought traces made from ground truth."""
    require("vot train sft", "video", "llm", "train", *(("rl",) if text == "lora" else ()))
    from vot_kernels.models.checkpoint import VLM, checkpoint_kind
    from vot_kernels.pipelines.sampling import check_device

    settings = SftTraining(
        text=text, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed
    )
    check_device(device)
    checkpoint_kind(checkpoint, VLM)
    check_output_folder(out)
    from vot_kernels.train.sft.run import run

    print(run(out, checkpoint, settings, eval_clips, device))
