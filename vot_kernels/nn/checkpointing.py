"""Activation checkpointing that computes everything again but the costly ops of this package."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from vot_kernels.ops.checks import check_choice

# What a user calls -> the ops of torch whose outputs are kept.
_OPS = {
    "attention": ("hybrid_attention_fwd", "linear_attention_fwd", "flash_attention_fwd"),
    "experts": ("aoe_fwd", "moe_fwd"),
}
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def keeping(*kinds: str) -> Callable[[], Contexts]:
    """Return a `context_fn` of `torch.utils.checkpoint.checkpoint` that keeps what costly ops give.

    Within a checkpointed block the outputs of these ops are kept, with what their backward needs, and all else is
    computed again in the backward pass. For a block of attention this keeps one activation of the width of the tokens,
    and saves the second forward of the attention, whose operations grow with the square of the tokens:

        checkpoint(block, x, layout, use_reentrant=False, context_fn=keeping("attention"))
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keeping("attention")})

    Args:
        kinds: "attention" (exact, hybrid and linear attention), "experts" (`aoe` and `moe`, which keep the hidden
            activations of all experts that a token chose), or both; none is the same as "attention".

    Raises:
        ValueError: a kind is neither.

    Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (arXiv 2205.05198),
    section 5; which operations are kept is the other way round here, since fused attention keeps no matrix of scores.
    """
    for kind in kinds:
        check_choice("kind", kind, tuple(_OPS))
    kept = frozenset(f"vot_kernels::{name}" for kind in kinds or ("attention",) for name in _OPS[kind])
    return partial(create_selective_checkpoint_contexts, partial(_policy, kept))


def _policy(kept: frozenset[str], context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE
