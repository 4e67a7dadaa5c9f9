"""Packed graphs as tensors, so that a batch of graphs travels like any other input of a model."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vot_kernels.scene_graph.graph import PackedGraph

GRAPH_INPUTS = ("graph_sizes", "graph_nodes", "graph_boxes", "graph_edges", "graph_edge_scores")
"""The names of the tensors, which are also arguments of the model's forward."""


def graph_tensors(graphs: Sequence[PackedGraph]) -> dict[str, Tensor]:
    """Return graphs of one vocabulary as tensors, of which the rows of all graphs follow one another.

    Returns:
        `graph_sizes` int64 `[graphs, 4]`: frames, nodes, edges and tracks of each graph.
        `graph_nodes` int64 `[nodes, 3]`: frame, track and label.
        `graph_boxes` float32 `[nodes, 5 + attributes]`: x1, y1, x2, y2, score, and 1 for each attribute it has.
        `graph_edges` int64 `[edges, 3]` and `graph_edge_scores` float32 `[edges]`: as in `PackedGraph`.

    Raises:
        ValueError: there is no graph.
    """
    if not graphs:
        raise ValueError("graphs must have at least one graph, got none.")
    sizes = [(len(g.lengths), len(g.track), len(g.edges), g.num_tracks) for g in graphs]
    nodes = [np.stack([np.repeat(np.arange(len(g.lengths)), g.lengths), g.track, g.label], 1) for g in graphs]
    boxes = [np.concatenate([g.boxes, g.scores[:, None], g.attributes], 1) for g in graphs]
    arrays = {
        "graph_sizes": np.array(sizes, np.int64),
        "graph_nodes": np.concatenate(nodes).astype(np.int64),
        "graph_boxes": np.concatenate(boxes).astype(np.float32),
        "graph_edges": np.concatenate([g.edges for g in graphs]),
        "graph_edge_scores": np.concatenate([g.edge_scores for g in graphs]),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def packed_graphs(tensors: Mapping[str, Tensor]) -> list[PackedGraph]:
    """Return the graphs of `graph_tensors`; `coref`, which the model does not read, is empty.

    Raises:
        ValueError: a tensor is missing, or its rows are not those that `graph_sizes` counts.
    """
    if missing := [name for name in GRAPH_INPUTS if tensors.get(name) is None]:
        raise ValueError(f"Graphs are given by {', '.join(GRAPH_INPUTS)} together; {missing[0]} is missing.")
    sizes, nodes, boxes, edges, scores = (_array(tensors[name]) for name in GRAPH_INPUTS)
    ends = np.cumsum(sizes, 0)
    counted = ends[-1, 1:3].tolist() if len(sizes) else [0, 0]
    if counted != [len(nodes), len(edges)] or len(boxes) != len(nodes) or len(scores) != len(edges):
        raise ValueError(
            f"graph_sizes counts {counted[0]} nodes and {counted[1]} edges, but there are {len(nodes)} nodes, "
            f"{len(boxes)} boxes, {len(edges)} edges and {len(scores)} edge scores."
        )
    starts = ends - sizes
    found = []
    for (frames, _, _, tracks), start, end in zip(sizes.tolist(), starts, ends, strict=True):
        node, edge = slice(start[1], end[1]), slice(start[2], end[2])
        found.append(
            PackedGraph(
                lengths=np.bincount(nodes[node, 0], minlength=frames).astype(np.int64),
                track=nodes[node, 1],
                label=nodes[node, 2],
                attributes=boxes[node, 5:],
                boxes=boxes[node, :4],
                scores=boxes[node, 4],
                edges=edges[edge],
                edge_scores=scores[edge],
                coref=np.zeros((0, 2), np.int64),
                num_tracks=tracks,
            )
        )
    return found


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
