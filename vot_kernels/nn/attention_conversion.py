"""The parts of an attention module of another package: its projections, norms, scale and positions.

Modules are recognised by their parts, not by their classes, so a comparison on sample tokens must detect those that
compute something else: positions of their own, another order of rows, a bias between tokens.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vot_kernels.ops.checks import FLOAT_DTYPES

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("attention.query", "attention.key", "attention.value"),
)
_OUTPUTS = ("proj", "out_proj", "o_proj", "projection_layer", "output.dense")
_HEADS = ("num_heads", "num_attention_heads")
_DROPOUTS = ("dropout", "attention_dropout", "dropout_prob")
_SAMPLE_TOKENS = 6
_Projections = tuple[list[Tensor], list[Tensor | None], list[nn.Linear]]


@dataclass(frozen=True)
class AttentionParts:
    """An attention module taken apart; the tensors are those of the module.

    Attributes:
        kind: the name of its class.
        weight, bias: of the queries, keys and values, concatenated; the bias is None if none of them has one.
        out: the output projection.
        num_heads, num_kv_heads: heads of the queries, and of keys and values.
        q_norm, k_norm: norms over head_dim, or None.
        scale: factor on q.k; None means head_dim ** -0.5.
        causal: whether tokens see no later token.
        per_call: whether its forward takes `position_embeddings`.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    out: nn.Linear
    num_heads: int
    num_kv_heads: int
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    scale: float | None
    causal: bool
    per_call: bool

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.weight.shape[0] // (self.num_heads + 2 * self.num_kv_heads)


@torch.enable_grad()  # so that joined weights are frozen only if all of them are
def take_apart(module: nn.Module) -> AttentionParts:
    """Return the parts of an attention module; see `HybridAttention.from_attention` for the modules and errors."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    kind = type(module).__name__
    weights, biases, used = (
        _multihead(module) if isinstance(module, nn.MultiheadAttention) else _linears(module)
    )
    heads = next((n for name in _HEADS if isinstance(n := _find(module, name), int)), None)
    if heads is None or heads < 1 or weights[0].shape[0] % heads:
        raise ValueError(f"{kind} must give its number of heads as {' or '.join(_HEADS)}, got {heads}.")
    head_dim = weights[0].shape[0] // heads
    q_norm, k_norm = (_norm(module, name, head_dim) for name in ("q_norm", "k_norm"))
    q, k, v = weights
    out = used[-1]
    dim = q.shape[1]
    if {w.shape[1] for w in weights} | {out.out_features} != {dim} or k.shape != v.shape or len(k) % head_dim:
        shapes = ", ".join(str(list(w.shape)) for w in (*weights, out.weight))
        raise ValueError(f"{kind} must be self-attention of one width, got weights of {shapes}.")
    if (reason := next(_obstacles(module, [*used, q_norm, k_norm]), None)) is not None:
        raise ValueError(f"{kind} cannot become HybridAttention: {reason}.")
    return AttentionParts(
        kind,
        weight=torch.cat(weights),
        bias=None if all(b is None for b in biases) else torch.cat(_with_zeros(biases, weights)),
        out=out,
        num_heads=heads,
        num_kv_heads=len(k) // head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        scale=_scale(module, head_dim),
        causal=bool(getattr(module, "is_causal", False)),
        per_call="position_embeddings" in inspect.signature(module.forward).parameters,
    )


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of a weight and a bias, frozen if they are."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def sample_of(parts: AttentionParts) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a few tokens in float64 on the CPU, always the same, and cos and sin of arbitrary angles for them."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    x = torch.randn(_SAMPLE_TOKENS, parts.weight.shape[1], **options)
    angles = torch.randn(_SAMPLE_TOKENS, -(-parts.head_dim // 2), **options).repeat(1, 2)[:, : parts.head_dim]
    return x, (angles.cos(), angles.sin())


@torch.no_grad()
def answers(module: nn.Module, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """Yield what a copy of the module returns for the tokens x `[tokens, dim]`, given packed and as a batch of one.

    Raises:
        ValueError: its forward needs other arguments.
    """
    copied = copy.deepcopy(module).to("cpu", torch.float64).eval()
    for part in copied.modules():  # the kernels of another implementation may accept neither
        config: Any = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "sdpa"
    if isinstance(copied, nn.MultiheadAttention):
        yield copied(x, x, x, need_weights=False)[0]
        return
    given = _arguments(copied, len(x))
    for batched in (True, False) if "cu_seqlens" not in given else (False, True):
        if "position_embeddings" in given:
            given["position_embeddings"] = tuple(t[None] if batched else t for t in position_embeddings)
        try:
            found = copied(x[None] if batched else x, **given)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue  # it takes the other form
        yield (found[0] if isinstance(found, tuple) else found).reshape(len(x), -1)


def _arguments(module: nn.Module, tokens: int) -> dict[str, Any]:
    """Return what the forward takes besides the tokens, which are one segment; positions are still missing."""
    _, *parameters = inspect.signature(module.forward).parameters.values()
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    taken = {"cu_seqlens": bounds, "position_embeddings": None}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {p.name for p in named if p.default is p.empty}
    known = taken | {"attention_mask": None, "max_seqlen": tokens}
    if unknown := sorted(needed - known.keys()):
        raise ValueError(
            f"The forward of {type(module).__name__} needs {', '.join(unknown)}, which from_attention does not know; "
            "if these are positions, give them as rotary, a callable (q, k, layout) -> (q, k)."
        )
    return {p.name: known[p.name] for p in named if p.name in needed or p.name in taken}


def _multihead(module: nn.MultiheadAttention) -> _Projections:
    """Return weights and biases of q, k and v, and the modules they are in, with the output projection last."""
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    bias = module.in_proj_bias
    return weights, [None] * 3 if bias is None else list(bias.chunk(3)), [module.out_proj]


def _linears(module: nn.Module) -> _Projections:
    """The same for a module whose projections are linear layers: one for q, k and v, or one for each."""
    out = next((found for name in _OUTPUTS if _is_linear(found := _find(module, name))), None)
    groups = (("qkv",), *_SEPARATE)
    found = next(
        (g for names in groups if all(map(_is_linear, g := [_find(module, n) for n in names]))), None
    )
    if out is None or found is None:
        parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in module.named_children())
        separate = "; ".join(", ".join(names) for names in _SEPARATE)
        raise ValueError(
            f"from_attention looks for nn.MultiheadAttention, or for linear layers of floating weights, qkv or one of "
            f"({separate}), with one of ({', '.join(_OUTPUTS)}), but {type(module).__name__} has {parts or 'no parts'}."
        )
    if len(found) == 3:
        return [p.weight for p in found], [p.bias for p in found], [*found, out]
    qkv = found[0]
    if len(qkv.weight) % 3:
        raise ValueError(f"qkv must have three equal parts, got {len(qkv.weight)} rows.")
    biases = [None] * 3 if qkv.bias is None else list(qkv.bias.chunk(3))
    return list(qkv.weight.chunk(3)), biases, [qkv, out]


def _with_zeros(biases: list[Tensor | None], weights: list[Tensor]) -> list[Tensor]:
    """Return the biases with zeros for those that are missing."""
    return [w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, weights, strict=True)]


def _norm(module: nn.Module, name: str, head_dim: int) -> nn.Module | None:
    """Return the norm of that name, which must work on each head by itself; None if there is none."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    shapes = [list(p.shape) for p in norm.parameters()] or [
        list(getattr(norm, "normalized_shape", [head_dim]))
    ]
    if any(shape != [head_dim] for shape in shapes):
        kind = type(module).__name__
        raise ValueError(f"{name} of {kind} must work on each head by itself, [{head_dim}], got {shapes[0]}.")
    return norm


