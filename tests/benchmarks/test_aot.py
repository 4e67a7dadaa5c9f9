"""Ahead-of-time compilation: kernels keep to the limits of their configs, and broken limits are found.

The compiler runs in processes of its own, because this one may have imported the kernels for the interpreter.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.aot import __main__ as command  # noqa: E402
from benchmarks.aot import build, compiler, gpus, sass  # noqa: E402
from benchmarks.aot.cases import Case, kernel_ops  # noqa: E402
from tests.processes import default_signals  # noqa: E402
from vot_kernels.ops.launch import Launch  # noqa: E402
from vot_kernels.tuning import Config  # noqa: E402

ROOT = Path(__file__).parents[2]

# Kernels that break one limit each. "good" and "allowed" break none.
SCRIPT = """
import sys

import torch
import triton
import triton.language as tl

from benchmarks.aot.__main__ import main
from benchmarks.aot.cases import Case
from vot_kernels.ops.launch import launch
from vot_kernels.tuning import Config


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, k, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, WARP_SPECIALIZE: tl.constexpr
):
    tl.static_assert(M != 48, "forty-eight rows")
    i, j, step = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    sums = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, k, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
        a = tl.load(a_ptr + i[:, None] * k + first + step[None, :])
        b = tl.load(b_ptr + (first + step)[:, None] * N + j[None, :])
        sums = tl.dot(a, b, sums)
    tl.store(out_ptr + i[:, None] * N + j[None, :], sums)


def case(name, m, n, block, stages=2, warps=4, **limits):
    def run():
        a = torch.empty(m, 1024, dtype=torch.bfloat16)
        asked = limits.get("warp_specialized", False)
        config = Config({"BLOCK_K": block, "WARP_SPECIALIZE": asked}, warps, stages, limits)
        arguments = {"a_ptr": a, "b_ptr": a.new_empty(1024, n), "out_ptr": torch.empty(m, n)}
        launch(_product_kernel, (1,), config, arguments | {"k": 1024, "M": m, "N": n})

    return Case("product", name, run, lambda kernel: 2 * m * n * 1024, quick=name == "good")


def refuse():
    raise ValueError("no such shape")


