"""Calling a custom op as the plain function that it is made of."""

import torch
from torch import Tensor
from torch.nn import Parameter


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Say whether a call with these tensors must go through PyTorch's dispatcher: something records or intercepts it.

    That is the case while compiling, tracing, profiling or differentiating, in modes and under transforms, and for
    subclasses of Tensor. Otherwise the dispatcher only costs time, some 30 us of Python for a custom op, as much as
    all of the launches.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd._profiler_enabled():
        return True
    records = torch.is_grad_enabled()
    given = [x for x in tensors if x is not None]
    return any(type(x) not in (Tensor, Parameter) or (records and x.requires_grad) for x in given)
