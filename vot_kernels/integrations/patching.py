"""Other people's models on the attention of this package: `patch`, `unpatch` and `patched`.

The modules are found, not listed: every attention of transformers that looks its function up by the name in its
config is served, by writing our name into that config, and so are its experts; a convolution that embeds patches gets
a function of its own. Nothing else of a model changes: no class, no weight, no key of its state_dict. A config serves
all modules that share it, so it is patched for all of them or for none. In transformers itself the constructor of
models is told to take the name.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from vot_kernels.extras import imports_for
from vot_kernels.integrations import experts as moe_experts
from vot_kernels.integrations import patch_embedding
from vot_kernels.integrations.writes import Write, planned, take_back, write_all
from vot_kernels.ops.attention_options import Window
from vot_kernels.ops.checks import check_choice
from vot_kernels.ops.dispatch import select
from vot_kernels.packing import brief

if TYPE_CHECKING:  # at run time inside functions: it brings torch's compiler along, which takes a second
    from vot_kernels.integrations.hybrid import HybridOptions, HybridSite

_STATE = "_vot_kernels_patch"  # what a patch wrote, and what was there before
_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_ATTRIBUTE = "_attn_implementation_internal"
_OP, _HYBRID_OP, _MOE = "flash_attn_varlen_func", "hybrid_attention", "moe"
_LINEAR, _UNPADDED = "linear", "rows of tokens alone"
_OF_TORCH = (_LINEAR, _UNPADDED)


@dataclass(frozen=True)
class PatchedModule:
    """What became of one module: an attention, experts of a layer, a convolution that embeds patches, or an encoder.

    Attributes:
        name: its name in the model, "" for the model itself.
        kind: its class.
        before: the attention or experts implementation it had, "conv" for a convolution, "all rows" for an encoder.
        after: the function that serves it now, None if it stays as it was. It is one of this package, but for
            "linear", which is PyTorch's. An encoder that computes no padding has "rows of tokens alone".
        backend: on what backend.
        reason: why it stays, "" if it does not.
        note: what a user should know besides.
    """

    name: str
    kind: str
    before: str | None
    after: str | None = None
    backend: str | None = None
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, module by module; prints as a table in which equal modules share a line."""

    modules: tuple[PatchedModule, ...]

    @property
    def replaced(self) -> tuple[PatchedModule, ...]:
        """The modules that are served by this package now."""
        return tuple(module for module in self.modules if module.after)

    @property
    def left(self) -> tuple[PatchedModule, ...]:
        """The modules that stay as they were."""
        return tuple(module for module in self.modules if not module.after)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, ready for JSON."""
        return {
            "replaced": len(self.replaced),
            "left": len(self.left),
            "modules": [asdict(module) for module in self.modules],
        }

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = {}
        for m in self.modules:
            now = (
                f"{m.before} -> {'' if m.after in _OF_TORCH else 'vot_kernels.'}{m.after} ({m.backend})"
                if m.after
                else f"stays as it is: {m.reason}"
            )
            groups.setdefault((m.kind, now + (f"; {m.note}" if m.note else "")), []).append(
                m.name or "the model"
            )
        lines = [f"{len(self.replaced)} of {len(self.modules)} modules replaced"]
        for (kind, now), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            lines.append(f"  {len(names)} x {kind}, {where}: {now}")
        return "\n".join(lines)


def patch(
    model: nn.Module,
    attention: str = "exact",
    *,
    window: Window = 0,
    far: float | Literal["zero"] | None = "zero",
    layers: Literal["all"] | Sequence[int] = "all",
    feature_map: str = "softmax",
    frames: int | None = None,
    experts: bool = True,
    embeddings: bool = True,
    padding: bool = True,
) -> PatchReport:
    """Run attention, experts and patch embedding of a transformers model on this package.

    With attention="exact" outputs and gradients stay the same but for rounding.

    Each vision layer becomes one call for all images and frames, without their padding, and language models keep their
    causality, sliding windows, packed sequences and caches. What a call can only find out by itself (a mask for every
    pair of tokens, dropout) raises one sentence then. A submodule may be given to patch that part alone. Experts become
    one call of `moe` per layer, and a convolution that embeds patches a linear layer.

    Names in the model's configs say which attention and experts it has. Models that are made from the same config
    object, before or after, share these two, and `unpatch` of the patched one takes them from all. What is made from a
    copy of a patched config has them as well, and `unpatch` does not reach it: `set_attn_implementation("sdpa")` does.
    Of the rest (patch embeddings, hybrid attention) such models have nothing; `copy.deepcopy(model)` is patched like
    the model. A patch is not saved: neither a model nor a config is patched after it was saved and loaded.

    With attention="hybrid" the attention of vision towers becomes `hybrid_attention` of the frames of a clip: softmax
    to the frames in `window`, linear to the others, with a weight per head that is learned. In a tower that attends
    within frames alone (Qwen-VL) window=0 and far="zero" at first compute what attention="exact" does, on CPUs bit for
    bit; training opens the view to the other frames. In one that attends within whole clips a window is cheaper and
    another function. Modules whose rows are no frames (the language model) stay exact. The weights are
    parameters `far_weight` of the attention modules: they train, and are saved, as all others. Load them by
    `model.load_state_dict` after patching.

    Args:
        model: a model of transformers, or a module that holds some (PEFT, say).
        attention: "exact" or "hybrid"; the rest is for "hybrid".
        window: near frames, see `hybrid_attention`; None is softmax attention over the whole clip.
        far: initial weight of far tokens, learned; "zero" is 0.0. None leaves them out for good.
        layers: "all", or which attention modules of each tower, counted from 0; the others stay exact.
        feature_map: phi of the far part, see `hybrid_attention`.
        frames: frames of every clip, for towers that take an image or a frame per row (SigLIP, ViT) or no grid. None:
            the tower's own argument `grid_thw` says it.
        experts: False leaves experts alone.
        embeddings: False leaves the convolutions of patch embeddings alone.
        padding: False leaves padding out of all of an encoder, not of its attention alone, where the images of a batch
            have a padded row each (SigLIP 2, Idefics, SmolVLM) and the states of single layers are not asked for. The
            encoder then returns 0 for padding; what it returns for patches stays the same. Each forward asks the device
            for the number of patches.

    Returns:
        For each such module what replaced it, on which backend, or why it stays.

    Raises:
        TypeError: not a module.
        ValueError: the model is patched already, nothing in it can be replaced, or an option is not one of the above;
            it is as it was then.
        ImportError: transformers is not installed.

    Source: transformers 5, `AttentionInterface`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    options = _options(attention, window, far, layers, feature_map, frames)
    check_choice("padding", padding, (False, True))
    with imports_for("Patching a model", "llm"):
        from vot_kernels.integrations.attention import NAME, register_attention, watch
    from vot_kernels.integrations.hybrid import attach
    from vot_kernels.integrations.padding import leave_padding_out

    sites = list(_sites(model))
    if _STATE in vars(model) or any(_implementation(site.config) == NAME for site in sites):
        raise ValueError("The model is patched already; call vot_kernels.unpatch first.")
    shared = _reasons_of_configs(model, sites)
    able = [site for site in sites if not shared[id(site.config)]]
    hybrid, exact = ({}, {}) if options is None else _hybrid_sites(model, able, options)
    rows = [_attention_row(site, shared[id(site.config)], site.name in hybrid, exact) for site in sites]
    rows += _rows_of_others(model, sites)
    configs = {id(site.config): site.config for site in able}
    writes = [planned(config, _ATTRIBUTE, NAME) for config in (*configs.values(), *_parents(model, configs))]
    for wanted, part in ((experts, _on_experts), (embeddings, _on_embeddings)):
        if wanted:
            more, of_part = part(model)
            rows, writes = rows + more, writes + of_part
    _check_replaceable(model, rows, writes)
    unpadded = [] if padding else _unpadded(model, able, options is not None)
    rows += [
        PatchedModule(name, type(module).__name__, "all rows", _UNPADDED, "torch")
        for name, module in unpadded
    ]
    if options is not None and not hybrid:
        reasons = "; ".join(dict.fromkeys(exact.values())) or "none of it can be replaced"
        raise ValueError(f"No attention of {type(model).__name__} can be hybrid: {reasons}.")
    register_attention()
    try:
        if options is not None:
            attach(hybrid.values(), options)
        write_all([*writes, planned(model, _STATE, writes)])
        watch(model)
        for _, module in unpadded:
            leave_padding_out(module)
    except BaseException:
        _take_hooks_back(model)
        raise
    return PatchReport(tuple(rows))


