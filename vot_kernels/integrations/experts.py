"""Which experts of a model of transformers `patch` puts on `moe`, and how: by the name in their config."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vot_kernels.integrations.writes import Write, planned
from vot_kernels.ops.dispatch import select

NAME = "vot_kernels"
_ATTRIBUTE = "_experts_implementation_internal"


def expert_sites(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules whose forward looks an experts function up by the name in their config."""
    for name, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and "_experts_implementation" in code.co_names and hasattr(module, "config"):
            yield name, module


def implementation(module: Any) -> str | None:
    """The name in the config of an experts module."""
    return module.config._experts_implementation


def refusals(modules: list[Any]) -> dict[int, str]:
    """By the id of a config, why the experts that share it stay as they are; "" if they need not."""
    found: dict[int, str] = {}
    for module in modules:
        key = id(module.config)
        reason = "" if found.get(key) else next(_refusals(module), "")
        found[key] = found.get(key) or reason
    return found


def backend(module: Any) -> str:
    """The backend that serves experts where and as their weights are; ValueError if there is none."""
    weight = module.gate_up_proj
    return select("moe", "auto", torch.empty(0, 64, dtype=weight.dtype, device=weight.device))


def writes(model: nn.Module, modules: list[Any]) -> list[Write]:
    """Our name in the configs of experts and of the models around them.

    What transformers switches for decoding it puts back by the config of the whole model, so that has to agree.
    """
    configs = {id(module.config): module.config for module in modules}
    for module in model.modules():
        config = getattr(module, "config", None)
        if any(id(part) in configs for part in _parts(config)):
            configs[id(config)] = config
    return [planned(config, _ATTRIBUTE, NAME) for config in configs.values()]


def _parts(config: Any) -> Iterator[Any]:
    """The configs inside a config, at every depth."""
    for key in getattr(config, "sub_configs", ()):
        if (part := getattr(config, key, None)) is not None:
            yield part
            yield from _parts(part)


def _refusals(module: Any) -> Iterator[str]:
    from vot_kernels.integrations.transformers import ALL_EXPERTS_FUNCTIONS, expert_refusals

    before = implementation(module)
    tables = inspect.getclosurevars(type(module).forward).nonlocals
    if before == NAME:
        yield "they are on vot_kernels already"
    if tables.get("experts_interface", ALL_EXPERTS_FUNCTIONS) is not ALL_EXPERTS_FUNCTIONS:
        yield "they have functions of their own family"
    if before is not None and "megamoe" in before:
        yield f"their weights lie as {before} needs them"
    yield from expert_refusals(module)
    if not isinstance(getattr(module, "gate_up_proj", None), torch.Tensor):
        yield "they have no tensor gate_up_proj"
        return
    try:
        backend(module)
    except ValueError as error:
        yield str(error)
