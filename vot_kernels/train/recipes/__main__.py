"""Writes the recipes anew from the settings of the stages."""

from pathlib import Path

from vot_kernels.train.config import recipe_text
from vot_kernels.train.recipes import STAGES

for stage, settings in STAGES.items():
    (Path(__file__).parent / f"{stage}.yaml").write_text(recipe_text(stage, settings), encoding="utf-8")
