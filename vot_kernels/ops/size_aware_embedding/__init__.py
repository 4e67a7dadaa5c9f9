"""An embedding of the size of an image or clip: see `op.py`."""

from vot_kernels.ops.size_aware_embedding.op import QUANTITIES, size_aware_embedding, size_features

__all__ = ["QUANTITIES", "size_aware_embedding", "size_features"]
