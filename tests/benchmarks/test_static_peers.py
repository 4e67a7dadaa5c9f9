"""The table of docs/gpu-static.md beside Triton kernels of others, and how those are found and compared."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from benchmarks.aot import beside, counts, page, peers  # noqa: E402
from tests.marks import compiled  # noqa: E402


def record(instructions, blocks, **more):
    return {
        **{"instructions_per_kmac": instructions, "blocks_per_sm": blocks, "threads": 128},
        **{"their_kernel": "k", "local_in_loops": 0, **more},
    }


def test_ahead_is_ahead_of_every_config():
    ours = record(1.5, 2)
    assert beside.ahead(ours, [record(1.5, 2), record(1.6, 1)])
    assert not beside.ahead(ours, [record(1.6, 1), record(1.4, 1)])
    assert not beside.ahead(ours, [record(9.0, 3)])


def test_every_row_where_a_peer_has_more_says_why_and_no_other_does():
    document = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    records = json.loads(beside.RESULTS.read_text(encoding="utf-8"))["peers"]
    found = list(beside.rows(document, records))
    behind = [key for key, ours, theirs in found if not beside.ahead(ours, theirs)]
    assert sorted(behind) == sorted(beside.REASONS) and len(behind) < len(found)
    assert sum(len(theirs) for _, _, theirs in found) == len(records), "every record is in the table"
    with pytest.raises(KeyError):
        list(beside.section(document, reasons={}))


def test_the_peers_are_compiled_with_the_triton_of_ours():
    document = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    records = json.loads(beside.RESULTS.read_text(encoding="utf-8"))["peers"]
    assert {one["triton"] for one in records} == {document["triton"]["sm_90"]}
    assert {one["arch"] for one in records} == {"sm_90"} and all(one["version"] for one in records)


def test_the_best_configs_are_those_that_no_other_beats():
    slow, quick, many = record(2.0, 1), record(1.0, 1), record(1.5, 2)
    spilling, tiny = record(0.5, 2, local_in_loops=1), record(3.0, 8)
    other = record(9.0, 1, their_kernel="other")
    assert peers.best([slow, many, quick, spilling, tiny, other]) == [quick, many, other]
    assert peers.best([spilling]) == [spilling] and peers.best([tiny]) == [tiny]


@compiled
def test_every_config_of_an_autotuner_is_taken_down_and_nothing_runs():
    configs = [triton.Config({"BLOCK_M": block}, num_warps=warps) for block, warps in ((16, 1), (32, 2))]

    @triton.autotune(configs, key=["n"])
    @triton.jit
    def kernel(x_ptr, n, BLOCK_M: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK_M), 1.0)

    x = torch.zeros(32)
    with peers.recording() as found:
        kernel[(1,)](x, 32)
    assert [one.options["num_warps"] for one in found] == [1, 2]
    assert [peers._in_words(one).split()[0] for one in found] == ["M=16", "M=32"]
    assert not x.any() and found[0].target.arch == 90


def test_a_missing_peer_is_left_out_and_its_records_stay(monkeypatch, tmp_path, capsys):
    def missing():
        raise ImportError("it is not there")

    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"peers": [{"peer": "absent", "kernel": "k"}]}))
    monkeypatch.setattr(peers, "RESULTS", path)
    monkeypatch.setattr(peers, "peers", lambda: [SimpleNamespace(name="absent", version=missing)])
    assert peers.main([]) == 0
    assert "absent is left out: it is not there" in capsys.readouterr().err
    assert json.loads(path.read_text())["peers"] == [{"peer": "absent", "kernel": "k"}]


@compiled
def test_what_is_counted_is_what_the_kernels_do_now():
    document = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    if triton.__version__ != document["triton"]["sm_90"]:
        pytest.skip(f"the results are of triton {document['triton']['sm_90']}")
    now = json.loads(counts.RESULTS.read_text(encoding="utf-8"))["now"]
    found = {"short product": counts.outside_of_loop(), "states d64": counts.state_gigabytes(64)}
    assert found == {name: now[name] for name in found}
    assert f"{100 * found['short product']:.0f} per cent of a warp" in page.PAGE.read_text(encoding="utf-8")
