"""One run: every race is run once, and the JSON is complete after each."""

import json
import platform
import re

import pytest
import torch

from benchmarks import session as session_module
from benchmarks.core import Outcome, Provider, Status, Workload
from benchmarks.problems.attention import Attention
from benchmarks.race import Rules
from benchmarks.session import Session, describe_device, race_facts, versions
from vot_kernels.cpp.library import library

WORKLOAD = Workload("hybrid", "w", Attention("packed_attention", (8,), 1, 1, 4), torch.float32, "cpu")
GOOD, BAD = (Provider(name, ("hybrid",), lambda *_: None, instead="x") for name in ("good", "bad"))


@pytest.fixture
def races(monkeypatch):
    """The races that were run, all of them imaginary."""
    held = []

    def race(workload, direction, providers, rules):
        held.append((workload.name, direction, [p.name for p in providers]))
        outcomes = {"good": Outcome("good", Status.TIMED, "", (1.0, 2.0), (0.5, 0.25), 7, {"solves": "x"})}
        return outcomes | {"bad": Outcome("bad", Status.MISMATCH, "off by one")}

    monkeypatch.setattr(session_module, "race", race)
    monkeypatch.setattr(session_module, "providers_of", lambda suite: (GOOD, BAD, Provider("no", (), print)))
    monkeypatch.setattr(session_module, "measure_ceilings", lambda device, dtypes: {"copy_bytes_per_s": 1.0})
    return held


@pytest.fixture
def run(request, tmp_path, races):
    path = tmp_path / "new" / "out.json"
    return Session(request.config, path, [WORKLOAD], ["good", "bad"], Rules()), path


def test_each_race_is_held_once_with_the_chosen_providers(run, races):
    session, _ = run
    for direction in ("forward", "both"):
        for provider in (GOOD, BAD, GOOD):
            assert session.outcome(WORKLOAD, direction, provider).provider == provider.name
    assert races == [("w", "forward", ["good", "bad"]), ("w", "both", ["good", "bad"])]


def test_the_file_is_valid_from_the_start_and_after_every_step(run):
    session, path = run
    assert not path.exists()
    session.start()
    first = json.loads(path.read_text())["vot_kernels"]
    assert first["complete"] is False and first["outcomes"] == []
    assert first["ceilings"] == {"copy_bytes_per_s": 1.0}
    session.outcome(WORKLOAD, "forward", GOOD)
    second = json.loads(path.read_text())
    assert second["benchmarks"] == []
    keys = ("suite", "workload", "direction", "provider", "op", "status", "reason", "notes")
    assert [tuple(o[key] for key in keys) for o in second["vot_kernels"]["outcomes"]] == [
        ("hybrid", "w", "forward", "good", "packed_attention", "timed", "", {"solves": "x"}),
        ("hybrid", "w", "forward", "bad", "packed_attention", "mismatch", "off by one", {}),
    ]
    session.finish(complete=True)
    assert json.loads(path.read_text())["vot_kernels"]["complete"] is True
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_an_interrupted_measurement_of_the_ceilings_leaves_a_file(run, monkeypatch):
    def interrupted(device, dtypes):
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "measure_ceilings", interrupted)
    session, path = run
    with pytest.raises(KeyboardInterrupt):
        session.start()
    session.finish(complete=False)
    assert json.loads(path.read_text())["vot_kernels"]["complete"] is False


def test_without_a_path_nothing_is_written(request, tmp_path, races, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = Session(request.config, None, [WORKLOAD], ["good"], Rules())
    session.start()
    session.outcome(WORKLOAD, "forward", GOOD)
    session.finish(complete=True)
    assert list(tmp_path.iterdir()) == []


def test_a_spent_budget_measures_no_ceilings(request, tmp_path, races):
    path = tmp_path / "out.json"
    Session(request.config, path, [WORKLOAD], ["good"], Rules(deadline=0.0)).start()
    assert json.loads(path.read_text())["vot_kernels"]["ceilings"] == {}


def test_facts_hold_what_the_report_needs():
    assert race_facts(WORKLOAD, "forward", GOOD) == {
        "suite": "hybrid",
        "workload": "w",
        "describe": "8 tokens in 1 segment, 1 heads of 4",
        "op": "packed_attention",
        "direction": "forward",
        "dtype": "float32",
        "size": 8,
        "provider": "good",
        "ours": False,
        "instead": "x",
        "flops": 2 * (8 * 8 * 4 + 8 * 8 * 4),  # q·k and p·v of 8 x 8 pairs, a multiply-add being two
        "bytes": 4 * 4 * 8 * 4,  # q, k, v and the output of 8 x 4 numbers of 4 bytes
    }


def test_facts_do_not_need_optional_packages(monkeypatch):
    def work(self, direction, itemsize):
        raise ImportError("transformers is not installed")

    monkeypatch.setattr(Attention, "work", work)
    assert race_facts(WORKLOAD, "forward", GOOD)["flops"] == 0


def test_the_machine_is_described_but_not_named(run):
    session, path = run
    session.start()
    text = path.read_text()
    described = json.loads(text)
    assert "node" not in described["machine_info"] and "release" not in described["machine_info"]
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    device = described["vot_kernels"]["device"]
    assert device["type"] == "cpu" and device["name"] and device["threads"] == torch.get_num_threads()
    assert device["cpp_isa"] == (library().isa or None)
    assert described["vot_kernels"]["versions"]["torch"] == torch.__version__
    assert set(described["commit_info"]) == {"id", "time", "dirty"}


def test_versions_name_what_is_absent(monkeypatch):
    assert describe_device(torch.device("cpu"))["cores"] >= 1
    found = versions()
    assert found["python"] == platform.python_version()
    assert {"vot-kernels", "torch", "triton", "transformers", "cuda", "utc"} <= set(found)
