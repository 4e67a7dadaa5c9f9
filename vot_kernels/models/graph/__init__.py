"""The recurrent graph transformer, which turns a scene graph into vectors."""

from vot_kernels.models.graph.modeling import RecurrentGraphTransformer, RecurrentGraphTransformerConfig
from vot_kernels.models.graph.tensors import GRAPH_INPUTS, graph_tensors, packed_graphs

__all__ = [
    "GRAPH_INPUTS",
    "RecurrentGraphTransformer",
    "RecurrentGraphTransformerConfig",
    "graph_tensors",
    "packed_graphs",
]
