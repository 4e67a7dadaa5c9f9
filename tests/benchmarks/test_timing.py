"""Turns, timers, peak memory and ceilings."""

import time

import pytest
import torch

from benchmarks.timing import CpuTimer, CudaTimer, make_timer, measure_ceilings, peak_memory, time_in_turns

CPU = torch.device("cpu")
MIB = 1 << 20


class FakeTimer:
    """A clock that moves on by one more second at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function):
        function()
        self.calls += 1
        return float(self.calls)


def test_functions_take_turns_and_warm_ups_do_not_count():
    seen = []

    def recorded(name):
        def function(turn):
            seen.append(("prepare", name, turn))
            return lambda: seen.append(("run", name, turn))

        return function

    seconds = time_in_turns([recorded("a"), recorded("b")], FakeTimer(), rounds=3, warmups=2)
    assert seconds == [(5.0, 7.0, 9.0), (6.0, 8.0, 10.0)]
    turns = [(name, turn) for turn in (-2, -1, 0, 1, 2) for name in "ab"]
    assert seen == [(what, *one) for one in turns for what in ("prepare", "run")]


def test_what_a_turn_prepares_is_not_timed():
    def slow_to_prepare(turn):
        time.sleep(0.02)
        return lambda: None

    def slow_to_run(turn):
        return lambda: time.sleep(0.02)

    prepared, run = time_in_turns([slow_to_prepare, slow_to_run], CpuTimer(), rounds=2)
    assert max(prepared) < 0.01
    assert min(run) >= 0.02


def test_an_exception_comes_through():
    def broken(turn):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        time_in_turns([broken], FakeTimer(), 1)


def test_the_timer_fits_the_device():
    assert isinstance(make_timer(CPU), CpuTimer)


@pytest.mark.gpu
def test_the_timer_of_a_gpu_waits_for_the_kernel():
    device = torch.device("cuda")
    timer = make_timer(device)
    assert isinstance(timer, CudaTimer)
    x = torch.randn(8192, 8192, device=device)
    (short, long) = time_in_turns([lambda _: lambda: x[:512] @ x, lambda _: lambda: x @ x], timer, 5)
    assert sorted(long)[2] > 4 * sorted(short)[2]


def allocate(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: None, 0),
        (lambda: allocate(3), 3),
        (lambda: [allocate(3), allocate(5)], 8),
        (lambda: [allocate(1) for _ in (allocate(5),)], 6),  # one is allocated while the other is made
        (lambda: (allocate(6).max(), allocate(2).max()), 6),  # the first is freed by then
    ],
)
def test_peak_memory_counts_what_is_alive_at_once(function, expected):
    peak = peak_memory(function, CPU)
    assert expected * MIB <= peak <= expected * MIB + 64 * 1024


def test_peak_memory_does_not_count_what_was_there_before():
    held = [allocate(8)]
    assert peak_memory(lambda: held[0][: 2 * MIB].clone(), CPU) == pytest.approx(2 * MIB, abs=4096)


def test_peak_memory_holds_what_the_backward_needs():
    x = torch.randn(MIB // 4, requires_grad=True)  # 1 MiB

    def forward_and_backward():
        out = x.exp().sin()  # keeps exp(x) for the backward, and also out
        return torch.autograd.grad(out, x, torch.ones_like(out))

    with torch.no_grad():
        forward = peak_memory(lambda: x.exp().sin(), CPU)
    assert forward == pytest.approx(2 * MIB, abs=4096)
    assert peak_memory(forward_and_backward, CPU) >= 4 * MIB


def test_ceilings_are_measured_rates():
    ceilings = measure_ceilings(CPU, [torch.float32])
    assert 1e8 < ceilings["copy_bytes_per_s"] < 1e13
    assert set(ceilings["matmul_flops_per_s"]) == {"float32"}
    assert 1e8 < ceilings["matmul_flops_per_s"]["float32"] < 1e15
