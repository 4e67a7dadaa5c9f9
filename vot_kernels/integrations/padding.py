"""Encoders that compute no padding: rows with tokens are packed before the first layer and spread after the last one.

A batch of images of mixed sizes is mostly padding. The attention of this package leaves it out, but the linear layers,
norms and activations around it do not, and they take most of the time.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from vot_kernels.integrations.attention import EVERYTHING, PLAN, AttentionPlan

# Without it, in another version, the arguments alone say that the states of every layer are wanted.
_collector: Any = None
with suppress(ImportError):
    from transformers.utils.output_capturing import _active_collector as _collector

_ROWS = "_vot_kernels_rows"
_STATES = ("output_hidden_states", "output_attentions")


class _Rows(NamedTuple):
    """Where packed rows were: int64 `[tokens]` places among the flattened ones, and sizes `[batch, length]`."""

    places: Tensor
    batch: int
    length: int


def encoders(model: nn.Module, attention: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that do nothing but hand rows and their mask from layer to layer.

    Their layers see a row through attention alone, whose modules have the names `attention`: whatever else they compute
    for a row does not depend on the others, nor on where it lies.
    """
    names = list(attention)
    for name, module in model.named_modules():
        arguments = list(signature(type(module).forward).parameters)[1:]
        plain = arguments[:2] == ["inputs_embeds", "attention_mask"] and arguments[2:] in ([], ["kwargs"])
        inside = f"{name}." if name else ""
        layered = plain and isinstance(getattr(module, "layers", None), nn.ModuleList)
        if layered and any(other.startswith(f"{inside}layers.") for other in names):
            yield name, module


def leave_padding_out(module: nn.Module) -> None:
    """Have an encoder of `encoders` compute no padding; what it returns there is 0."""
    module.register_forward_pre_hook(_pack, with_kwargs=True)
    module.register_forward_hook(_spread, with_kwargs=True)


def undo(model: nn.Module) -> None:
    """Undo `leave_padding_out` for all modules of a model."""
    for module in model.modules():
        for hooks, ours in ((module._forward_pre_hooks, _pack), (module._forward_hooks, _spread)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)


def _pack(
    module: nn.Module, arguments: tuple, keywords: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """A forward pre-hook: the rows with tokens as one row, whose mask has a plan with a segment for each old row."""
    given = {**dict(zip(("inputs_embeds", "attention_mask"), arguments, strict=False)), **keywords}
    real = _real_rows(given.get("attention_mask"))
    if real is None or _needs_all_rows(given):
        return None
    places = real.flatten().nonzero().squeeze(1)
    if not len(places):  # models cannot reshape a row of no tokens
        return None
    lengths = nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    mask = torch.ones(1, len(places), dtype=torch.bool, device=real.device)
    setattr(mask, PLAN, AttentionPlan(False, EVERYTHING, lengths, lengths))
    setattr(mask, _ROWS, _Rows(places, *real.shape))
    packed = given["inputs_embeds"].flatten(0, 1).index_select(0, places)[None]
    return (), given | {"inputs_embeds": packed, "attention_mask": mask}


def _spread(module: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> Any:
    """A forward hook: the rows at their old places, zeros between them."""
    rows = getattr(keywords.get("attention_mask"), _ROWS, None)
    if rows is None:
        return None
    if isinstance(output, ModelOutput):
        output["last_hidden_state"] = _at_places(output["last_hidden_state"], rows)
        return output
    if isinstance(output, tuple):
        return (_at_places(output[0], rows), *output[1:])
    return _at_places(output, rows)


def _at_places(packed: Tensor, rows: _Rows) -> Tensor:
    spread = packed.new_zeros(rows.batch * rows.length, packed.shape[2])
    return spread.index_copy(0, rows.places, packed[0]).unflatten(0, (rows.batch, rows.length))


def _real_rows(mask: Any) -> Tensor | None:
    """bool `[batch, length]`, which rows hold tokens, where a mask of ours says that of rows that all see them."""
    plan = getattr(mask, PLAN, None)
    if plan is None or not plan.padded or plan.causal or plan.window != EVERYTHING or mask.ndim != 4:
        return None
    return mask[:, 0, 0] if mask.shape[2] == mask.shape[3] else None


def _needs_all_rows(given: dict[str, Any]) -> bool:
    """Whether somebody is to see the rows of every layer, or something else belongs to the rows; or a graph is traced,
    which cannot have as many rows as it finds."""
    if torch.compiler.is_compiling() or any(given.get(name) for name in _STATES):
        return True
    if _collector is not None and _collector.get():
        return True
    others = (value for name, value in given.items() if name not in ("inputs_embeds", "attention_mask"))
    return any(isinstance(value, Tensor) for value in others)