def unpatch(model: nn.Module) -> None:
    """Give a model back what it had before `patch`; its outputs are bit-equal to those of then.

    A config that was given another implementation since keeps that.

    Raises:
        ValueError: `model` is not what was given to `patch`.
    """
    state = vars(model).pop(_STATE, None) if isinstance(model, nn.Module) else None
    if state is None:
        raise ValueError("The model is not patched; give the very module that vot_kernels.patch was given.")
    _take_hooks_back(model)
    take_back(state)


@contextmanager
def patched(model: nn.Module, attention: str = "exact", **options: Any) -> Iterator[PatchReport]:
    """`patch` for the time of a with block, which gets the report; takes and raises what `patch` does."""
    report = patch(model, attention, **options)
    try:
        yield report
    finally:
        unpatch(model)


def _take_hooks_back(model: nn.Module) -> None:
    """Undo what a patch adds to modules besides attributes."""
    from vot_kernels.integrations import attention, hybrid, padding

    hybrid.undo(model)
    attention.unwatch(model)
    padding.undo(model)


def _unpadded(model: nn.Module, sites: "list[_Site]", hybrid: bool) -> list[tuple[str, nn.Module]]:
    """The encoders of images that are to compute no padding.

    Raises:
        ValueError: there is none, or attention is hybrid.
    """
    from vot_kernels.integrations.padding import encoders

    if hybrid:
        raise ValueError(
            'padding=False is for attention="exact": hybrid attention takes frames without padding.'
        )
    # Those of texts are left alone: a pooling of the last place may read what an encoder returns for padding.
    images = [s.name for s in sites if s.owner is not None and _takes_pixels(type(s.owner))]
    found = list(encoders(model, images))
    if not found:
        raise ValueError(
            f"padding=False needs an image encoder that hands rows and their mask alone to its layers, and "
            f"{type(model).__name__} has none."
        )
    return found


