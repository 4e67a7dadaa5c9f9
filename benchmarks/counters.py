"""The minimal floating-point operations and bytes of an op, computed from its sizes.

A multiply-add counts as two operations; exponentials, norms and additions are left out, as is usual for
attention and matrix products. Bytes: every input read once, every output written once.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

from benchmarks.core import Work

# Products per query-key pair: the forward computes scores and values; the backward the scores again, dp, dv, dq, dk.
_PAIR_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
# Products per token with a state of feature x head_dim: the forward builds and reads it; the backward builds the
# states again, then computes the states' gradient (a build), dphi(q), dphi(k) and dv.
_STATE_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


def attention(problem: Any, direction: str, itemsize: int) -> Work:
    """Count packed, linear or hybrid attention; see `benchmarks.problems.attention.Attention` for the sizes."""
    d = problem.head_dim
    flops = 2 * problem.near_pairs() * problem.heads * d * _PAIR_PRODUCTS[direction]
    if problem.kind != "packed_attention":
        flops += 2 * problem.size * problem.heads * d * d * _STATE_PRODUCTS[direction]
    queries = problem.size * problem.heads * d * itemsize
    keys = problem.size * problem.kv_heads * d * itemsize
    forward = 2 * queries + 2 * keys  # read q, k, v, write o
    backward = 4 * queries + 4 * keys  # read q, k, v, o, do, write dq, dk, dv
    total = {"forward": forward, "backward": backward, "both": forward + backward}
    return Work(flops, total[direction])


def hybrid_step(problem: Any, itemsize: int) -> Work:
    """See `benchmarks.problems.stream.HybridStep`: the far state is read once and written once, in float32."""
    n, d = problem.tokens, problem.head_dim
    near = (problem.window + 1) * n
    products = problem.heads * n * d * (2 * near + d) + problem.kv_heads * n * d * d
    tensors = d * (2 * n * problem.heads + 2 * near * problem.kv_heads) * itemsize
    return Work(2 * products, tensors + 2 * 4 * problem.kv_heads * d * (d + 1))


def dense_residual(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.DenseResidual`."""
    n, states = problem.tokens * problem.width, problem.states
    flops = {"forward": 2 * states * n, "backward": 3 * states * n, "both": 5 * states * n}
    forward, backward = states + 1, 2 * states + 1  # backward: read grad and states, write their gradients
    tensors = {"forward": forward, "backward": backward, "both": forward + backward}
    return Work(flops[direction], tensors[direction] * n * itemsize)


