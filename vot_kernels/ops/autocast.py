"""The behaviour of the public ops under `torch.autocast`.

Inputs of matrix products are cast to the autocast dtype first, so that their gradients come back in their own dtype;
float64 inputs stay, as in torch. All that follows, in a reference too, computes as it does without autocast.
"""

import inspect
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

# Asked once: the compiler of torch 2.11 cannot trace the question.
_DEVICE_TYPES = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "hpu", "mps", "xla", "mtia", "maia", "privateuseone")
    if torch.amp.is_autocast_available(kind)
)


def autocasts(*names: str, widest: tuple[str, ...] = ()) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a public function follow autocast on the device of its first argument.

    Args:
        names: arguments that are cast to the autocast dtype.
        widest: arguments, tensors or sequences of them, that are combined outside of matrix products; they are
            cast to the widest dtype among them, as torch.cat does.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = list(inspect.signature(function).parameters)

        @wraps(function)
        def cast_first(*args: P.args, **kwargs: P.kwargs) -> T:
            device_type = _autocasting(args[0] if args else kwargs.get(parameters[0]))
            if device_type is None:
                return function(*args, **kwargs)
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            dtypes = {
                **dict.fromkeys(names, torch.get_autocast_dtype(device_type)),
                **dict.fromkeys(widest, _widest([given.get(name) for name in widest])),
            }
            cast = {name: _cast(given[name], dtype) for name, dtype in dtypes.items() if name in given}
            positional = [cast.get(name, x) for name, x in zip(parameters, args, strict=False)]
            named = {name: cast.get(name, x) for name, x in kwargs.items()}
            with torch.autocast(device_type, enabled=False):
                return function(*positional, *args[len(parameters) :], **named)  # type: ignore[arg-type]

        return cast_first

    return decorate


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Turn autocast off inside a custom op, because a backward runs under the autocast state of its caller."""

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        device_type = _autocasting(args[0])
        if device_type is None:
            return function(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return computed


def _autocasting(value: Any) -> str | None:
    """Return the device type of a tensor, or of the first of several, if autocast is on there."""
    first = value if isinstance(value, Tensor) else next(iter(_tensors(value)), None)
    if first is None:
        return None
    device_type = first.device.type
    if device_type not in _DEVICE_TYPES or not torch.is_autocast_enabled(device_type):
        return None
    return device_type


def _tensors(value: Any) -> list[Tensor]:
    """List a tensor or those of a sequence; any other value gives an empty list, and the function itself refuses it."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def _widest(values: list[Any]) -> torch.dtype | None:
    dtypes = [x.dtype for value in values for x in _tensors(value)]
    return reduce(torch.promote_types, dtypes) if dtypes else None


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(x, dtype) for x in value]
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value
