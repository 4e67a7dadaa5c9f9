"""`vot train sft`: the model of the stage projector learns to answer with Video-of-Thought traces."""

from pathlib import Path

from vot_kernels.train.sft.settings import SftTraining
from vot_kernels.train.sft.stage import sft_metrics, train_sft
from vot_kernels.train.vlm.model import load_vlm
from vot_kernels.train.vlm.run import Origin, VlmStage, run_stage

OPTIONS = ("text", "steps", "batch_size", "learning_rate", "seed")
"""The settings that the command line has options for, in addition to the checkpoint."""
STAGE = VlmStage("sft", train_sft, sft_metrics)


def run(out: Path, checkpoint: Path, settings: SftTraining, eval_clips: int = 56, device: str = "cpu") -> str:
    """Run the stage on `checkpoint`, a model of the stage projector; see `run_stage`."""
    origin = Origin("checkpoint", checkpoint, (str(checkpoint),))
    return run_stage(STAGE, out, settings, OPTIONS, origin, lambda: load_vlm(checkpoint), eval_clips, device)