def _obstacles(module: nn.Module, used: Sequence[nn.Module | None]) -> Iterator[str]:
    """Yield what the module does that HybridAttention does not."""
    taken = {id(p) for part in used if part is not None for p in part.parameters()}
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        taken |= {id(getattr(module, name)) for name in names}
        if module.add_zero_attn:
            yield "it adds a token of zeros (add_zero_attn)"
    if others := [name for name, p in module.named_parameters() if id(p) not in taken]:
        yield f"it has parameters of other kinds, {', '.join(others)}"
    numbers = {name: getattr(module, name, None) for name in _DROPOUTS}
    numbers |= {name: part.p for name, part in module.named_modules() if isinstance(part, nn.Dropout)}
    for name, p in numbers.items():
        if isinstance(p, (int, float)) and p > 0:
            yield f"it has dropout, which would be lost; set {name} to 0 if that is right ({name} is {p})"
    if (window := getattr(module, "sliding_window", None)) is not None:
        yield f"it has a sliding window of {window} tokens; set sliding_window to None to go without"


def _scale(module: nn.Module, head_dim: int) -> float | None:
    for name in ("scaling", "scale"):
        if isinstance(value := _find(module, name), float):
            return None if value == head_dim**-0.5 else value
    return None


def _is_linear(part: object) -> bool:
    return isinstance(part, nn.Linear) and part.weight.dtype in FLOAT_DTYPES


def _find(module: nn.Module, path: str) -> Any:
    """Return an attribute by its dotted path, else that of the module's `attention` or `config`; None if missing."""
    for start in (module, getattr(module, "attention", None), getattr(module, "config", None)):
        value: Any = start
        for name in path.split("."):
            value = getattr(value, name, None)
        if value is not None:
            return value
    return None
