"""Tuning at run time: with an artificial clock, with the kernels on the interpreter, and on a GPU."""

import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.marks import interpreted
from vot_kernels import tuning
from vot_kernels.ops import launch as _launch
from vot_kernels.ops.hybrid_attention import hybrid_attention, reference
from vot_kernels.ops.launch import Kernel, launch, record_launches
from vot_kernels.ops.linear_attention import linear_attention
from vot_kernels.ops.linear_attention.reference import linear_attention as linear_attention_reference
from vot_kernels.packing import PackedLayout
from vot_kernels.testing import (
    check_against_reference,
    make_qkv,
    uninitialized_is_nan,
)
from vot_kernels.tuning import Config, Request, lookup
from vot_kernels.tuning.autotune import (
    Tuner,
    gpu_milliseconds,
    shape_candidates,
    stage_candidates,
    tuner_from_environment,
)

REQUEST = Request("scan", "sum", "sm_90", (("bits", 16), ("head_dim", 64)))
SHIPPED = Config({"BLOCK_T": 64, "TILE": 512}, 4, 2, {"registers": 128}, REQUEST)


class Clock:
    """Milliseconds of the configs that `run` has been called with, by what they cost."""

    def __init__(self, cost):
        self.cost = cost
        self.ran = []

    def run(self, config):
        self.ran.append(config)

    def __call__(self, run):
        run()
        return self.cost(self.ran[-1])


def wide_and_deep(config):
    """The fastest is the widest with 8 warps and 3 stages."""
    return 100 / config.blocks["BLOCK_T"] + abs(config.num_warps - 8) + abs(config.num_stages - 3)


def tuner(folder, cost=wide_and_deep):
    clock = Clock(cost)
    return Tuner(folder, clock), clock


def path_in(folder):
    return folder / "sm_90" / "scan.json"


def test_candidates_lie_around_the_config():
    found = [(c.blocks["BLOCK_T"], c.num_warps, c.num_stages) for c in shape_candidates(SHIPPED)]
    assert found == [(64, 8, 2), (32, 4, 2), (32, 8, 2), (128, 4, 2), (128, 8, 2)]
    assert all(c.blocks["TILE"] == 512 and c.limits == {} for c in shape_candidates(SHIPPED))
    assert all(c.request == REQUEST for c in shape_candidates(SHIPPED))
    assert [c.num_stages for c in stage_candidates(SHIPPED)] == [1, 3, 4]
    assert all(c.blocks == SHIPPED.blocks and c.num_warps == 4 for c in stage_candidates(SHIPPED))


@pytest.mark.parametrize(
    ("block", "sizes"),
    [(16, {16, 32}), (128, {64, 128}), (8, {4, 8, 16}), (1024, {512, 1024, 2048}), (1, {1, 2})],
)
def test_blocks_of_matrix_products_remain_so(block, sizes):
    config = Config({"BLOCK": block}, 16, 1)
    assert {c.blocks["BLOCK"] for c in shape_candidates(config)} == sizes
    assert {c.num_warps for c in shape_candidates(config)} == {4, 8, 16}


@pytest.mark.parametrize("arch", tuning.known_archs("range_attention"))
def test_a_search_is_short(arch):
    for table in tuning.tables(arch).values():
        for entry in (entry for entries in table.values() for entry in entries):
            config = Config(entry["blocks"], entry["num_warps"], entry["num_stages"])
            assert len([*shape_candidates(config), *stage_candidates(config)]) <= 24


def test_the_fastest_is_used_written_and_told(tmp_path, capsys):
    tuned, clock = tuner(tmp_path)
    assert tuned.find(SHIPPED) is None
    best = tuned.tune(SHIPPED, clock.run)
    assert best == Config({"BLOCK_T": 128, "TILE": 512}, 8, 3)
    assert tuned.find(SHIPPED) is best
    when = {"bits": 16, "head_dim": 64}
    entry = {"when": when, "blocks": {"BLOCK_T": 128, "TILE": 512}, "num_warps": 8, "num_stages": 3}
    assert json.loads(path_in(tmp_path).read_text()) == {"sum": [entry]}
    assert len(path_in(tmp_path).read_text().splitlines()) == 5  # one entry a line
    assert os.listdir(tmp_path / "sm_90") == ["scan.json"]
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("vot-kernels: scan/sum on sm_90 (bits=16 head_dim=64): BLOCK_T=64 TILE=512 ")
    assert "num_stages=2: 6.5625 ms -> BLOCK_T=128 " in told.err and "ms, 8.40x" in told.err

    count = len(clock.ran)
    assert tuned.tune(SHIPPED, clock.run) is best and len(clock.ran) == count  # only the first launch
    later, clock = tuner(tmp_path)
    assert later.find(SHIPPED) == best and not clock.ran  # nor in the next process


