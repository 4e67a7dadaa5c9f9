"""`vot train sft`: a video-language model learns to answer questions, with Video-of-Thought traces."""

from functools import partial
from pathlib import Path

from vot_kernels.data.questions.file import split_questions
from vot_kernels.train.ranks import ALONE, Ranks
from vot_kernels.train.sft.questions import QuestionBatches, answer, data_identity, question_metrics
from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.sft.stage import sft_metrics, sft_work, train_sft
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.train.vlm.run import Origin, VlmStage, run_stage
from vot_kernels.train.vlm.stage import conversation_work, train_parts

STAGE = VlmStage("sft", train_sft, sft_metrics, sft_work)


def run(
    out: Path,
    checkpoint: Path,
    settings: SftTraining,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> str:
    """Run the stage on `checkpoint`, a model of the stage projector; see `run_stage`."""
    origin = Origin({"checkpoint": checkpoint}, (str(checkpoint),))
    return run_stage(
        STAGE, out, settings, origin, lambda: load_vlm(checkpoint), eval_clips, device, dry_run, ranks=ranks
    )


def run_on_questions(
    out: Path,
    checkpoint: Path,
    data: Path,
    settings: SftTraining,
    held_out: float = 0.1,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
    ranks: Ranks = ALONE,
) -> str:
    """Run the stage on the questions of a file; see `run_stage` and `split_questions`.

    Args:
        data: JSONL of questions about a user's own videos.
        held_out: share of the videos to measure with, where the file has no splits.
    """
    train, held = split_questions(data, held_out)
    given = data_identity(data, held_out)
    batches = partial(QuestionBatches, train, given)
    stage = VlmStage(
        "sft",
        partial(train_parts, speak=answer, batches=batches),
        partial(question_metrics, questions=held),
        partial(conversation_work, speak=answer, batches=batches),
    )
    words = (str(checkpoint), "--data", str(data), "--held-out", str(held_out))
    origin = Origin({"checkpoint": checkpoint}, words, given)
    table = run_stage(
        stage, out, settings, origin, lambda: load_vlm(checkpoint), eval_clips, device, dry_run, ranks=ranks
    )
    return f"{len(train):,} questions to train on, {len(held):,} held out.\n{table}"
