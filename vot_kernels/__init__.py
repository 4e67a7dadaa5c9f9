"""Hybrid attention over packed variable-length tokens, Autonomy-of-Experts, and Video-of-Thought.

`import vot_kernels` is cheap: the names of `__all__` load their module (and torch) on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vot_kernels.integrations.patching import patch, patched, unpatch
    from vot_kernels.ops.aoe import aoe
    from vot_kernels.ops.dense_residual import dense_residual
    from vot_kernels.ops.flash_attention import flash_attn_func, flash_attn_varlen_func
    from vot_kernels.ops.hybrid_attention import hybrid_attention, hybrid_attention_step
    from vot_kernels.ops.linear_attention import linear_attention
    from vot_kernels.ops.moe import moe
    from vot_kernels.ops.pack_patches import pack_patches
    from vot_kernels.ops.packed_attention import packed_attention
    from vot_kernels.ops.rope_qk_norm import rope_qk_norm
    from vot_kernels.ops.size_aware_embedding import size_aware_embedding
    from vot_kernels.packing import PackedLayout, plan_packing

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "__version__",
    "aoe",
    "dense_residual",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "hybrid_attention",
    "hybrid_attention_step",
    "linear_attention",
    "moe",
    "pack_patches",
    "packed_attention",
    "patch",
    "patched",
    "plan_packing",
    "rope_qk_norm",
    "size_aware_embedding",
    "unpatch",
]

# The rest of __all__ lives in the module of its own name under ops/.
_MODULES = {
    "PackedLayout": "packing",
    "plan_packing": "packing",
    "patch": "integrations.patching",
    "patched": "integrations.patching",
    "unpatch": "integrations.patching",
    "flash_attn_func": "ops.flash_attention",
    "flash_attn_varlen_func": "ops.flash_attention",
    "hybrid_attention_step": "ops.hybrid_attention",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, f'ops.{name}')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(globals() | dict.fromkeys(__all__))
