"""A recurrent transformer over scene graphs: frame by frame, with a memory per track.

For the nodes of frame k, with X_k the embedding of class, box and optional region features and M the memory:

    H⁰_k     = X_k + σ(g) ⊙ M[track]
    H_k      = L pre-norm layers of packed attention over the frame's nodes, with relation bias, and MLPs
    M[track] ← GRU(M[track], H_k)

Frames of several graphs are batched as the segments of one packed attention call. The relation bias stays inside that
op: bias_ij is added to the logits exactly by appending its row of biases to query i, and the one-hot vector of its
position in the frame to key j, since [q, bias_i]·[k, e_j] = q·k + bias_ij.

A bias alone shifts attention between neighbours but cannot tell a node that it moves left (softmax over one node is 1
whatever the bias), so each node's embedding also has the relations and events it takes part in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vot_kernels.ops.packed_attention import packed_attention
from vot_kernels.packing import PackedLayout
from vot_kernels.scene_graph.graph import STSG, PackedGraph, Vocabulary

_SUBJECT, _OBJECT = 0, 1
_SPREAD = 4.0  # scales fractions of the frame, 0 to 1, to about unit variance
_PLACE_STEP = 32  # extra head dimensions come in multiples of this; frames of up to 32 nodes share one width


@dataclass(frozen=True)
class RecurrentGraphTransformerConfig:
    """Sizes of a `RecurrentGraphTransformer`.

    Attributes:
        vocabulary: the words that its embeddings represent, in order.
        dim: width of the node states, a multiple of `num_heads`.
        num_layers: transformer layers.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLPs over `dim`.
        feature_dim: width of the region features per node; None uses the graph alone.
        memory: False removes the recurrence, for ablation.

    Raises:
        ValueError: a size is below 1, or dim is not a multiple of num_heads.
    """

    vocabulary: Vocabulary
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    mlp_ratio: int = 2
    feature_dim: int | None = None
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {self.dim} and {self.num_heads}.")

    @property
    def num_edge_types(self) -> int:
        """Predicates, then events, as in `PackedGraph.edges`."""
        return len(self.vocabulary.predicates) + len(self.vocabulary.events)


class RecurrentGraphTransformer(nn.Module):
    """Node states and track embeddings of scene graphs; see the module's text for the equations."""

    def __init__(self, config: RecurrentGraphTransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, vocabulary = config.dim, config.vocabulary
        self.label_embedding = nn.Embedding(len(vocabulary.labels) + 1, dim)  # the last: any other label
        self.attribute_embedding = nn.Parameter(torch.empty(len(vocabulary.attributes), dim))
        self.relation_embedding = nn.Parameter(torch.empty(config.num_edge_types, 2, dim))
        self.relation_bias = nn.Parameter(torch.empty(config.num_edge_types, 2, config.num_heads))
        self.box_mlp = nn.Sequential(nn.Linear(9, dim), nn.GELU(), nn.Linear(dim, dim))
        self.feature_projection = (
            None if config.feature_dim is None else nn.Linear(config.feature_dim, dim, bias=False)
        )
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        self.memory_gate = nn.Parameter(torch.zeros(dim)) if config.memory else None
        self.memory_cell = nn.GRUCell(dim, dim) if config.memory else None
        self.readout = nn.Linear(2 * dim if config.memory else dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what the layers do not initialise themselves."""
        nn.init.normal_(self.relation_bias, std=0.02)
        # These start small beside the box, so that what things are does not drown where they are.
        for embedding in (self.label_embedding.weight, self.attribute_embedding, self.relation_embedding):
            nn.init.normal_(embedding, std=0.1)
        if self.memory_gate is not None:
            nn.init.zeros_(self.memory_gate)

    def forward(self, graphs: Sequence[PackedGraph], features: Tensor | None = None) -> Tensor:
        """Compute the states of all nodes.

        Args:
            graphs: from `STSG.to_packed(config.vocabulary)`. Graphs do not see one another.
            features: `[nodes, feature_dim]`, the nodes of all graphs in turn; required if and only
                if the model has a feature_dim.

        Returns:
            `[nodes, dim]` in the order of the graphs' nodes. A node's state depends on its own and on earlier
            frames only.

        Raises:
            ValueError: a graph has another vocabulary, or the features do not fit.
        """
        return self._run(_Batch(graphs, self.config), features)[0]

    def embed(self, graphs: STSG | Sequence[STSG], features: Tensor | None = None) -> Tensor:
        """Return one embedding per tracklet: a projection of [mean of its states, its memory after the last frame].

        Args:
            graphs: one graph or several, of any vocabulary; words that the model does not know count as unknown.
            features: as in `forward`.

        Returns:
            `[tracks, dim]`, the tracklets of all graphs in turn. A tracklet without boxes has
            the embedding of zeros, the readout's bias.
        """
        graphs = [graphs] if isinstance(graphs, STSG) else graphs
        packed = [g.to_packed(self.config.vocabulary) for g in graphs]
        return self.embed_spans(packed, 1, features).squeeze(1)

    def embed_spans(
        self, graphs: Sequence[PackedGraph], spans: int, features: Tensor | None = None
    ) -> Tensor:
        """Return `spans` embeddings per tracklet, one for each part of its graph's frames.

        Each is a projection of [mean of the tracklet's states in that part, its memory after the last frame].

        Args:
            graphs: from `STSG.to_packed(config.vocabulary)`. Graphs do not see one another.
            spans: number of parts, of equal length, at least 1.
            features: as in `forward`.

        Returns:
            `[tracks, spans, dim]`, the tracklets of all graphs in turn. Where a tracklet has no box in a part, the mean
            is zeros.

        Raises:
            ValueError: spans is below 1, a graph has another vocabulary, or the features do not fit.
        """
        if spans < 1:
            raise ValueError(f"spans must be at least 1, got {spans}.")
        batch = _Batch(graphs, self.config)
        states, memory = self._run(batch, features)
        part = _join([_parts(g.lengths, spans) for g in graphs])
        place = batch.tensor(batch.track[batch.inverse] * spans + part, states)
        counts = torch.bincount(place, minlength=batch.num_tracks * spans).clamp(min=1)
        sums = states.new_zeros(batch.num_tracks * spans, self.config.dim).index_add(0, place, states)
        pooled = (sums / counts.unsqueeze(1)).view(batch.num_tracks, spans, self.config.dim)
        if memory is None:
            return self.readout(pooled)
        return self.readout(torch.cat([pooled, memory.unsqueeze(1).expand_as(pooled)], dim=-1))

    def _run(self, batch: "_Batch", features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return node states in the graphs' order and the final memory `[tracks, dim]`, or None without a memory."""
        inputs = self._embed_nodes(batch, features)
        bias, place = self._relation_bias(batch, inputs)
        track = batch.tensor(batch.track, inputs)
        memory = inputs.new_zeros(batch.num_tracks, self.config.dim) if self.config.memory else None
        states = []
        for rows, lengths in batch.steps():
            hidden, here = inputs[rows], track[rows]
            if memory is not None and self.memory_gate is not None:
                hidden = hidden + torch.sigmoid(self.memory_gate) * memory[here]
            layout = PackedLayout.from_lengths(lengths, device=inputs.device)
            for layer in self.layers:
                hidden = layer(hidden, bias[rows], place[rows], layout)
            hidden = self.norm(hidden)
            if memory is not None and self.memory_cell is not None:
                memory = memory.index_copy(0, here, self.memory_cell(hidden, memory[here]))
            states.append(hidden)
        packed = torch.cat(states) if states else inputs
        return packed[batch.tensor(batch.inverse, inputs)], memory

    def _embed_nodes(self, batch: "_Batch", features: Tensor | None) -> Tensor:
        """Return X `[nodes, dim]` in the batch's order."""
        like = self.relation_bias
        boxes, scores = batch.tensor(batch.boxes, like), batch.tensor(batch.scores, like)
        corner, end = boxes[:, :2], boxes[:, 2:]
        shape = torch.cat([boxes, (corner + end) / 2, end - corner, scores.unsqueeze(1)], dim=1)
        nodes = self.label_embedding(batch.tensor(batch.label, like)) + self.box_mlp(_SPREAD * (shape - 0.5))
        nodes = nodes + batch.tensor(batch.attributes, like) @ self.attribute_embedding
        type, weight = batch.tensor(batch.edge_type, like), batch.tensor(batch.edge_scores, like)
        for role, ends in ((_SUBJECT, batch.edge_subject), (_OBJECT, batch.edge_object)):
            relation = self.relation_embedding[type, role] * weight.unsqueeze(1)
            nodes = nodes.index_add(0, batch.tensor(ends, like), relation)
        if features is None and self.feature_projection is None:
            return nodes
        return nodes + self._project(batch, features)

    def _project(self, batch: "_Batch", features: Tensor | None) -> Tensor:
        width = self.config.feature_dim
        if features is None or self.feature_projection is None or features.shape != (batch.num_nodes, width):
            given = "none" if features is None else list(features.shape)
            wanted = "none" if width is None else [batch.num_nodes, width]
            raise ValueError(f"Node features must have the shape {wanted}, got {given}.")
        return self.feature_projection(features[batch.tensor(batch.order, features)])

    def _relation_bias(self, batch: "_Batch", like: Tensor) -> tuple[Tensor, Tensor]:
        """Return extra head dimensions: queries' biases `[nodes, heads, width]`, keys' positions `[nodes, width]`."""
        heads, width = self.config.num_heads, batch.width
        type, weight = batch.tensor(batch.edge_type, like), batch.tensor(batch.edge_scores, like).unsqueeze(1)
        bias = like.new_zeros(batch.num_nodes * width, heads)
        ends = (batch.edge_subject, batch.edge_object)
        for role, (query, key) in ((_SUBJECT, ends), (_OBJECT, ends[::-1])):
            cell = batch.tensor(query * width + batch.place[key], like)
            bias = bias.index_add(0, cell, self.relation_bias[type, role] * weight)
        place = F.one_hot(batch.tensor(batch.place, like), width).to(like.dtype)
        return bias.view(-1, width, heads).transpose(1, 2), place


class _Layer(nn.Module):
    """Pre-norm attention with relation bias, then a pre-norm MLP."""

    def __init__(self, config: RecurrentGraphTransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_ratio * dim), nn.GELU(), nn.Linear(config.mlp_ratio * dim, dim)
        )

    def forward(self, hidden: Tensor, bias: Tensor, place: Tensor, layout: PackedLayout) -> Tensor:
        nodes, dim = hidden.shape
        q, k, v = self.qkv(self.attention_norm(hidden)).view(nodes, 3, self.num_heads, -1).unbind(1)
        head_dim = q.shape[-1]
        q = torch.cat([q * head_dim**-0.5, bias], dim=-1)
        k = torch.cat([k, place.unsqueeze(1).expand(-1, self.num_heads, -1)], dim=-1)
        v = F.pad(v, (0, place.shape[-1]))
        mixed = packed_attention(q, k, v, layout, scale=1.0)[..., :head_dim]
        hidden = hidden + self.output(mixed.reshape(nodes, dim))
        return hidden + self.mlp(self.mlp_norm(hidden))


class _Batch:
    """Several packed graphs as one, with nodes sorted by frame, then graph, so that each frame is one slice of rows.

    `order` maps rows to nodes in the graphs' order, `inverse` back. Arrays are numpy; `place` is a node's position in
    its own frame and graph.
    """

    def __init__(self, graphs: Sequence[PackedGraph], config: RecurrentGraphTransformerConfig) -> None:
        for graph in graphs:
            _check(graph, config)
        frames = max((len(g.lengths) for g in graphs), default=0)
        self.counts = np.zeros((frames, len(graphs)), np.int64)  # nodes of each frame of each graph
        for i, g in enumerate(graphs):
            self.counts[: len(g.lengths), i] = g.lengths
        nodes = np.array([len(g.track) for g in graphs], np.int64)
        first_node = np.cumsum(nodes) - nodes
        tracks = np.array([g.num_tracks for g in graphs], np.int64)
        first_track = np.cumsum(tracks) - tracks
        self.num_nodes, self.num_tracks = int(nodes.sum()), int(tracks.sum())

        frame = _join([np.repeat(np.arange(len(g.lengths)), g.lengths) for g in graphs])
        self.order = np.argsort(frame, kind="stable")
        self.inverse = np.argsort(self.order)
        self.track = _join([g.track + n for g, n in zip(graphs, first_track, strict=True)])[self.order]
        self.label = _join([g.label for g in graphs])[self.order]
        vocabulary = config.vocabulary
        self.attributes = _join([g.attributes for g in graphs], np.float32, len(vocabulary.attributes))[
            self.order
        ]
        self.boxes = _join([g.boxes for g in graphs], np.float32, 4)[self.order]
        self.scores = _join([g.scores for g in graphs], np.float32)[self.order]

        sizes = self.counts.ravel()
        self.place = np.arange(self.num_nodes) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.width = max(_PLACE_STEP, -(-int(sizes.max(initial=1)) // _PLACE_STEP) * _PLACE_STEP)
        ends = _join([g.edges[:, :2] + n for g, n in zip(graphs, first_node, strict=True)], np.int64, 2)
        self.edge_subject, self.edge_object = self.inverse[ends[:, 0]], self.inverse[ends[:, 1]]
        self.edge_type = _join([g.edges[:, 2] for g in graphs])
        self.edge_scores = _join([g.edge_scores for g in graphs], np.float32)

    def steps(self) -> list[tuple[slice, list[int]]]:
        """Return (rows, nodes of each graph) of the frames that have nodes."""
        ends = np.cumsum(self.counts.sum(1))
        return [
            (slice(int(end) - sum(lengths), int(end)), lengths)
            for end, lengths in zip(ends, self.counts.tolist(), strict=True)
            if any(lengths)
        ]

    @staticmethod
    def tensor(array: np.ndarray, like: Tensor) -> Tensor:
        """Return the array on `like`'s device; floats in its dtype."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor


def _join(arrays: list[np.ndarray], dtype: type = np.int64, width: int | None = None) -> np.ndarray:
    empty: np.ndarray = np.zeros((0,) if width is None else (0, width), dtype)
    return np.concatenate([empty, *arrays]).astype(dtype)


def _parts(lengths: np.ndarray, spans: int) -> np.ndarray:
    """Return for each node of a graph which of `spans` equal parts of the frames it lies in."""
    return np.repeat(np.arange(len(lengths)) * spans // max(len(lengths), 1), lengths)


def _check(graph: PackedGraph, config: RecurrentGraphTransformerConfig) -> None:
    vocabulary = config.vocabulary
    fits = (
        graph.attributes.shape[1] == len(vocabulary.attributes)
        and graph.label.max(initial=0) <= len(vocabulary.labels)
        and graph.edges[:, 2].max(initial=-1) < config.num_edge_types
    )
    if not fits:
        raise ValueError(
            f"A graph must be packed with the model's own vocabulary "
            f"({len(vocabulary.labels)} labels, {len(vocabulary.attributes)} attributes, "
            f"{config.num_edge_types} predicates and events): to_packed(config.vocabulary)."
        )
