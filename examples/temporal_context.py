"""A frozen tower that sees one frame at a time learns to look at the others: `temporal_context.py CLIPS STEPS SEEDS`.

Half of a frame is black: which colours have the digits behind it? A guess has a balanced accuracy of 50 %.
"""

import copy
import sys

import torch
from torch import nn
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import vot_kernels
from vot_kernels.data.digitworld import hidden_colours

VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64}
VISION |= {"patch_size": 8, "temporal_patch_size": 1, "spatial_merge_size": 1, "deepstack_visual_indexes": []}
bce = nn.functional.binary_cross_entropy_with_logits
HYBRID = {"attention": "hybrid", "feature_map": "relu"}  # at first the same as one frame
WAYS = {"one frame": {}, "temporal context": HYBRID, "full attention": HYBRID | {"window": None}}


def ask(tower, head, frames, covered, alone):
    """Logits of colours `[clips, tokens, 8]`, of the tokens of the covered frame, encoded alone or with its clip."""
    clip = torch.arange(len(frames))
    frames, covered = (frames[clip, covered, None], 0) if alone else (frames, covered)
    patches = (frames.float() / 127.5 - 1).unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 192)
    tokens = tower(patches, grid_thw=torch.tensor([[frames.shape[1], 8, 8]] * len(frames))).last_hidden_state
    return head(tokens.view(*frames.shape[:2], 64, 64)[clip, covered])


def fit(tower, head, truth, group, alone):  # which colours show in a frame, or which are in its clip
    optimizer = torch.optim.AdamW([group], weight_decay=0)
    for _ in range(steps):
        rows = torch.randint(clips, [16])
        logits = ask(tower, head, train[0][rows], train[1][rows], alone)
        optimizer.zero_grad()
        bce(logits, truth[rows, None].expand_as(logits).float()).backward()
        optimizer.step()


clips, steps, seeds = map(int, sys.argv[1:]) if sys.argv[1:] else (16, 4, 1)
data = [hidden_colours(split, n) for split, n in (("train", clips), ("test", max(8, clips // 3)))]
train, test = ([torch.from_numpy(x) for x in vars(part).values()] for part in data)
for seed in range(seeds):
    torch.manual_seed(seed)
    tower, head = Qwen3VLVisionModel(Qwen3VLConfig(vision_config=VISION).vision_config), nn.Linear(64, 8)
    fit(tower, head, train[3], {"lr": 2e-3, "params": [*tower.parameters(), *head.parameters()]}, alone=True)
    for way, options in WAYS.items():
        torch.manual_seed(seed)
        model, head = copy.deepcopy(tower).requires_grad_(False), nn.Linear(64, 8)
        vot_kernels.patch(model, **options)
        trained = [
            p for p in [*model.parameters(), *head.parameters()] if p.requires_grad
        ]  # far weights, head
        fit(model, head, train[2], {"lr": 5e-2, "params": trained}, alone=False)
        said = ask(model, head, test[0], test[1], alone=False).mean(1) > 0
        right = said[test[2] & ~test[3]].float().mean() + (~said)[~test[2]].float().mean()
        print(f"seed {seed}, {way}: {right.item() / 2:.1%}")
