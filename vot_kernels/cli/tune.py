"""`vot tune`: the fastest configs of the kernels on this GPU."""

import sys
from typing import Annotated, Any

import typer

from vot_kernels.cli.manners import when_interrupted


def _configs_are_kept(given: dict[str, Any]) -> str:
    return "whatever was found so far is kept, and VOT_TUNED=1 uses it."


@when_interrupted(_configs_are_kept)
def tune(
    seconds: Annotated[float, typer.Option(min=1, help="Time for everything.")] = 90,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Time the shipped configs of every kernel on this GPU and keep the fastest; VOT_TUNED=1 uses them."""
    from vot_kernels.pipelines.tuning import tune_gpu

    path, found = tune_gpu(seconds, dtype)  # which refuses what cannot be tuned
    print(f"Tuning for {seconds:.0f} s; what is found is kept as it is found.", file=sys.stderr)
    for one in found:
        print(one, file=sys.stderr)
    print(path)
