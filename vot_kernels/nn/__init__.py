"""Modules on the ops; they need only torch."""

from vot_kernels.nn.aoe_conversion import ConversionReport, convert_swiglu
from vot_kernels.nn.autonomy_of_experts import AutonomyOfExperts, ExpertUsage, expert_usage
from vot_kernels.nn.dense_residual import DenseResidual
from vot_kernels.nn.hybrid_attention import HybridAttention
from vot_kernels.nn.linear_attention import LinearAttention
from vot_kernels.nn.mlp import SwiGLU
from vot_kernels.nn.mlp_conversion import BiasedExperts, convert_mlp
from vot_kernels.nn.pooling import PackedAttentionPooling
from vot_kernels.nn.rotary import RotaryEmbedding
from vot_kernels.nn.size_aware_embedding import SizeAwareEmbedding

__all__ = [
    "AutonomyOfExperts",
    "BiasedExperts",
    "ConversionReport",
    "DenseResidual",
    "ExpertUsage",
    "HybridAttention",
    "LinearAttention",
    "PackedAttentionPooling",
    "RotaryEmbedding",
    "SizeAwareEmbedding",
    "SwiGLU",
    "convert_mlp",
    "convert_swiglu",
    "expert_usage",
]
