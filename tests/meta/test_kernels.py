"""Ahead-of-time compilation leaves nothing out: every kernel and every shipped config has a case."""

import pytest

pytest.importorskip("triton")

from benchmarks.aot import build  # noqa: E402
from benchmarks.aot.cases import cases, kernel_ops  # noqa: E402
from benchmarks.aot.gpus import GPUS  # noqa: E402
from vot_kernels import tuning  # noqa: E402


@pytest.fixture(scope="module")
def launched():
    """Every launch of every case on every GPU; the tests that need it are slow."""
    return build.launched(cases(), GPUS)


@pytest.mark.slow
def test_every_kernel_is_reached(launched):
    assert build.unreached_kernels(launched, build.registered_kernels()) == []


@pytest.mark.slow
def test_every_shipped_config_is_used(launched):
    assert build.unused_entries(launched, GPUS) == []


def test_every_op_with_a_kernel_has_a_case():
    assert set(kernel_ops()) <= {case.op for case in cases()}


@pytest.mark.slow
def test_the_tests_compile_every_kernel(launched):
    quick = build.launched([case for case in cases() if case.quick], ["sm_90"])
    assert {launch.kernel for launch in quick} == build.registered_kernels()


def test_every_table_is_for_a_gpu_that_is_compiled_for():
    tables = {path.parent.name for path in tuning.CONFIGS.glob("sm_*/*.json")}
    assert tables <= set(GPUS)


def test_case_names_are_unique():
    names = [(case.op, case.name) for case in cases()]
    assert len(names) == len(set(names))


def test_a_kernel_without_a_case_is_found(tmp_path):
    (tmp_path / "new.py").write_text(
        "import triton\n\n"
        "@triton.jit\ndef _new_kernel(x):\n    pass\n\n"
        "@triton.jit(do_not_specialize=['n'])\ndef _other_kernel(x, n):\n    pass\n\n"
        "@triton.jit\ndef helper(x):\n    pass\n\n"
        "def _host_kernel(x):\n    pass\n"
    )
    registered = build.registered_kernels(tmp_path)
    assert registered == {"_new_kernel", "_other_kernel"}
    seen = [build.Launched("sm_90", "_other_kernel", {})]
    [line] = build.unreached_kernels(seen, registered)
    assert "_new_kernel" in line


def test_registered_kernels_are_found_in_the_package():
    assert "_group_states_kernel" in build.registered_kernels()


@pytest.mark.slow
def test_an_unused_config_is_found(launched):
    """Leaving out what one entry serves names that entry, even where another one is equal to it."""
    arch, family, kernel = "sm_90", "group_states", "reduce_states"
    [entry] = tuning.tables(arch)[family][kernel]
    rest = [launch for launch in launched if launch.blocks is not entry["blocks"]]
    assert len(rest) < len(launched)
    [line] = set(build.unused_entries(rest, GPUS)) - set(build.unused_entries(launched, GPUS))
    assert f"configs/{arch}/{family}.json" in line and kernel in line


def test_no_cases_use_nothing():
    entries = sum(
        len(entries) for arch in GPUS for table in tuning.tables(arch).values() for entries in table.values()
    )
    assert len(build.unused_entries([], GPUS)) == entries > 0
    assert len(build.unreached_kernels([], build.registered_kernels())) == len(build.registered_kernels())
