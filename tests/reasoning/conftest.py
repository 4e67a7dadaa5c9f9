import pytest

from tests.reasoning.world import VOCABULARY, make_world
from vot_kernels.scene_graph.graph import STSG


@pytest.fixture
def world() -> STSG:
    return make_world()


@pytest.fixture
def empty() -> STSG:
    return STSG((0.0, 0.25), vocabulary=VOCABULARY)
