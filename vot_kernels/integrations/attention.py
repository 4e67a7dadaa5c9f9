"""The attention of transformers' models on the variable-length attention of this package.

transformers 5 looks two functions up by the name in `config._attn_implementation`: one that makes the mask of a
forward, once for all layers, and one that attends, once per layer. `register_attention` adds both under `NAME`. The
name holds "flash", because vision towers hand over their cumulative lengths to such names alone; any other name gets a
loop with one call per image or frame. By the same "flash" transformers takes the name for a kernel that it has to load,
when a model is built from a patched config; `register_attention` has it take the name as it is.

A mask of ours is bool, True where a key is real, and carries an `AttentionPlan`: which of the
flattened rows make a segment, and what a query sees in it. So padding and packed sequences are worked out once per
forward. A mask that is no such pattern is refused: no approximation takes its place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from inspect import getclosurevars, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from vot_kernels.integrations.hybrid import HybridLayer, layer_of
from vot_kernels.ops.flash_attention import flash_attn_varlen_func
from vot_kernels.packing import PackedLayout

NAME = "vot_kernels_flash"
PLAN = "_vot_kernels_plan"
EVERYTHING = (-1, -1)
_ACCEPTS = "_vot_kernels_accepts"
_JOINED = masking_utils.and_masks(masking_utils.causal_mask_function).__code__  # of what is joined by "and"


class AttentionPlan(NamedTuple):
    """Which keys the queries of one forward see, over the flattened rows of a batch.

    Attributes:
        causal: a query sees no key after its own place; the last query of a segment is at the place of its last key.
        window: keys seen before and after that place, -1 for all.
        cu_seqlens_q, cu_seqlens_k: int32 `[segments + 1]`, cumulative lengths in packed order.
        rows, keys: int64 `[batch * queries]` and `[batch * keys]`, the flattened rows in packed order, padding last;
            None if they lie in that order.
        places: int64 `[batch * queries]`, where each query is in packed order; None with `rows`.
        padded: whether some rows of the batch may hold padding, left out by the segments or by the order.
    """

    causal: bool
    window: tuple[int, int]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    rows: Tensor | None = None
    keys: Tensor | None = None
    places: Tensor | None = None
    padded: bool = False


@dataclass(frozen=True)
class _Pattern:
    """What a mask function of transformers says of two places in a row."""

    causal: bool
    window: tuple[int, int]
    sequences: Tensor | None  # integers [batch, length], equal within a packed sequence


@dataclass
class _Traced:
    """What is known of the forward that a compiler traces, which reads neither numbers nor the insides of functions.

    Attributes:
        unpacked: the config of a model that was given no places of packed sequences.
    """

    unpacked: Any = None


_traced = _Traced()


def register_attention() -> str:
    """Make `NAME` an attention implementation of transformers; again changes nothing. Returns the name."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    _accept_name()
    return NAME


def _accept_name() -> None:
    """Have models that are built with `NAME` in their config take it, as there is no kernel to load for it."""
    check = PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(check, _ACCEPTS):
        return

    @wraps(check)
    def accept(model: PreTrainedModel, name: str | None, *arguments: Any, **options: Any) -> str:
        return NAME if name == NAME else check(model, name, *arguments, **options)

    setattr(accept, _ACCEPTS, True)
    setattr(PreTrainedModel, check.__name__, accept)


