"""`vot tune` with an artificial clock, on the interpreter and without running a kernel."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.marks import interpreted
from vot_kernels import dense_residual, tuning
from vot_kernels.cli import main
from vot_kernels.ops import launch
from vot_kernels.ops.launch import is_recording
from vot_kernels.pipelines.tuning import Call, Tuner, calls, compile_in_parallel, describe
from vot_kernels.tuning import lookup

pytest.importorskip("triton")

ARCH, KEY = "sm_90", {"bits": 16, "states": 3}
COSTS = {None: 1.0, "wide": 0.5, "narrow": 0.9}  # milliseconds of the forward by variant


def variant():
    """The variant of the forward that a launch would use now."""
    return lookup("dense_residual", "fwd", ARCH, **KEY).variant


def run(tokens, device, backend="torch"):
    states = [torch.full((tokens, 8), float(i), dtype=torch.bfloat16, requires_grad=True) for i in range(3)]
    out = dense_residual(states, torch.arange(3.0), backend="triton" if is_recording() else backend)
    return [out.detach(), *torch.autograd.grad(out.sum(), states)]


def clock(function):
    function()
    return COSTS[variant()]


class Search:
    """A tuner, and what it compiled and kept."""

    def __init__(self, call=run, measure=clock, seconds=60.0):
        self.compiled, self.kept = [], []
        self.tuner = Tuner(
            ARCH,
            torch.device("cpu"),
            seconds,
            measure,
            lambda launches, seconds: self.compiled.extend(launches),
            self.kept.append,
            sizes=(64, 256),
        )
        self.found = list(self.tuner.tune([Call("sum", call)]))


def test_the_fastest_is_kept_and_the_others_stay():
    search = Search()
    forward, backward = search.found
    assert (forward.request.kernel, forward.best["variant"]) == ("fwd", "wide")
    assert backward.request.kernel == "bwd" and backward.best is None
    assert [len(one.times) for one in search.found] == [3, 3]
    (tables,) = search.kept
    (entry,) = tables["dense_residual"]["fwd"]
    assert entry["default"] and entry["when"] == {"bits": [16, 16]} and "limits" not in entry
    assert variant() is None, "nothing stays in use"
    with tuning.using(ARCH, tables):
        assert variant() == "wide"
    assert "takes 0.50 and 0.50 of the shipped config's time" in str(forward)
    assert "the shipped config stays, of 3 candidates" in str(backward)


def test_every_candidate_is_compiled_first():
    blocks = [(one.kernel.__name__, one.arguments["BLOCK"]) for one in Search().compiled]
    for name in ("_weighted_sum_kernel", "_weighted_sum_bwd_kernel"):
        assert {block for kernel, block in blocks if kernel == name} == {512, 1024, 2048}


def test_compiling_takes_the_options_of_the_launch():
    """A kernel with a bound of its registers is another one than without."""
    entry = {"blocks": {"BLOCK": 512}, "num_warps": 4, "num_stages": 2, "default": True, "max_registers": 96}
    with tuning.using(ARCH, {"dense_residual": {"fwd": [entry]}}), launch.record_launches(ARCH) as launches:
        run(64, torch.device("cpu"))
    bounded, other = launches
    warmed = []
    for one in launches:
        kernel = SimpleNamespace(warmup=lambda **options: warmed.append(options))
        compile_in_parallel([replace(one, kernel=kernel)], 60.0)
    assert [options.get("maxnreg") for options in warmed] == [96, None]
    for one, options in zip((bounded, other), warmed, strict=True):
        assert options == {"grid": one.grid, **one.arguments, **one.config.launch_options()}


def test_candidates_that_differ_or_fail_are_left_out():
    def bad(tokens, device):
        outs = run(tokens, device)
        if not is_recording() and variant() == "wide":
            outs[0][-1] *= 1.2
        if not is_recording() and variant() == "narrow":
            raise RuntimeError("out of resource: shared memory")
        return outs

    forward = Search(bad).found[0]
    assert forward.best is None and len(forward.times) == 1
    reasons = {name.split()[0]: why for name, why in forward.left_out.items()}
    assert "the results differ by" in reasons["wide"]
    assert reasons["narrow"] == "RuntimeError: out of resource: shared memory"


def test_noise_changes_nothing():
    def noisy(function):
        return {None: 1.0, "wide": 0.99, "narrow": 1.01}[variant()]

    search = Search(measure=noisy)
    assert search.kept == [] and all(one.best is None for one in search.found)


def test_one_size_may_not_win_at_the_cost_of_the_other():
    seconds = iter([1.0, 1.0, 0.5, 2.1, 0.5, 2.1] * 2)  # of each candidate, small and large
    assert all(one.best is None for one in Search(measure=lambda function: next(seconds)).found)


def test_without_time_nothing_is_measured():
    assert Search(seconds=0.0).found == []


@interpreted
def test_kernels_on_the_interpreter(monkeypatch):
    """The blocks of every candidate reach the kernel, whose results agree with the shipped config's."""
    monkeypatch.setattr(launch, "target_arch", lambda device: ARCH)
    used, run_kernel = [], launch.launch

    def noted(kernel, grid, config, arguments):
        used.append(config.blocks["BLOCK"])
        run_kernel(kernel, grid, config, arguments)

    monkeypatch.setattr(launch, "launch", noted)
    search = Search(lambda tokens, device: run(tokens, device, backend="triton"))
    assert search.found[0].best["variant"] == "wide" and not any(one.left_out for one in search.found)
    assert set(used) == {512, 1024, 2048}


def test_the_calls_reach_all_families():
    families = set()
    for call in calls():
        with launch.record_launches(ARCH) as launches:
            call.run(4096, torch.device("cpu"))
        families |= {one.config.request.family for one in launches}
    assert families == set(tuning.tables(ARCH))


def test_candidates_are_told_apart_in_words():
    request = lookup("dense_residual", "fwd", ARCH, **KEY).request
    names = [describe(entry) for entry in tuning.candidates(request)]
    assert names[1] == "wide BLOCK=2048 num_warps=4 num_stages=1" and len(set(names)) == 3
    entry = tuning.candidates(request)[0]
    assert describe(entry | {"max_registers": 96}) == f"{describe(entry)} max_registers=96"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [([], "Tuning needs a CUDA device, and torch finds none"), (["--dtype", "int8"], "dtype must be one of")],
)
def test_the_command_says_what_it_needs(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vot", "tune", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
