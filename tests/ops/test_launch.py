"""The launch handle: what it tells kernels about strides, and what it refuses."""

import pytest
import torch

from vot_kernels.ops.launch import Kernel, contiguous, matrices_contiguous, rows_contiguous, strides
from vot_kernels.testing import spread
from vot_kernels.tuning import Config

KERNEL = Kernel("scan", "sum", "experts.combine:_combine_kernel")
ROWS = torch.zeros(4, 6, 32)


def launch(**arguments):
    """On an empty grid, so that only the check takes place."""
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
