"""Custom ops that are called without PyTorch's dispatcher where nothing needs it."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})
_SEQUENCES = frozenset({list, tuple})


class Op:
    """A custom op of `torch.library`, and the plain function that it is made of.

    Through the dispatcher a call costs some 30 us of Python, and a forward and backward with twenty arguments 300 us,
    more than all checks and launches. So the function is called itself, and where gradients are asked for, a node of
    autograd that calls it, unless something records or intercepts the call.

    Attributes:
        op: the custom op, as `torch.library.custom_op` returns it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self._function = function
        self._node: type[Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        flat, lengths = _flat(arguments)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if needs_dispatcher(tensors):
            return self.op(*arguments)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return self._function(*arguments)
        if self._node is None:  # no derivative: PyTorch says so if one is asked for
            return self.op(*arguments)
        return self._node.apply(*flat, lengths)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As the method of the custom op."""
        return self.op.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As the method of the custom op."""
        self.op.register_autograd(backward, setup_context=setup_context)
        self._node = _node(self._function, backward, setup_context)


def custom_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make an `Op` of a function, whose annotations are the schema; it changes none of its arguments."""
    return lambda function: Op(name, function)


def needs_dispatcher(tensors: list[Tensor]) -> bool:
    """Say whether something records or intercepts a call with these tensors, other than autograd.

    That is the case while compiling, tracing and profiling, in modes and under transforms, and for subclasses of
    Tensor.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd._profiler_enabled():
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def _flat(arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[int | None] | None]:
    """Return the arguments with those of sequences one by one, and the length of each sequence, None for others.

    Without sequences, the second value is None. Autograd finds no tensors in sequences.
    """
    if _SEQUENCES.isdisjoint(map(type, arguments)):
        return arguments, None
    flat: list[Any] = []
    lengths = [len(x) if isinstance(x, (list, tuple)) else None for x in arguments]
    for x, length in zip(arguments, lengths, strict=True):
        flat += [x] if length is None else x
    return flat, lengths


def _nested(flat: Sequence[Any], lengths: Sequence[int | None] | None) -> Sequence[Any]:
    """Return the arguments that `_flat` was called with, tuples as lists."""
    if lengths is None:
        return flat
    values = iter(flat)
    return [next(values) if length is None else [*islice(values, length)] for length in lengths]


def _flat_gradients(gradients: Sequence[Any], lengths: Sequence[int | None] | None) -> Sequence[Any]:
    if lengths is None:
        return gradients
    flat: list[Any] = []
    for gradient, length in zip(gradients, lengths, strict=True):
        flat += [gradient] if length is None else gradient or [None] * length
    return flat


def _node(
    function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> type[Function]:
    """Return the node of autograd that does what the custom op does with the same functions."""

    def forward(ctx: Any, *flat_and_lengths: Any) -> Any:
        *flat, ctx.lengths = flat_and_lengths
        arguments = _nested(flat, ctx.lengths)
        output = function(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        return (*_flat_gradients(backward(ctx, *gradients), ctx.lengths), None)

    # Of its name autograd makes that of the output's `grad_fn`.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(function.__name__.strip("_"), (Function,), methods)