def test_the_shipped_config_stays_if_nothing_is_faster(tmp_path):
    tuned, clock = tuner(tmp_path, lambda config: 1.0)
    assert tuned.tune(SHIPPED, clock.run) is SHIPPED
    later, _ = tuner(tmp_path)
    assert later.find(SHIPPED) == SHIPPED  # with its limits, and not to be searched again


def test_candidates_that_fail_are_passed_over(tmp_path):
    def cost(config):
        if config.num_warps == 8:
            raise RuntimeError("PassManager::run failed")
        return wide_and_deep(config)

    tuned, clock = tuner(tmp_path, cost)
    assert tuned.tune(SHIPPED, clock.run) == Config({"BLOCK_T": 128, "TILE": 512}, 4, 3)


def test_errors_of_the_shipped_config_are_raised(tmp_path):
    def cost(config):
        raise RuntimeError("out of resource")

    tuned, clock = tuner(tmp_path, cost)
    with pytest.raises(RuntimeError, match="out of resource"):
        tuned.tune(SHIPPED, clock.run)
    assert tuned.find(SHIPPED) is None and not path_in(tmp_path).exists()


def test_other_entries_of_a_file_are_kept(tmp_path):
    tuned, clock = tuner(tmp_path)
    wider = replace(SHIPPED, request=replace(REQUEST, key=(("bits", 16), ("head_dim", 128))))
    other = replace(SHIPPED, request=replace(REQUEST, kernel="product"))
    for config in (SHIPPED, wider, other):
        tuned.tune(config, clock.run)
    table = json.loads(path_in(tmp_path).read_text())
    assert [entry["when"]["head_dim"] for entry in table["sum"]] == [128, 64]
    assert len(table["product"]) == 1

    another, clock = tuner(tmp_path, lambda config: config.blocks["BLOCK_T"])
    path_in(tmp_path).write_text(path_in(tmp_path).read_text().replace("BLOCK_T", "BLOCK_OLD"))
    assert another.find(SHIPPED) is None  # it is of a version with other blocks
    another.tune(SHIPPED, clock.run)
    entries = json.loads(path_in(tmp_path).read_text())["sum"]
    assert [entry["blocks"] for entry in entries] == [
        {"BLOCK_T": 32, "TILE": 512},
        {"BLOCK_OLD": 128, "TILE": 512},
    ]
    assert tuner(tmp_path)[0].find(SHIPPED).blocks["BLOCK_T"] == 32


def test_each_variant_is_tuned_apart(tmp_path):
    tuned, clock = tuner(tmp_path)
    other = replace(SHIPPED, request=replace(REQUEST, variant="wide"))
    for config in (SHIPPED, other):
        tuned.tune(config, clock.run)
    entries = json.loads(path_in(tmp_path).read_text())["sum"]
    assert [entry.get("variant") for entry in entries] == ["wide", None]
    assert len({json.dumps(entry["when"]) for entry in entries}) == 1
    later, _ = tuner(tmp_path)
    assert [later.find(config).variant for config in (SHIPPED, other)] == [None, "wide"]
    third = replace(SHIPPED, request=replace(REQUEST, variant="deep"))
    assert later.find(third) is None


GOOD = {"blocks": {"BLOCK_T": 64, "TILE": 512}, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("\udcff", "not valid JSON"),
        ("[]", "not a table"),
        ('{"sum": {}}', "not a table"),
        ('{"sum": [1]}', "not a table"),
        ('{"sum": [{"blocks": {}}]}', "not a table"),
        (json.dumps({"sum": [GOOD | {"blocks": {"BLOCK_T": "64"}}]}), "not a table"),
        (json.dumps({"sum": [GOOD | {"num_warps": None}]}), "not a table"),
        (json.dumps({"sum": [GOOD | {"when": {"bits": [16]}}]}), "not a table"),
        (json.dumps({"sum": [GOOD | {"when": [16]}]}), "not a table"),
    ],
)
def test_a_broken_file_is_named_once_and_left_alone(tmp_path, text, reason):
    path_in(tmp_path).parent.mkdir()
    path_in(tmp_path).write_bytes(text.encode(errors="surrogateescape"))
    before = path_in(tmp_path).read_bytes()
    tuned, clock = tuner(tmp_path)
    with pytest.warns(UserWarning, match=reason) as caught:
        assert tuned.find(SHIPPED) is SHIPPED
    assert len(caught) == 1 and str(path_in(tmp_path)) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tune(SHIPPED, clock.run) is SHIPPED and not clock.ran
    assert path_in(tmp_path).read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    tuned, clock = tuner(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"file/sm_90/scan\.json "):
        found = tuned.find(SHIPPED)
    assert found is SHIPPED  # it cannot be read either

    tuned, clock = tuner(tmp_path)
    (tmp_path / "sm_90").write_text("")
    tuned._tables[path_in(tmp_path)] = {}
    with pytest.warns(UserWarning, match=r"sm_90/scan\.json cannot be written"):
        best = tuned.tune(SHIPPED, clock.run)
    assert best.num_warps == 8 and tuned.find(SHIPPED) is best


