"""Linearization: a copy of a model with cheaper attention learns to compute what the model does."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vot_kernels.train.linearize.stage import linearize

__all__ = ["linearize"]


def __getattr__(name: str) -> object:
    """Import lazily, because the command line reads the settings of this package and must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.stage"), name)