def _takes_pixels(kind: type[nn.Module]) -> bool:
    return "pixel_values" in inspect.signature(kind.forward).parameters


def _attention_row(site: "_Site", reason: str, hybrid: bool, exact: dict[str, str]) -> PatchedModule:
    """What becomes of an attention module: `reason` keeps it as it is, and `exact` says why it is not hybrid."""
    row = PatchedModule(site.name, type(site.module).__name__, _implementation(site.config))
    if reason:
        return replace(row, reason=reason)
    notes = ["its quantised projections stay as they are"] if _is_quantised(site.module) else []
    notes += [f"exact, since {exact[site.name]}"] if site.name in exact else []
    op = _HYBRID_OP if hybrid else _OP
    return replace(row, after=op, backend=_backend(site.module), note="; ".join(notes))


def _rows_of_others(model: nn.Module, sites: "list[_Site]") -> list[PatchedModule]:
    """The rows of attention that looks no function up."""
    reason = f"it does not look its function up in {_FUNCTIONS}"
    return [
        PatchedModule(name, type(module).__name__, None, reason=reason)
        for name, module in _other_attention(model, sites)
    ]


def _check_replaceable(model: nn.Module, rows: list[PatchedModule], writes: list[Write]) -> None:
    """Raise a ValueError that says what was found if nothing can be replaced."""
    if writes:
        return
    found = "; ".join(dict.fromkeys(f"{row.kind}: {row.reason}" for row in rows)) or "none at all"
    raise ValueError(
        f"Nothing in {type(model).__name__} can be replaced. Looked for attention and experts that look their "
        f"function up in a table of transformers and for patch embeddings, and found {found}."
    )


def _on_experts(model: nn.Module) -> tuple[list[PatchedModule], list[Write]]:
    """The rows of a model's experts, and the writes that put them on `moe`."""
    with imports_for("Patching a model", "llm"):
        from vot_kernels.integrations.transformers import register_experts
    found = list(moe_experts.expert_sites(model))
    reasons = moe_experts.refusals([module for _, module in found])
    rows, able = [], []
    for name, module in found:
        row = PatchedModule(name, type(module).__name__, moe_experts.implementation(module))
        if reason := reasons[id(module.config)]:
            rows.append(replace(row, reason=reason))
        else:
            rows.append(replace(row, after=_MOE, backend=moe_experts.backend(module)))
            able.append(module)
    if able:
        register_experts(moe_experts.NAME)
    return rows, moe_experts.writes(model, able)