sys.exit(main(sys.argv[1:], [
    case("good", 64, 64, 64, registers=128, spill_bytes=0, wgmma=True),
    case("narrow", 64, 16, 64, tensor_work=1),
    case("registers", 64, 64, 64, registers=1),
    case("spills", 128, 256, 64, local_in_loops=65536),
    case("in a loop", 128, 256, 64, spill_bytes=65536),
    case("allowed", 128, 256, 64, spill_bytes=65536, local_in_loops=65536),
    case("no wgmma", 16, 16, 64, wgmma=True),
    case("no tma", 16, 16, 64, tma=True),
    case("not specialized", 64, 64, 64, warps=8, warp_specialized=True),  # the compiler says nothing
    case("shared", 64, 64, 512, stages=4, registers=255),
    case("unknown", 16, 16, 64, regs=1),
    case("wrong", 48, 16, 64),
    Case("product", "refused", refuse),
    Case("product", "nothing", lambda: None),
]))
"""


@pytest.fixture(scope="module")
def environment(pytestconfig):
    """Without the interpreter. What is compiled is kept for the next run: Triton finds it by its source."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found.pop("TRITON_INTERPRET", None)
    found.setdefault("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
    return found


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "products.py"
    path.write_text(SCRIPT)
    return path


def run(command, environment, folder, *arguments):
    """Return the exit status, the JSON document and stdout."""
    path = folder / "found.json"
    line = [sys.executable, *command, *arguments, "--json", str(path)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return done.returncode, json.loads(path.read_text()), done.stdout


# The kernels of the package.


def check_kernels(document):
    assert document["complete"] and document["problems"] == []
    for row in document["kernels"]:
        found = row["resources"]
        assert found["spill_bytes"] <= row["limits"].get("spill_bytes", 0)
        assert found["registers"] <= row["limits"].get("registers", 255)
        assert row["blocks_per_sm"] >= 1 and row["moved"] > 0 and row["least_us"] > 0
        assert found["local_in_loops"] == 0
        if found["matrix"] != "none":
            assert row["flops"] > 0, f"benchmarks/aot/cases.py counts no products of {row['kernel']}"


def test_kernels_keep_to_their_limits(environment, tmp_path):
    arguments = ("--arch", "sm_90", "--quick", "--jobs", "2")
    status, document, printed = run(["-m", "benchmarks.aot"], environment, tmp_path, *arguments)
    assert status == 0, printed
    check_kernels(document)
    assert {row["kernel"] for row in document["kernels"]} == build.registered_kernels()
    assert {"linear_attention", *kernel_ops()} <= {row["op"] for row in document["kernels"]}


def test_a_kernel_on_other_gpus(environment, tmp_path):
    only = ("--quick", "--op", "packed_attention", "--kernel", "_range_attention_fwd")
    arguments = ("--arch", "sm_80,sm_100", *only)
    status, document, printed = run(["-m", "benchmarks.aot"], environment, tmp_path, *arguments)
    assert status == 0, printed
    check_kernels(document)
    assert {row["arch"] for row in document["kernels"]} == {"sm_80", "sm_100"}
    assert {row["resources"]["matrix"] for row in document["kernels"] if row["arch"] == "sm_80"} == {"mma"}
    specialized = [row["arch"] for row in document["kernels"] if row["resources"]["warp_specialized"]]
    assert specialized == ["sm_100"]


# Kernels that break limits.


@pytest.fixture(scope="module")
def broken(environment, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    return run([str(script)], environment, folder, "--arch", "sm_90", "--jobs", "2")


def test_broken_limits_fail_the_command(broken):
    status, document, printed = broken
    assert status == 1 and document["complete"]
    failed = [line for line in printed.splitlines() if line.startswith("FAILED ")]
    assert failed == [f"FAILED {problem}" for problem in document["problems"]]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("registers", "the limit is 1."),
        ("spills", "the limit is 0."),
        ("no wgmma", "does not use wgmma"),
        ("no tma", "does not use tma"),
        ("not specialized", "does not use warp_specialized, and its config demands it"),
        ("shared", "bytes of shared memory, a block has 232448"),
        ("unknown", "limit 'regs' is unknown, known are registers, spill_bytes"),
        ("in a loop", "local_in_loops"),
        ("narrow", "tensor_work 2.5, the limit is 1."),
        ("wrong", "does not compile"),
        ("refused", "cannot be launched: ValueError: no such shape"),
        ("nothing", "launches no kernel"),
    ],
)
def test_each_broken_limit_has_one_line(broken, case, sentence):
    [line] = [line for line in broken[1]["problems"] if f"product {case};" in line or f"({case})" in line]
    assert sentence in line and line.startswith("sm_90 ")


def test_kept_limits_have_none(broken):
    rows = {row["cases"][0]: row for row in broken[1]["kernels"]}
    assert rows["good"]["violations"] == rows["allowed"]["violations"] == []
    assert rows["good"]["resources"]["matrix"] == "wgmma" and rows["good"]["resources"]["unit"] == "half"
    assert rows["allowed"]["resources"]["spill_bytes"] == rows["spills"]["resources"]["spill_bytes"] > 0
    assert rows["wrong"]["resources"] is None
    assert rows["good"]["flops"] == 2 * 64 * 64 * 1024
    assert rows["good"]["moved"] == 2 * 2 * 64 * 1024 + 4 * 64 * 64
    assert rows["good"]["resources"]["threads"] == 128


def test_good_kernels_alone_pass(environment, script, tmp_path):
    status, document, printed = run([str(script)], environment, tmp_path, "--arch", "sm_90", "--quick")
    assert status == 0 and document["problems"] == []
    assert "1 of 1 kernels compiled, 0 problems." in printed and "estimate" in printed


def test_ctrl_c_leaves_valid_json(environment, script, tmp_path):
    path = tmp_path / "part.json"
    line = [sys.executable, str(script), "--arch", "sm_80", "--jobs", "1", "--json", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": default_signals}
    environment = environment | {"TRITON_CACHE_DIR": str(tmp_path / "triton")}  # empty, so that it takes time
    with subprocess.Popen(line, cwd=ROOT, env=environment, text=True, **pipes) as process:
        while not process.stderr.readline().startswith("[1/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Interrupted" in errors
    document = json.loads(path.read_text())
    assert not document["complete"] and document["triton"]
    assert 1 <= len(document["kernels"]) < 10


# What the user may do wrong:


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--arch", "sm_70"], ["--arch 'sm_70'", "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"]),
        (["--arch", "sm_90,h100"], ["--arch 'h100'", "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"]),
        (["--op", "atention"], ["--op 'atention'", "linear_attention"]),
        (["--arch", "sm_90", "--quick", "--kernel", "xyz"], ["--kernel 'xyz'", "_group_states_kernel"]),
    ],
)
def test_unknown_names_list_the_known(arguments, parts, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(command, "make_plan", lambda *_: plan_of("_group_states_kernel"))
    assert command.main(arguments) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts) and len(message.splitlines()) == 1


def plan_of(kernel):
    row = build.Row("sm_90", "op", kernel, "", "", {}, ["case"], 0, 0)
    return build.Plan(jobs=[build.Job(row, None)])


def test_a_folder_is_no_json_file(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command.main(["--json", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_jobs_must_be_positive(jobs, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--jobs", jobs])
    assert error.value.code == 2 and "positive integer" in capsys.readouterr().err


def test_without_triton_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert command.main([]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main([]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


# What would be compiled:


def _mixed_kernel(
    x_ptr, y_ptr, absent_ptr, count, one, rows, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    pass


def launch_of(x, count=48, rows=1, width=80):
    arguments = {
        **{"x_ptr": x, "y_ptr": x.int(), "absent_ptr": None, "count": count, "one": 1, "rows": rows},
        **{"scale": 0.5, "WIDTH": width, "BLOCK": 32},
    }
    kernel = JITFunction(_mixed_kernel, do_not_specialize=["rows"])
    return Launch(kernel, (1,), arguments, Config({"BLOCK": 32}, 8, 3))


def test_arguments_become_what_the_jit_makes_of_them():
    found = compiler.specialize(launch_of(torch.empty(64, dtype=torch.bfloat16)), "sm_90")
    assert list(found.signature.values()) == [
        *("*bf16", "*i32", "constexpr", "i32", "constexpr", "i32", "fp32", "constexpr", "constexpr")
    ]
    assert found.constexprs == {(2,): None, (4,): 1, (7,): 80, (8,): 32}
    assert found.attributes == {(index,): [["tt.divisibility", 16]] for index in (0, 1, 3)}
    assert found.options["num_warps"] == 8 and found.options["num_stages"] == 3
    assert found.target.arch == 90
    assert found.key() == "bf16 one=1 width=80 -absent"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rows": 4096}, True),  # not specialised
        ({"count": 96}, True),  # still a multiple of 16
        ({"count": 50}, False),
        ({"count": 2**40}, False),  # int64
        ({"width": 96}, False),
        ({"x": torch.empty(65, dtype=torch.bfloat16)[1:]}, False),  # not aligned
        ({"x": torch.empty(64)}, False),
    ],
)
def test_launches_share_a_kernel_where_the_jit_would(change, same):
    first, second = (
        compiler.specialize(launch_of(**{"x": torch.empty(64, dtype=torch.bfloat16), **options}), "sm_90")
        for options in ({}, change)
    )
    assert (first.identity == second.identity) == same


def test_architectures_do_not_share_a_kernel():
    launch = launch_of(torch.empty(64))
    identities = {compiler.specialize(launch, arch).identity for arch in gpus.GPUS}
    assert len(identities) == len(gpus.GPUS)


def test_interpreted_kernels_are_refused():
    launch = Launch(_mixed_kernel, (1,), {}, Config({}, 4, 1))
    with pytest.raises(TypeError, match="_mixed_kernel is interpreted"):
        compiler.specialize(launch, "sm_90")


def test_equal_launches_are_compiled_once(monkeypatch):
    launches = [launch_of(torch.empty(64)), launch_of(torch.empty(64)), launch_of(torch.empty(64), count=50)]
    monkeypatch.setattr(build, "record", lambda case, arch: launches)
    plan = build.make_plan([Case("op", "a", print), Case("op", "b", print)], ["sm_90"])
    assert len(plan.launched) == 6
    assert [job.row.cases for job in plan.jobs] == [["a", "b"], ["a", "b"]]


def test_traffic_counts_each_tensor_once():
    x = torch.empty(10, 3)
    arguments = {"x_ptr": x, "again_ptr": x, "y_ptr": x.half(), "part_ptr": x[:5], "n": 7, "none_ptr": None}
    assert compiler.traffic(arguments) == 120 + 60 + 60


# What is read from the compiled program:


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("add.f32 %r1, %r2, %r3;", ("none", "fma")),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", ("mma", "half")),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {", ("mma", "tf32")),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {", ("wgmma", "half")),
        ("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {", ("wgmma", "tf32")),
        ("tcgen05.mma.cta_group::1.kind::f16 [%r1],", ("tcgen05", "half")),
        ("tcgen05.mma.cta_group::1.kind::tf32 [%r1],", ("tcgen05", "tf32")),
        ("wgmma.fence.sync.aligned;\nmma.sync.aligned.m16n8k16.f32.f16.f16 {", ("mma", "half")),
    ],
)
def test_matrix_instructions(ptx, expected):
    assert compiler.matrix_instructions(ptx) == expected


@pytest.mark.parametrize(
    ("ttgir", "expected"),
    [
        ("ttg.warp_specialize(%arg0, %1) attributes {", True),
        ("scf.for %i = %a to %b step %c : i32 {\n} {tt.warp_specialize}", False),
        ("} {ttg.warp_specialize.tag = 0 : i32}", False),
        ("", False),
    ],
)
def test_warp_specialization(ttgir, expected):
    assert compiler.is_warp_specialized(ttgir) == expected


@pytest.mark.parametrize(
    ("arch", "block", "expected"),
    [
        # 65,536 registers: 128 threads of 128 take 16,384
        ("sm_90", {"threads": 128, "registers": 128, "shared": 0}, (4, "registers")),
        # 168 registers take 21 units of 256 per warp, so that 3 warps fit on each of 4 schedulers
        ("sm_90", {"threads": 256, "registers": 168, "shared": 0}, (1, "registers")),
        ("sm_90", {"threads": 256, "registers": 128, "shared": 0}, (2, "registers")),
        # of 228 KiB, a block takes its own and 1 KiB more
        ("sm_90", {"threads": 128, "registers": 32, "shared": 113 * 1024}, (2, "shared")),
        ("sm_90", {"threads": 128, "registers": 32, "shared": 113 * 1024 + 1}, (1, "shared")),
        ("sm_80", {"threads": 128, "registers": 32, "shared": 113 * 1024}, (1, "shared")),
        ("sm_90", {"threads": 1024, "registers": 32, "shared": 0}, (2, "registers")),
        ("sm_90", {"threads": 1024, "registers": 16, "shared": 0}, (2, "threads")),
        ("sm_90", {"threads": 32, "registers": 16, "shared": 0}, (32, "blocks")),
        (
            "sm_100",
            {"threads": 128, "registers": 32, "shared": 0, "tensor_memory": 256},
            (2, "tensor memory"),
        ),
        ("sm_80", {"threads": 128, "registers": 32, "shared": 200 * 1024}, (0, "shared")),
        # GPUs for graphics hold fewer threads and blocks, and have 100 KiB
        ("sm_89", {"threads": 512, "registers": 32, "shared": 0}, (3, "threads")),
        ("sm_86", {"threads": 32, "registers": 16, "shared": 0}, (16, "blocks")),
        ("sm_120", {"threads": 128, "registers": 32, "shared": 49 * 1024}, (2, "shared")),
    ],
)
def test_occupancy(arch, block, expected):
    assert gpus.occupancy(gpus.GPUS[arch], **block) == expected


def test_roofline():
    gpu = gpus.GPUS["sm_90"]
    assert gpus.roofline(gpu, 0, 3_350_000, "half") == (pytest.approx(1e-6), "memory")
    assert gpus.roofline(gpu, 989_000_000, 1, "half") == (pytest.approx(1e-6), "compute")
    assert gpus.roofline(gpu, 67_000_000, 1, "fma") == (pytest.approx(1e-6), "compute")


def resources(**changes):
    kept = {"registers": 100, "spill_bytes": 0, "shared_bytes": 1000, "threads": 128, "tensor_memory": 0}
    used = {"matrix": "wgmma", "unit": "half", "tma": False, "warp_specialized": False}
    return compiler.Resources(**{**kept, **used, **changes})


@pytest.mark.parametrize(
    ("changes", "limits", "count"),
    [
        ({}, {}, 0),
        ({}, {"registers": 100, "wgmma": True, "tma": False}, 0),
        ({}, {"registers": 99}, 1),
        ({"spill_bytes": 8}, {}, 1),
        ({"spill_bytes": 8}, {"spill_bytes": 8}, 0),
        ({"spill_bytes": 9}, {"spill_bytes": 8}, 1),
        ({}, {"shared_bytes": 999}, 1),
        ({}, {"tcgen05": True, "tma": True}, 2),
        ({"tma": True}, {"tma": True}, 0),
        ({"tma": True}, {"tma": True, "warp_specialized": True}, 1),
        ({"warp_specialized": True}, {"warp_specialized": True}, 0),
        ({"matrix": "mma"}, {"wgmma": True}, 1),
        ({"local_in_loops": 2, "spill_bytes": 8}, {"spill_bytes": 8}, 1),
        ({"loop": sass.MainLoop(100, 1.5, 2.0, 0)}, {"tensor_work": 1}, 1),
        ({"loop": sass.MainLoop(100, 1.5, 1.25, 0)}, {"tensor_work": 1.25}, 0),
        ({}, {"wgmma": True, "regs": 4}, 1),
    ],
)
def test_broken_limits(changes, limits, count):
    assert len(build.broken_limits(resources(**changes), limits)) == count
