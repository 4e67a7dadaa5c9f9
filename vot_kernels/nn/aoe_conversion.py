"""Conversion of a SwiGLU feed-forward to Autonomy-of-Experts: neurons are grouped, gates are factored.

A SwiGLU layer is a sum over neurons, so any partition of them gives experts whose plain sum is the layer:

    y = Σ_i (SiLU(x G_iᵀ) ⊙ x U_iᵀ) O_i        G_i, U_i, O_i: the rows of group i, `[hidden, dim]`

W_p = U_i and W_o = O_i are copies. The gate needs the cache, so G_i ≈ W_up W_down of rank r: with the left
singular vectors B of S G_i M^½ (M: second moment of the inputs, S: a diagonal matrix of neuron importances),

    W_up = S⁻¹ B_r        W_down = B_rᵀ S G_i        ‖C_i‖ = ‖B_rᵀ S G_i x‖ ≈ ‖S G_i x‖

is the factorisation with the least E‖S (G_i - W_up W_down) x‖² (Eckart and Young), and the norm that selects the
expert is the weighted energy of its gates. Three things then differ from the dense layer, and the report measures
each: gates have rank r, only top_k experts contribute, and their weights are a softmax that sums to 1. Scaling repairs
the last: W_down · c, W_up / c is the same expert with c times the norm, so that a small c makes the weights nearly
equal, and W_o is multiplied by the factor (top_k, or fitted) that a plain sum needs.

Some neurons contribute to every token. In a shared expert they are kept exactly and need no selection, which lowers
the error and balances the load of the other experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts
from vot_kernels.ops.checks import check_alike, check_choice, check_device, check_floating, check_tensor

SCORES = ("output", "gate")
_PROFILE_WIDTH = 1024
_BEGINNINGS = 4
_BLOCK_ELEMENTS = 2**23


@dataclass(frozen=True, eq=False)
class ConversionReport:
    """The choices of a conversion and its errors, which are relative Frobenius norms.

    All but `factor_error` are measured on the calibration tokens in float64 (`output_error` in the dtype of the
    layer), and are None without these. Each isolates one step, so they do not add up to `output_error`.

    Attributes:
        groups: int64 `[num_experts, hidden]`, the neuron at each position of each expert; -1 is a zero neuron.
        shared: int64 `[shared_hidden]`, the neurons of the shared expert.
        output_scale: `[num_experts]`, the factor in each expert's W_o.
        load: `[num_experts]`, share of the tokens that chose each expert; sums to top_k.
        factor_error: error of the gate matrices of all experts but the shared one, which is exact.
        gate_error: error of their pre-activations x Gᵀ.
        low_rank_error: error of the output if only the gates have rank r.
        selection_error: error of the output if only the top_k experts contribute, with exact gates, summed plainly.
        best_selection_error: the same if the experts with the largest outputs are selected, as by a perfect score
            for this grouping.
        mixing_error: change by the softmax and `output_scale` in the plain sum of the selected experts, over the
            dense output.
        output_error: error of the returned layer, for `convert_mlp` against the module; infinite if its output
            overflows its dtype on the tokens.
    """

    groups: Tensor
    shared: Tensor
    output_scale: Tensor
    factor_error: float
    load: Tensor | None = None
    gate_error: float | None = None
    low_rank_error: float | None = None
    selection_error: float | None = None
    best_selection_error: float | None = None
    mixing_error: float | None = None
    output_error: float | None = None

    def __str__(self) -> str:
        names = [name for name in self.__dataclass_fields__ if name.endswith("_error")]
        known = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        return ", ".join(f"{name} {value:.3g}" for name, value in known)


def convert_swiglu(
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    num_experts: int,
    top_k: int,
    rank: int,
    *,
    calibration: Tensor | None = None,
    shared_hidden: int = 0,
    score: str = "output",
    sharpness: float = 0.1,
    weighting: str = "topk_softmax",
) -> tuple[AutonomyOfExperts, ConversionReport]:
    """Return an AoE layer that approximates (SiLU(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ, and a report of its errors.

    With `rank = dim` and `top_k = num_experts` the experts sum to the dense layer exactly, except that their weights
    are not quite equal, which `sharpness` bounds. Otherwise the result is a starting point for training.

    Balanced k-means divides the neurons into groups whose sizes differ by at most one (zero neurons fill the rest).
    With calibration tokens it compares when neurons are active, by the direction of |hidden| over the tokens, and
    without them the direction of their gate rows. The same inputs give the same layer on the same machine.

    Args:
        w_gate, w_up: `[hidden, dim]`, floating.
        w_down: `[dim, hidden]`, dtype and device of `w_gate`.
        num_experts: number of experts, at most hidden - shared_hidden.
        top_k: experts per token.
        rank: width of the cache, 1 to dim; more than the hidden width of an expert gives no gain.
        calibration: `[tokens, dim]`, inputs of the layer, floating, on its device: some thousands of tokens like those
            that the layer will see. They determine groups and factors, and W_o is fitted to them by least squares (one
            factor per expert). Without them inputs count as white, and the factor is that of a plain sum.
        shared_hidden: width of a shared expert, 0 for none. It gets the neurons that contribute most on average,
            by the mean square of hidden times ‖column of W_down‖ (without calibration by the product of the
            norms of their three vectors).
        score: what a selecting norm estimates. "output": gates are weighted by their contribution, S = ‖column of
            W_down‖ · rms(hidden) / rms(gate) (without calibration ‖column of W_down‖ · ‖row of W_up‖), also in their
            factorisation. "gate": all gates have the same weight, and ‖C‖² is the energy of the gate pre-activations.
        sharpness: root mean square of the norms after scaling. 0.1 keeps the mixing weights within about a tenth of
            each other. W_down is proportional to it, W_up inversely: train them with matching learning rates, or with
            a sharpness of 1 or more, with which the norms matter from the start.
        weighting: "topk_softmax" or "softmax_topk", see `vot_kernels.aoe`.

    Returns:
        The layer, dtype and device of `w_gate`, and the report. The conversion is computed in float64.

    Raises:
        TypeError: weights or calibration are not floating, or weights have different dtypes.
        ValueError: shapes do not fit together; num_experts, top_k, rank or shared_hidden is out of range; score or
            weighting is unknown; sharpness is not positive and finite; calibration has no tokens or is on another
            device than the weights; weights or calibration have NaN or infinity; or a weight of the layer overflows
            the dtype of `w_gate`.

    Source: the layer of Lv et al. (arXiv 2501.13074); grouping by co-activation as in Zhang et al.,
    MoEfication, Findings of ACL 2022 (arXiv 2110.01786).
    """
    _validate(w_gate, w_up, w_down, num_experts, rank, calibration, shared_hidden, score, sharpness)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # its random weights are replaced below
        layer = AutonomyOfExperts(
            w_gate.shape[1],
            num_experts,
            top_k,
            rank=rank,
            hidden=-(-(w_gate.shape[0] - shared_hidden) // num_experts),
            weighting=weighting,
            shared_hidden=shared_hidden,
        )
    dense = _Dense(*(w.detach().double() for w in (w_gate, w_up, w_down.T)))
    tokens = None if calibration is None else calibration.detach()
    data = None if tokens is None else _observe(dense, tokens)
    contribution, importance = _contribution(dense, data), _importance(dense, data, score)
    _check_range(contribution, importance, *(() if data is None else (data.moment, data.profiles)))
    ranking = torch.argsort(contribution, descending=True, stable=True)
    shared, routed = ranking[:shared_hidden], ranking[shared_hidden:].sort().values
    profiles = dense.gate if data is None else data.profiles
    groups = _group(F.normalize(profiles[routed]), num_experts, routed)
    experts = _factor_experts(dense, groups, importance, data, rank, sharpness)
    plain = torch.full_like(experts.gate[:, 0, 0], top_k if weighting == "topk_softmax" else num_experts)
    scale, errors = (
        (plain, {}) if tokens is None else _measure(experts, dense, tokens, top_k, weighting, plain)
    )
    _fill(layer, experts, scale, dense.take(shared), w_gate.dtype)
    if tokens is not None:
        errors["output_error"] = output_error(layer, dense, tokens, w_gate.shape[0])
    change = experts.gate - layer.w_up.detach().double() @ layer.w_down.detach().double()
    factor_error = _ratio(change.square().sum(), experts.gate.square().sum())
    return layer, ConversionReport(groups, shared, scale, factor_error, **errors)


@dataclass(frozen=True, eq=False)
class _Dense:
    """The dense layer in float64, every matrix `[hidden, dim]`."""

    gate: Tensor
    up: Tensor
    out: Tensor

    def take(self, neurons: Tensor) -> "_Dense":
        return _Dense(self.gate[neurons], self.up[neurons], self.out[neurons])

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (gate pre-activations, hidden activations) `[tokens, hidden]`."""
        gate = x @ self.gate.T
        return gate, F.silu(gate) * (x @ self.up.T)

    def __call__(self, x: Tensor) -> Tensor:
        return self.hidden(x)[1] @ self.out


@dataclass(frozen=True, eq=False)
class _Data:
    """Statistics of the calibration tokens: second moment of x, mean squares per neuron, profiles of neurons."""

    moment: Tensor
    gate_square: Tensor
    hidden_square: Tensor
    profiles: Tensor


@dataclass(frozen=True, eq=False)
class _Experts:
    """Grouped matrices: gate (exact), w_up, w_p, w_o `[experts, hidden, ...]`, w_down `[experts, rank, dim]`."""

    gate: Tensor
    w_down: Tensor
    w_up: Tensor
    w_p: Tensor
    w_o: Tensor


def _blocks(tokens: Tensor, width: int) -> Iterator[Tensor]:
    """Yield blocks of tokens in float64, small enough for `width` elements per token to fit into memory."""
    for block in tokens.split(max(1, _BLOCK_ELEMENTS // width)):
        yield block.double()


def _observe(dense: _Dense, tokens: Tensor) -> _Data:
    neurons, dim = dense.gate.shape
    count = tokens.shape[0]
    moment = dense.gate.new_zeros(dim, dim)
    gate_square, hidden_square = dense.gate.new_zeros(2, neurons)
    profiles = dense.gate.new_zeros(neurons, min(count, _PROFILE_WIDTH))
    generator, start = torch.Generator().manual_seed(0), 0
    for x in _blocks(tokens, neurons):
        gate, hidden = dense.hidden(x)
        moment.addmm_(x.T, x)
        gate_square += gate.square().sum(0)
        hidden_square += hidden.square().sum(0)
        # Many tokens are mixed at random into few, which preserves the distances that k-means needs.
        if count > _PROFILE_WIDTH:
            mix = torch.randn(x.shape[0], _PROFILE_WIDTH, generator=generator, dtype=torch.float64)
        else:
            mix = torch.eye(count, dtype=torch.float64)[start : start + x.shape[0]]
        profiles.addmm_(hidden.abs().T, mix.to(x.device))
        start += x.shape[0]
    return _Data(moment / count, gate_square / count, hidden_square / count, profiles)


def _contribution(dense: _Dense, data: _Data | None) -> Tensor:
    """Return how much each neuron adds to the output on average `[hidden]`; without data the scale is arbitrary."""
    norms = [torch.linalg.vector_norm(rows, dim=1) for rows in (dense.gate, dense.up, dense.out)]
    return norms[0] * norms[1] * norms[2] if data is None else norms[2] * data.hidden_square.sqrt()


def _importance(dense: _Dense, data: _Data | None, score: str) -> Tensor:
    """Return the diagonal S `[hidden]`: positive, with 1 as its largest entry."""
    if score == "gate":
        return torch.ones_like(dense.gate[:, 0])
    importance = torch.linalg.vector_norm(dense.out, dim=1)
    if data is None:
        importance = importance * torch.linalg.vector_norm(dense.up, dim=1)
    else:
        tiny = torch.finfo(importance.dtype).tiny
        importance = importance * (data.hidden_square / data.gate_square.clamp_min(tiny)).sqrt()
    largest = importance.max()
    # A neuron that contributes nothing needs no gate, but the code divides by S.
    return (importance / largest).clamp_min(1e-4) if largest > 0 else torch.ones_like(importance)


def _factor_experts(
    dense: _Dense, groups: Tensor, importance: Tensor, data: _Data | None, rank: int, sharpness: float
) -> _Experts:
    def grouped(rows: Tensor, pad: float = 0.0) -> Tensor:
        return torch.cat([rows, torch.full_like(rows[:1], pad)])[groups]

    gate, importances = grouped(dense.gate), grouped(importance, 1.0)
    moment = torch.eye(gate.shape[2], dtype=gate.dtype, device=gate.device) if data is None else data.moment
    root = _root(moment)
    pairs = [_factor(g, s[:, None], root, rank) for g, s in zip(gate, importances, strict=True)]
    down, up = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
    square = (down @ moment * down).sum() / len(down)  # E‖C‖², mean over the experts
    factor = sharpness / square.sqrt() if square > 0 else 1.0
    return _Experts(gate, down * factor, up / factor, grouped(dense.up), grouped(dense.out))


def _root(moment: Tensor) -> Tensor:
    """Return a matrix whose product with its transpose is `moment`; directions without data get a small weight."""
    values, vectors = torch.linalg.eigh(moment)
    mean = values.mean()
    return vectors * torch.maximum(values, 1e-9 * torch.where(mean > 0, mean, 1.0)).sqrt()


def _factor(gate: Tensor, importance: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (W_down `[rank, dim]`, W_up `[hidden, rank]`), optimal for inputs of second moment root rootᵀ."""
    rated = importance * gate
    basis = torch.linalg.svd(rated @ root, full_matrices=False).U[:, :rank]
    missing = rank - basis.shape[1]
    down, up = basis.T @ rated, basis / importance
    return F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))


def _measure(
    experts: _Experts, dense: _Dense, tokens: Tensor, top_k: int, weighting: str, plain: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Return the output scale fitted to the tokens, and every error except the finished layer's."""
    number, hidden, dim = experts.gate.shape
    gram, right, cross, load = plain.new_zeros(number, number), *plain.new_zeros(3, number)
    squares: dict[str, Tensor] = {}
    for x in _blocks(tokens, number * max(hidden, dim)):
        gate_square, gate_change, exact, factored, norms = _run_experts(experts, x)
        chosen = _largest(norms, top_k)
        logits = norms.masked_fill(~chosen, -torch.inf) if weighting == "topk_softmax" else norms
        parts = factored * (logits.softmax(-1) * chosen)[..., None]
        routed, answer = exact.sum(1), (factored * chosen[..., None]).sum(1)
        best = _largest(torch.linalg.vector_norm(exact, dim=2), top_k)
        found = {
            "dense": dense(x).square().sum(),
            "answer": answer.square().sum(),
            "gate": gate_square,
            "gate_change": gate_change,
            "low_rank": (factored - exact).sum(1).square().sum(),
            "selection": (exact * ~chosen[..., None]).sum(1).square().sum(),
            "best_selection": (exact * ~best[..., None]).sum(1).square().sum(),
        }
        squares = {name: value + squares.get(name, 0) for name, value in found.items()}
        gram += torch.einsum("tid,tjd->ij", parts, parts)
        right += torch.einsum("tid,td->i", parts, routed)
        cross += torch.einsum("tid,td->i", parts, answer)
        load += chosen.sum(0)
    # An expert that no token chose keeps the unfitted factor.
    ridged = _with_ridge(gram, 1e-6)
    scale = torch.linalg.solve(ridged, right + (ridged - gram) @ plain)
    mixing = (scale @ gram @ scale - 2 * scale @ cross + squares["answer"]).clamp_min(0)
    whole = squares["dense"]
    return scale, {
        "load": load / tokens.shape[0],
        "gate_error": _ratio(squares["gate_change"], squares["gate"]),
        "mixing_error": _ratio(mixing, whole),
        **{
            f"{name}_error": _ratio(squares[name], whole)
            for name in ("low_rank", "selection", "best_selection")
        },
    }


def _with_ridge(square: Tensor, share: float) -> Tensor:
    """Return a positive semidefinite matrix plus `share` of its mean diagonal, or of 1 if it is 0."""
    mean = square.diagonal().mean()
    diagonal = torch.full_like(square[0], share) * torch.where(mean > 0, mean, 1.0)
    return square + torch.diag(diagonal)


def _run_experts(experts: _Experts, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return sums of squares of the gates and of their change, outputs with exact and factored gates, norms.

    The outputs are `[tokens, experts, dim]`, unweighted; the norms `[tokens, experts]`.
    """
    gate_square, gate_change = x.new_zeros(2)
    exact, factored, norms = [], [], []
    for expert in range(experts.gate.shape[0]):
        gate, value = x @ experts.gate[expert].T, x @ experts.w_p[expert].T
        cache = x @ experts.w_down[expert].T
        approximation = cache @ experts.w_up[expert].T
        gate_square += gate.square().sum()
        gate_change += (gate - approximation).square().sum()
        exact.append((F.silu(gate) * value) @ experts.w_o[expert])
        factored.append((F.silu(approximation) * value) @ experts.w_o[expert])
        norms.append(torch.linalg.vector_norm(cache, dim=1))
    return gate_square, gate_change, torch.stack(exact, 1), torch.stack(factored, 1), torch.stack(norms, 1)


def _largest(scores: Tensor, top_k: int) -> Tensor:
    """Mark the top_k largest scores of each token, ties to the lowest id."""
    indices = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)


def _check_range(*found: Tensor) -> None:
    """Refuse finite numbers that became infinite in the computation."""
    if not all(x.isfinite().all() for x in found):
        raise ValueError("The weights or the calibration are too large: their products overflow float64.")


def _fill(
    layer: AutonomyOfExperts, experts: _Experts, scale: Tensor, shared: _Dense, dtype: torch.dtype
) -> None:
    w_o = experts.w_o * scale[:, None, None]
    weights = {"w_down": experts.w_down, "w_up": experts.w_up, "w_p": experts.w_p, "w_o": w_o}
    _check_range(*weights.values())
    for name, weight in weights.items():
        stored = weight.to(dtype)
        if not stored.isfinite().all():
            advice = {"w_up": " or a larger sharpness", "w_down": " or a smaller sharpness"}.get(name, "")
            raise ValueError(
                f"{name} overflows {str(dtype).removeprefix('torch.')}: its largest value is "
                f"{float(weight.abs().max()):.3g} and the largest allowed is {torch.finfo(dtype).max:.3g}; "
                f"give weights of a wider dtype{advice}."
            )
        setattr(layer, name, nn.Parameter(stored))
    layer.selection_bias = torch.zeros(len(scale), device=scale.device)
    if layer.shared is not None:
        layer.shared.gate_up.weight = nn.Parameter(torch.cat([shared.gate, shared.up]).to(dtype))
        layer.shared.down.weight = nn.Parameter(shared.out.T.to(dtype).contiguous())


@torch.no_grad()
def output_error(layer: nn.Module, exact: Callable[[Tensor], Tensor], tokens: Tensor, width: int) -> float:
    """Return the distance of the layer from `exact`, which takes float64 tokens, in blocks for `width` per token."""
    dtype = next(layer.parameters()).dtype
    change, square = torch.zeros(2, dtype=torch.float64, device=tokens.device)
    for x in _blocks(tokens, width):
        y = exact(x).double()
        change += (layer(x.to(dtype)).double() - y).square().sum()
        square += y.square().sum()
    return _ratio(change, square)


def _ratio(change: Tensor, square: Tensor) -> float:
    """Return the root of a ratio of sums of squares; 0 / 0 is 0, and a change that is NaN gives infinity."""
    return 0.0 if change == 0 else float((change.nan_to_num(torch.inf, torch.inf) / square).sqrt())


def _group(profiles: Tensor, number: int, names: Tensor) -> Tensor:
    """Group rows by balanced k-means: their names in each group `[number, ceil(rows / number)]`, filled with -1.

    The result is the best of all assignments found from several starts: with equal sizes k-means easily gets stuck,
    and the sum of squares need not decrease in every round.
    """
    points = profiles.float().cpu()
    sizes = torch.full((number,), len(points) // number)
    sizes[: len(points) % number] += 1
    generator = torch.Generator().manual_seed(0)
    runs = [
        _balanced_kmeans(points, sizes, _beginning(points, number, generator)) for _ in range(_BEGINNINGS)
    ]
    labels = _swapped(points, min(runs, key=lambda run: run[0])[1], sizes)
    rows = names[torch.argsort(labels, stable=True).to(names.device)].split(sizes.tolist())
    return torch.stack([F.pad(row, (0, int(sizes.max()) - len(row)), value=-1) for row in rows])


def _balanced_kmeans(points: Tensor, sizes: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    """Return (sum of squares, label of every point) of the best round."""
    best = (torch.inf, torch.zeros(0, dtype=torch.int64))
    for _ in range(30):
        labels = _assign(_distances(points, centres), sizes)
        centres = _centres(points, labels, sizes)
        spread = float((points - centres[labels]).square().sum())
        if spread >= best[0] * (1 - 1e-6):
            break
        best = (spread, labels)
    return best


def _beginning(points: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Choose the centres of k-means++: points drawn by squared distance from the nearest so far (Arthur, 2007)."""
    odds = torch.ones(len(points))
    chosen = []
    for _ in range(number):
        chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        distances = (points - points[chosen[-1]]).square().sum(1)
        odds = distances if len(chosen) == 1 else torch.minimum(odds, distances)
        odds = odds if odds.sum() > 0 else torch.ones_like(odds)  # fewer distinct points than groups
    return points[chosen]


def _centres(points: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    return points.new_zeros(len(sizes), points.shape[1]).index_add_(0, labels, points) / sizes[:, None]


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances, less the square of the point, which no comparison for a point needs."""
    return centres.square().sum(1) - 2 * points @ centres.T


def _swapped(points: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Swap points between two groups as long as that lowers the sum of squares."""
    for _ in range(20):
        before, labels = labels, labels.clone()
        distances = _distances(points, _centres(points, labels, sizes))
        for one, other in combinations(range(len(sizes)), 2):
            pair = []
            for here, there in ((one, other), (other, one)):
                rows = (labels == here).nonzero()[:, 0]
                gain, order = (distances[rows, here] - distances[rows, there]).sort(
                    descending=True, stable=True
                )
                pair.append((gain, rows[order]))
            (gains, rows), (other_gains, other_rows) = pair
            least = min(len(rows), len(other_rows))
            swaps = int((gains[:least] + other_gains[:least] > 1e-6).sum())
            labels[rows[:swaps]], labels[other_rows[:swaps]] = other, one
        if torch.equal(labels, before):
            break
    return labels


def _assign(distances: Tensor, sizes: Tensor) -> Tensor:
    """Give every point the nearest centre with room, where a centre admits its nearest points first."""
    labels, room = torch.full((len(distances),), -1), sizes.clone()
    rows = torch.arange(len(distances))
    while len(rows):
        nearest, choice = distances[rows].masked_fill(room == 0, torch.inf).min(1)
        for centre in choice.unique().tolist():
            mine = choice == centre
            taken = rows[mine][torch.argsort(nearest[mine], stable=True)][: room[centre]]
            labels[taken] = centre
            room[centre] -= len(taken)
        rows = rows[labels[rows] < 0]
    return labels


def _validate(
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    num_experts: int,
    rank: int,
    calibration: Tensor | None,
    shared_hidden: int,
    score: str,
    sharpness: float,
) -> None:
    check_tensor("w_gate", w_gate, ["hidden", "dim"])
    check_floating("w_gate", w_gate)
    hidden, dim = w_gate.shape
    check_tensor("w_up", w_up, [hidden, dim])
    check_tensor("w_down", w_down, [dim, hidden])
    check_alike("w_gate", w_gate, w_up=w_up, w_down=w_down)
    for name, weight in {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}.items():
        _check_finite(name, weight)
    if not 0 <= shared_hidden < hidden:
        raise ValueError(f"shared_hidden must be from 0 to {hidden - 1}, got {shared_hidden}.")
    if not 1 <= num_experts <= hidden - shared_hidden:
        left = f"the {hidden - shared_hidden} neurons that are not shared"
        raise ValueError(f"num_experts must be from 1 to {left}, got {num_experts}.")
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be from 1 to dim, {dim}, got {rank}.")
    check_choice("score", score, SCORES)
    if not 0 < sharpness < float("inf"):
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}.")
    if calibration is not None:
        check_tensor("calibration", calibration, ["tokens", dim])
        check_floating("calibration", calibration)
        check_device("w_gate", w_gate, calibration=calibration)
        if not len(calibration):
            raise ValueError("calibration must have at least one token, got none.")
        _check_finite("calibration", calibration)


def _check_finite(name: str, x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
