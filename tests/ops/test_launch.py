"""The launch handle: what it tells kernels about strides, and what it refuses."""

import pytest
import torch

from vot_kernels.ops import launch as launching
from vot_kernels.ops.launch import (
    Kernel,
    contiguous,
    matrices_contiguous,
    record_launches,
    rows_contiguous,
    run_within_resources,
    strides,
)
from vot_kernels.testing import spread
from vot_kernels.tuning import Config

KERNEL = Kernel("scan", "sum", "experts.combine:_combine_kernel")
ROWS = torch.zeros(4, 6, 32)


def launch(*, checked=True, **arguments):
    """On an empty grid, so that only the check takes place."""
    with record_launches("sm_90", checked=checked):
        KERNEL.launch((0,), config=Config({}, 4, 1), **arguments)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (spread(torch.zeros(3)), {}),
        (torch.zeros(1).expand(3), {}),
        (torch.zeros(3, 4).T, {}),
        (ROWS.transpose(0, 1), {}),
        (ROWS.transpose(0, 1), {"x_stride": 1}),
        (ROWS.transpose(0, 1), {"y_stride": 1, "x_head_strides": 1}),
        (ROWS.mT, strides(x=ROWS)),
        (spread(ROWS), strides(x=ROWS)),
    ],
)
def test_a_tensor_whose_strides_the_kernel_is_not_told_is_refused(x, told):
    with pytest.raises(
        ValueError, match=r"scan sum: x_ptr has shape \[.*\] and strides \[.*\]; the kernel takes "
    ):
        launch(x_ptr=x, **told)


def test_strides_are_checked_where_it_costs_nothing():
    pytest.importorskip("triton")
    launch(checked=False, x_ptr=torch.zeros(3, 4).T)
    assert launching._checking == launching.INTERPRETING


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (ROWS, {}),
        (torch.zeros(3, 4)[:, :1], {"x_stride": 4}),
        (ROWS.transpose(0, 1), strides(x=ROWS)),
        (ROWS[:, :3, 8:], strides(x=ROWS)),
        (ROWS[1:, ::2], {"X_ROW_STRIDE": 1, "X_HEAD_STRIDE": 1}),
        (ROWS.mT, strides({"x": ROWS.mT})),
        (torch.zeros(32).expand(4, 32), strides(x=ROWS[0])),
    ],
)
def test_a_tensor_whose_strides_the_kernel_is_told_is_taken(x, told):
    pytest.importorskip("triton")
    launch(x_ptr=x, **told)


def test_strides_are_those_of_rows_and_heads_in_the_largest_unit():
    x = torch.zeros(4, 6, 40)
    assert strides(x=x) == {"x_stride": 30, "x_head_stride": 5, "STRIDE_UNIT": 8}
    assert strides(x=x[0], y=None) == {"x_stride": 5, "y_stride": 0, "STRIDE_UNIT": 8}
    assert strides(x=torch.zeros(4, 6, 5)) == {"x_stride": 30, "x_head_stride": 5, "STRIDE_UNIT": 1}
    assert strides(x=torch.zeros(4, 100), y=x)["STRIDE_UNIT"] == 4
    assert strides(x=torch.zeros(8).as_strided((1, 8), (2**31, 1))) == {"x_stride": 2**31, "STRIDE_UNIT": 1}


def test_strides_of_matrices_are_those_of_the_dimension_that_is_not_contiguous():
    w = torch.zeros(3, 16, 24)
    found = {"W_TRANSPOSED": False, "w_expert_stride": 48, "w_stride": 3, "STRIDE_UNIT": 8}
    assert strides({"w": w}) == found
    assert strides({"w": w.mT}) == found | {"W_TRANSPOSED": True}
    nothing = {"W_TRANSPOSED": False, "w_expert_stride": 0, "w_stride": 0, "STRIDE_UNIT": 8}
    assert strides({"w": None}) == nothing


def test_what_is_contiguous_is_not_copied():
    rows, far = ROWS.transpose(0, 1), torch.zeros(32).as_strided((1, 32), (2**24, 1))
    assert rows_contiguous(rows) is rows and rows_contiguous(far) is far
    assert rows_contiguous(ROWS.mT).is_contiguous() and rows_contiguous(far, compact=True).is_contiguous()
    assert matrices_contiguous(ROWS.mT).stride() == ROWS.mT.stride()
    assert matrices_contiguous(spread(ROWS)).is_contiguous()
    assert contiguous(None) is None and contiguous(ROWS) is ROWS
    half = contiguous(torch.zeros(1).expand(3), torch.float16)
    assert half.dtype == torch.float16 and half.stride() == (1,)


@pytest.fixture
def limited(monkeypatch):
    """A launch that takes at most so many stages; it lists those that it was tried with."""
    errors = pytest.importorskip("triton.runtime.errors")
    monkeypatch.setattr(launching, "_SMALLER", {})

    def make(most, tried):
        def run(config):
            tried.append(config.num_stages)
            if config.num_stages > most:
                raise errors.OutOfResources(config.num_stages, most, "shared memory")

        return run

    return make


def test_without_the_resources_a_smaller_config_runs_with_one_warning(limited):
    tried, config = [], Config({"BLOCK": 64}, 4, 3)
    with pytest.warns(
        UserWarning, match=r"lacks the resources for a kernel with .*'num_stages': 3.*instead"
    ) as seen:
        run_within_resources(limited(1, tried), config, any_blocks=True)
        run_within_resources(limited(1, tried), config, any_blocks=True)
    assert tried == [3, 2, 1, 1] and len(seen) == 1


def test_other_blocks_are_tried_only_where_the_launch_takes_them(limited, monkeypatch):
    other = Config({"BLOCK": 32}, 4, 1)
    monkeypatch.setattr(launching, "smaller", lambda config: iter([other, Config(config.blocks, 8, 2)]))
    for any_blocks, expected in ((True, [3, 1]), (False, [3, 2])):
        tried = []
        with pytest.warns(UserWarning, match="instead"):
            run_within_resources(limited(2, tried), Config({"BLOCK": 64}, 4, 3), any_blocks=any_blocks)
        assert tried == expected


def test_what_no_config_fits_is_an_error(limited):
    tried = []
    with pytest.raises(Exception, match="shared memory"):
        run_within_resources(limited(0, tried), Config({"BLOCK": 64}, 4, 2), any_blocks=True)
    assert tried == [2, 1]
