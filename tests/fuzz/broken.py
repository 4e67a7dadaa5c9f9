"""Calls with one argument broken: the outcome must be a result, or a ValueError or TypeError with a sentence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vot_kernels
from tests.fuzz.calls import Draw
from tests.fuzz.checks import WrongResult, is_a_sentence
from vot_kernels import PackedLayout

STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        3,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "token",
        "softmax",
        "auto",
        "nowhere",
    ),
    *([], [1], (1, 2), (1, 2, 3), {}, object(), [[1], [2, 3]], b"x"),
)


def strange_tensors(draw: Draw) -> list[Tensor]:
    shapes = [(), (0,), (3,), (3, 2), (7, 2, 4), (7, 2, 0), (0, 0, 0), (7, 0, 4), (2, 7, 2, 4), (7, 3, 4)]
    dtypes = [torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8]
    return [torch.zeros(draw.pick(shapes), dtype=draw.pick(dtypes)) for _ in range(4)]


def _valid() -> dict[str, dict[str, Any]]:
    """The arguments by name of one correct call per function."""
    layout = PackedLayout.from_lengths([4, 3], group_size=2)
    q, k, v = torch.randn(3, 7, 2, 4)
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
    qkv = {"q": q, "k": k, "v": v}
    flash = {"dropout_p": 0.0, "softmax_scale": None, "causal": True, "window_size": (1, 1), "softcap": 0.0}
    flash |= {"alibi_slopes": None, "deterministic": False, "return_attn_probs": True, "backend": "auto"}
    varlen = {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
        "block_table": None,
    }
    options = {"layout": layout, "backend": "auto"}
    hybrid = {"window": 1, "beta": torch.zeros(2), "feature_map": "softmax", "causal": None, "scale": None}
    hybrid |= {"q_features": None, "k_features": None, "return_lse": True}
    experts = {"w_down": torch.randn(3, 2, 4), "w_up": torch.randn(3, 5, 2), "w_p": torch.randn(3, 5, 4)}
    experts |= {"x": torch.randn(7, 4), "w_o": torch.randn(3, 5, 4), "top_k": 2}
    return {
        "hybrid_attention": {**qkv, **options, **hybrid},
        "packed_attention": {**qkv, **options, "causal": True, "scale": None, "return_lse": False},
        "linear_attention": {
            **qkv,
            **options,
            "feature_map": "elu",
            "causal": True,
            "log_decay": -torch.ones(2),
        },
        "flash_attn_varlen_func": {**qkv, **varlen, **flash},
        "flash_attn_func": {**{name: x[None] for name, x in qkv.items()}, **flash},
        "hybrid_attention_step": {
            **qkv,
            "state": None,
            "window": 1,
            "beta": None,
            "feature_map": "softmax",
            "scale": None,
            "backend": "auto",
        },
        "aoe": {**experts, "weighting": "topk_softmax", "bias": None, "return_aux": True, "backend": "auto"},
        "moe": {
            "x": torch.randn(7, 4),
            "w_gate_up": torch.randn(3, 10, 4),
            "w_down": torch.randn(3, 4, 5),
            "topk_idx": torch.zeros(7, 2, dtype=torch.int64),
            "topk_weights": torch.ones(7, 2),
            "backend": "auto",
        },
        "dense_residual": {
            "states": [torch.ones(3), torch.ones(3)],
            "weights": torch.ones(2),
            "backend": "auto",
        },
        "rope_qk_norm": {
            **{"q": q, "k": k, "positions": torch.zeros(7, 3), "q_weight": torch.ones(4), "k_weight": None},
            **{"theta": 100.0, "sections": [1, 1, 0], "eps": 1e-6, "backend": "auto"},
        },
        "size_aware_embedding": {
            **{
                "x": torch.randn(7, 4),
                "w1": torch.randn(5, 12),
                "b1": torch.zeros(5),
                "w2": torch.randn(4, 5),
            },
            **{"b2": torch.zeros(4), "fps": 8.0, "use_frames": True, **options},
        },
        "pack_patches": {"images": [torch.ones(3, 4, 4)], "patch_size": 2, "temporal_patch_size": 1},
        "PackedLayout.from_lengths": {"lengths": [3, 4], "group_size": 2},
        "PackedLayout.from_cu_seqlens": {
            "cu_seqlens": [0, 3, 7],
            "cu_groups": None,
            "group_size": 2,
            "num_tokens": 9,
        },
        "PackedLayout.from_grid_thw": {"grid_thw": [[1, 2, 3]], "group": "frame"},
        "plan_packing": {"lengths": [3, 4], "budget": 7},
    }


FUNCTIONS = tuple(_valid())


def _function(name: str) -> Callable[..., Any]:
    owner: Any = vot_kernels
    for word in name.split("."):
        owner = getattr(owner, word)
    return owner


def check_broken(draw: Draw) -> str:
    """Break one argument of one function; returns what was called.

    Raises:
        WrongResult: the answer is an exception of another kind, or one whose words are no sentence.
    """
    name = draw.pick(FUNCTIONS)
    arguments = _valid()[name]
    broken = draw.pick(sorted(arguments))
    value = draw.pick([*STRANGE, *strange_tensors(draw)])
    arguments[broken] = value
    shown = f"{name}({broken}={f'{list(value.shape)} {value.dtype}' if isinstance(value, Tensor) else repr(value)})"
    try:
        with torch.no_grad():
            _function(name)(**arguments)
    except (ValueError, TypeError) as error:
        if not is_a_sentence(str(error)):
            raise WrongResult(f"{shown}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise WrongResult(f"{shown}: {type(error).__name__}: {error}") from error
    return shown