def dense_residual_norm(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.DenseResidualNorm`: beside the sum, the norm is written and takes 4 operations per
    element; the backward reads its gradient and the sum, and takes 9."""
    plain, n = dense_residual(problem, direction, itemsize), problem.tokens * problem.width
    tensors, flops = {"forward": (1, 4), "backward": (2, 9), "both": (3, 13)}[direction]
    return Work(plain.flops + flops * n, plain.bytes + tensors * n * itemsize)


# RMS norm and rotation per element: square and add 2, scale 2, rotate 3; the backward rotates back (3), normalises
# again (4), and takes two products with the normed value (4) and its own scaling (4).
_ROPE_NORM_FLOPS = {"forward": 7, "backward": 15, "both": 22}
_ROPE_NORM_TENSORS = {"forward": 2, "backward": 3, "both": 5}  # backward: read grad and x, write dx


def rope_qk_norm(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.RopeQkNorm`; positions and norm weights are too small to count."""
    n = problem.size * (problem.heads + problem.kv_heads) * problem.head_dim
    return Work(_ROPE_NORM_FLOPS[direction] * n, _ROPE_NORM_TENSORS[direction] * n * itemsize)


def size_aware_embedding(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.SizeAwareEmbedding`: one addition per element, and the two small layers."""
    n = problem.size * problem.width
    layers = 2 * len(problem.grid) * problem.hidden * (12 * problem.octaves + problem.width)
    flops = {"forward": n + layers, "backward": n + 2 * layers, "both": 2 * n + 3 * layers}
    tensors = {"forward": 2, "backward": 2, "both": 4}  # backward: read grad, write dx
    return Work(flops[direction], tensors[direction] * n * itemsize)


def pack_patches(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.PackPatches`: every value is moved once each way."""
    values = 3 * sum(height * width for height, width in problem.sizes)
    return Work(0, 2 * values * itemsize * (2 if direction == "both" else 1))


def normalise_patches(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.fused.NormalisePatches`: a byte is read, a number of `itemsize` bytes is written, and
    each is divided, shifted and divided again."""
    values = 3 * sum(height * width for height, width in problem.sizes)
    return Work(3 * values, values * (1 + itemsize))


def aoe(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.experts.AoE`: T tokens, n experts, k chosen, rank r, hidden D, dim d.

    Multiply-adds forward: T · n · r · d for the caches of all experts, T · k · D · (r + 2 d) for the bodies of
    those chosen. Backward: twice the bodies and twice the caches of the k chosen experts, 2 T k r d, as under
    "topk_softmax" no other expert gets a gradient. Recomputation does not count.

    Bytes: forward x and y, T · d each, and the n · (r d + D r + 2 D d) weights; backward x, dy and dx, the
    weights read and their gradients written.
    """
    t, d, n, k, r = problem.tokens, problem.dim, problem.experts, problem.top_k, problem.rank
    body = k * problem.hidden * (r + 2 * d)
    flops = {"forward": 2 * t * (n * r * d + body), "backward": 4 * t * (k * r * d + body)}
    weights = n * (r * d + problem.hidden * (r + 2 * d))
    elements = {"forward": 2 * t * d + weights, "backward": 3 * t * d + 2 * weights}
    return _one_or_both(direction, flops, {key: itemsize * count for key, count in elements.items()})


def moe(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.experts.MoE`: T tokens, E experts, k chosen, hidden h, dim d; routing is given.

    Multiply-adds: 3 · T · k · h · d forward (gate, up, down), twice that backward.

    Bytes: forward x and y, T · d each, the 3 h d weights of each expert that can be chosen (at most T · k of
    them), and T · k ids (int64) with their weights; backward x, dy and dx, the same weights, the gradients of
    all E experts, and the ids with their weights and the weights' gradients.
    """
    t, d, slots = problem.tokens, problem.dim, problem.tokens * problem.top_k
    expert = 3 * problem.hidden * d
    forward = 2 * slots * expert
    read, everything = min(problem.experts, slots) * expert, problem.experts * expert
    traffic = {
        "forward": itemsize * (2 * t * d + read + slots) + 8 * slots,
        "backward": itemsize * (3 * t * d + read + everything + 2 * slots) + 8 * slots,
    }
    return _one_or_both(direction, {"forward": forward, "backward": 2 * forward}, traffic)


def _one_or_both(direction: str, flops: dict[str, int], traffic: dict[str, int]) -> Work:
    parts = ("forward", "backward") if direction == "both" else (direction,)
    return Work(sum(flops[part] for part in parts), sum(traffic[part] for part in parts))


def encoder(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.encoder.Encoder`; only products count, and a backward takes twice the forward's."""
    parameters, flops = _encoder_forward(problem)
    config = problem.config()
    pixels, out = problem.size * config.patch_numbers, problem.size * config.hidden_size
    forward = parameters + pixels + out
    backward = 2 * (parameters + pixels) + out  # read everything and grad; write the gradients
    numbers = {"forward": forward, "backward": backward, "both": forward + backward}
    return Work(flops * {"forward": 1, "backward": 2, "both": 3}[direction], numbers[direction] * itemsize)


@cache
def _encoder_forward(problem: Any) -> tuple[int, int]:
    """Return the number of parameters, and the floating-point operations of the forward."""
    from vot_kernels.models.encoder.cost import encoder_cost

    costs = {clip: encoder_cost(problem.config(), clip) for clip in set(problem.grid)}
    return next(iter(costs.values())).parameters, sum(costs[clip].flops for clip in problem.grid)


def tower(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.towers.Tower`; only products count, and a layer's backward takes twice its forward.

    Tables of positions are looked up. Query and key meet within a frame, or within windows if the layer has them.
    """
    family, shapes = problem.family, problem.shapes()
    products = 0
    for name, shape in shapes.items():
        if len(shape) > 1 and "pos_embed" not in name and "position_embedding" not in name:
            rows = problem.size // (family.merged if name.startswith("downsample") else 1)
            products += 2 * rows * prod(shape)
    width = problem.config().hidden_size
    layers = [family.window] * (problem.layers - 1) + [None]
    pairs = 2 * width * sum(_pairs(problem.grid, window) for window in layers)
    flops = products * {"forward": 1, "backward": 2, "both": 3}[direction] + pairs * _PAIR_PRODUCTS[direction]
    parameters, pixels = sum(map(prod, shapes.values())), problem.size * prod(next(iter(shapes.values()))[1:])
    out = problem.size // family.merged * (shapes["downsample.weight"][0] if family.merged > 1 else width)
    forward, backward = parameters + pixels + out, 2 * (parameters + pixels) + out
    numbers = {"forward": forward, "backward": backward, "both": forward + backward}
    return Work(flops, numbers[direction] * itemsize)


def _pairs(grid: Sequence[tuple[int, int, int]], window: int | None) -> int:
    """Count the pairs of patches of one frame, or of one window of a frame."""

    def squares(side: int) -> int:
        whole, rest = divmod(side, window or side)
        return whole * (window or side) ** 2 + rest**2

    return sum(frames * squares(height) * squares(width) for frames, height, width in grid)


def video(problem: Any, direction: str, itemsize: int) -> Work:
    """See `benchmarks.problems.video.DecodeAndPack`; only the output pixels count, as decoding depends on the codec."""
    return Work(0, problem.patches * 3 * problem.patch_size**2 * itemsize)