def test_threads_search_once(tmp_path):
    def cost(config):
        time.sleep(0.001)  # lets the other threads run
        return wide_and_deep(config)

    tuned, clock = tuner(tmp_path, cost)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: tuned.tune(SHIPPED, clock.run), range(8)))
    assert all(config is found[0] for config in found)
    assert sum(config == SHIPPED for config in clock.ran) == 1


class Noted:
    """A kernel that records its launches as (grid, keywords) and can be told not to fit."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((grid, arguments))


@pytest.fixture
def tuned_launches(tmp_path, monkeypatch):
    """`launch` with a tuner of CPU tensors whose clock likes many programs."""
    kernel = Noted()

    def measure(run):
        run()
        return 1 / kernel.launches[-1][0][0]

    found = Tuner(tmp_path, measure)
    monkeypatch.setattr(_launch, "_tuner", lambda device: None if _launch._recording else found)
    capturing = SimpleNamespace(now=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.now)
    return SimpleNamespace(kernel=kernel, tuner=found, capturing=capturing)


def blocks_of(count):
    return lambda blocks: (count // blocks["BLOCK_T"],)


def test_the_first_launch_tunes_and_ends_with_the_fastest(tuned_launches):
    kernel, x = tuned_launches.kernel, torch.zeros(4)
    launch(kernel, blocks_of(1024), SHIPPED, x_ptr=x, size=4)
    assert len(kernel.launches) > 2
    assert all(arguments["x_ptr"] is x and arguments["size"] == 4 for _, arguments in kernel.launches)
    for grid, arguments in kernel.launches:
        assert grid == (1024 // arguments["BLOCK_T"],)  # each candidate on its own grid
    assert kernel.launches[-1][1]["BLOCK_T"] == 32

    kernel.launches.clear()
    launch(kernel, blocks_of(2048), SHIPPED, x_ptr=x, size=4)
    assert [(grid, arguments["BLOCK_T"]) for grid, arguments in kernel.launches] == [((64,), 32)]


@pytest.mark.parametrize("why", ["fixed grid", "capturing", "no lookup", "empty"])
def test_launches_that_do_not_tune(tuned_launches, why):
    kernel, grid, config = tuned_launches.kernel, blocks_of(1024), SHIPPED
    tuned_launches.capturing.now = why == "capturing"
    if why == "no lookup":
        config = replace(SHIPPED, request=None)
    if why == "fixed grid":
        grid = (16,)
    if why == "empty":
        grid = blocks_of(0)
    launch(kernel, grid, config, x_ptr=torch.zeros(4))
    assert [grid for grid, _ in kernel.launches] == ([] if why == "empty" else [(16,)])
    assert tuned_launches.tuner.find(SHIPPED) is None


def test_sums_in_place_are_not_tuned(tuned_launches, monkeypatch):
    from vot_kernels.ops.parts.group_states import triton as launcher

    seen = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *_, **__: seen.append(callable(grid)))
    states, bounds = torch.zeros(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
    launcher.scan_states(states, bounds)
    launcher.scan_states(states, bounds, out=torch.zeros_like(states))
    assert seen == [True, False]


def test_recorded_launches_have_the_shipped_configs(tuned_launches, monkeypatch):
    kernel = Kernel("range_attention", "bwd_dq", "range_attention.bwd:_range_attention_dq_kernel")
    key = {"bits": 16, "far": 0, "head_dim": 64}
    shipped = lookup("range_attention", "bwd_dq", "sm_90", **key)
    best = replace(shipped, num_stages=1)
    tuned_launches.tuner._known[shipped.request] = best
    device = torch.device("cpu")
    with record_launches("sm_90") as launches:
        assert kernel.config(device, key) is shipped
        launch(tuned_launches.kernel, lambda blocks: (1,), shipped, x_ptr=torch.zeros(4))
    assert [one.config for one in launches] == [shipped] and launches[0].grid == (1,)
    assert not tuned_launches.kernel.launches
    monkeypatch.setattr(_launch, "target_arch", lambda device: "sm_90")
    assert kernel.config(device, key) is best


def test_only_real_launches_on_a_gpu_are_tuned(tmp_path, monkeypatch):
    found = tuner(tmp_path)[0]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert _launch._tuner(cuda) is _launch.TUNER  # None, unless the tests run with VOT_AUTOTUNE=1
    monkeypatch.setattr(_launch, "TUNER", found)
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    assert _launch._tuner(cuda) is found and _launch._tuner(cpu) is None
    with record_launches("sm_90"):
        assert _launch._tuner(cuda) is None
    monkeypatch.setattr(_launch, "INTERPRETING", True)
    assert _launch._tuner(cuda) is None


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_by_default(value, tmp_path, monkeypatch):
    monkeypatch.setenv("VOT_TUNING_DIR", str(tmp_path))
    monkeypatch.delenv("VOT_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("VOT_AUTOTUNE", value)
    assert tuner_from_environment() is None


@pytest.mark.parametrize(
    ("folder", "expected"), [("elsewhere", "elsewhere"), (None, "home/.cache/vot-kernels/tuning")]
)
def test_the_folder(folder, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("VOT_AUTOTUNE", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VOT_TUNING_DIR", raising=False)
    if folder is not None:
        monkeypatch.setenv("VOT_TUNING_DIR", str(tmp_path / folder))
    assert tuner_from_environment()._folder == tmp_path / expected
    assert not os.listdir(tmp_path)  # reading creates no file


def test_the_environment_is_read_at_import(tmp_path):
    code = "import os; from vot_kernels.ops import launch; print(launch.TUNER is not None, end=' ');"
    code += "os.environ['VOT_AUTOTUNE'] = '0'; print(launch.TUNER is not None)"
    environment = {**os.environ, "VOT_AUTOTUNE": "1", "VOT_TUNING_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "True True\n", run.stderr


def linear(q, k, v, layout, **options):
    return linear_attention(q, k, v, layout, causal=True, **options)


def hybrid(q, k, v, layout, **options):
    return hybrid_attention(q, k, v, layout, window=0, **options)


ORACLES = {
    linear: lambda q, k, v, layout: linear_attention_reference(q, k, v, layout, causal=True)[:1],
    hybrid: lambda q, k, v, layout: reference.hybrid_attention(q, k, v, layout, window=0)[:1],
}


@interpreted
@pytest.mark.parametrize("sign", [1, -1], ids=["small", "large"])
@pytest.mark.parametrize("op", [linear, hybrid])
def test_results_are_right_whichever_blocks_win(op, sign, tmp_path, monkeypatch):
    """Kernels are launched over and over on buffers that later ones read, and end on another grid."""

    def size(config):
        return sum(config.blocks.values())

    def measure(run):
        (config,) = run.args
        if (config.num_warps, config.num_stages) == (4, 1):  # the others are the same to the interpreter
            run()
        return 2.0**40 + sign * size(config)

    found = Tuner(tmp_path, measure)
    monkeypatch.setattr(_launch, "_tuner", lambda device: found)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layout = PackedLayout.from_lengths((37, 0, 3), group_size=14)
    with uninitialized_is_nan():
        check_against_reference(
            lambda q, k, v: [op(q, k, v, layout, backend="triton")],
            lambda q, k, v: ORACLES[op](q, k, v, layout),
            make_qkv(40, 1),
            roundings=16,
        )
    assert len(found._known) >= 4
    for request, best in found._known.items():
        shipped = lookup(request.family, request.kernel, request.arch, **dict(request.key))
        assert sign * size(best) <= sign * size(shipped)
        assert sign == 1 or size(best) > size(shipped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures time by CUDA events")
@pytest.mark.parametrize("op", [linear, hybrid])
def test_on_a_gpu(op, tmp_path, monkeypatch, capsys):
    """The first call tunes every kernel of the forward; a graph of the second one has the same results."""
    found = Tuner(tmp_path, gpu_milliseconds)
    monkeypatch.setattr(_launch, "TUNER", found)
    layout = PackedLayout.from_lengths((2048, 1024, 512), group_size=256).to("cuda")
    inputs = [x.to("cuda", torch.bfloat16) for x in make_qkv(layout.num_tokens, 4, head_dim=64)]
    out = op(*inputs, layout, backend="triton")
    told = capsys.readouterr().err
    assert told.count("vot-kernels: ") == len(found._known) >= 3
    torch.testing.assert_close(out, op(*inputs, layout, backend="torch"), atol=2e-2, rtol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = op(*inputs, layout, backend="triton")
    graph.replay()
    assert torch.equal(out, again) and capsys.readouterr().err == ""
