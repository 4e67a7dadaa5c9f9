"""torchvision beside a CPU build of torch, which the video processors of transformers import.

The wheel of the index belongs to torch with CUDA, so that its compiled operators do not load here, and its import then
fails on operators that nobody declared. With them declared, all that is written in Python works: the transforms, and
with them the video processors. `make` puts the wheel into a folder that is not on the path.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(sys.prefix) / "torchvision"
_ROI = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_GRAD = "Tensor grad, Tensor rois"
_SCALE = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_STEPS = ", ".join(f"SymInt {name}_{axis}" for name in ("stride", "pad", "dil") for axis in "hw")
_DEFORM = (
    f"Tensor offset, Tensor mask, Tensor bias, {_STEPS}, SymInt groups, SymInt offset_groups, bool use_mask"
)
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward({_GRAD}, {_SCALE}, {_SIZE}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_roi_pool_backward({_GRAD}, Tensor argmax, {_SCALE}, {_SIZE}) -> Tensor",
    f"ps_roi_align({_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_GRAD}, Tensor mapping, {_SCALE}, int sampling_ratio, {_SIZE}) -> Tensor",
    f"ps_roi_pool({_ROI}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_GRAD}, Tensor mapping, {_SCALE}, {_SIZE}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, {_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_DEFORM}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class _Declares(MetaPathFinder):
    """Declares the operators at the moment at which torchvision is looked for, and leaves finding it to others."""

    library = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in OPERATORS:
                self.library.define(schema)


def make_torchvision_importable() -> None:
    """Let this process import torchvision; nothing changes where it is installed, or has no folder."""
    if FOLDER.is_dir() and find_spec("torchvision") is None:
        sys.path.append(str(FOLDER))
        sys.meta_path.insert(0, _Declares())
