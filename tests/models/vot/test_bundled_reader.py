"""The video-language model that ships with the package: what it reads, and how commands find it."""

import json

import pytest

from tests.models.vot.reading import replies_from_graphs
from vot_kernels.data.digitworld import generate_questions
from vot_kernels.data.digitworld.traces import read_reply, write_trace
from vot_kernels.models.checkpoint import BUNDLED_READER, checkpoint_name, find_checkpoint
from vot_kernels.train.report import command_line
from vot_kernels.train.sft.settings import SftTraining

READ = ("motion", "did_hit", "count")
"""Kinds of questions whose answers follow from what the graph says, without a simulation."""


@pytest.fixture(scope="module")
def told():
    """Questions about held-out clips, each with the reply of the model, which sees their true graphs alone."""
    asked = [a for a in generate_questions("test", 70, seed=2) if a.question.kind in READ]
    return list(zip(asked, replies_from_graphs(BUNDLED_READER, asked), strict=True))


def test_it_answers_what_can_be_read(told):
    right = [(read_reply(reply) or ("", ""))[1] == item.question.answer for item, reply in told]
    assert len(right) == 30 and sum(right) >= 0.6 * len(right)


def test_its_answers_have_their_evidence(told):
    """The part of the graph that decides the question is in the thought, line by line."""
    same = 0
    for item, reply in told:
        wanted, _, _ = write_trace(item.question, item.episode.stsg).partition("</stsg>")
        same += reply.partition("</stsg>")[0] == wanted
    assert same >= 0.6 * len(told)


def test_the_folder_is_small_and_says_how_it_was_made():
    record = json.loads((BUNDLED_READER / "training.json").read_text())
    assert record["command"].startswith("vot train sft ") and record["metrics"]["after"]["format"] > 0.95
    assert sum(file.stat().st_size for file in BUNDLED_READER.iterdir()) < 5e6


def test_commands_find_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("digitworld-reader") == BUNDLED_READER
    for other in ("digitworld", "../checkpoints/digitworld-reader", str(tmp_path / "digitworld-reader")):
        assert str(find_checkpoint(other)) == other
        assert checkpoint_name(other) == other
    assert checkpoint_name(str(BUNDLED_READER)) == "digitworld-reader"
    command = command_line("vot train sft", SftTraining(), str(BUNDLED_READER))
    assert command.startswith("vot train sft digitworld-reader --steps ")  # on every machine
    (tmp_path / "digitworld-reader").mkdir()  # the user's own folder comes first
    assert str(find_checkpoint("digitworld-reader")) == "digitworld-reader"