def watch(model: nn.Module) -> None:
    """Have the models within a model that take positions say, while they are traced, whether they were given any."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "position_ids" in _names(module):
            module.register_forward_pre_hook(_note_positions, with_kwargs=True)
            module.register_forward_hook(_forget_positions)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _note_positions]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [k for k, hook in module._forward_hooks.items() if hook is _forget_positions]:
            del module._forward_hooks[key]


def _note_positions(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
    """A forward pre-hook: without a mask, transformers looks for packed sequences in positions, in its own, too.

    Its own have none, so that the lengths of the sequences are the shape of the batch.
    """
    if torch.compiler.is_compiling():
        given = {**dict(zip(_names(module), arguments, strict=False)), **keywords}
        unpacked = given.get("position_ids") is None or given.get("attention_mask") is not None
        _traced.unpacked = module.config if unpacked else None


def _forget_positions(module: nn.Module, arguments: tuple, output: Any) -> None:
    """A forward hook: another model of the same config, which is not watched, may be given other positions."""
    _traced.unpacked = None


def _names(module: nn.Module) -> list[str]:
    """The arguments of its forward."""
    return list(signature(type(module).forward).parameters)[1:]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask of a forward in the form that `attention_forward` reads; the arguments are those of transformers.

    Args:
        batch_size, q_length, kv_length: sizes of the attention.
        q_offset, kv_offset: places of the first query and the first key; a static cache gives a tensor.
        mask_function: what transformers composed of its mask functions.
        attention_mask: bool `[batch, places]`, False for padding.
        device: where the mask lies if `attention_mask` is None.
        others: what transformers says besides; it is read where a compiler cannot take `mask_function` apart.

    Returns:
        None if every query sees all keys, or all up to its own place where the module is causal; else bool
        `[batch, kv_length]` with an `AttentionPlan`; `[batch, 1, q_length, kv_length]` where all queries of a row see
        the same keys, and `[batch, 1, 0, kv_length]` where only the plan knows what they see.

    Raises:
        ValueError: the mask is none of causal, bidirectional, sliding window, padding and packed sequences.

    Source: transformers 5, `masking_utils.py`.
    """
    pattern = _pattern(mask_function, others)
    device = device if attention_mask is None else attention_mask.device
    if pattern.sequences is not None:  # transformers looks for them where there is no padding and no cache
        mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        plan = _plan_sequences(pattern.causal, pattern.window, pattern.sequences)
    elif (real := _real_keys(attention_mask, q_length, kv_length, q_offset, kv_offset, pattern)) is not None:
        real = real.expand(batch_size, -1)
        if _aligned(pattern.causal, pattern.window):
            start = torch.arange(q_length, device=device) + (q_offset - kv_offset)
            queries, mask = real.index_select(1, start), real.clone()
        else:  # in the shape that other attention of the model takes, too
            queries, mask = None, real[:, None, None].expand(-1, 1, q_length, -1)
        plan = _plan_padding(pattern.causal, pattern.window, real, queries, q_length)
    elif pattern.window != EVERYTHING:
        mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        plan = _plan_rows(pattern.causal, pattern.window, batch_size, q_length, kv_length, device)
    else:
        return None
    ends_together = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if mask.ndim == 2 and not (ends_together and pattern.sequences is None and pattern.window == EVERYTHING):
        # By itself it would say too little. So it says nothing: a copy without the plan is refused, by other attention,
        # too. It has four dimensions because `generate` makes masks for models that make theirs of what they are given:
        # transformers leaves those with four as they are, and takes all others for padding.
        mask = mask.new_empty(batch_size, 1, 0, kv_length)
    setattr(mask, PLAN, plan)
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a transformers module, in one call for the whole batch.

    Args:
        module: the attention module; its `is_causal` counts where `is_causal` is None.
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`; the head_dim of `value` may be another one.
        attention_mask: None, a mask that `make_mask` returned, or bool `[batch, keys]`, False for padding.
        dropout: must be 0.
        scaling: factor on q.k, by default head_dim ** -0.5.
        sliding_window: keys that a query sees on a side, itself included; a mask with a plan knows it better.
        is_causal: a query sees no key after its own place.
        cu_seq_lens_q, cu_seq_lens_k: integer `[segments + 1]`, cumulative lengths of the flattened rows, obeyed
            whatever maximum lengths come with them.
        others: softcap, s_aux (sinks), position_bias, cache and output_attentions are refused unless they are
            None or False; the rest are not read.

    Returns:
        `[batch, queries, heads, head_dim]`, and None in place of the weights.

    Raises:
        ValueError: something of the above that is not served, in one sentence.
    """
    if refusal := next(_refusals(dropout, attention_mask, others), None):
        raise ValueError(
            f"The attention of vot_kernels has no {refusal}, which {type(module).__name__} asks for; call "
            "vot_kernels.unpatch, or patch only the modules that do without."
        )
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != key.shape[0]:  # one set of learned queries for all rows of the batch
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    side = -1 if sliding_window is None else sliding_window - 1
    plan = getattr(attention_mask, PLAN, None)
    if cu_seq_lens_q is None and _is_step(query, plan, attention_mask, side) and layer_of(module) is None:
        return _step(query, key, value, attention_mask, scaling), None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        causal, window = (causal, (side, side)) if plan is None else (plan.causal, plan.window)
        plan = AttentionPlan(causal, window, cu_seq_lens_q.int(), cu_seq_lens_k.int())
    elif plan is None and attention_mask is not None:
        real = attention_mask.bool()
        queries = real[:, -query.shape[2] :] if _aligned(causal, (side, side)) else None
        plan = _plan_padding(causal, (side, side), real, queries, query.shape[2])
    elif plan is None:
        plan = _plan_rows(causal, (side, side), batch, query.shape[2], key.shape[2], query.device)
    layer = layer_of(module)
    layout = None if layer is None else _layout(layer, query, key, plan, cu_seq_lens_q)
    return _attend(module, query, key, value, plan, scaling, layout), None


def _is_step(query: Tensor, plan: AttentionPlan | None, mask: Tensor | None, side: int) -> bool:
    """Whether one token of each row reads all real keys of it, on a CPU.

    For so little the kernels are prepared longer than they run, and keys of several rows would have to be copied.
    """
    if torch.compiler.is_compiling() or query.device.type != "cpu" or query.shape[2] != 1:
        return False
    if mask is None:
        return side < 0
    return plan is not None and plan.causal and plan.window == EVERYTHING and plan.padded and mask.ndim == 2


def _step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one token of each row to all its keys, or to those of a `mask` [batch, keys]; zero for padding."""
    q, k, v = (x.to(_computed_in(query)) for x in (query, key, value))
    real = None if mask is None else mask[:, None, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, real, scale=scaling, enable_gqa=True)
    if real is not None:
        out = out.where(real[..., -1:], 0)
    return out.transpose(1, 2).contiguous()


def _computed_in(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _layout(
    layer: HybridLayer, query: Tensor, key: Tensor, plan: AttentionPlan, cu_seqlens: Tensor | None
) -> PackedLayout:
    """Clips and frames of a call to hybrid attention."""
    own = query.shape[2] == key.shape[2] and not plan.padded
    if plan.causal or plan.window != EVERYTHING or not own:
        raise ValueError(
            "Hybrid attention is for bidirectional attention of frames without padding; patch this model with "
            'attention="exact", or give it frames of one size.'
        )
    return layer.clips.layout(cu_seqlens, query.shape[0], query.shape[2], query.device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scaling: float | None,
    layout: PackedLayout | None,
) -> Tensor:
    """Attention of all rows in one call, over the plan or, where the module is hybrid, over a layout of clips."""
    batch, _, queries, head_dim = query.shape
    width = value.shape[-1]
    dtype = _computed_in(query)
    widest = max(head_dim, width)
    q, k, v = (_widened(x.to(dtype), widest).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if plan.rows is not None:
        q = q.index_select(0, plan.rows)
    if plan.keys is not None:
        k, v = k.index_select(0, plan.keys), v.index_select(0, plan.keys)
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    if layout is not None and (layer := layer_of(module)) is not None:
        out = layer.attend(module, q, k, v, layout, scale)
    else:
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            queries,
            key.shape[2],
            softmax_scale=scale,
            causal=plan.causal,
            window_size=plan.window,
        )
    if plan.places is not None:
        out = out.index_select(0, plan.places)
    return out.unflatten(0, (batch, queries))[..., :width].contiguous()


def _widened(x: Tensor, width: int) -> Tensor:
    """x with zeros at the end of its last dimension; itself if it is wide enough, which padding by 0 would copy."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _refusals(dropout: float, mask: Tensor | None, others: dict[str, Any]) -> Iterator[str]:
    """What a call asks for and cannot have."""
    if dropout:
        yield f"dropout ({dropout} while training)"
    if mask is not None and not hasattr(mask, PLAN) and not (isinstance(mask, Tensor) and mask.ndim == 2):
        shape = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        yield f"mask of its own for every pair of tokens ({shape})"
    for name, words in _NOT_SERVED.items():
        if others.get(name) is not None and others[name] is not False:
            yield words


_NOT_SERVED = {
    "softcap": "softcap",
    "s_aux": "sinks",
    "position_bias": "position bias",
    "cache": "paged cache",
    "output_attentions": "attention weights to return",
}


def _plan_rows(
    causal: bool, window: tuple[int, int], batch: int, queries: int, keys: int, device: torch.device | str
) -> AttentionPlan:
    """Every row of the batch is a segment."""
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return AttentionPlan(causal, window, rows * queries, rows * keys)


def _plan_padding(
    causal: bool, window: tuple[int, int], keys: Tensor, queries: Tensor | None, q_length: int
) -> AttentionPlan:
    """Every row of the batch without its padding; what padded queries return is 0, or as always if None is given.

    A window counts places, so it needs rows without padding between their tokens; only it asks the device.
    """
    begins = keys & ~nn.functional.pad(keys[:, :-1], (1, 0))
    if window != EVERYTHING:
        _check_whole(begins.sum(1) <= 1)
    on_host = keys.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and (begins.sum(1) <= 1).all():
        return _plan_runs(causal, window, keys, queries, q_length)
    cu_k, key_order = _packed_order(keys)
    if queries is None:
        plan = _plan_rows(causal, window, keys.shape[0], q_length, 0, keys.device)
        return plan._replace(cu_seqlens_k=cu_k, keys=key_order, padded=True)
    cu_q, order = _packed_order(queries)
    return AttentionPlan(causal, window, cu_q, cu_k, order, key_order, order.argsort(), padded=True)


def _check_whole(rows: Tensor) -> None:
    """Refuse rows that are not True; a graph checks it when it runs."""
    refusal = "A sliding window over rows with padding between their tokens is not served."
    if torch.compiler.is_compiling():
        torch._assert_async(rows.all(), refusal)
    elif not rows.all():
        raise ValueError(refusal)


def _plan_runs(
    causal: bool, window: tuple[int, int], keys: Tensor, queries: Tensor | None, q_length: int
) -> AttentionPlan:
    """The same where real keys follow each other: nothing moves, for padding makes segments of its own.

    Five of them for each row: padded queries without keys, padded keys without queries, what is real, and both again.
    """
    batch, k_length = keys.shape
    none, all_queries = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), q_length)
    q_begin, q_end = (none, all_queries) if queries is None else _run(queries)
    k_begin, k_end = _run(keys)
    q_bounds = torch.stack([none, q_begin, q_begin, q_end, all_queries], 1)
    k_bounds = torch.stack([none, none, k_begin, k_end, k_end], 1)

    def flattened(places: Tensor, length: int) -> Tensor:
        rows = places + length * torch.arange(batch)[:, None]
        return nn.functional.pad(rows.flatten(), (0, 1), value=batch * length).int()

    cu_q, cu_k = flattened(q_bounds, q_length), flattened(k_bounds, k_length)
    return AttentionPlan(causal, window, cu_q, cu_k, padded=True)


def _run(real: Tensor) -> tuple[Tensor, Tensor]:
    """Where the real places of each row begin and end, int64 `[batch]`; they follow each other."""
    begin = real.byte().argmax(1)
    return begin, begin + real.sum(1)


def _aligned(causal: bool, window: tuple[int, int]) -> bool:
    """Whether it matters which key a query stands at, so that both have to be packed alike."""
    return causal or window != EVERYTHING


def _packed_order(real: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative numbers of real places of the rows, and all places flattened, real ones first."""
    bounds = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return bounds, real.logical_not().flatten().byte().argsort(stable=True)


def _plan_sequences(causal: bool, window: tuple[int, int], sequences: Tensor) -> AttentionPlan:
    """Every packed sequence of every row is a segment."""
    begins = nn.functional.pad(sequences.diff(dim=1).ne(0), (1, 0), value=True).flatten()
    bounds = nn.functional.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel()).int()
    return AttentionPlan(causal, window, bounds, bounds)


def _real_keys(
    mask: Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    pattern: _Pattern,
) -> Tensor | None:
    """bool `[batch or 1, kv_length]`: no padding, and nothing after the last query of a causal row; None if all are."""
    real = None
    if mask is not None:
        real = mask.bool()
        missing = kv_offset + kv_length - real.shape[1]
        real = nn.functional.pad(real, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
        if not torch.compiler.is_compiling() and bool(real.all()):  # once per forward, as sdpa's mask does
            real = None
    full = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if pattern.causal and not full:
        device = q_offset.device if isinstance(q_offset, Tensor) else None if mask is None else mask.device
        seen = torch.arange(kv_length, device=device)[None] + kv_offset < q_offset + q_length
        real = seen if real is None else real & seen
    return real


def _traced_pattern(function: Callable[..., Any], said: dict[str, Any]) -> _Pattern | None:
    """The pattern of a model that is traced, from what transformers says of it; None where that does not tell.

    What it joins by "and" are windows or chunks, functions of the model's own (`use_vmap`), and packed sequences.
    """
    config, size = said.get("config"), said.get("local_size")
    if not torch.compiler.is_compiling() or config is None or _traced.unpacked is not config:
        return None
    chunks = getattr(config, "attention_chunk_size", None) is not None
    if said.get("use_vmap", True) or chunks or getattr(function, "__code__", None) is not _JOINED:
        return None
    if "allow_is_bidirectional_skip" in said:
        return None if size is None else _Pattern(False, (size, size), None)
    return _Pattern(True, EVERYTHING if size is None else (size - 1, -1), None)


def _pattern(function: Callable[..., Any], said: dict[str, Any]) -> _Pattern:
    """Take a mask function of transformers apart; it is one of theirs, or several joined by "and"."""
    causal, window, sequences = False, EVERYTHING, None
    # By its identity first, since a compiler cannot look into functions.
    if function is masking_utils.causal_mask_function:
        return _Pattern(True, window, sequences)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern(False, window, sequences)
    if (traced := _traced_pattern(function, said)) is not None:
        return traced
    for part in _parts(function):
        made_by, inside = _maker(part), getclosurevars(part).nonlocals
        if made_by == "causal_mask_function":
            causal = True
        elif made_by == "sliding_window_overlay":
            window = (inside["sliding_window"] - 1, -1)
        elif made_by == "sliding_window_bidirectional_overlay":
            window = (inside["sliding_window"],) * 2
        elif made_by == "packed_sequence_mask_function":
            sequences = inside["packed_sequence_mask"]
        elif made_by != "bidirectional_mask_function":
            raise ValueError(
                "The attention of vot_kernels has causal, bidirectional and sliding-window masks, padding and packed "
                f"sequences; this model asks for {made_by}: call vot_kernels.unpatch, or patch other modules only."
            )
    return _Pattern(causal, window, sequences)


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that `function` joins, itself if it joins none."""
    made_by = _maker(function)
    if made_by == "and_masks":
        for part in getclosurevars(function).nonlocals["mask_functions"]:
            yield from _parts(part)
    elif made_by == "remap_positions_for_packed_sequence":  # places within a sequence: its rows are in order
        yield from _parts(getclosurevars(function).nonlocals["mask_function"])
    else:
        yield function


def _maker(function: Callable[..., Any]) -> str:
    """The function of transformers that is, or returned, `function`; the whole name of any other."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return f"a mask of its own ({name})"
    return name.split(".")[0]
