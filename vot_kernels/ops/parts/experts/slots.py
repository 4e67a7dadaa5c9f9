"""The parts that the backends of `aoe` and `moe` share: slots, expert bodies, the gradients of norms."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # elements in a block of caches


@dataclass(frozen=True, eq=False)
class Slots:
    """The choices of all tokens, grouped by expert.

    Slot `t * top_k + j` is the j-th choice of token t. Its *place* is its position when the slots are sorted by
    expert and, within an expert, by slot.

    Attributes:
        order: int32 `[slots]`, the slot at each place; undefined from offsets[-1] on.
        places: int32 `[slots]`, the place of each slot; -1 if its expert does not exist. It has no entries in the
            `torch` backend, which does not need it.
        offsets: int32 `[experts + 1]`: expert e has the places from offsets[e] to offsets[e + 1] - 1.
        top_k: number of slots of a token.
    """

    order: Tensor
    places: Tensor
    offsets: Tensor
    top_k: int

    def by_expert(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (expert, its places, their slots) for each expert that has any. The host reads the offsets."""
        bounds = self.offsets.tolist()
        for expert in range(len(bounds) - 1):
            if bounds[expert] < bounds[expert + 1]:
                places = slice(bounds[expert], bounds[expert + 1])
                yield expert, places, self.order[places]


class Experts(NamedTuple):
    """The weights of `aoe`; see that op."""

    w_down: Tensor
    w_up: Tensor
    w_p: Tensor
    w_o: Tensor


class Saved(NamedTuple):
    """What the forward of `aoe` computes and its backward reads.

    Attributes:
        norms, indices, weights: as in `vot_kernels.ops.aoe.AoEAux`.
        cache: `[slots, rank]`, C of the selected experts in the order of places ("cpp": of slots).
        value: `[slots, hidden]`, x W_pᵀ in the order of places ("cpp": in panels, see `parts.experts.cpp`).
        slots: the slot at each place.
    """

    norms: Tensor
    indices: Tensor
    weights: Tensor
    cache: Tensor
    value: Tensor
    slots: Slots


def group_slots(indices: Tensor, experts: int) -> Slots:
    """Return the slots of `indices` `[tokens, top_k]` by a stable sort; ids without an expert come last."""
    flat = indices.flatten()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    order = torch.argsort(flat, stable=True).to(torch.int32)
    return Slots(order, order.new_empty(0), offsets, indices.shape[1])


def swiglu_backward(
    gate: Tensor, value: Tensor, d_hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward of h = weight · SiLU(gate) · value; overwrite `d_hidden`.

    Args:
        gate, value: `[rows, hidden]`.
        d_hidden: `[rows, hidden]`, gradient of h.
        weight: `[rows, 1]`.

    Returns:
        d_gate, d_value, d_weight `[rows]`, and h.
    """
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * value
    d_weight = (d_hidden * hidden).sum(-1)
    d_hidden.mul_(weight)
    d_value = d_hidden * silu
    # d silu(u) / du = s + silu(u) (1 - s), with s = sigmoid(u)
    d_gate = d_hidden.mul_(value).mul_(sigmoid + silu * (1 - sigmoid))
    return d_gate, d_value, d_weight, hidden.mul_(weight)


def softmax_backward(probabilities: Tensor, d_probabilities: Tensor) -> Tensor:
    """Return the gradient of the logits."""
    mean = (probabilities * d_probabilities).sum(-1, keepdim=True)
    return probabilities * (d_probabilities - mean)


def over_norm(d_norms: Tensor, norms: Tensor) -> Tensor:
    """Return d_norms / norms, with the subgradient 0 where the norm is 0."""
    return torch.where(norms > 0, d_norms / norms, torch.zeros_like(d_norms))


def norm_gradient(
    norms: Tensor,
    indices: Tensor,
    weights: Tensor,
    d_weights: Tensor,
    d_norms: Tensor | None,
    weighting: str,
) -> Tensor:
    """Return the gradient of every norm `[tokens, experts]`: through the mixing weights, plus the given `d_norms`."""
    if weighting == "topk_softmax":
        total = torch.zeros_like(norms).scatter_(1, indices, softmax_backward(weights, d_weights))
    else:
        total = softmax_backward(norms.softmax(-1), torch.zeros_like(norms).scatter_(1, indices, d_weights))
    return total if d_norms is None else total.add_(d_norms)


def cache_blocks(
    x: Tensor, w_down: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (tokens, C `[tokens, experts, rank]` computed in `dtype`) in blocks of bounded size.

    Args:
        x: `[tokens, dim]`.
        w_down: `[experts, rank, dim]`.
        dtype: dtype of the products.
        scale: `[tokens, 1]`, multiplies x; None for 1.
    """
    experts, rank, dim = w_down.shape
    block = max(1, BLOCK_ELEMENTS.get(x.device.type, 2**26) // (experts * rank))
    matrix = w_down.reshape(experts * rank, dim).to(dtype).T
    for start in range(0, x.shape[0], block):
        tokens = slice(start, min(start + block, x.shape[0]))
        rows = x[tokens].to(dtype)
        rows = rows if scale is None else rows * scale[tokens]
        yield tokens, (rows @ matrix).view(-1, experts, rank)


def norms_backward(
    x: Tensor, w_down: Tensor, d_norms: Tensor, norms: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what the gradients of the norms of all caches add to the gradients of x and w_down, computed in `dtype`.

    Args:
        x: `[tokens, dim]`.
        w_down: `[experts, rank, dim]`.
        d_norms, norms: `[tokens, experts]`.

    Returns:
        Both in the dtype of `norms`. Only one block of caches is in memory at a time.
    """
    matrix = w_down.flatten(0, 1).to(dtype)
    d_x = x.new_empty(x.shape, dtype=norms.dtype)
    d_down = norms.new_zeros(matrix.shape)
    for tokens, cache in cache_blocks(x, w_down, dtype):
        d_cache = through_norms(cache, d_norms[tokens], norms[tokens]).flatten(1)
        d_x[tokens] = d_cache @ matrix
        d_down += d_cache.T @ x[tokens].to(dtype)
    return d_x, d_down.view_as(w_down)


def through_norms(cache: Tensor, d_norms: Tensor, norms: Tensor) -> Tensor:
    """Return d_norms C / ||C||, in the dtype of C and 0 where the norm is 0.

    C is computed anew, and where its terms cancel, its roundings are not those of the C whose norms were taken. So the
    quotient has the norm of this C, as a multiple of the given one, which neither overflows nor vanishes.

    Args:
        cache: C, `[..., rank]`.
        d_norms, norms: `[...]`.
    """
    units = cache / torch.where(norms > 0, norms, 1.0)[..., None]
    own = torch.linalg.vector_norm(units, dim=-1)
    return units.mul_(over_norm(d_norms, own)[..., None]).to(cache.dtype)
