"""Custom ops that are called without PyTorch's dispatcher where nothing needs it."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from vot_kernels.ops.replay import Replayed

_PLAIN = frozenset({Tensor, Parameter})
_SEQUENCES = frozenset({list, tuple})
# Arguments that are no tensors. What is of another type, as a symbolic integer is, goes through the dispatcher.
_OTHERS = _SEQUENCES | {bool, int, float, str, torch.dtype, type(None)}
_Lengths = Sequence[int | None] | None


class Op:
    """A custom op of `torch.library`, and the plain function that it is made of.

    Through the dispatcher a call costs some 30 us of Python, and a forward and backward with twenty arguments 300 us,
    more than all checks and launches. So the function is called itself, and where gradients are asked for, a node of
    autograd that calls it, unless something records or intercepts the call.

    Attributes:
        op: the custom op, as `torch.library.custom_op` returns it.
    """

    def __init__(self, name: str, function: Callable[..., Any], layout: Sequence[str]) -> None:
        replayed = Replayed(function, layout)

        @wraps(function)  # torch.library wants a function
        def called(*arguments: Any) -> Any:
            return replayed(*arguments)

        self.op = torch.library.custom_op(name, called, mutates_args=())
        self._name, self._function = function.__name__, replayed
        self._node: type[Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # first, so that no compiler has to trace what follows
            return self.op(*arguments)
        tensors = [x for x in arguments if type(x) not in _OTHERS]
        nested = not _SEQUENCES.isdisjoint(map(type, arguments))
        if nested:
            tensors += [y for x in arguments if type(x) in _SEQUENCES for y in x if type(y) not in _OTHERS]
        if needs_dispatcher(tensors):
            return self.op(*arguments)
        if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):
            return self._function(*arguments)
        if self._node is None:  # no derivative: PyTorch says so if one is asked for
            return self.op(*arguments)
        lengths = [len(x) if type(x) in _SEQUENCES else None for x in arguments] if nested else None
        return self._node.apply(*_flat(arguments, lengths), lengths)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As the method of the custom op."""
        return self.op.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As the method of the custom op."""
        self.op.register_autograd(backward, setup_context=setup_context)
        self._node = _node(self._name, self._function, backward, setup_context)


def custom_op(name: str, layout: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Make an `Op` of a function, whose annotations are the schema; it changes none of its arguments.

    layout: the arguments that are tensors of a layout, see `Replayed`.
    """
    return lambda function: Op(name, function, layout)


def needs_dispatcher(tensors: list[Tensor]) -> bool:
    """Say whether something records or intercepts a call with these tensors, other than autograd.

    That is the case while tracing and profiling, in modes and under transforms, and for subclasses of Tensor and for
    tensors without numbers, on the device "meta".
    """
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd._profiler_enabled():
        return True
    return not _PLAIN.issuperset(map(type, tensors)) or bool(tensors) and tensors[0].is_meta


def _flat(values: Sequence[Any], lengths: _Lengths) -> Sequence[Any]:
    """Return the values with those of sequences one by one: autograd finds no tensors in sequences.

    Args:
        values: arguments, or their gradients, in which None is the gradient of a whole sequence.
        lengths: of each sequence, and None for other values; None if there are no sequences.
    """
    if lengths is None:
        return values
    flat: list[Any] = []
    for x, length in zip(values, lengths, strict=True):
        flat += [x] if length is None else x or [None] * length
    return flat


def _nested(flat: Sequence[Any], lengths: _Lengths) -> Sequence[Any]:
    """Return the values that `_flat` was called with, tuples as lists."""
    if lengths is None:
        return flat
    values = iter(flat)
    return [next(values) if length is None else [*islice(values, length)] for length in lengths]


def _node(
    name: str, function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> type[Function]:
    """Return the node of autograd that does what the custom op does with the same functions."""

    def forward(ctx: Any, *flat_and_lengths: Any) -> Any:
        *flat, ctx.lengths = flat_and_lengths
        arguments = _nested(flat, ctx.lengths)
        output = function(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        return (*_flat(backward(ctx, *gradients), ctx.lengths), None)

    # Of its name autograd makes that of the output's `grad_fn`.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(name.strip("_"), (Function,), methods)
