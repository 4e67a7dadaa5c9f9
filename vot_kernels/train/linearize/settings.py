"""The settings of linearization; importing them takes no time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linearization:
    """Settings of a run; two runs with equal settings give equal weights on one machine.

    Attributes:
        layer_steps: steps in which each attention module on its own learns to return what the teacher's returns.
        steps: steps after those, in which all modules together learn the teacher's outputs.
        layer_learning_rate, learning_rate: peak learning rates of the two stages. The second moves all layers at once.
        warmup, clip: those of both stages; see `vot_kernels.train.loop.Schedule`.
    """

    layer_steps: int = 150
    steps: int = 0
    layer_learning_rate: float = 3e-3
    learning_rate: float = 1e-5
    warmup: int = 10
    clip: float = 1.0
