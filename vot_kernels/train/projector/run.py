"""`vot train projector`: a new video-language model learns to caption clips and to write their graphs."""

from functools import partial
from pathlib import Path

from vot_kernels.models.checkpoint import BUNDLED_CHECKPOINT
from vot_kernels.train.projector.settings import ProjectorTraining
from vot_kernels.train.projector.stage import describe, projector_metrics, train_projector
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.vlm.model import build_model
from vot_kernels.train.vlm.run import Origin, VlmStage, run_stage
from vot_kernels.train.vlm.stage import conversation_work

STAGE = VlmStage(
    "projector",
    train_projector,
    projector_metrics,
    partial(conversation_work, speak=describe),
    rows="nats per token",
)


def run(
    out: Path,
    settings: ProjectorTraining,
    perception: Path,
    language_model: Path | None = None,
    eval_clips: int = 64,
    device: str = "cpu",
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> str:
    """Build the model and run the stage; see `run_stage`.

    Args:
        perception: folder of the perception checkpoint whose encoder is used.
        language_model: folder of SmolLM2, where the settings ask for it.
    """
    bundled = perception.resolve() == BUNDLED_CHECKPOINT.resolve()
    origin = Origin({"perception": perception}, () if bundled else ("--checkpoint", str(perception)))
    return run_stage(
        STAGE,
        out,
        settings,
        origin,
        lambda: build_model(settings.language_model, perception, settings.seed, language_model),
        eval_clips,
        device,
        dry_run,
        ranks=ranks,
    )
