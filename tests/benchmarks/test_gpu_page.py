"""docs/gpu-static.md: it says what the results say, and the results are what the compiler makes of the kernels now."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton  # noqa: E402

from benchmarks.aot import page  # noqa: E402
from benchmarks.aot.gpus import GPUS, KIB  # noqa: E402
from vot_kernels import tuning  # noqa: E402

# Compiles a few rows of the page and prints their records.
FRESH = """
import json, sys
from benchmarks.aot import page
from benchmarks.aot.build import compile_all

wanted = json.loads(sys.argv[1])
jobs = page.jobs_of(["sm_90"], {op: [call] for op, call, _ in wanted})
chosen = [job for job in jobs if [job.row.op, job.row.cases[0], page.short(job.row.kernel)] in wanted]
compile_all(chosen, 1, lambda row: None)
print(json.dumps(page.records_of(chosen)))
"""
WANTED = [
    ["packed_attention", "bf16 d64", "range_attention_dkdv"],
    ["hybrid_attention", "bf16 d128", "range_attention_fwd"],
]


@pytest.fixture(scope="module")
def document():
    return json.loads(page.RESULTS.read_text(encoding="utf-8"))


def test_the_page_says_what_the_results_say(document):
    assert page.PAGE.read_text(encoding="utf-8") == page.page(document)


def test_the_results_are_those_of_now(document, pytestconfig):
    if triton.__version__ != document["triton"]["sm_90"]:
        pytest.skip(f"the results are of triton {document['triton']['sm_90']}")
    environment = {**os.environ, "PYTHONPATH": str(page.ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("TRITON_CACHE_DIR", str(pytestconfig.cache.mkdir("triton")))
    command = [sys.executable, "-c", FRESH, json.dumps(WANTED)]
    done = subprocess.run(command, cwd=page.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now = {page.key_of(record): record for record in document["now"]}
    found = json.loads(done.stdout)
    assert len(found) == len(WANTED)
    for record in found:
        assert record == now[page.key_of(record)], "run python -m benchmarks.aot.page"


def test_every_kernel_fits_and_spills_nowhere_in_its_loops(document):
    for record in document["now"]:
        assert "error" not in record, record
        assert record["shared_bytes"] <= GPUS[record["arch"]].shared_per_block, record
        assert record["blocks_per_sm"] >= 1 and record["local_in_loops"] == 0, record


def test_figures_that_changed_have_the_first_one_in_brackets():
    record = {
        **{"arch": "sm_89", "op": "moe", "call": "bf16 d2048 h768 n128", "kernel": "k", "config": "M=64"},
        **{"registers": 100, "spill_bytes": 0, "shared_bytes": 64 * KIB, "threads": 128, "blocks_per_sm": 1},
        **{"limited_by": "shared", "matrix": "mma", "instructions_per_kmac": 2.0, "tensor_work": 1.0},
        **{"barriers": 2, "local_in_loops": 0},
    }
    first = page.merged({}, [{**record, "shared_bytes": 164 * KIB, "tensor_work": 3.0}], ["sm_89"], "3.7.1")
    then = page.merged(first, [record], ["sm_89"], "3.8.0")
    assert then["triton"] == {"sm_89": "3.8.0"} and then["before"][0]["triton"] == "3.7.1"
    assert page.merged(then, [record], ["sm_89"], "3.8.0") == then
    [row] = [line for line in page.page(then).splitlines() if line.startswith("| d2048")]
    cells = ["d2048 h768 n128", "`k`", "M=64", "2.00", "1.00 (3.00)", "1 by shared (does not fit)", "100"]
    assert row == "| " + " | ".join([*cells, "64 (164)", "2", "0"]) + " |"


@pytest.mark.parametrize("arch", sorted(tuning.SHARED_KIB))
@pytest.mark.parametrize("family", ["range_attention", "group_states", "linear_attention", "experts"])
@pytest.mark.filterwarnings("ignore:vot-kernels ships no")
def test_no_gpu_takes_entries_above_its_shared_memory(family, arch):
    """The check compiles every entry within the shared memory of the GPU that its table is for."""
    found = tuning.nearest_arch(family, arch)
    assert GPUS[found].shared_per_block == tuning.SHARED_KIB[found] * KIB
    if tuning.SHARED_KIB[arch] >= 99:  # older ones cannot run the kernels
        assert tuning.SHARED_KIB[found] <= tuning.SHARED_KIB[arch]


def test_the_text_about_triton_3_9_counts_what_was_compiled():
    """The launches above their limits, and those of them with spills in loops, by op."""
    found = json.loads((page.RESULTS.parent / "gate-sm_90-triton-3.9.json").read_text())
    launches = {line.partition("): ")[0] for line in found["problems"]}
    loops = {line.partition("): ")[0] for line in found["problems"] if "local_in_loops" in line}
    linear = [launch for launch in loops if "linear_attention" in launch]
    text = " ".join(page.PAGE.read_text().split())
    assert f"{len(loops)} launches of sm_90, of {found['launches']:,}: {len(linear)} of causal linear" in text
    assert f"{len(launches) - len(loops)} more are above their limits outside of loops" in text
