"""From a command's options to the models that answer: what can be wrong is found before they are imported."""

from pathlib import Path
from typing import TYPE_CHECKING

from vot_kernels.cli.options import STEPS

if TYPE_CHECKING:
    from vot_kernels.pipelines.video_qa import VideoQA


def check_models(checkpoint: Path | None, llm: Path | None, skip: list[str] | None, device: str) -> None:
    """Find whatever can be wrong with a model's options before the model is imported."""
    from vot_kernels.pipelines.sampling import check_device, checkpoint_folder
    from vot_kernels.reasoning.llm import check_model_folder

    unknown = sorted(set(skip or ()) - set(STEPS))
    if unknown:
        raise ValueError(f"--skip must be one of {', '.join(STEPS)}, got {unknown[0]!r}.")
    check_device(device)
    checkpoint_folder(checkpoint)
    if llm is not None:
        check_model_folder(llm)


def make_video_qa(
    checkpoint: Path | None, llm: Path | None, skip: list[str] | None, device: str, anyway: bool
) -> "VideoQA":
    from vot_kernels.reasoning.types import Switches

    check_models(checkpoint, llm, skip, device)
    switches = Switches(**{name: False for name in skip or ()})
    from vot_kernels.pipelines.video_qa import VideoQA, load_eyes, load_language_model
    from vot_kernels.watching.protocols import DeferredModel

    model = DeferredModel(lambda: load_language_model(llm, device))
    return VideoQA(load_eyes(checkpoint, device), model, switches, anyway=anyway)
