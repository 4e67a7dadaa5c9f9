"""The recurrent graph transformer, which turns a scene graph into vectors."""

from vot_kernels.models.graph.modeling import RecurrentGraphTransformer, RecurrentGraphTransformerConfig

__all__ = ["RecurrentGraphTransformer", "RecurrentGraphTransformerConfig"]
