"""The settings of linearization; importing them takes no time."""

import math
from dataclasses import dataclass

from vot_kernels.train.config import check_bounds, setting


@dataclass(frozen=True)
class Linearization:
    """Settings of a run; two runs with equal settings give equal weights on one machine."""

    layer_steps: int = setting(150, "Optimiser steps in which each layer learns alone.", least=0)
    steps: int = setting(0, "Further steps in which all layers learn together.", least=0)
    layer_learning_rate: float = setting(3e-3, "Peak learning rate of the layers alone.", least=0)
    learning_rate: float = setting(1e-5, "Peak learning rate of all layers together.", least=0)
    warmup: int = setting(10, "Steps of either part in which the learning rate rises.", least=0)
    clip: float = setting(1.0, "Largest gradient norm; inf clips nothing.", above=0, most=math.inf)

    def __post_init__(self) -> None:
        check_bounds(self)
