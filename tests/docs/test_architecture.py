"""The picture of the architecture is that of the code."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "draw_architecture.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.drawn(page) == page, "run python docs/draw_architecture.py"


def test_every_room_has_a_label_and_imports_go_one_way(script):
    graph = script.imports()
    assert set(graph) == set(script.LABELS)
    for name in graph:
        seen, waiting = set(), list(graph[name])
        while waiting:
            room = waiting.pop()
            assert room != name, f"{name} imports itself through other rooms"
            if room not in seen:
                seen.add(room)
                waiting += graph[room]


def test_arrows_that_follow_from_others_are_left_out(script):
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert script.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}
