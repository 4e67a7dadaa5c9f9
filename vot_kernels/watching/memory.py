"""Too little memory as one sentence that says what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vot_kernels.reasoning.llm import LanguageModelError


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Around what a model computes: running out of memory becomes a `LanguageModelError`, which says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise LanguageModelError(
                f"The memory is too small for '{name}'; lower --num-frames, or the size of the numbers with "
                "--dtype bfloat16."
            ) from error
        raise
