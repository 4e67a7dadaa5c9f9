"""What a server imports once, so that the ranks that it forks need not: see `tests.distributed.ranks`."""

from tests.torchvision_operators import make_torchvision_importable

make_torchvision_importable()  # before transformers looks for it

from tests.distributed import (  # noqa: E402, F401
    attention_cases,
    context_cases,
    expert_cases,
    models_cases,
    traffic_cases,
    training_cases,
)
