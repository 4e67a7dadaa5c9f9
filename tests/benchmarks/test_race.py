"""The outcome of every kind of provider, what each column has, and the order in which things run."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import race as race_module
from benchmarks.core import Outcome, Provider, Status, Work, Workload
from benchmarks.problems.attention import Attention
from benchmarks.providers import ours
from benchmarks.race import Inputs, Rules, Runner, race
from vot_kernels.ops.hybrid_attention import torch as hybrid_attention
from vot_kernels.ops.linear_attention import torch as linear_attention
from vot_kernels.ops.parts import plans


@dataclass(frozen=True)
class Square:
    """y = x², the smallest possible problem."""

    size: int = 8

    @property
    def op(self):
        return "square"

    def describe(self):
        return f"{self.size} numbers"

    def inputs(self, dtype, device, seed=0):
        return (torch.randn(self.size, generator=torch.Generator().manual_seed(seed)).to(dtype),)

    def rows(self, inputs):
        return None

    def oracle(self, inputs, rows):
        return inputs[0] ** 2

    def small(self):
        return self

    def work(self, direction, itemsize):
        return Work(self.size, 2 * self.size * itemsize)


WORKLOAD = Workload("suite", "squares", Square(), torch.float32, "cpu")
RULES = {"rounds": 2, "input_sets": 2}


@pytest.fixture(autouse=True)
def small_flush(monkeypatch):
    """Overwriting the caches before each call would take longer than all the calls."""
    monkeypatch.setattr("benchmarks.timing._CPU_FLUSH", 64)


def square(problem, prepared, x):
    return x * x


def provider(name="good", run=square, **options):
    return Provider(name, ("suite",), run, **options)


def hold(*providers, direction="forward", **rules):
    return race(
        WORKLOAD, direction, [provider("first"), *providers, provider("last")], Rules(**RULES | rules)
    )


def raises(error):
    def run(*arguments, **options):
        raise error

    return run


class Late:
    """A provider that is correct for `calls` calls, then raises an exception."""

    def __init__(self, calls, error):
        self.left, self.error = calls, error

    def __call__(self, problem, prepared, x):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return x * x


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
BAD = {
    "missing": (provider("bad", missing=lambda: "x is not installed"), "missing", "x is not installed"),
    "missing raises": (provider("bad", missing=raises(OSError("no x.so"))), "error", "OSError: no x.so"),
    "refuses": (provider("bad", refuses=lambda *_: "no float32"), "unsupported", "no float32"),
    "refuses raises": (provider("bad", refuses=raises(KeyError("k"))), "error", "KeyError: 'k'"),
    "solves raises": (provider("bad", solves=raises(ValueError("s"))), "error", "ValueError: s"),
    "prepare raises": (provider("bad", prepare=raises(ValueError("p"))), "error", "ValueError: p"),
    "run raises": (provider("bad", raises(RuntimeError("one\ntwo"))), "error", "RuntimeError: one"),
    "no message": (provider("bad", raises(RuntimeError())), "error", "RuntimeError: no message"),
    "exits": (provider("bad", raises(SystemExit("bye"))), "error", "SystemExit: bye"),
    "no tensor": (provider("bad", lambda *_: None), "error", "TypeError"),
    "mismatch": (provider("bad", lambda p, _, x: x), "mismatch", "output 0"),
    "memory in verification": (provider("bad", raises(OOM)), "out of memory", "CUDA out of memory"),
    "memory in prepare": (provider("bad", prepare=raises(MemoryError())), "out of memory", "no message"),
    "memory in words": (
        provider("bad", raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))),
        "out of memory",
        "can't allocate memory",
    ),
    "not quick": (provider("bad", quick_size=0), "unsupported", "left out of the quick suite at this size"),
    "gated": (provider("bad", ours=True), "gated", "square is red"),
}


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("case", BAD)
def test_a_provider_that_fails_says_why_and_stops_nobody(case, direction):
    bad, status, reason = BAD[case]
    outcomes = hold(bad, direction=direction, quick=True, gate=lambda op: f"{op} is red")
    assert list(outcomes) == ["first", "bad", "last"]
    assert outcomes["bad"].status == status
    assert reason in outcomes["bad"].reason
    assert "\n" not in outcomes["bad"].reason
    assert outcomes["bad"].whole_s == outcomes["bad"].kernel_s == ()
    assert outcomes["bad"].peak_bytes is None
    for name in ("first", "last"):
        assert outcomes[name].status is Status.TIMED
        assert len(outcomes[name].whole_s) == 2
        assert len(outcomes[name].kernel_s) == (0 if direction == "backward" else 2)


# Calls before the timed ones: two for verification (small and full size), two to warm up (one more for a
# backward, which needs the shape of the output), two in the untimed round.
@pytest.mark.parametrize(("calls", "where"), [(2, "when built"), (5, "in the untimed round"), (7, "amid")])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_provider_that_breaks_later_loses_its_figures_alone(calls, where, direction):
    outcomes = hold(provider("bad", Late(calls, ValueError("late"))), direction=direction)
    assert outcomes["bad"] == Outcome("bad", Status.ERROR, "ValueError: late")
    for name in ("first", "last"):
        assert outcomes[name].status is Status.TIMED
        assert len(outcomes[name].whole_s) == 2
        assert "alone" not in outcomes[name].notes


@pytest.mark.parametrize("calls", [2, 5, 7])
def test_memory_that_never_suffices_is_said_so(calls):
    outcomes = hold(provider("bad", Late(calls, OOM)))
    assert outcomes["bad"].status is Status.OUT_OF_MEMORY
    assert not outcomes["bad"].whole_s
    assert [outcomes[name].status for name in ("first", "last")] == [Status.TIMED] * 2


def test_who_does_not_fit_beside_the_others_is_timed_alone():
    class Crowded:
        calls = 0

        def __call__(self, problem, prepared, x):
            self.calls += 1
            if self.calls == 5:  # once, together with the others
                raise OOM
            return x * x

    outcomes = hold(provider("bad", Crowded()))
    assert outcomes["bad"].status is Status.TIMED
    assert len(outcomes["bad"].whole_s) == 2
    assert outcomes["bad"].notes == {"alone": True}
    assert outcomes["first"].notes == outcomes["last"].notes == {}


def test_everybody_may_fail():
    bad, *_ = BAD["run raises"]
    assert race(WORKLOAD, "forward", [bad], Rules())["bad"].status is Status.ERROR
    assert race(WORKLOAD, "forward", [], Rules()) == {}


def test_ctrl_c_is_not_taken_for_a_failure():
    with pytest.raises(KeyboardInterrupt):
        hold(provider("bad", raises(KeyboardInterrupt())))


def test_a_gated_provider_never_runs():
    outcomes = race(
        WORKLOAD, "forward", [provider(run=raises(AssertionError), ours=True)], Rules(gate=lambda op: "red")
    )
    assert outcomes["good"] == Outcome("good", Status.GATED, "red")


def test_the_gate_asks_for_every_op_of_a_problem():
    @dataclass(frozen=True)
    class TwoOps(Square):
        @property
        def ops(self):
            return ("green", "red")

    workload = replace(WORKLOAD, problem=TwoOps())
    rules = Rules(**RULES, gate={"green": None, "red": "tests of red failed"}.get)
    outcomes = race(workload, "forward", [provider("ours", ours=True), provider("peer")], rules)
    assert outcomes["ours"] == Outcome("ours", Status.GATED, "tests of red failed")
    assert outcomes["peer"].status is Status.TIMED


def test_after_the_deadline_nothing_is_started():
    bad = provider("bad", raises(AssertionError()), missing=raises(AssertionError()))
    outcomes = hold(bad, deadline=time.monotonic() - 1)
    assert {o.status for o in outcomes.values()} == {Status.NO_TIME}
    assert len(outcomes) == 3


def test_time_runs_out_between_providers():
    rules = Rules(**RULES)

    def slow(problem, prepared, x):
        rules.deadline = time.monotonic() - 1
        return x * x

    outcomes = race(WORKLOAD, "forward", [provider("slow", slow), provider("late")], rules)
    assert outcomes["slow"].status is Status.TIMED
    assert outcomes["late"].status is Status.NO_TIME


def test_a_peer_that_solves_another_problem_is_verified_on_that_one_and_says_so():
    @dataclass(frozen=True)
    class Cube(Square):
        def oracle(self, inputs, rows):
            return inputs[0] ** 3

    cube = provider("cube", lambda p, _, x: x**3, solves=lambda p: Cube(p.size), instead="the cube")
    wrong = provider("wrong", square, solves=lambda p: Cube(p.size), instead="the cube")
    outcomes = hold(cube, wrong)
    assert outcomes["cube"].status is Status.TIMED
    assert outcomes["cube"].notes == {"solves": "the cube"}
    assert outcomes["wrong"].status is Status.MISMATCH


class Recorder:
    """A provider that records what is called; `timed` says whether the clock runs."""

    def __init__(self, monkeypatch):
        self.calls, self.timed = [], False
        self.fresh = 0
        recorder = self

        class Timer:
            def __call__(self, function):
                recorder.timed = True
                function()
                recorder.timed = False
                return 1.0

        monkeypatch.setattr(race_module, "make_timer", lambda device: Timer())

    def provider(self, name):
        recorder = self

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                recorder.calls.append((name, "backward", recorder.timed))
                return 2 * ctx.saved_tensors[0] * grad

        def prepare(problem, dtype, device):
            recorder.calls.append((name, "prepare", recorder.timed))

        def run(problem, prepared, x):
            recorder.calls.append((name, "forward", recorder.timed))
            return Marked.apply(x)

        return Provider(name, ("suite",), run, prepare)

    def timed_calls(self):
        return [(name, what) for name, what, timed in self.calls if timed]


@pytest.mark.parametrize(
    ("direction", "whole", "kernel"),
    [
        ("forward", ["prepare", "forward"], ["forward"]),
        ("both", ["prepare", "forward", "backward"], ["forward", "backward"]),
        ("backward", ["backward"], []),
    ],
)
def test_the_clock_sees_what_the_column_says_in_turns(monkeypatch, direction, whole, kernel):
    recorder = Recorder(monkeypatch)
    providers = [recorder.provider("a"), recorder.provider("b")]
    race(WORKLOAD, direction, providers, Rules(rounds=3, input_sets=2))
    one_turn = [(name, what) for name in "ab" for what in whole + kernel]
    assert recorder.timed_calls() == one_turn * 4  # three rounds and one to warm up


def test_the_forward_before_a_timed_backward_is_not_timed(monkeypatch):
    recorder = Recorder(monkeypatch)
    race(WORKLOAD, "backward", [recorder.provider("a")], Rules(rounds=2))
    assert ("a", "forward", True) not in recorder.calls
    first = recorder.calls.index(("a", "backward", True))
    assert recorder.calls[first - 1 : first + 4] == [
        ("a", "forward", False),
        ("a", "backward", True),
    ] * 2 + [("a", "forward", False)]


def test_all_providers_get_the_same_inputs_in_the_same_turn_and_others_in_the_next():
    seen = {"a": [], "b": []}

    def record(name):
        def run(problem, prepared, x):
            seen[name].append(x.data_ptr())
            return x * x

        return run

    chosen = [provider(name, record(name)) for name in seen]
    race(WORKLOAD, "forward", chosen, Rules(rounds=6, input_sets=3))
    timed = {name: pointers[6:-1] for name, pointers in seen.items()}  # 2 + 2 + 2 before, 1 for the memory
    assert timed["a"] == timed["b"]
    assert timed["a"][::2] == timed["a"][1::2]  # whole op and kernel alone
    assert timed["a"][::2] == timed["a"][0:6:2] * 2
    assert len(set(timed["a"])) == 3


def test_gradients_are_made_only_where_they_are_timed():
    device = torch.device("cpu")
    for direction in ("forward", "backward", "both"):
        inputs = Inputs(WORKLOAD, direction, device, 1)
        runner = Runner(provider(), WORKLOAD, direction, device, inputs)
        assert runner.inputs[0][0].requires_grad == (direction != "forward")
        result = runner.whole(0)()
        if direction == "forward":
            assert not result.requires_grad
        else:
            gradients = result if direction == "backward" else result[1]
            torch.testing.assert_close(gradients[0], 2 * runner.inputs[0][0] * runner.grads[0])


def test_a_slow_first_call_does_not_cost_rounds():
    """Compilation happens once, so it says nothing about how many runs fit into the time."""

    class Compiles:
        calls = 0

        def __call__(self, problem, prepared, x):
            self.calls += 1
            if self.calls <= 3:
                time.sleep(0.05)
            return x * x

    rules = Rules(seconds_per_provider=0.2, input_sets=1)
    outcome = race(WORKLOAD, "forward", [provider(run=Compiles())], rules)["good"]
    assert len(outcome.whole_s) > 4


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [([0.001], 50), ([0.1], 20), ([0.1, 0.001, 0.1, 0.199], 20), ([5.0, 0.1], 3), ([0.0], 50)],
)
def test_rounds_fit_the_time_of_all_together(seconds, rounds):
    class Timed:
        def __init__(self, seconds):
            self.seconds = seconds

    assert race_module._rounds([Timed(s) for s in seconds], Rules()) == rounds


@pytest.mark.parametrize(("seconds", "warmups"), [([0.1, 1.9], 1), ([0.1, 2.1], 0)])
def test_slow_runners_are_not_warmed_up_again(seconds, warmups):
    runners = [SimpleNamespace(seconds=s) for s in seconds]
    assert race_module._warmups(runners, Rules(seconds_per_provider=2.0)) == warmups


def test_verification_is_remembered_for_directions_with_the_same_results():
    prepared = []
    recorded = provider(prepare=lambda *_: prepared.append(1))
    rules = Rules(rounds=1, input_sets=1)
    counts = []
    for direction in ("forward", "backward", "both", "forward"):
        prepared.clear()
        race(WORKLOAD, direction, [recorded], rules)
        counts.append(len(prepared))
    # Two to verify unless remembered; then one for the kernel, and for the whole op two to warm up, one in
    # the untimed round, one timed, one for the memory.
    assert counts == [2 + 6, 2 + 1, 6, 6]


@pytest.mark.parametrize("kind", ["packed_attention", "linear_attention", "hybrid_attention"])
def test_the_whole_op_plans_anew_and_the_kernel_does_not(kind, monkeypatch):
    """Our ops remember a packing by its contents, but the first call on a batch must include the planning."""
    problem = Attention(kind, (300, 20), 1, 1, 8, group_size=32)
    workload = Workload("hybrid", "w", problem, torch.float32, "cpu")
    chosen = next(p for p in ours.PROVIDERS if p.name == "vot-kernels torch")
    runner = Runner(
        chosen, workload, "forward", torch.device("cpu"), Inputs(workload, "forward", torch.device("cpu"), 1)
    )
    planner = {
        "packed_attention": (hybrid_attention, "plan_segments"),
        "linear_attention": (linear_attention, "plan_states"),
        "hybrid_attention": (hybrid_attention, "plan_pass"),
    }[kind]
    planned, inner = [], getattr(*planner)

    def count(*arguments):
        planned.append(arguments)
        return inner(*arguments)

    monkeypatch.setattr(*planner, count)
    for turn in range(3):
        planned.clear()
        runner.whole(turn)()
        assert planned
        planned.clear()
        runner.kernel(turn)()
        assert not planned


def test_everything_that_our_ops_remember_is_forgotten():
    """The ops use only `remember` for plans, so `forget_plans` is all there is to call; shapes and GPUs are no plan."""
    import pkgutil
    from importlib import import_module

    import vot_kernels.ops

    modules = [
        import_module(module.name)
        for module in pkgutil.walk_packages(vot_kernels.ops.__path__, "vot_kernels.ops.")
    ]
    assert plans in modules
    no_plans = {"_strides_of_rows", "_strides_fit", "_sizes", "_has_gluon", "_arch_of_gpu"}
    for module in modules:
        own = [
            f
            for name, f in vars(module).items()
            if getattr(f, "__module__", None) == module.__name__ and name not in no_plans
        ]
        assert not [f for f in own if hasattr(f, "cache_clear")], module.__name__


def test_failures_do_not_tell_whose_machine_it_is():
    message = "cannot open /home/someone/.cache/lib.so at 0x7f8eb0a4a5c0, see https://example.org/a/b"
    outcome = hold(provider("bad", raises(OSError(message))))["bad"]
    assert outcome.reason == "OSError: cannot open lib.so at 0x…, see https://example.org/a/b"


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_all_code_of_a_provider_runs_in_its_context(direction):
    """A variant holds in the backward too, and never outside of its own provider."""
    inside, seen = [], []

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", bool(inside)))
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", bool(inside)))
            return 2 * grad * ctx.saved_tensors[0]

    def prepare(problem, dtype, device):
        seen.append(("prepare", bool(inside)))

    def other(problem, prepared, x):
        assert not inside
        return x * x

    def run(problem, prepared, x):
        return Watched.apply(x)

    outcomes = hold(
        provider("variant", run, prepare=prepare, around=around),
        provider("other", other),
        direction=direction,
    )
    assert all(outcome.status is Status.TIMED for outcome in outcomes.values())
    places = {"forward", "prepare"} | ({"backward"} if direction != "forward" else set())
    assert {place for place, _ in seen} == places and all(within for _, within in seen)
