"""Every mixture of experts of the installed transformers on `vot_kernels.patch`: writes the table of docs/experts.md.

Nothing is listed by hand. A walk over the model files finds the experts that look their function up by a name, those of
each family are built small with random weights, and outputs and gradients with and without the patch are compared in
float64. `python docs/list_experts.py` rewrites the table.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import listing
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

import vot_kernels
from vot_kernels.integrations import transformers as integration

PAGE = Path(__file__).with_name("experts.md")
OUTPUT, GRADIENT = 1e-10, 1e-9  # errors allowed, relative to the largest number
MARK = "experts"
TOKENS, CHOSEN = 24, 2

# Sizes of small experts, wherever a config has the name.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "moe_latent_size", "moe_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 5),
}


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture: the family's folder in transformers and their class."""

    family: str
    kind: type[nn.Module]

    @property
    def name(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True)
class Finding:
    """What came of experts: "exact", "refused" by the patch, "not built" here, or "wrong"."""

    status: str
    reason: str = ""


@cache
def all_experts() -> tuple[Experts, ...]:
    """The experts of the installed transformers whose function is looked up by the name in their config."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__ and looks_up(kind):
                found.append(Experts(path.parent.name, kind))
    return tuple(sorted(found, key=lambda experts: (experts.family, experts.name)))


def looks_up(kind: type) -> bool:
    """Whether the forward of a class looks its function up."""
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    return code is not None and "_experts_implementation" in code.co_names


def small_configs(kind: type[nn.Module]) -> Iterator[PreTrainedConfig]:
    """The configs that experts of a class may be made from, but small: the likeliest first."""
    module = importlib.import_module(kind.__module__)
    declared = inspect.signature(inspect.unwrap(kind.__init__)).parameters["config"].annotation
    others = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, PreTrainedConfig)]
    folder = importlib.import_module(kind.__module__.replace("modeling_", "configuration_"))
    others += [c for c in vars(folder).values() if inspect.isclass(c) and issubclass(c, PreTrainedConfig)]
    for config_class in dict.fromkeys([declared, *others]):
        if inspect.isclass(config_class) and issubclass(config_class, PreTrainedConfig):
            config = config_class()
            for name, size in SMALL.items():
                if hasattr(config, name):  # a number, None without experts, or a number for each kind of them
                    kinds = getattr(config, name)
                    setattr(config, name, [size] * len(kinds) if isinstance(kinds, list) else size)
            config._experts_implementation = "eager"
            yield config


def build(experts: Experts) -> nn.Module:
    """Small ones in evaluation mode and float64; raises what the first of the configs does."""
    error: Exception | None = None
    names = inspect.signature(inspect.unwrap(experts.kind.__init__)).parameters
    sizes = {name: size for name, size in SMALL.items() if name in names}
    for config in small_configs(experts.kind):
        try:
            module = experts.kind(config, **sizes).double().eval()
        except Exception as caught:
            error = error or caught
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter) / 3)
        return module
    raise error or ValueError("no config of theirs is found")


def inputs_of(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights."""
    torch.manual_seed(1)
    number = next(p.shape[0] for p in module.parameters())
    width = getattr(module, "hidden_dim", module.config.hidden_size)
    index = torch.rand(TOKENS, number).topk(CHOSEN, 1).indices
    return torch.randn(TOKENS, width).double(), index, torch.rand(TOKENS, CHOSEN).double()


def examine(experts: Experts) -> Finding:
    """Build experts, and compare them patched and not."""
    try:
        module = build(experts)
        inputs = inputs_of(module)
        module(*inputs)
    except Exception as error:
        return Finding("not built", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}")
    return compare(module, *inputs)


def compare(module: nn.Module, *inputs: Tensor) -> Finding:
    """The same numbers with and without the patch, and really by our op, once."""
    expected, gradients = run(module, *inputs)
    try:
        with counted() as calls, vot_kernels.patched(module):
            found, found_gradients = run(module, *inputs)
    except ValueError as error:
        return Finding("refused", str(error).rpartition(" and found ")[2].partition(": ")[2] or str(error))
    if len(calls) != 1:
        return Finding("wrong", f"{len(calls)} calls")
    error = listing.relative(found, expected)
    slopes = [listing.relative(found_gradients[name], gradient) for name, gradient in gradients.items()]
    if error > OUTPUT or max(slopes) > GRADIENT:
        return Finding("wrong", f"outputs differ by {error:.0e}, gradients by {max(slopes):.0e}")
    if not torch.equal(run(module, *inputs)[0], expected):
        return Finding("wrong", "they are other experts after unpatch")
    return Finding("exact")


@contextmanager
def counted() -> Iterator[list[int]]:
    """The tokens of every call of our op."""
    calls: list[int] = []
    op: Callable[..., Tensor] = integration.moe

    def recorded(x: Tensor, *arguments: Any) -> Tensor:
        calls.append(x.shape[0])
        return op(x, *arguments)

    integration.moe = recorded
    try:
        yield calls
    finally:
        integration.moe = op


def run(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of a sum of it by every parameter, the hidden states and the weights."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad()
    out = module(x, index, weights)
    torch.manual_seed(2)
    (out * torch.randn(out.shape)).sum().backward()
    leaves = {**dict(module.named_parameters()), "hidden states": x, "weights": weights}
    missing = {name: torch.zeros_like(leaf) for name, leaf in leaves.items() if leaf.grad is None}
    found = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    return out.detach(), found | missing


def table(findings: dict[Experts, Finding]) -> list[str]:
    """The rows of the table, one per class of experts."""
    return [
        f"| {e.family} | `{e.name}` | {found.status} | {found.reason.replace('|', '/')} |"
        for e, found in findings.items()
    ]


def lines(rows: list[str]) -> list[str]:
    """The rows as a table, below the version of transformers that it is about."""
    version = f"transformers {transformers.__version__}: {listing.statuses(rows, 2)}."
    return [version, "", *listing.table(["family", "experts", "status", "reason"], rows)]


if __name__ == "__main__":
    findings = {experts: examine(experts) for experts in all_experts()}
    listing.write(PAGE, MARK, lines(table(findings)))
