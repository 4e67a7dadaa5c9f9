"""A Qwen2.5-VL vision tower, here with random weights, on these kernels: the same output, and how long each takes."""

import time

import torch
from transformers import AutoModel, Qwen2_5_VLConfig

import vot_kernels

FRAMES, ROWS, COLUMNS = 12, 8, 8  # of patches, in every clip


def make_tower() -> torch.nn.Module:
    # AutoModel.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct").visual is the pretrained one.
    sizes = {"depth": 4, "hidden_size": 160, "num_heads": 2, "intermediate_size": 320, "out_hidden_size": 160}
    return AutoModel.from_config(Qwen2_5_VLConfig(vision_config=sizes).vision_config).eval()


def seconds(tower: torch.nn.Module, patches: torch.Tensor, grid: torch.Tensor, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        tower(patches, grid)
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    tower = make_tower()
    grid = torch.tensor(
        [[FRAMES, ROWS, COLUMNS], [1, 16, 12], [FRAMES, ROWS, COLUMNS]]
    )  # two clips and an image
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    expected, before = tower(patches, grid).pooler_output, seconds(tower, patches, grid)

    print(vot_kernels.patch(tower))
    found, after = tower(patches, grid).pooler_output, seconds(tower, patches, grid)
    difference = float((found - expected).abs().max() / expected.abs().max())
    print(
        f"{len(patches)} patches in {len(grid)} inputs; the outputs differ by {difference:.1e} of the largest"
    )
    # A CPU gains little: torch computes image by image either way. On a GPU a layer is one kernel for all of them.
    print(f"median of 5: {before * 1e3:.0f} ms before, {after * 1e3:.0f} ms patched")
    assert difference < 1e-4

    vot_kernels.unpatch(tower)
    assert torch.equal(tower(patches, grid).pooler_output, expected)


if __name__ == "__main__":
    main()
