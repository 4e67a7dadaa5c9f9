"""Blocks of rows: they cover every row once, in order."""

import pytest
import torch

from vot_kernels.ops.parts.row_blocks import row_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [0, 1, 99, 100, 101, 1000])
@pytest.mark.parametrize("width", [0, 1, 700, 10**9])
@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_every_row_stands_in_one_block(rows, width, device):
    covered = [row for block in row_blocks(rows, width, device) for row in range(rows)[block]]
    assert covered == list(range(rows))


def test_blocks_are_small_on_a_cpu_alone():
    assert len(list(row_blocks(10_000, 768, torch.device("cuda")))) == 1
    sizes = [block.stop - block.start for block in row_blocks(10_000, 768, CPU)]
    assert len(sizes) > 1 and max(sizes) * 768 <= 2**16 * torch.get_num_threads()
