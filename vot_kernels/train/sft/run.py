"""`vot train sft`: the model of the stage projector learns to answer with Video-of-Thought traces."""

from functools import partial
from pathlib import Path

from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.sft.stage import reason, sft_metrics, train_sft
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.train.vlm.run import Origin, VlmStage, run_stage
from vot_kernels.train.vlm.stage import conversation_work

STAGE = VlmStage("sft", train_sft, sft_metrics, partial(conversation_work, speak=reason))


def run(
    out: Path,
    checkpoint: Path,
    settings: SftTraining,
    eval_clips: int = 56,
    device: str = "cpu",
    dry_run: bool = False,
) -> str:
    """Run the stage on `checkpoint`, a model of the stage projector; see `run_stage`."""
    origin = Origin({"checkpoint": checkpoint}, (str(checkpoint),))
    return run_stage(STAGE, out, settings, origin, lambda: load_vlm(checkpoint), eval_clips, device, dry_run)
