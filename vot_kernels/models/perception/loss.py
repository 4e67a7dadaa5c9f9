"""The set-prediction loss of the STSG head: Hungarian matching of whole tracks, then supervised terms."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from vot_kernels.models.perception.head import HeadOutput


@dataclass
class Targets:
    """The ground truth for `B` clips of one grid with up to `N` objects; shorter lists are padded.

    Attributes:
        centers: float32 `[B, N, T, 2]`, (x, y) in fractions of the frame.
        sizes: float32 `[B, N, T, 2]`, (width, height) in fractions of the frame.
        present: bool `[B, N, T]`, whether the object is in the frame.
        exists: bool `[B, N]`, False for padding.
        labels: int64 `[B, N]`.
        attributes: int64 `[B, N]`.
        pair_events: bool `[B, N, N, T, kinds]`.
        unary_events: bool `[B, N, T, kinds]`.
        pair_relations: bool `[B, N, N, T, kinds]`.
        unary_relations: bool `[B, N, T, kinds]`.
    """

    centers: Tensor
    sizes: Tensor
    present: Tensor
    exists: Tensor
    labels: Tensor
    attributes: Tensor
    pair_events: Tensor
    unary_events: Tensor
    pair_relations: Tensor
    unary_relations: Tensor

    def to(self, device: torch.device | str) -> "Targets":
        """Return the same ground truth on a device."""
        return Targets(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@torch.no_grad()
def match(output: HeadOutput, targets: Targets) -> list[tuple[Tensor, Tensor]]:
    """Return for each clip (query indices, object indices) of the cheapest assignment of objects to queries.

    The cost of a pair is minus the log-probability that the query seeks the object's attribute, plus twice the
    mean centre distance in frame widths over the frames where the object is present, minus a tenth of the mean
    log-odds of presence.
    """
    from scipy.optimize import linear_sum_assignment

    distance = (output.coarse_centers[:, :, None] - targets.centers[:, None]).norm(dim=-1)  # [B, Q, N, T]
    present = targets.present[:, None].float()
    place = (distance * present).sum(-1) / present.sum(-1).clamp_min(1)
    index = targets.attributes[:, None].expand(-1, output.sought.shape[1], -1)
    name = -output.sought.log_softmax(-1).gather(2, index)
    cost = name + 2 * place - 0.1 * output.presence.mean(-1, keepdim=True)
    pairs = []
    for clip_cost, exists in zip(cost.cpu(), targets.exists.cpu(), strict=True):
        objects = exists.nonzero().squeeze(1)
        rows, columns = linear_sum_assignment(clip_cost[:, objects].numpy())
        pairs.append((torch.as_tensor(rows), objects[torch.as_tensor(columns)]))
    return pairs


def perception_loss(
    output: HeadOutput, targets: Targets, pairs: list[tuple[Tensor, Tensor]], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Return the terms of the loss by name; training minimises their sum. grid is (h, w) in tokens."""
    clip = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(pairs)])
    query, item = (torch.cat(part) for part in zip(*pairs, strict=True))
    wanted = torch.zeros_like(output.presence)
    wanted[clip, query] = targets.present[clip, item].to(wanted.dtype)
    present = targets.present[clip, item]
    centers, sizes = targets.centers[clip, item][present], targets.sizes[clip, item][present]

    def off(predicted: Tensor, truth: Tensor) -> Tensor:
        return F.l1_loss(predicted[clip, query][present], truth)

    cell = (centers * centers.new_tensor([grid[1], grid[0]])).long()
    cell = cell[:, 1].clamp(0, grid[0] - 1) * grid[1] + cell[:, 0].clamp(0, grid[1] - 1)
    terms = {
        "presence": 2 * F.binary_cross_entropy_with_logits(output.presence, wanted),
        "center": 10 * off(output.centers, centers) + 5 * off(output.coarse_centers, centers),
        "size": 5 * off(output.sizes, sizes),
        "heat": 0.3 * F.cross_entropy(output.heat[clip, query][present], cell),
        "label": F.cross_entropy(output.labels[clip, query], targets.labels[clip, item]),
        "sought": F.cross_entropy(output.sought[clip, query], targets.attributes[clip, item]),
        "attribute": F.cross_entropy(output.attributes[clip, query], targets.attributes[clip, item]),
        "unary_events": _rare(output.unary_events[clip, query], targets.unary_events[clip, item]),
        "unary_relations": _rare(output.unary_relations[clip, query], targets.unary_relations[clip, item]),
    }
    return terms | {
        name: _pair_loss(getattr(output, name), getattr(targets, name), pairs)
        for name in ("pair_events", "pair_relations")
    }


def dynamics_loss(read: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
    """Return the terms for relations and events only, for tracks in the order of the targets' objects."""
    objects = [exists.nonzero().squeeze(1) for exists in targets.exists]
    same = [(index, index) for index in objects]
    terms = {}
    for name, logits in read.items():
        truth = getattr(targets, name)
        if name.startswith("pair"):
            terms[name] = _pair_loss(logits, truth, same)
        else:
            terms[name] = _rare(logits[targets.exists], truth[targets.exists])
    return terms


def naming_loss(
    labels: Tensor, attributes: Tensor, targets: Targets, pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the terms for names only; labels `[B, Q, labels]` and attributes `[B, Q, attributes]` are logits."""
    clip = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(pairs)])
    query, item = (torch.cat(part) for part in zip(*pairs, strict=True))
    return {
        "label": F.cross_entropy(labels[clip, query], targets.labels[clip, item]),
        "attribute": F.cross_entropy(attributes[clip, query], targets.attributes[clip, item]),
    }


def _pair_loss(logits: Tensor, truth: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the loss over ordered pairs of different objects; `[B, Q, Q, T, kinds]`, `[B, N, N, T, kinds]`."""
    losses = []
    for b, (queries, items) in enumerate(pairs):
        different = ~torch.eye(len(queries), dtype=torch.bool, device=truth.device)
        losses.append(_rare(logits[b][queries][:, queries][different], truth[b][items][:, items][different]))
    return torch.stack(losses).mean()


def _rare(logits: Tensor, truth: Tensor) -> Tensor:
    """Sum binary cross-entropy over kinds and average over frames, so that rare positives keep their weight."""
    if logits.numel() == 0:
        return logits.sum()
    return F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none").sum(-1).mean()