def _on_embeddings(model: nn.Module) -> tuple[list[PatchedModule], list[Write]]:
    """The rows of the convolutions that embed patches, and the writes that make them linear."""
    rows, writes = [], []
    for name, module in patch_embedding.patch_embeddings(model):
        row = PatchedModule(name, type(module).__name__, "conv")
        if reason := patch_embedding.refusal(module):
            rows.append(replace(row, reason=reason))
        else:
            rows.append(replace(row, after=_LINEAR, backend="torch"))
            writes.append(planned(module, patch_embedding.FORWARD, patch_embedding.embed_patches))
    return rows, writes


def _options(attention: str, *values: Any) -> "HybridOptions | None":
    """The options of hybrid attention, None if it is not asked for."""
    check_choice("attention", attention, ("exact", "hybrid"))
    from vot_kernels.integrations.hybrid import HybridOptions

    options = HybridOptions(*values)
    if attention == "hybrid":
        return options
    if options != HybridOptions():
        raise ValueError('window, far, layers, feature_map and frames are for attention="hybrid" alone.')
    return None


def _hybrid_sites(
    model: nn.Module, sites: "list[_Site]", options: "HybridOptions"
) -> "tuple[dict[str, HybridSite], dict[str, str]]":
    """By name the modules that become hybrid, and why the others do not."""
    from vot_kernels.integrations.hybrid import Clips, HybridSite, count_heads, grid_owner

    chosen: dict[str, HybridSite] = {}
    reasons: dict[str, str] = {}
    places: dict[nn.Module, int] = {}
    clips: dict[nn.Module, Clips] = {}
    for site in sites:
        packed = any("cu_seq_lens_q" in names for names in _keywords(list(_codes(type(site.module)))))
        owner = grid_owner(model, site.name)
        if not packed and getattr(site.owner, "main_input_name", "") != "pixel_values":
            reasons[site.name] = "its rows are no frames"
        elif options.frames is None and not (packed and owner):
            reasons[site.name] = "nothing says which frames make a clip: give frames, their number"
        elif count_heads(site.module) is None:
            reasons[site.name] = "the number of its heads is unknown"
        else:
            tower, grid = owner if packed and owner else (site.owner, "")
            places[tower] = places.get(tower, -1) + 1
            if options.layers == "all" or places[tower] in options.layers:
                known = clips.setdefault(tower, Clips(options.frames, grid))
                chosen[site.name] = HybridSite(site.module, tower, known)
            else:
                reasons[site.name] = "it is not among the layers"
    last = max(places.values(), default=0)
    if options.layers != "all" and any(i not in range(last + 1) for i in options.layers):
        raise ValueError(f"layers must be within 0 to {last}, got {brief(options.layers)}.")
    return chosen, reasons


@dataclass(frozen=True)
class _Site:
    """An attention module that looks its function up, and the model of transformers that it belongs to."""

    name: str
    module: nn.Module
    config: Any
    owner: Any


def _sites(model: nn.Module) -> Iterator[_Site]:
    with imports_for("Patching a model", "llm"):
        from transformers import PreTrainedConfig, PreTrainedModel

    owners = [("", None)] + [(n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel)]
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and any(
            _FUNCTIONS in c.co_names for c in _codes(type(module))
        ):
            inside = [owner for path, owner in owners if not path or f"{name}.".startswith(f"{path}.")]
            yield _Site(name, module, config, inside[-1])


def _reasons_of_configs(model: nn.Module, sites: list[_Site]) -> dict[int, str]:
    """By the id of a config, why the modules that share it stay as they are; "" if they need not."""
    reasons: dict[int, str] = {}
    for site in sites:
        kind = type(site.module).__name__
        own = [] if reasons.get(id(site.config)) else list(_refusals(site))
        shared = "" if not own else f"{kind} {own[0]}"
        reasons[id(site.config)] = reasons.get(id(site.config)) or shared
    for module in model.modules():
        config = getattr(module, "config", None)
        if reasons.get(id(config)) == "" and _branches_on_sdpa(type(module)):
            reasons[id(config)] = (
                f'{type(module).__name__} computes something else for any name but "eager" and "sdpa"'
            )
    return reasons


