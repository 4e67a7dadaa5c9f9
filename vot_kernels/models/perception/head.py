"""The STSG head: object queries that find, track and name objects, and predict relations and events between them.

Queries attend to all tokens of a clip (as in DETR, Carion et al. 2020). Each then locates its object in every frame by
attention over that frame's tokens, refines the position with a glimpse (a small crop) of the pixels there, and names
what a second, centred glimpse shows. Relations and events are predicted from the tracks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vot_kernels.models.perception.configuration import VotPerceptionConfig

_GLIMPSE_MARGIN = 1.5  # side of the locating glimpse divided by the side of the box
_MAX_SHIFT = 0.75  # largest refinement, in box sides


@dataclass
class HeadOutput:
    """The results of the queries for `B` clips of one grid; `Q` queries, `T` frames.

    Attributes:
        centers: `[B, Q, T, 2]`, (x, y) in fractions of the frame.
        coarse_centers: `[B, Q, T, 2]`, the same before the glimpse refined them.
        sizes: `[B, Q, T, 2]`, (width, height) in fractions of the frame.
        heat: `[B, Q, T, P]`, logits over the tokens of each frame.
        presence: `[B, Q, T]`, logits.
        labels: `[B, Q, labels]`, logits.
        attributes: `[B, Q, attributes]`, logits.
        sought: `[B, Q, attributes]`, logits of the attribute that each query looks for, before any glimpse.
        pair_events: `[B, Q, Q, T, kinds]`, independent logits, symmetric in the two queries.
        unary_events: `[B, Q, T, kinds]`, independent logits.
        pair_relations: `[B, Q, Q, T, kinds]`, independent logits.
        unary_relations: `[B, Q, T, kinds]`, independent logits.
    """

    centers: Tensor
    coarse_centers: Tensor
    sizes: Tensor
    heat: Tensor
    presence: Tensor
    labels: Tensor
    attributes: Tensor
    sought: Tensor
    pair_events: Tensor
    unary_events: Tensor
    pair_relations: Tensor
    unary_relations: Tensor


class STSGHead(nn.Module):
    """Turns the encoder's tokens of a clip into tracked, named objects, relations and events."""

    def __init__(self, config: VotPerceptionConfig):
        super().__init__()
        dim = config.encoder.hidden_size
        self.queries = nn.Embedding(config.num_queries, dim)
        self.sought = nn.Linear(dim, max(1, len(config.attributes)))
        self.token_norm = nn.RMSNorm(dim)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, config.decoder_heads) for _ in range(config.decoder_layers)
        )
        self.localizer = Localizer(dim, config.glimpse_size)
        self.namer = Namer(dim, config)
        self.dynamics = Dynamics(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the queries differ from each other at the start, each looking for attributes of its own.

        Without this, queries divide the objects by position, which changes from clip to clip, and they learn slowly
        whether their object is there.
        """
        nn.init.orthogonal_(self.queries.weight)
        own = torch.arange(self.sought.out_features) % self.queries.num_embeddings
        with torch.no_grad():
            self.sought.weight.copy_(3 * self.queries.weight[own])
        nn.init.zeros_(self.sought.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int], frames: Tensor) -> HeadOutput:
        """Read clips of one grid.

        Args:
            tokens: `[B, T * h * w, dim]`, the encoder's output.
            grid: (T, h, w) of every clip.
            frames: `[B, T, 3, H, W]`, the normalised pixels.
        """
        tokens = self.token_norm(tokens)
        queries = self.queries.weight.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens)
        per_frame = tokens.unflatten(1, (grid[0], grid[1] * grid[2]))
        place = self.localizer(queries, per_frame, grid[1:], frames)
        labels, attributes = self.namer(queries, place, frames)
        return HeadOutput(
            centers=place.centers,
            coarse_centers=place.coarse_centers,
            sizes=place.sizes,
            heat=place.heat,
            presence=place.presence,
            labels=labels,
            attributes=attributes,
            sought=self.sought(queries),
            **self.dynamics(place.centers.detach(), place.sizes.detach(), frames.shape[-2:]),
        )


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the clip, and a feed-forward block."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.self_attention = Attention(dim, num_heads)
        self.cross_attention = Attention(dim, num_heads)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.feed_forward = _mlp(dim, 2 * dim, dim)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Update queries `[B, Q, dim]` from tokens `[B, N, dim]` (already normalised)."""
        normed = self.norms[0](queries)
        queries = queries + self.self_attention(normed, normed)
        queries = queries + self.cross_attention(self.norms[1](queries), tokens)
        return queries + self.feed_forward(self.norms[2](queries))


class Attention(nn.Module):
    """Multi-head attention of a few queries over many tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attend from queries `[B, Q, dim]` to tokens `[B, N, dim]`."""
        q = self.query(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@dataclass
class Place:
    """The position of each query's object; shapes as in `HeadOutput`, features `[B, Q, T, dim]`."""

    centers: Tensor
    coarse_centers: Tensor
    sizes: Tensor
    heat: Tensor
    presence: Tensor
    features: Tensor


class Localizer(nn.Module):
    """Locates each object in each frame: attention over tokens, then a glimpse of the pixels."""

    def __init__(self, dim: int, glimpse_size: int):
        super().__init__()
        self.glimpse_size = glimpse_size
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.offset_and_size = _mlp(2 * dim, dim, 4)
        self.glimpse = _mlp(3 * glimpse_size**2, dim, dim)
        self.shift = _mlp(2 * dim, dim, 2)
        self.presence = _mlp(2 * dim + 1, dim, 1)

    def forward(self, queries: Tensor, tokens: Tensor, grid: tuple[int, int], frames: Tensor) -> Place:
        """Locate queries `[B, Q, dim]` in tokens `[B, T, P, dim]`, grid (h, w), frames `[B, T, 3, H, W]`."""
        keys, values = self.key_value(tokens).chunk(2, -1)
        scale = keys.shape[-1] ** -0.5
        heat = torch.einsum("bqd,btpd->bqtp", self.query(queries), keys) * scale
        attention = heat.softmax(-1)
        features = torch.einsum("bqtp,btpd->bqtd", attention, values)
        joined = torch.cat([features, queries[:, :, None].expand_as(features)], -1)
        offset, size = self.offset_and_size(joined).chunk(2, -1)
        patch = tokens.new_tensor([1 / grid[1], 1 / grid[0]])
        pointed = torch.einsum("bqtp,pc->bqtc", attention, _token_centers(grid, tokens))
        coarse = pointed + 2 * torch.tanh(offset) * patch
        sizes = torch.sigmoid(size - 1)

        seen = self.glimpse(
            take_glimpses(frames, coarse.detach(), _GLIMPSE_MARGIN * sizes.detach(), self.glimpse_size)
        )
        shift = _MAX_SHIFT * torch.tanh(self.shift(torch.cat([seen, joined[..., : seen.shape[-1]]], -1)))
        peak = attention.amax(-1, keepdim=True)
        presence = self.presence(torch.cat([seen, joined[..., seen.shape[-1] :], peak], -1)).squeeze(-1)
        centers = coarse.detach() + shift * sizes.detach()
        return Place(centers, coarse, sizes, heat, presence, features)


class Namer(nn.Module):
    """Names an object from its centred glimpses, averaged over the frames in which it is present."""

    def __init__(self, dim: int, config: VotPerceptionConfig):
        super().__init__()
        self.glimpse_size = config.glimpse_size
        self.glimpse = _mlp(3 * config.glimpse_size**2, 2 * dim, dim)
        self.label = _mlp(2 * dim, dim, len(config.labels))
        self.attribute = _mlp(2 * dim, dim, len(config.attributes))

    def forward(self, queries: Tensor, place: Place, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, Q, labels]` and `[B, Q, attributes]`."""
        seen = self.glimpse(self.glimpses(place, frames))
        return self.read(self.label, seen, place), self.read(self.attribute, seen, place)

    def glimpses(self, place: Place, frames: Tensor) -> Tensor:
        """Return a crop of each object in each frame; see `take_glimpses`."""
        return take_glimpses(frames, place.centers.detach(), 1.1 * place.sizes.detach(), self.glimpse_size)

    def read(self, names: nn.Module, seen: Tensor, place: Place, features: Tensor | None = None) -> Tensor:
        """Return the logits of `names` for glimpses `seen` `[B, Q, T, dim]` and features, of `place` by default."""
        joined = torch.cat([seen, place.features if features is None else features], -1)
        weight = torch.sigmoid(place.presence.detach())[..., None] + 1e-3
        weight = weight / weight.sum(2, keepdim=True)
        return (weight * names(joined)).sum(2)


class Dynamics(nn.Module):
    """Relations and events from tracks: small temporal convolutions over relative motion."""

    def __init__(self, config: VotPerceptionConfig, hidden: int = 48):
        super().__init__()
        unary_events, unary_predicates = set(config.unary_events), set(config.unary_predicates)
        self.pair_event = _TemporalConv(9, hidden, len([e for e in config.events if e not in unary_events]))
        self.unary_event = _TemporalConv(10, hidden, len(config.unary_events))
        self.pair_relation = _TemporalConv(
            9, hidden, len([p for p in config.predicates if p not in unary_predicates])
        )
        self.unary_relation = _TemporalConv(10, hidden, len(config.unary_predicates))

    def forward(self, centers: Tensor, sizes: Tensor, frame_size: tuple[int, int]) -> dict[str, Tensor]:
        """Take centers, sizes `[B, Q, T, 2]` in fractions of a frame of `frame_size` (height, width) pixels."""
        # Lengths are in units of the object's own size, so that neither resolution nor aspect ratio matters.
        pixels = centers.new_tensor([frame_size[1], frame_size[0]])
        unit = (sizes * pixels).mean((2, 3), keepdim=True).clamp_min(1.0)
        position = centers * pixels / unit
        walls = torch.cat([position, pixels / unit - position], -1).clamp_max(4.0)
        velocity, turn = _differences(position)
        single = torch.cat([velocity, turn, turn.abs(), walls], -1)

        offset = position[:, None] - position[:, :, None]  # [B, i, j, T, 2], from i to j
        distance = offset.norm(dim=-1, keepdim=True).clamp_min(1e-3)
        closing, bend = _differences(distance)
        turns = turn[:, :, None].expand_as(offset), turn[:, None].expand_as(offset)
        along = [(t * offset / distance).sum(-1, keepdim=True) for t in turns]
        pair = torch.cat(
            [offset.clamp(-4, 4), distance.clamp_max(4.0), closing, bend, *turns[0:1], *along], -1
        )
        events = self.pair_event(pair)
        return {
            "pair_events": events + events.transpose(1, 2),
            "unary_events": self.unary_event(single),
            "pair_relations": self.pair_relation(pair),
            "unary_relations": self.unary_relation(single),
        }


class _TemporalConv(nn.Module):
    """Maps `[..., T, inputs]` to `[..., T, outputs]` with a receptive field of seven frames."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.first = nn.Conv1d(inputs, hidden, 5, padding=2, padding_mode="replicate")
        self.second = nn.Conv1d(hidden, hidden, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv1d(hidden, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-2]
        hidden = F.silu(self.first(x.flatten(0, -3).transpose(1, 2)))
        hidden = F.silu(self.second(hidden))
        return self.last(hidden).transpose(1, 2).unflatten(0, lead)


def take_glimpses(frames: Tensor, centers: Tensor, sizes: Tensor, resolution: int) -> Tensor:
    """Crop bilinearly around `centers`: `[B, Q, T, 3 * resolution**2]`, with the border repeated outside the frame.

    frames `[B, T, 3, H, W]`; centers and sizes `[B, Q, T, 2]` in fractions of the frame, as (x, y).
    """
    steps = (torch.arange(resolution, device=frames.device, dtype=frames.dtype) + 0.5) / resolution - 0.5
    x = centers[..., :1] + sizes[..., :1] * steps
    y = centers[..., 1:] + sizes[..., 1:] * steps
    batch, queries, length, _ = centers.shape
    shape = (batch, queries, length, resolution, resolution)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], -1) * 2 - 1
    # One row of crops per frame: [B * T, Q * resolution, resolution, 2].
    grid = grid.transpose(1, 2).reshape(batch * length, queries * resolution, resolution, 2)
    crops = F.grid_sample(
        frames.flatten(0, 1), grid.to(frames.dtype), padding_mode="border", align_corners=False
    )
    crops = crops.view(batch, length, 3, queries, resolution, resolution)
    return crops.permute(0, 3, 1, 2, 4, 5).flatten(3)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return central first differences and second differences over time (dim -2), zero-order at the ends."""
    before = torch.cat([x[..., :1, :], x[..., :-1, :]], -2)
    after = torch.cat([x[..., 1:, :], x[..., -1:, :]], -2)
    bend = after - 2 * x + before
    inner = torch.ones(x.shape[-2], 1, dtype=x.dtype, device=x.device)
    inner[0] = inner[-1] = 0.0  # the ends have no second difference
    return (after - before) / 2, bend * inner


def _token_centers(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Return (x, y) of each token's centre in fractions of the frame, `[h * w, 2]`."""
    height, width = grid
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