def _refusals(site: _Site) -> Iterator[str]:
    """Why an attention module cannot be served, as what its class does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    codes = list(_codes(type(site.module)))
    if not _interfaces(type(site.module)) <= {id(ALL_ATTENTION_FUNCTIONS)}:
        yield "has attention functions of its own family"
    if getattr(site.module, "attn_logit_softcapping", None) is not None:
        yield f"uses softcap ({site.module.attn_logit_softcapping})"
    if (
        any("s_aux" in names for names in _keywords(codes))
        and getattr(site.module, "sinks", True) is not None
    ):
        yield "uses sinks"
    if any("position_bias" in names for names in _keywords(codes)):
        yield "adds a position bias"
    packed = any("cu_seq_lens_q" in names for names in _keywords(codes))
    owner = site.owner
    if (
        owner is not None
        and not packed
        and not owner._supports_flash_attn
        and not _masks_torch_attention(owner)
    ):
        yield f"belongs to {type(owner).__name__}, which declares no support for variable-length attention"
    try:
        _backend(site.module)
    except ValueError as error:
        yield f"cannot be served: {error}"


def _masks_torch_attention(model: nn.Module) -> bool:
    """Whether the file of a model masks torch's own attention, in a head that this model need not have.

    That head takes our masks, but none of the other implementations with such a name; nothing else is in the way.
    """
    files = {
        base.__module__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")
    }
    kinds = [kind for file in files for kind in vars(sys.modules[file]).values() if inspect.isclass(kind)]
    needed = {"MultiheadAttention", "create_bidirectional_mask"}
    return any(needed <= {name for code in _codes(kind) for name in code.co_names} for kind in kinds)


def _other_attention(model: nn.Module, sites: list[_Site]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are attention by name, and neither a site nor above or below one or each other."""
    taken = [site.name for site in sites]
    for name, module in model.named_modules():
        related = any(f"{name}.".startswith(f"{t}.") or f"{t}.".startswith(f"{name}.") for t in taken)
        if name and not related and "Attention" in type(module).__name__:
            taken.append(name)
            yield name, module


def _parents(model: nn.Module, configs: dict[int, Any]) -> list[Any]:
    """The configs of models whose parts are all patched: what they decide for their parts should fit."""
    found = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if id(config) in configs or not hasattr(config, "sub_configs"):
            continue
        parts = [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
        if parts and all(id(part) in configs or id(part) in found for part in parts):
            found[id(config)] = config
    return list(found.values())


def _implementation(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)


def _backend(module: nn.Module) -> str:
    """The backend that serves a module where and as its weights are; one of quantised weights computes in halves."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = (
        weight.device
        if weight is not None
        else next((b.device for b in module.buffers()), torch.device("cpu"))
    )
    dtype = torch.bfloat16 if weight is None else weight.dtype
    width = getattr(module, "head_dim", None)
    return select(
        _OP, "auto", torch.empty(0, width if isinstance(width, int) else 64, dtype=dtype, device=device)
    )


def _is_quantised(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    names = {type(part).__module__ for part in module.modules()}
    return any(t.dtype in (torch.int8, torch.uint8) for t in tensors) or any(
        "quantiz" in name for name in names
    )


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of every method of a class and its bases below transformers' and torch's own, inner functions too."""
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "transformers.modeling_utils", "builtins")):
            continue
        for method in vars(base).values():
            function = inspect.unwrap(method) if inspect.isfunction(method) else None
            if inspect.isfunction(function):
                yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _interfaces(kind: type) -> set[int]:
    """The ids of the tables in which the methods of a class look their function up."""
    functions = [
        inspect.unwrap(m) for base in kind.__mro__ for m in vars(base).values() if inspect.isfunction(m)
    ]
    return {id(f.__globals__[_FUNCTIONS]) for f in functions if _FUNCTIONS in f.__code__.co_names}


def _keywords(codes: list[CodeType]) -> Iterator[tuple]:
    """The keywords of the calls that `codes` make: Python keeps them as a tuple of names each."""
    for code in codes:
        yield from (names for names in code.co_consts if isinstance(names, tuple))


def _branches_on_sdpa(kind: type) -> bool:
    """Whether a class compares the name of the attention implementation with that of transformers' default."""
    if not issubclass(kind, nn.Module):
        return False
    for code in _codes(kind):
        constants = {c for const in code.co_consts for c in (const if isinstance(const, tuple) else (const,))}
        if "_attn_implementation" in code.co_names and "sdpa" in constants:
            return True
    return False
